"""The operator namespace, and the choice of a backend for each operator and device.

The PyTorch dispatcher is the dispatch mechanism. Every operator has one schema, defined next to its public function,
and one kernel per dispatch key. Where the compiled extension is loaded, its kernels are under their keys before the
schema is defined; where they are not what runs by default, ``define`` lays a Python kernel over them, or under the key
that is left, which runs the preferred backend of that device. ``use_backend`` lays another kernel over that for the
length of a ``with`` block.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _native
from ._native import ENVIRONMENT_VARIABLE

NAMESPACE = "anyflow_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

BACKENDS = ("reference", "triton", "native")
DEVICES = {"cpu": "CPU", "cuda": "CUDA"}  # device type -> dispatch key
PREFERRED = {  # the first that can runs by default
    "cpu": ("native", "reference"),
    "cuda": ("triton", "native", "reference"),
}

_MINIMUM_TRITON = (3, 5)
_MINIMUM_CAPABILITY = (8, 0)


class WrongTable(ValueError):
    """A table of launch configurations that cannot be meant: to go on without it would hide the mistake."""


@dataclass(frozen=True)
class Operator:
    """One operator: its name and, per backend, the function (or ``module:function``, imported at first use); per device
    type, the compiled kernel."""

    name: str
    implementations: dict[str, Callable[..., Any] | str]
    compiled: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def implementation(self, backend: str, device_type: str = "") -> Callable[..., Any]:
        if backend == "native":
            return self.compiled[device_type]
        found = self.implementations[backend]
        if isinstance(found, str):
            module, _, function = found.partition(":")
            found = getattr(importlib.import_module(module), function)
            self.implementations[backend] = found
        return found


_operators: dict[str, Operator] = {}
_failures: dict[tuple[str, str], str] = {}  # (backend, device type) -> why it was given up in this process
_lock = threading.RLock()


def define(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    implementations: dict[str, Callable[..., Any] | str],
    autograd: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
) -> None:
    """Define ``anyflow_kernels::name``, its fake kernel, and a Python kernel for the devices where no compiled one is
    the default.

    ``autograd``: setup_context and backward, as ``torch.library.register_autograd`` takes them; for the builds without
    the compiled one, which costs a call less.
    """
    operator = Operator(name, implementations)
    _operators[name] = operator
    qualified = f"{NAMESPACE}::{name}"
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    for device_type, key in DEVICES.items():
        if _native.extension is not None and torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key):
            kernel = torch.library.get_kernel(qualified, key)  # kept under what is laid over it
            keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
            operator.compiled[device_type] = functools.partial(kernel.call_boxed, keys)
        if PREFERRED[device_type][0] != "native" or device_type not in operator.compiled:
            _lay(LIBRARY, name, _default_kernel(operator, device_type), key)
    if autograd is not None and not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "Autograd"):
        setup_context, backward = autograd
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)


def _lay(library: torch.library.Library, name: str, kernel: Callable[..., Any], key: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")  # over another one on purpose
        library.impl(name, kernel, key, allow_override=True)


def _default_kernel(operator: Operator, device_type: str) -> Callable[..., Any]:
    reference = operator.implementation("reference")
    if device_type == "cpu":
        return reference

    runs: str | None = None  # asked at the first call: the answer costs more than a launch

    def kernel(*arguments: Any) -> Any:
        nonlocal runs
        if runs is None or (runs, device_type) in _failures:
            runs = _runs_by_default(operator, device_type)
        if runs == "triton":
            try:
                with torch.cuda.device(_device_of(arguments)):
                    return operator.implementation("triton")(*arguments)
            except (torch.OutOfMemoryError, WrongTable):
                raise
            except Exception as error:  # a Triton without a working compiler or driver shows only at the first launch
                _failures["triton", device_type] = f"gave up after {type(error).__name__}: {error}"
                runs = _runs_by_default(operator, device_type)
                warnings.warn(
                    f"anyflow_kernels: the Triton kernel of {operator.name} failed, the {runs} takes over: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return operator.implementation(runs, device_type)(*arguments)

    return kernel


def _device_of(arguments: tuple[Any, ...]) -> torch.device:
    return next(a.device for a in arguments if isinstance(a, Tensor))


def why_not(backend: str, device_type: str, operator: Operator) -> str | None:
    """Why ``backend`` cannot run ``operator`` on ``device_type``; None when it can."""
    if backend == "native":
        if _native.extension is None:
            return _native.about
        if device_type == "cuda" and not _native.extension.cuda_architectures:
            return "no CUDA kernels were compiled"
        if device_type not in operator.compiled:
            return "not in this build"
        return None if device_type == "cpu" else _native.why_not_on_this_gpu()
    if backend not in operator.implementations:
        return "not implemented"
    if backend == "reference":
        return None
    if ("triton", device_type) in _failures:
        return _failures["triton", device_type]
    if os.environ.get(ENVIRONMENT_VARIABLE) == "reference":
        return f"{ENVIRONMENT_VARIABLE}=reference"
    try:
        import triton
    except Exception as error:  # absent, or present and broken: both leave the reference
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    numbers = re.match(r"(\d+)\.(\d+)", getattr(triton, "__version__", ""))
    if numbers is None or tuple(map(int, numbers.groups())) < _MINIMUM_TRITON:
        return f"triton {getattr(triton, '__version__', '(no version)')} is older than 3.5"
    if device_type == "cpu":
        return None if triton.knobs.runtime.interpret else "triton has no CPU backend (only TRITON_INTERPRET=1)"
    if not torch.cuda.is_available():
        return "no GPU"
    if torch.version.hip is not None:
        return "not verified on ROCm"
    capability = min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    if capability < _MINIMUM_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator on one backend inside the ``with`` block: "reference", "triton" or "native".

    The choice holds for the whole process, backward passes on autograd's own threads included; a call that another
    thread makes at the moment of entering or leaving may run the default. Blocks nest; the inner one wins. On a device
    where the backend cannot run, an operator raises instead of falling back.

    Raises ValueError for an unknown name, RuntimeError when the backend runs on no device of this machine.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; allowed are {', '.join(map(repr, BACKENDS))}")
    reasons = {
        (operator.name, device_type): why_not(name, device_type, operator)
        for operator in _operators.values()
        for device_type in DEVICES
    }
    if all(reason is not None for reason in reasons.values()):
        listed = "; ".join(sorted({f"{device_type}: {reason}" for (_, device_type), reason in reasons.items()}))
        raise RuntimeError(f"backend {name!r} cannot run here ({listed})")
    choice = [name]  # its own object: blocks of several threads end in any order
    try:
        with _lock:
            _forced.append(choice)
            _lay_over()
        yield
    finally:
        with _lock:
            _forced[:] = [other for other in _forced if other is not choice]
            _lay_over()


_forced: list[list[str]] = []  # the blocks that are entered, the innermost last
_overlay: list[torch.library.Library] = []  # the one of the innermost, where it is needed


def _lay_over() -> None:
    """Put the kernels of the innermost block over the default ones, and nothing over those that run anyway."""
    while _overlay:
        _overlay.pop()._destroy()
    if not _forced:
        return
    (name,) = _forced[-1]
    overlay = torch.library.Library(NAMESPACE, "IMPL")
    _overlay.append(overlay)
    for operator in _operators.values():
        for device_type, key in DEVICES.items():
            if device_type != "cpu" or name != _runs_by_default(operator, device_type):
                _lay(overlay, operator.name, _forced_kernel(operator, name, device_type), key)


def _runs_by_default(operator: Operator, device_type: str) -> str:
    runs = (backend for backend in PREFERRED[device_type] if why_not(backend, device_type, operator) is None)
    return next(runs, "reference")


def _forced_kernel(operator: Operator, backend: str, device_type: str) -> Callable[..., Any]:
    reason = why_not(backend, device_type, operator)
    if reason is not None:

        def refuse(*arguments: Any) -> Any:
            raise RuntimeError(
                f"{operator.name}: backend {backend!r} is forced but cannot run on {device_type}: {reason}"
            )

        return refuse
    implementation = operator.implementation(backend, device_type)
    if device_type == "cpu" or backend == "native":  # which sees to the device itself
        return implementation

    def kernel(*arguments: Any) -> Any:
        with torch.cuda.device(_device_of(arguments)):
            return implementation(*arguments)

    return kernel


def describe() -> str:
    """A table of what runs by default for each operator and device, and why the other backends do not. The last line is
    about the compiled extension."""
    lines = [f"{'operator':<28}{'device':<8}{'runs':<12}others"]
    for operator in _operators.values():
        for device_type in DEVICES:
            reasons = {backend: why_not(backend, device_type, operator) for backend in BACKENDS}
            if _native.extension is None:
                reasons["native"] = "not loaded"
            runs = _runs_by_default(operator, device_type)
            others = "; ".join(
                f"{backend}: {reason or ('available' if backend != runs else '')}"
                for backend, reason in reasons.items()
                if backend != runs
            )
            lines.append(f"{operator.name:<28}{device_type:<8}{runs:<12}{others}")
    lines.append(f"native extension: {_native.about}")
    return "\n".join(lines)


def refuse_forward_ad(name: str, *tensors: Tensor | None) -> None:
    """Raise when an input carries a forward-mode tangent: the dispatcher would return a zero tangent without a word."""
    if torch.compiler.is_compiling():
        return
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{name} has no forward-mode derivative. Take a central difference in sigma instead, or call "
                f"the plain PyTorch function of the module anyflow_kernels.{name}.reference under torch.func.jvp."
            )


def same_device(name: str, **tensors: Tensor | None) -> torch.device:
    """The one device of all given tensors; ValueError that names both when they differ."""
    devices = {n: t.device for n, t in tensors.items() if t is not None}
    (first_name, first), *others = devices.items()
    for other_name, other in others:
        if other != first:
            raise ValueError(
                f"{name}: all tensors must be on one device, but {first_name} is on {first} and {other_name} on {other}"
            )
    return first


def floating_on_one_device(name: str, **tensors: Tensor | None) -> None:
    """``floating`` and ``same_device`` in one pass: what every call of a small operator pays."""
    device = None
    for tensor in tensors.values():
        if tensor is None:
            continue
        device = device or tensor.device
        if tensor.device != device or not tensor.is_floating_point():
            floating(name, **tensors)
            same_device(name, **tensors)


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 when any of the tensors is float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def floating(name: str, **tensors: Tensor | None) -> None:
    """ValueError that names the tensor and its dtype when one is not real floating point."""
    for tensor_name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name}: {tensor_name} must be floating point, got {tensor.dtype}")


def constant(name: str, **tensors: Tensor | None) -> None:
    """ValueError that names the tensor when a gradient is asked of one that gets none."""
    if not torch.is_grad_enabled():
        return
    for tensor_name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name}: not differentiable in {tensor_name}, which requires a gradient; detach it")


def floating_dtype(name: str, **dtypes: torch.dtype | None) -> None:
    """ValueError that names the argument when a dtype is given that is not floating point."""
    for dtype_name, dtype in dtypes.items():
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"{name}: {dtype_name} must be floating point, got {dtype}")


def same_shape(name: str, **tensors: Tensor | None) -> None:
    """ValueError that names both when a tensor has another shape than the first."""
    first_name, first = next(iter(tensors.items()))
    for other_name, other in tensors.items():
        if first is not None and other is not None and other.shape != first.shape:
            raise ValueError(
                f"{name}: {other_name} has shape {tuple(other.shape)}, {first_name} has {tuple(first.shape)}"
            )


def guidance(name: str, scale: float, uncond_name: str, uncond: Tensor | None) -> None:
    """ValueError for a scale whose unconditional prediction is missing."""
    if uncond is None and scale != 1.0:
        raise ValueError(f"{name}: guidance_scale {scale} needs {uncond_name}")


def broadcasts(name: str, like: Tensor, **times: Tensor | None) -> None:
    """ValueError that names the tensor when one cannot be laid over ``like``."""
    for time_name, time in times.items():
        if time is None or time.numel() == 1 or (time.ndim == 1 and like.ndim > 0 and time.shape[0] == like.shape[0]):
            continue
        if time.ndim != like.ndim or not all(s in (1, n) for s, n in zip(time.shape, like.shape, strict=True)):
            raise ValueError(
                f"{name}: {time_name} of shape {tuple(time.shape)} does not broadcast to {tuple(like.shape)}; "
                f"pass one element, [{like.shape[0] if like.ndim else 1}], or {like.ndim} dimensions"
            )


def over(shape: torch.Size, *times: Tensor) -> tuple[Tensor, ...]:
    """The times with as many dimensions as ``shape``: one element, or [B] with ones behind."""
    ones = (1,) * len(shape)
    return tuple(
        time if time.ndim == len(shape) else time.reshape(ones if time.numel() == 1 else (time.shape[0], *ones[1:]))
        for time in times
    )


def per_sample(values: Tensor) -> Tensor:
    """[B, elements of a sample]"""
    return values.reshape(values.shape[0], math.prod(values.shape[1:]))
