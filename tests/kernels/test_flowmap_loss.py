"""``flowmap_loss`` against its formula, and what one sample of a batch does to the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from samples import DEVICE, TIMES, Sample, check_against_oracle, outputs_and_gradients, sample_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anyflow_kernels import flowmap_loss

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = {  # of the target velocity and of the predictions
    "fp32": (F32, F32),
    "fp32-bf16": (F32, BF16),
    "fp32-fp16": (F32, F16),
    "bf16": (BF16, BF16),
    "bf16-fp32": (BF16, F32),
    "fp64": (F64, F64),
    "fp64-fp32": (F64, F32),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "g = 1": {"guidance": 1.0, "sign": 1},
    "unguided": {"guidance": None},
    "no difference": {"difference": False, "sign": 1},
    "regression": {"difference": False, "guidance": None},
    "frames, weights of samples": {"times": (3, 1, 4, 1), "weights": (3,)},
    "samples, weights of frames": {"weights": (1, 1, 4, 1)},
}


@pytest.mark.parametrize("shapes", [t for t in TIMES.values() if t[0]], ids=[n for n, t in TIMES.items() if t[0]])
def test_times_of_every_shape(backend: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    if 0 in shapes[0][1:]:
        found = sample_inputs("flowmap_loss", DEVICE, F32, True, size=shapes[0], times=shapes[1])
        outputs, _ = outputs_and_gradients(found, found.run)
        assert all(o.tolist() == [0.0] * shapes[0][0] for o in outputs)  # of nothing
    else:
        check_against_oracle(sample_inputs("flowmap_loss", DEVICE, F32, True, size=shapes[0], times=shapes[1]))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_result_and_gradients(backend: str, dtypes: tuple[torch.dtype, torch.dtype], variant: dict[str, Any]) -> None:
    check_against_oracle(sample_inputs("flowmap_loss", DEVICE, dtypes[0], True, second_dtype=dtypes[1], **variant))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("names", [("u_plus", "u_minus"), ("u_minus",), ("uncond_prediction",)], ids=str)
def test_differences_of_another_dtype(backend: str, dtype: torch.dtype, names: tuple[str, ...]) -> None:
    """Of forwards in float32, say, which lose nothing of the difference."""
    sample = sample_inputs("flowmap_loss", DEVICE, F32, True, second_dtype=dtype)
    check_against_oracle(sample.replaced(**{name: sample.tensors[name].float() for name in names}))


def test_float64_is_float64(backend: str) -> None:
    sample = sample_inputs("flowmap_loss", DEVICE, F64, True)
    found, gradients = outputs_and_gradients(sample, sample.run)
    expected, exact = outputs_and_gradients(sample, sample.formula)
    for f, e in zip((*found, *gradients.values()), (*expected, *exact.values()), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-15)


def _one(value: float) -> Tensor:
    return torch.full((1, 5), value, dtype=F64)


def test_guidance_stands_on_the_side_of_the_prediction(backend: str) -> None:
    """u_c = 2, u_u = 1, v = 2, t - r = 0.5, dF/dt = 4, g = 3: both sides are 4/3."""
    difference = {"u_plus": _one(4), "u_minus": _one(0), "interval": torch.tensor([0.5]), "gap": torch.ones(1)}
    options = {"weight": torch.ones(1), "guidance_scale": 3.0}
    p, _ = flowmap_loss(_one(2), _one(0), uncond_prediction=_one(1), **options)
    target, _ = flowmap_loss(_one(0), _one(2), uncond_prediction=_one(0), **difference, **options)
    both, _ = flowmap_loss(_one(2), _one(2), uncond_prediction=_one(1), **difference, **options)
    torch.testing.assert_close(torch.cat((p, target)), torch.full((2,), 16 / 9, dtype=F64))
    assert both.item() < 1e-30


def test_a_guidance_of_one_is_none(backend: str) -> None:
    guided = sample_inputs("flowmap_loss", DEVICE, F32, True, guidance=1.0)
    without = {n: t for n, t in guided.tensors.items() if n != "uncond_prediction"}
    expected = guided.run(**without)
    (grad,) = torch.autograd.grad(expected[0].sum(), without["prediction"])
    found = guided.run(**guided.tensors)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    assert torch.equal(torch.autograd.grad(found[0].sum(), guided.tensors["prediction"])[0], grad)


def _results(sample: Sample, **changed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, unweighted, gradient)"""
    sample = sample.replaced(**changed)
    outputs, gradients = outputs_and_gradients(sample, sample.run)
    return *outputs, gradients["prediction"]


