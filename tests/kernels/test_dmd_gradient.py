"""``dmd_gradient`` against its formula, its derivative, and the samples that have no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from samples import DEVICE, TIMES, Sample, check_against_oracle, outputs_and_gradients, sample_inputs
from torch import Tensor

from anyflow_kernels import dmd_gradient

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = {  # of the sample and of the scores
    "fp32": (F32, F32),
    "fp32-bf16": (F32, BF16),
    "bf16-fp32": (BF16, F32),
    "bf16": (BF16, BF16),
    "fp16": (F16, F16),
    "fp64": (F64, F64),
    "fp32-fp64": (F32, F64),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "guided": {},
    "g = 1": {"guidance": 1.0, "sign": 1},
    "unguided": {"guidance": None},
    "dataward, a sigma for each frame": {"times": (3, 1, 4, 1), "guidance": None},
}


@pytest.mark.parametrize("shapes", [t for t in TIMES.values() if t[0]], ids=[n for n, t in TIMES.items() if t[0]])
def test_sigmas_of_every_shape(backend: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    sample = sample_inputs("dmd_gradient", DEVICE, F32, True, size=shapes[0], times=shapes[1])
    if 0 in shapes[0][1:]:
        (loss, gradient), _ = outputs_and_gradients(sample, sample.run)
        assert loss.tolist() == [0.0] * shapes[0][0] and gradient.shape == shapes[0]
    else:
        check_against_oracle(sample)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_result_and_derivative(backend: str, dtypes: tuple[torch.dtype, torch.dtype], variant: dict[str, Any]) -> None:
    check_against_oracle(sample_inputs("dmd_gradient", DEVICE, dtypes[0], True, second_dtype=dtypes[1], **variant))


def test_float64_is_float64(backend: str) -> None:
    sample = sample_inputs("dmd_gradient", DEVICE, F64, True)
    found, gradients = outputs_and_gradients(sample, sample.run)
    expected, exact = outputs_and_gradients(sample, sample.formula)
    for f, e in zip((*found, *gradients.values()), (*expected, *exact.values()), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-14)


def test_known_numbers(backend: str) -> None:
    """From x_sigma = 0 at 0.5, scores of 2 and 4 estimate -1 and -2: the difference -1 over the distance of 0 to -1."""
    x, two = torch.zeros(1, 4, requires_grad=True), torch.full((1, 4), 2.0)
    loss, gradient = dmd_gradient(x, torch.tensor([0.5]), torch.zeros(1, 4), two, 2 * two)
    assert gradient.tolist() == [[-1.0] * 4] and loss.tolist() == [0.5]
    assert torch.autograd.grad(loss.sum(), x)[0].tolist() == [[-0.25] * 4]
    mirrored = dmd_gradient(x.detach(), torch.tensor([0.5]), torch.zeros(1, 4), -two, -2 * two, sign=-1)
    assert torch.equal(mirrored[1], gradient)
    guided = dmd_gradient(
        x.detach(), torch.tensor([0.5]), torch.zeros(1, 4), 1.5 * two, 2 * two, uncond_real_velocity=2 * two,
        guidance_scale=2.0,
    )  # fmt: skip
    assert torch.equal(guided[1], gradient)


def test_the_derivative_is_the_gradient_over_the_elements(backend: str) -> None:
    sample = sample_inputs("dmd_gradient", DEVICE, F64, True)
    loss, gradient = sample.run(**sample.tensors)
    assert loss.requires_grad and not gradient.requires_grad
    upstream = torch.tensor([0.5, -2.0, 0.0], dtype=F64)
    (found,) = torch.autograd.grad((upstream * loss).sum(), sample.tensors["x"])
    torch.testing.assert_close(found, upstream.view(3, 1, 1, 1) * gradient / 72, rtol=1e-15, atol=0)
    torch.testing.assert_close(loss, gradient.square().mean((1, 2, 3)) / 2, rtol=1e-14, atol=0)


def _results(sample: Sample, **changed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient, derivative)"""
    sample = sample.replaced(**changed)
    outputs, gradients = outputs_and_gradients(sample, sample.run)
    return *outputs, gradients["x"]


def _assert_only_the_middle_is_zero(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f[1], torch.zeros_like(f[1]))
        assert torch.equal(f[::2], e[::2])
        assert e[1].abs().max() > 0


@pytest.mark.parametrize("name", ["x", "x_sigma", "real_velocity", "fake_velocity", "uncond_real_velocity", "sigma"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_sample_that_is_not_finite_has_no_gradient(backend: str, dtype: torch.dtype, name: str, value: float) -> None:
    sample = sample_inputs("dmd_gradient", DEVICE, dtype, True)
    expected = _results(sample)
    changed = sample.tensors[name].detach().clone()
    changed.view(3, -1)[1, -1] = value
    _assert_only_the_middle_is_zero(_results(sample, **{name: changed}), expected)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_real_score_that_agrees_has_no_gradient(backend: str, sign: int) -> None:
    """The exact velocity leads from x_sigma back to x: in numbers that binary holds, the normaliser is zero."""
    sample = sample_inputs("dmd_gradient", DEVICE, F32, True, guidance=None, sign=sign)
    expected = _results(sample)
    tensors = {n: t.detach().clone() for n, t in sample.tensors.items()}
    x0, noise = torch.full((2, 4, 9), 0.5), torch.full((2, 4, 9), -1.0)
    tensors["sigma"][1] = 0.25
    tensors["x"][1], tensors["x_sigma"][1] = x0, 0.75 * x0 + 0.25 * noise
    tensors["real_velocity"][1] = sign * (noise - x0)
    _assert_only_the_middle_is_zero(_results(sample, **tensors), expected)


def test_a_small_normaliser_is_not_zero(backend: str) -> None:
    """The gradient does not depend on the unit of length."""
    sample = sample_inputs("dmd_gradient", DEVICE, F32, True)
    small = {n: t.detach() * (1.0 if n == "sigma" else 2.0**-40) for n, t in sample.tensors.items()}
    for found, expected in zip(_results(sample, **small), _results(sample), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_sigma": torch.zeros(3, 2)}, r"x_sigma has shape \(3, 2\), x has \(3, 2, 4, 9\)"),
        ({"uncond_real_velocity": None}, "guidance_scale 3.5 needs uncond_real_velocity"),
        ({"sign": 2}, "sign must be 1 or -1, got 2"),
        ({"sigma": torch.zeros(2)}, r"sigma of shape \(2,\) does not broadcast"),
        ({"fake_velocity": torch.zeros(3, 2, 4, 9, requires_grad=True)}, "not differentiable in fake_velocity"),
        ({"sigma": torch.zeros(3, requires_grad=True)}, "not differentiable in sigma"),
        ({"x": torch.zeros(3, 2, 4, 9, dtype=torch.int64)}, "x must be floating point, got torch.int64"),
    ],
    ids=["shape", "uncond", "sign", "length", "gradient", "sigma", "dtype"],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    sample = sample_inputs("dmd_gradient", "cpu")
    with pytest.raises(ValueError, match=message):
        sample.run(**{**sample.tensors, **change})


def test_a_batch_is_needed() -> None:
    with pytest.raises(ValueError, match="x has no batch dimension"):
        dmd_gradient(*[torch.zeros(())] * 5)
