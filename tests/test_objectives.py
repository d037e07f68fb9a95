"""The targets against closed forms and float64 oracles written from the formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy_flow import toy_stage

from anyflow import AnyStepScheduler
from anyflow.layout import TimeLayout
from anyflow.objectives import (
    average_velocity,
    backward_simulation,
    distribution_matching,
    fake_score_loss,
    linear_velocity,
    simulation_path,
)
from anyflow.time import sample_r

Velocity = Callable[[Tensor, Tensor], Tensor]


def run(v: Velocity, x: Tensor, t: Tensor, r: Tensor, steps: int, **kwargs: object) -> Tensor:
    return average_velocity(lambda x, s: (v(x, s), None), x, t, r, steps, **kwargs)  # type: ignore[arg-type]


def exponential(r: float, steps: int, dtype: torch.dtype = torch.float64) -> float:
    """v(x) = x from x = 1 at t = 1."""
    one = torch.ones(1, 1, dtype=dtype)
    target = run(lambda x, _: x, one, torch.ones(1, dtype=dtype), torch.full((1,), r, dtype=dtype), steps)
    return target.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exact_numbers(dtype: torch.dtype) -> None:
    assert exponential(0.5, 1, dtype) == 1.0 and exponential(0.0, 1, dtype) == 1.0
    assert exponential(0.5, 2, dtype) == 0.875
    assert exponential(0.0, 2, dtype) == 0.75


@pytest.mark.parametrize(("r", "limit"), [(0.5, 2 * (1 - math.exp(-0.5))), (0.0, 1 - math.exp(-1))])
def test_limit_is_reached_at_first_order(r: float, limit: float) -> None:
    errors = {n: exponential(r, n) - limit for n in (256, 512, 1024)}
    for n in (256, 512):
        assert errors[n] / errors[2 * n] == pytest.approx(2.0, abs=0.01)
    # Two Richardson steps remove the first two orders of 1/n.
    first = [2 * exponential(r, 2 * n) - exponential(r, n) for n in (512, 1024)]
    assert (4 * first[1] - first[0]) / 3 == pytest.approx(limit, abs=1e-9)


def test_limit_within_1e_6() -> None:
    # The error is about c / n with c < 0.2: 2^18 steps, on the scalar recursion that the op computes.
    n = 2**18
    for r in (0.5, 0.0):
        h, x, total = (1 - r) / n, 1.0, 0.0
        for _ in range(n):
            total += x
            x -= h * x
        assert total / n == pytest.approx((1 - math.exp(-(1 - r))) / (1 - r), abs=1e-6)
    assert exponential(0.0, 64) == pytest.approx(1 - (1 - 1 / 64) ** 64, abs=1e-14)
    assert exponential(0.5, 64) == pytest.approx(2 * (1 - (1 - 0.5 / 64) ** 64), abs=1e-13)


@pytest.mark.parametrize("sign", [1, -1])
def test_straight_path_lands_on_x0(sign: int) -> None:
    """The exact velocity noise - x0, predicted in either sign, from t = 1 to r = 0."""
    x0, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    t, r = torch.ones(2), torch.zeros(2)
    u = run(lambda *_: sign * (noise - x0), noise, t, r, 4, sign=sign)
    assert torch.allclose(noise - u, x0, atol=1e-6)


def test_guidance_is_applied_before_the_step() -> None:
    """v = v_u + g (v_c - v_u) = 1 + 3 (2 - 1) = 4 with v_c = 2, v_u = 1, g = 3; float64 oracle of the states."""
    seen = []

    def velocity(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(x.clone())
        return torch.full_like(x, 2.0), torch.ones_like(x)

    x = torch.zeros(1, 1, dtype=torch.float64)
    u = average_velocity(velocity, x, torch.ones(1).double(), torch.zeros(1).double(), 2, guidance_scale=3.0)
    assert u.item() == 4.0 and [s.item() for s in seen] == [0.0, -2.0]


def test_interval_of_zero_length_is_the_instantaneous_velocity() -> None:
    t = torch.tensor([0.0, 1e-8, 0.01, 1.0])
    x = torch.randn(4, 5)
    # Eight float32 additions.
    assert torch.allclose(run(lambda x, s: x * 3, x, t, t, 8), x * 3, rtol=1e-6)


def test_r_matters_with_two_steps_and_not_with_one() -> None:
    x, t = torch.randn(3, 4), torch.ones(3)

    def v(x: Tensor, s: Tensor) -> Tensor:
        return x * s[:, None]

    near, far = torch.full((3,), 0.5), torch.zeros(3)
    assert torch.equal(run(v, x, t, near, 1), run(v, x, t, far, 1))
    assert not torch.allclose(run(v, x, t, near, 2), run(v, x, t, far, 2))


@pytest.mark.parametrize("steps", [2, 4, 8])
@pytest.mark.parametrize("interval", [0.02, 0.1, 1.0])
def test_bf16_network_small_interval(steps: int, interval: float) -> None:
    """The mean of bfloat16 velocities keeps float32 accuracy, where (x_N - x_0) / (r - t) loses it to cancellation."""
    torch.manual_seed(0)
    weight = torch.randn(64, 64) / 8
    outputs: list[Tensor] = []

    def v(x: Tensor, s: Tensor) -> Tensor:
        assert x.dtype == torch.bfloat16 and s.dtype == torch.float32
        outputs.append((x @ weight.bfloat16()).tanh())
        return outputs[-1]

    x, t = torch.randn(4, 64), torch.full((4,), 1.0)
    u = run(v, x, t, t - interval, steps, model_dtype=torch.bfloat16)
    oracle = torch.stack(outputs).double().mean(0)
    assert u.dtype == torch.float32
    assert ((u.double() - oracle).norm() / oracle.norm()).item() <= 1e-6


def test_frames_have_their_own_interval() -> None:
    """[B, F] times on [B, C, F, H, W], against one rollout a frame in float64; a clean frame stays where it is."""
    x = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    t, r = torch.rand(2, 4).double(), torch.zeros(2, 4).double()
    t[:, 0] = 0

    def lay(s: Tensor) -> Tensor:
        return s[:, None, :, None, None]

    u = run(lambda x, s: x.sin() * lay(s + 1), x, t, r, 4, to_latents=lay)
    for frame in range(4):

        def single(x: Tensor, s: Tensor) -> Tensor:
            return x.sin() * (s + 1)[:, None, None, None]

        expected = run(single, x[:, :, frame], t[:, frame], r[:, frame], 4)
        assert torch.allclose(u[:, :, frame], expected, atol=1e-12)
    assert torch.allclose(u[:, :, 0], x[:, :, 0].sin(), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_linear(dtype: torch.dtype) -> None:
    x0, noise = torch.randn(2, 3).to(dtype), torch.randn(2, 3).to(dtype)
    target = linear_velocity(x0, noise)
    assert target.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(target, noise.to(target.dtype) - x0.to(target.dtype))


class WithoutFloat64(TorchDispatchMode):
    """Stands for a device that has no float64 (MPS); the meta device is taken for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                assert tensor.dtype != torch.float64, func
        return result


