"""Runs Triton kernels on machines without a GPU: in Triton's interpreter, with its bfloat16 repaired."""

import contextlib
import os
import warnings
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so it has to come before every import


def _repair_interpreter_bfloat16() -> None:
    """bfloat16 values are uint16 arrays in the interpreter. It truncates float32 on the way there, converts to and from
    every other type than float32 by the integer's value, and multiplies the bit patterns in ``tl.dot`` (triton 3.9)."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def decode(bits):
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def encode(values):
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)

    def repaired(convert):
        def cast(self, src, dst_type, *arguments):
            source, target = src.dtype.scalar, dst_type.scalar
            if tl.bfloat16 not in (source, target) or source == target:
                return convert(self, src, dst_type, *arguments)
            data = decode(src.data) if source == tl.bfloat16 else src.data
            if target == tl.bfloat16:
                return TensorHandle(encode(data), target)
            return TensorHandle(data.astype(interpreter._get_np_dtype(target)), target)

        return cast

    dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *arguments):
        a, b = (TensorHandle(decode(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *arguments)

    InterpreterBuilder.cast_impl = repaired(InterpreterBuilder.cast_impl)
    InterpreterBuilder.create_fp_to_fp = repaired(InterpreterBuilder.create_fp_to_fp)
    InterpreterBuilder.create_dot = create_dot


if os.environ.get("TRITON_INTERPRET") == "1":
    with contextlib.suppress(ImportError):  # no triton: the reference alone is tested
        _repair_interpreter_bfloat16()


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Families that a test registers are forgotten after it."""
    from anyflow.families import registry

    monkeypatch.setattr(registry, "_specs", dict(registry._specs))


@pytest.fixture
def quiet_dependencies() -> Iterator[None]:
    """Warnings of diffusers, transformers and torch are theirs; ours stay errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", module="anyflow")
        yield


@pytest.fixture(autouse=True)
def reference_arithmetic() -> Iterator[None]:
    """The tests of models compare bits with stock modules, as only the reference promises them. The operators have
    tests of their own on every backend."""
    import anyflow_kernels

    with anyflow_kernels.use_backend("reference"):
        yield
