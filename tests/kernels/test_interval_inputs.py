"""``interval_inputs`` against its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from samples import DEVICE, TIMES, check_against_oracle, sample_inputs

from anyflow_kernels import interval_inputs

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = {
    "fp32": (F32, F32),
    "bf16": (BF16, BF16),
    "fp16": (F16, F16),
    "fp64": (F64, F64),
    "bf16-fp32": (BF16, F32),
    "fp32-fp64": (F32, F64),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "three": {},
    "one": {"difference": False},
    "bf16 model": {"model_dtype": BF16},
    "fp32 model": {"model_dtype": F32},
}


@pytest.mark.parametrize("shapes", TIMES.values(), ids=TIMES)
def test_sigmas_of_every_shape(backend: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    check_against_oracle(sample_inputs("interval_inputs", DEVICE, F32, True, size=shapes[0], times=shapes[1]))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_result_and_gradients(backend: str, dtypes: tuple[torch.dtype, torch.dtype], variant: dict[str, Any]) -> None:
    check_against_oracle(sample_inputs("interval_inputs", DEVICE, dtypes[0], True, second_dtype=dtypes[1], **variant))


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_the_ends_are_exact(backend: str, dtype: torch.dtype) -> None:
    tensors = sample_inputs("interval_inputs", DEVICE, dtype).tensors
    x0, noise = tensors["x0"], tensors["noise"]
    found = interval_inputs(x0, noise, torch.ones(()), torch.tensor([1.0, 0.0]), torch.zeros(1))
    assert torch.equal(found.x, noise)
    assert torch.equal(found.x_plus, torch.stack((noise[0], x0[1])))
    assert torch.equal(found.x_minus, x0)


def test_the_points_lie_on_the_straight_path(backend: str) -> None:
    """Beyond its ends too, where a central difference may reach."""
    tensors = sample_inputs("interval_inputs", DEVICE, F64).tensors
    sigma, eps = torch.tensor([0.0, 0.7], dtype=F64), 0.005
    found = interval_inputs(tensors["x0"], tensors["noise"], sigma, sigma + eps, sigma - eps)
    # Three roundings of numbers of size one, over the gap.
    tolerance = {"rtol": 0, "atol": 20 * torch.finfo(F64).eps}
    torch.testing.assert_close(found.x_plus, found.x + eps * found.velocity, **tolerance)
    torch.testing.assert_close(found.x_minus, found.x - eps * found.velocity, **tolerance)


@pytest.mark.parametrize("name", ["sigma_plus", "sigma_minus"])
def test_a_sigma_whose_input_has_no_gradient_is_not_looked_at(backend: str, name: str) -> None:
    sample = sample_inputs("interval_inputs", DEVICE, F32, True)
    latents = [sample.tensors["x0"], sample.tensors["noise"]]
    x, *_ = sample.run(**sample.tensors)
    expected = torch.autograd.grad(x.sum(), latents)
    x, *_ = sample.run(**sample.replaced(**{name: torch.full((2,), torch.nan)}).tensors)
    for found, right in zip(torch.autograd.grad(x.sum(), latents), expected, strict=True):
        assert torch.equal(found, right)


def test_without_a_difference_nothing_is_allocated_for_it(backend: str) -> None:
    x0, noise = torch.zeros(2, 3), torch.ones(2, 3)
    found = interval_inputs(x0, noise, torch.tensor([0.25, 0.5]))
    assert found.x_plus is None and found.x_minus is None
    assert found.x.tolist() == [[0.25] * 3, [0.5] * 3]
    raw = torch.ops.anyflow_kernels.interval_inputs.default(x0, noise, torch.ones(2, 1), None, None, F32)
    assert [t.numel() for t in raw] == [6, 0, 0, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": torch.zeros(2, 3)}, r"noise has shape \(2, 3\), x0 has \(2, 3, 4, 9\)"),
        ({"sigma_plus": None}, "sigma_plus and sigma_minus go together"),
        ({"sigma": torch.zeros(3)}, r"sigma of shape \(3,\) does not broadcast to \(2, 3, 4, 9\)"),
        ({"sigma_minus": torch.zeros(2, requires_grad=True)}, "not differentiable in sigma_minus"),
        ({"noise": torch.zeros(2, 3, 4, 9, dtype=torch.int32)}, "noise must be floating point, got torch.int32"),
        ({"model_dtype": torch.int32}, "model_dtype must be floating point, got torch.int32"),
    ],
    ids=["noise", "one sigma", "length", "gradient", "dtype", "model_dtype"],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interval_inputs(**{**sample_inputs("interval_inputs", "cpu").tensors, **change})