def test_no_float64_on_a_device_that_has_none() -> None:
    """Draws, schedules and every objective, from latents on the device; what is drawn is float64 on the CPU at most."""
    x, noise, v, fake = torch.randn(4, 3, 2, 4, 4).to("meta").unbind()
    sigma = torch.full((3,), 0.5, device="meta")

    def lay(s: Tensor) -> Tensor:
        return s.reshape(-1, 1, 1, 1)

    stage, denoiser = toy_stage(torch.float32)
    denoiser.bare.to("meta")
    common: dict[str, Any] = {"to_latents": lay}
    with WithoutFloat64():
        r = sample_r(sigma, "uniform", 0.02, torch.Generator())
        average_velocity(lambda *_: (v, v), x, sigma, r, 4, guidance_scale=2.0, **common)
        path = [s * torch.ones_like(sigma) for s in simulation_path(4, 1, 3.0)]
        samples = backward_simulation(lambda *_: v, noise, path, **common)
        distribution_matching(samples, noise, sigma, lambda *_: (v, v), lambda *_: fake, guidance_scale=2.0, **common)
        fake_score_loss(samples, noise, sigma, lambda *_: fake, **common)
        batch = {"latents": x, "noise": noise, "negative_conditioning": {}}
        layout = TimeLayout(denoiser.spec, denoiser.bare, x)
        drawn, lower = stage.times(batch, layout)
        prepared = stage.prepare(batch, layout, drawn, lower, None)
        loss, logs = stage.loss(prepared, denoiser(prepared, prepared["noisy_latents"], drawn, lower))
        assert loss.device.type == drawn.device.type == prepared["target"].device.type == "meta"
        assert all(value.dtype == torch.float32 for value in (loss, *logs.values()))
        scheduler = AnyStepScheduler.like(FlowMatchEulerDiscreteScheduler(shift=3.0))
        scheduler.set_timesteps(4, device="meta")
        assert scheduler.timesteps.device.type == "meta" and scheduler.timesteps.dtype == torch.float32
