"""``gate_blend`` against its formula."""

from __future__ import annotations

import pytest
import torch
from samples import DEVICE, check_against_oracle, sample_inputs

from anyflow_kernels import gate_blend

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = {
    "fp32": (F32, F32),
    "bf16": (BF16, BF16),
    "fp16": (F16, F16),
    "fp64": (F64, F64),
    "fp32-bf16": (F32, BF16),
    "bf16-fp32": (BF16, F32),
    "fp64-bf16": (F64, BF16),
}


@pytest.mark.parametrize("size", [(3, 63), (100,), (2, 1100), (1,), (0, 5), ()], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_result_and_gradients(backend: str, dtypes: tuple[torch.dtype, torch.dtype], size: tuple[int, ...]) -> None:
    check_against_oracle(sample_inputs("gate_blend", DEVICE, dtypes[0], True, second_dtype=dtypes[1], size=size))


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_gate_zero_and_equal_embeddings_are_exact(backend: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    tensors = sample_inputs("gate_blend", DEVICE, dtypes[0], second_dtype=dtypes[1]).tensors
    base, delta = tensors["base"], tensors["delta"]
    assert torch.equal(gate_blend(base, delta, torch.zeros(())), base)
    assert torch.equal(gate_blend(base, base, torch.tensor(0.3)), base)


@pytest.mark.parametrize("gate_dtype", [BF16, F32, F64], ids=str)
def test_gate_of_any_dtype_and_shape(backend: str, gate_dtype: torch.dtype) -> None:
    sample = sample_inputs("gate_blend", requires_grad=True)
    for shape in ((), (1,), (1, 1, 1)):
        gate = torch.full(shape, 0.3, dtype=gate_dtype, requires_grad=True)
        y = gate_blend(sample.tensors["base"], sample.tensors["delta"], gate)
        (grad,) = torch.autograd.grad(y.sum(), gate)
        assert grad.shape == gate.shape
        assert grad.dtype == gate_dtype
        exact = (sample.tensors["delta"] - sample.tensors["base"]).double().sum()
        torch.testing.assert_close(grad.double().sum(), exact, rtol=torch.finfo(gate_dtype).eps, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": torch.zeros(3, 62)}, r"one shape, got \(3, 63\) and \(3, 62\)"),
        ({"gate": torch.zeros(2)}, r"one element, got shape \(2,\)"),
        ({"delta": torch.zeros(3, 63, dtype=torch.int32)}, "delta must be floating point, got torch.int32"),
    ],
    ids=["shape", "gate", "dtype"],
)
def test_wrong_arguments_are_named(change: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gate_blend(**{**sample_inputs("gate_blend", "cpu").tensors, **change})
