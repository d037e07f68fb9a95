"""``rollout_step`` against its formula, and whole rollouts against numbers known beforehand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from samples import DEVICE, TIMES, check_against_oracle, sample_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anyflow_kernels import rollout_step

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = {
    "fp32": (F32, F32),
    "fp32-bf16": (F32, BF16),
    "fp32-fp16": (F32, F16),
    "bf16": (BF16, BF16),
    "fp64": (F64, F64),
    "fp32-fp64": (F32, F64),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "guided": {},
    "plain": {"guidance": None, "sign": 1},
    "first": {"average": False},
    "last": {"last": True},
    "only": {"average": False, "guidance": None, "last": True},
    "fp16 model": {"model_dtype": F16},
}


@pytest.mark.parametrize("shapes", TIMES.values(), ids=TIMES)
def test_times_of_every_shape(backend: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    check_against_oracle(sample_inputs("rollout_step", DEVICE, F32, True, size=shapes[0], times=shapes[1]))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_result_and_gradients(backend: str, dtypes: tuple[torch.dtype, torch.dtype], variant: dict[str, Any]) -> None:
    check_against_oracle(sample_inputs("rollout_step", DEVICE, dtypes[0], True, second_dtype=dtypes[1], **variant))


@pytest.mark.parametrize("guidance", [0.3, 7.5])
def test_float64_keeps_the_scalars_in_float64(backend: str, guidance: float) -> None:
    sample = sample_inputs("rollout_step", DEVICE, F64, guidance=guidance, sign=1)
    average = sample.run(**sample.tensors)[0]
    v, u = sample.tensors["velocity"], sample.tensors["uncond_velocity"]
    weight = sample.tensors["weight"].reshape(2, 1, 1, 1)
    torch.testing.assert_close(
        average, sample.tensors["average"] + weight * (u + guidance * (v - u)), rtol=1e-13, atol=0
    )


@pytest.mark.parametrize("guidance", [0.3, 7.5])
def test_float_arguments_are_the_same_compiled(backend: str, guidance: float) -> None:
    sample = sample_inputs("rollout_step")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda tensors, scale: sample.run(**tensors, guidance_scale=scale), fullgraph=True, backend="aot_eager"
    )
    for scale in (guidance, guidance + 0.1):
        found, expected = compiled(sample.tensors, scale), sample.run(**sample.tensors, guidance_scale=scale)
        for f, e in zip(found, expected, strict=True):
            assert torch.equal(f, e)


def test_model_time_keeps_the_dtype_and_shape_of_sigma(backend: str) -> None:
    x = torch.zeros(2, 3)
    for shape in ((), (1,), (2,), (2, 1)):
        for dtype in (F32, F64, BF16):
            sigma = torch.full(shape, 0.3, dtype=dtype)
            state = rollout_step(x, None, x, sigma, sigma, sigma, time_scale=1000.0, time_offset=1.0)
            assert state.model_time.shape == sigma.shape
            expected = (sigma.double() * 1000 + 1).to(dtype)
            torch.testing.assert_close(state.model_time, expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_model_input_is_x_where_the_dtype_is_the_same(backend: str) -> None:
    sample = sample_inputs("rollout_step")
    tensors = [sample.tensors[n] for n in ("x", "average", "velocity", "sigma", "sigma_next", "weight")]
    state = rollout_step(*tensors)
    assert state.model_input is state.x
    assert rollout_step(*tensors, last=True)[::2] == (None, None)


def _rollout(x: Tensor, t: float, r: float, steps: int) -> Tensor:
    """The average over [r, t] of the velocity v(x) = x."""
    sigmas = torch.linspace(t, r, steps + 1, dtype=F64)
    average, weight = None, torch.tensor(1 / steps, dtype=F64)
    for k in range(steps):
        x, average, model_input, _ = rollout_step(x, average, x, sigmas[k], sigmas[k + 1], weight, last=k == steps - 1)
        assert k == steps - 1 or model_input is x
    return average


@pytest.mark.parametrize(
    ("steps", "r", "expected"), [(1, 0.5, 1.0), (1, 0.0, 1.0), (2, 0.5, 0.875), (2, 0.0, 0.75)], ids=str
)
def test_average_of_the_linear_velocity(backend: str, steps: int, r: float, expected: float) -> None:
    # A step of length h = (1 - r) / 2 from 1 reaches 1 - h, where the velocity is 1 - h: the mean of two is 1 - h / 2.
    average = _rollout(torch.ones(1, 2, dtype=F64), 1.0, r, steps)
    torch.testing.assert_close(average, torch.full_like(average, expected), rtol=0, atol=1e-15)


@pytest.mark.parametrize("r", [0.5, 0.0])
def test_average_converges_at_first_order(backend: str, r: float) -> None:
    exact = (1 - math.exp(r - 1)) / (1 - r)
    errors = [abs(_rollout(torch.ones(1, dtype=F64), 1.0, r, steps).item() - exact) for steps in (8, 16, 32)]
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.05)


def test_average_over_a_short_interval_keeps_its_digits(backend: str) -> None:
    """From the ends of the rollout, (x_N - x_0) / (sigma_r - sigma_t), bf16 states would be off by a quarter."""
    generator = torch.Generator().manual_seed(0)
    velocities = [torch.randn(2, 200, generator=generator, device="cpu").to(DEVICE, BF16) for _ in range(8)]
    x, average, model_input = torch.randn(2, 200, generator=generator, device="cpu").to(DEVICE), None, None
    sigmas, weight = torch.linspace(0.5, 0.48, 9), torch.tensor(1 / 8)
    for k, v in enumerate(velocities):
        x, average, model_input, _ = rollout_step(x, average, v, sigmas[k], sigmas[k + 1], weight, last=k == 7)
        assert k == 7 or model_input.dtype == BF16
    exact = torch.stack(velocities).double().mean(0)
    assert (average.double() - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"velocity": torch.zeros(2, 3)}, r"velocity has shape \(2, 3\), x has \(2, 3, 4, 9\)"),
        ({"sigma_next": torch.zeros(3)}, r"sigma_next has shape \(3,\), sigma has \(2,\)"),
        ({n: torch.zeros(3) for n in ("sigma", "sigma_next", "weight")}, "does not broadcast"),
        ({n: torch.zeros(2, 1) for n in ("sigma", "sigma_next", "weight")}, "does not broadcast"),
        ({"weight": torch.zeros(2, requires_grad=True)}, "not differentiable in weight"),
        ({"sigma": torch.zeros(2, dtype=torch.int64)}, "sigma must be floating point, got torch.int64"),
        ({"sign": 2}, "sign must be 1 or -1, got 2"),
        ({"uncond_velocity": None, "guidance_scale": 5.0}, "guidance_scale 5.0 needs uncond_velocity"),
    ],
    ids=[
        "velocity",
        "times differ",
        "times length",
        "times rank",
        "times gradient",
        "dtype",
        "sign",
        "guidance",
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    sample = sample_inputs("rollout_step", "cpu")
    with pytest.raises(ValueError, match=message):
        sample.run(**{**sample.tensors, **change})


def test_a_model_dtype_that_is_none_is_named() -> None:
    x, one = torch.zeros(2, 3), torch.ones(1)
    with pytest.raises(ValueError, match=r"model_dtype must be floating point, got torch\.int32"):
        rollout_step(x, None, x, one, one, one, model_dtype=torch.int32)


@pytest.mark.parametrize("operator", ["rollout_step", "interval_inputs", "flowmap_loss"])
def test_no_zeros_for_results_that_nothing_depends_on(backend: str, operator: str) -> None:
    """Of several results the backward operator is given the gradients that there are."""
    sample = sample_inputs(operator, DEVICE, F32, True)
    outputs = sample.run(**sample.tensors)
    seen: list[Any] = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            if function.name() == f"anyflow_kernels::{operator}_backward":
                names = [argument.name for argument in function._schema.arguments]
                seen.extend(a for n, a in zip(names, arguments, strict=False) if n.startswith("grad_"))
            return function(*arguments, **(options or {}))

    with Recording():
        torch.autograd.grad(outputs[0].sum(), sample.tensors[sample.differentiable[0]])
    assert len(seen) > 1 and sum(gradient is not None for gradient in seen) == 1