def test_an_interval_of_zero_leaves_the_velocity(backend: str) -> None:
    """For every sample, for none, and for some: the values do not depend on what the others have."""
    sample = sample_inputs("flowmap_loss", DEVICE, F32, True)
    interval = sample.tensors["interval"]
    nowhere = _results(sample)
    everywhere = _results(sample, interval=torch.zeros_like(interval))
    mixed = _results(sample, interval=interval * torch.tensor([1.0, 0.0, 1.0]))
    plain = {n: t for n, t in sample.tensors.items() if n not in ("u_plus", "u_minus", "interval", "gap")}
    loss, unweighted = sample.run(**plain)
    torch.testing.assert_close(everywhere[0], loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(everywhere[1], unweighted, rtol=1e-6, atol=0)
    for of_none, of_all, of_some in zip(nowhere, everywhere, mixed, strict=True):
        assert torch.equal(of_some, torch.stack((of_none[0], of_all[1], of_none[2])))
        assert not torch.equal(of_none[1], of_all[1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_interval_of_zero_does_not_look_at_the_difference(backend: str, value: float) -> None:
    sample = sample_inputs("flowmap_loss", DEVICE, F32, True)
    tensors = {n: t.detach().clone() for n, t in sample.tensors.items()}
    tensors["interval"][1] = 0.0
    expected = _results(sample, **tensors)
    tensors["u_plus"][1], tensors["u_minus"][1] = value, value
    tensors["gap"][1] = 0.0
    for found, right in zip(_results(sample, **tensors), expected, strict=True):
        assert right.isfinite().all()
        assert torch.equal(found, right)


def test_frames_with_an_interval_of_zero_do_not_look_at_the_difference(backend: str) -> None:
    """Every other of frames that are shorter than a vector."""
    sample = sample_inputs("flowmap_loss", DEVICE, F32, True, size=(2, 2, 7, 3), times=(2, 1, 7, 1))
    tensors = {n: t.detach().clone() for n, t in sample.tensors.items()}
    tensors["interval"][:, :, ::2] = 0.0
    for name in ("u_plus", "u_minus"):
        tensors[name][:, :, ::2] = 0.0
    expected = _results(sample, **tensors)
    for name in ("u_plus", "u_minus"):
        tensors[name][:, :, ::2] = torch.nan
    tensors["gap"][:, :, ::2] = 0.0
    for found, right in zip(_results(sample, **tensors), expected, strict=True):
        assert right.isfinite().all()
        assert torch.equal(found, right)
    check_against_oracle(sample.replaced(**{n: tensors[n].nan_to_num() for n in tensors if n != "gap"}))


@pytest.mark.parametrize("name", ["prediction", "target_velocity", "uncond_prediction", "u_plus", "u_minus", "weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_sample(backend: str, name: str, value: float) -> None:
    sample = sample_inputs("flowmap_loss", DEVICE, F32, True)
    expected = _results(sample)
    changed = sample.tensors[name].detach().clone()
    changed.view(3, -1)[1, -1] = value
    found = _results(sample, **{name: changed})
    assert not found[0][1].isfinite()
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f[::2], e[::2])


def test_half_precision_does_not_overflow(backend: str) -> None:
    """A derivative of 1e5, which float16 does not hold, and its square."""
    u = torch.full((1, 3), 100.0, dtype=F16)
    prediction = torch.zeros(1, 3, dtype=F16, requires_grad=True)
    one = torch.ones(1)
    loss, _ = flowmap_loss(prediction, -u, u_plus=u, u_minus=-u, interval=one, gap=0.002 * one, weight=0.1 * one)
    (grad,) = torch.autograd.grad(loss.sum(), prediction)
    torch.testing.assert_close(loss, torch.tensor([0.1 * 1.001e5**2]), rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.float(), torch.full((1, 3), 0.2 * 1.001e5 / 3), rtol=1e-3, atol=0)


def test_both_results_have_the_gradient(backend: str) -> None:
    sample = sample_inputs("flowmap_loss", DEVICE, F64, True)
    prediction, weight = sample.tensors["prediction"], sample.tensors["weight"]
    loss, unweighted = sample.run(**sample.tensors)
    torch.testing.assert_close(loss, weight * unweighted)
    (of_loss,) = torch.autograd.grad(loss.sum(), prediction, retain_graph=True)
    (of_unweighted,) = torch.autograd.grad((weight * unweighted).sum(), prediction)
    torch.testing.assert_close(of_loss, of_unweighted)


def test_one_tensor_is_kept_for_the_backward(backend: str) -> None:
    """Of six: the residual in float32."""
    sample = sample_inputs("flowmap_loss", DEVICE, F32, True, second_dtype=BF16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        sample.run(**sample.tensors)
    assert sorted((t.numel(), t.dtype) for t in kept) == [(3, F32), (216, F32)]


class _Results(TorchDispatchMode):
    """The sizes of what the operator returns."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        if function is torch.ops.anyflow_kernels.flowmap_loss.default:
            self.sizes = [t.numel() for t in results]
        return results


@pytest.mark.parametrize("needed", [True, False], ids=["grad", "no grad"])
def test_without_a_gradient_nothing_is_kept(backend: str, needed: bool) -> None:
    sample = sample_inputs("flowmap_loss", DEVICE, F32, True)
    with _Results() as found, torch.set_grad_enabled(needed):
        sample.run(**sample.tensors)
    assert found.sizes == [3, 3, 216 if needed else 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u_plus": torch.zeros(3, 2)}, r"u_plus has shape \(3, 2\), prediction has \(3, 2, 4, 9\)"),
        ({"gap": None}, "u_plus, u_minus, interval and gap go together, but gap is missing"),
        ({"uncond_prediction": None}, "guidance_scale 3.0 needs uncond_prediction"),
        ({"guidance_scale": 0.0}, "guidance_scale must be positive, got 0.0"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be positive, got nan"),
        ({"sign": 0}, "sign must be 1 or -1, got 0"),
        ({"weight": torch.zeros(2)}, r"weight of shape \(2,\) does not broadcast"),
        ({"u_minus": torch.zeros(3, 2, 4, 9, requires_grad=True)}, "not differentiable in u_minus"),
        ({"weight": torch.zeros(3, requires_grad=True)}, "not differentiable in weight"),
        ({"interval": torch.zeros(3, dtype=torch.int64)}, "interval must be floating point, got torch.int64"),
    ],
    ids=["shape", "missing", "uncond", "zero", "nan", "sign", "length", "gradient", "weight", "dtype"],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    sample = sample_inputs("flowmap_loss", "cpu")
    with pytest.raises(ValueError, match=message):
        sample.run(**{**sample.tensors, **change})


def test_a_batch_is_needed() -> None:
    with pytest.raises(ValueError, match="prediction has no batch dimension"):
        flowmap_loss(torch.zeros(()), torch.zeros(()), weight=torch.ones(()))
