"""The forward stage against a float64 oracle written from its formulas: targets, weights, balance, loss, gradients."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_flow import toy_stage

from anyflow.layout import TimeLayout
from anyflow.objectives import adaptive_balance, central_difference, exact_derivative, flowmap_target, meanflow_loss
from anyflow.stages.forward import TERMS
from anyflow.time import central_points, timestep_weight

SHIFT, EPSILON = 3.0, 0.005
# All three buckets; both ends of the schedule within epsilon; an interval shorter than epsilon.
T = (1.0, 0.8, 0.3, 0.002, 0.998, 0.5, 0.6, 0.4)
R = (1.0, 0.0, 0.1, 0.002, 0.0, 0.25, 0.6, 0.397)
SIGNS = {"SD3Transformer2DModel": 1, "ZImageTransformer2DModel": -1}


def data(dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, len(T), 2, 3, 3, generator=generator, dtype=torch.float64)
    times = torch.promote_types(dtype, torch.float32)
    return {
        "latents": x0.to(dtype),
        "noise": noise.to(dtype),
        "sigmas": torch.tensor(T, dtype=times),
        "r_sigmas": torch.tensor(R, dtype=times),
        "negative_conditioning": {},
    }


def weight_of(t: float, kind: str) -> float:
    """Mean 1 over the shifted sigmas 3 u / (1 + 2 u) of u = 1/1000 ... 1."""

    def w(s: float) -> float:
        if kind == "beta08":
            return s * math.sqrt(1 - s)
        return math.exp(-2 * (s - 0.5) ** 2) - math.exp(-0.5) if kind == "gaussian" else 1.0

    grid = [SHIFT * u / (1 + (SHIFT - 1) * u) for u in (i / 1000 for i in range(1, 1001))]
    return w(t) / (math.fsum(map(w, grid)) / len(grid))


def oracle(batch: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Sample by sample, from the formulas; noiseward. The gradient is that of a in u_c = a sin(x) (1 + t) + ..."""
    g, a, b = settings["fuse_guidance_scale"], 0.7, -0.4
    if batch["latents"].dtype == torch.bfloat16:
        a, b = (torch.tensor(value, dtype=torch.bfloat16).item() for value in (a, b))
    x0s, noises = batch["latents"].double(), batch["noise"].double()
    targets, losses, floors, gradients = [], [], [], []
    for x0, noise, t, r in zip(x0s, noises, batch["sigmas"].tolist(), batch["r_sigmas"].tolist(), strict=True):

        def at(s: float, x0: Tensor = x0, noise: Tensor = noise) -> Tensor:
            return (1 - s) * x0 + s * noise

        def u(s: float, r: float = r, at: Any = at) -> Tensor:
            return a * torch.sin(at(s)) * (1 + s) + b * (s - r) * at(s)

        v, x = noise - x0, at(t)
        above, below = t + EPSILON, t - EPSILON
        if settings["boundary_mode"] == "clamp":
            above, below = min(above, 1.0), max(below, 0.0)
        derivative = (u(above) - u(below)) / (above - below)
        base = x * t / 2
        if t == r:
            target = base if settings["diffusion_target"] == "base_prediction" else v
        else:
            target = v - (t - r) * derivative / g
        p = (u(t) + (g - 1) * torch.cos(x) * (t + r)) / g
        w = weight_of(t, settings["meanflow_weight_type"])
        targets.append(target)
        losses.append(w * (p - target).square().mean().item())
        floors.append(w * (base - v).square().mean().item())
        gradients.append(w * (2 * (p - target) * torch.sin(x) * (1 + t) / g).mean().item())
    diffusion = [t == r for t, r in zip(batch["sigmas"].tolist(), batch["r_sigmas"].tolist(), strict=True)]
    levels = losses
    if settings["diffusion_target"] == "base_prediction":
        levels = [max(pair) for pair in zip(losses, floors, strict=True)]
    balance = [1.0] * len(losses)
    if settings["meanflow_adaptive_weighting"] and any(diffusion):
        mean = math.fsum(level for level, d in zip(levels, diffusion, strict=True) if d) / sum(diffusion)
        balance = [1.0 if d else mean / (loss + 1e-5) for loss, d in zip(losses, diffusion, strict=True)]
    return {
        "target": torch.stack(targets),
        "loss": 2.0 * sum(f * loss for f, loss in zip(balance, losses, strict=True)) / len(losses),
        "gradient": 2.0 * sum(f * d for f, d in zip(balance, gradients, strict=True)) / len(losses),
    }


def eager(batch: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The same as trainers write it, in the dtype of the batch."""
    dtype, g = batch["latents"].dtype, settings["fuse_guidance_scale"]
    x0, v, times = batch["latents"], batch["noise"] - batch["latents"], (-1, 1, 1, 1)
    t, r = (batch[key].reshape(times) for key in ("sigmas", "r_sigmas"))
    a, b = torch.tensor(0.7, dtype=dtype, requires_grad=True), torch.tensor(-0.4, dtype=dtype)

    def at(s: Tensor) -> Tensor:
        return ((1 - s) * x0 + s * batch["noise"]).to(dtype)

    def u(s: Tensor) -> Tensor:
        x, low, lower = at(s), s.to(dtype), r.to(dtype)
        return a * x.sin() * (1 + low) + b * (low - lower) * x

    above, below = t + EPSILON, t - EPSILON
    if settings["boundary_mode"] == "clamp":
        above, below = above.clamp_max(1), below.clamp_min(0)
    derivative = (u(above) - u(below)).detach() / (above - below).to(dtype)
    x, base = at(t), at(t) * t.to(dtype) / 2
    flow = base if settings["diffusion_target"] == "base_prediction" else v
    target = torch.where(t == r, flow, v - (t - r).to(dtype) * derivative / g)
    p = (u(t) + (g - 1) * x.cos() * (t + r).to(dtype)) / g
    s, kind = batch["sigmas"], settings["meanflow_weight_type"]
    w = s * (1 - s).sqrt() if kind == "beta08" else torch.exp(-2 * (s - 0.5) ** 2) - math.exp(-0.5)
    w = torch.ones_like(s) if kind == "uniform" else w / (w[1] / weight_of(T[1], kind))
    w = w.to(dtype)
    loss = w * (p - target).square().flatten(1).mean(1)
    level = loss.detach()
    if settings["diffusion_target"] == "base_prediction":
        level = torch.maximum(level, w * (base - v).square().flatten(1).mean(1))
    diffusion = (t == r).flatten()
    if settings["meanflow_adaptive_weighting"]:
        loss = torch.where(diffusion, loss, loss * level[diffusion].mean() / (loss.detach() + 1e-5))
    total = 2.0 * loss.mean()
    total.backward()
    return {"target": target, "loss": total, "gradient": a.grad}


def run(batch: dict[str, Any], settings: dict[str, Any], family: str) -> dict[str, Any]:
    dtype = batch["latents"].dtype
    stage, denoiser = toy_stage(dtype, family, loss_weight=2.0, **settings)
    layout = TimeLayout(denoiser.spec, denoiser.bare, batch["latents"])
    sigma, r = stage.times(batch, layout)
    prepared = stage.prepare(batch, layout, sigma, r, None)
    prediction = denoiser(prepared, prepared["noisy_latents"], sigma, r)
    loss, _ = stage.loss(prepared, prediction)
    loss.backward()
    return {"target": SIGNS[family] * prepared["target"], "loss": loss, "gradient": denoiser.bare.a.grad}


def error(found: Any, expected: Any) -> float:
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected, dtype=torch.float64)
    return ((found - expected).norm() / expected.norm()).item()


CASES = [
    {
        "fuse_guidance_scale": g,
        "boundary_mode": boundary,
        "diffusion_target": target,
        "meanflow_weight_type": weight,
        "meanflow_adaptive_weighting": adaptive,
    }
    for g, boundary, target, weight, adaptive in product(
        (1.0, 3.0),
        ("extrapolate", "clamp"),
        ("flow", "base_prediction"),
        ("beta08", "gaussian", "uniform"),
        (True, False),
    )
    if g == 1.0 or target == "flow"
]


@pytest.mark.parametrize("family", SIGNS)
@pytest.mark.parametrize("settings", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_in_float64(settings: dict[str, Any], family: str) -> None:
    batch = data(torch.float64)
    found, expected = run(batch, settings, family), oracle(batch, settings)
    for key, value in expected.items():
        # Rounding of 1e-16, which the difference of two neighbouring outputs divides by the gap of 0.01 or 0.007.
        assert error(found[key], value) < 1e-12, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_no_worse_than_twice_eager(settings: dict[str, Any], dtype: torch.dtype) -> None:
    found_errors: dict[str, float] = {}
    eager_errors: dict[str, float] = {}
    for seed in range(6):  # the worst of several: one scalar can be right by chance
        batch = data(dtype, seed)
        expected, plain = oracle(batch, settings), eager(batch, settings)
        found = run(batch, settings, "SD3Transformer2DModel")
        assert found["target"].dtype == torch.float32 and found["loss"].dtype == torch.float32
        for key, value in expected.items():
            found_errors[key] = max(found_errors.get(key, 0.0), error(found[key], value))
            eager_errors[key] = max(eager_errors.get(key, 0.0), error(plain[key], value))
    for key, value in found_errors.items():
        assert value <= 2 * eager_errors[key], (key, value, eager_errors[key])


@pytest.mark.parametrize("bucket", ["no diffusion", "nothing else"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_batches_of_one_kind_are_not_balanced(bucket: str, dtype: torch.dtype) -> None:
    """Loss and gradient are those without the balance, to the bit, and finite."""
    batch = data(dtype)
    batch["r_sigmas"] = batch["sigmas"] * (1.0 if bucket == "nothing else" else 0.5)
    settings = {**CASES[0], "fuse_guidance_scale": 3.0, "diffusion_target": "flow"}
    on, off = (
        run(batch, {**settings, "meanflow_adaptive_weighting": a}, "SD3Transformer2DModel") for a in (True, False)
    )
    for key in ("loss", "gradient"):
        assert torch.equal(on[key], off[key]) and on[key].isfinite(), key


@pytest.mark.parametrize("tangent", [1e4, 1e5])
def test_large_tangents_of_a_float16_network_under_autocast(tangent: float) -> None:
    """Through the whole stage: u is 1e4 (or 1e5) sigma, so the target is of that size and its square is beyond float16.

    u_plus - u_minus is rounded to float16, of numbers of up to half the tangent; the target is taken from that.
    """
    stage, denoiser = toy_stage(torch.float16, fuse_guidance_scale=1.0, meanflow_weight_type="uniform")
    scale = torch.tensor(1.0, requires_grad=True)
    denoiser.bare.forward = lambda x, t, r, negative=False: (  # type: ignore[method-assign]
        (scale * tangent * (t - 0.45).reshape(-1, 1, 1, 1)).half().expand(x.shape)
    )
    x0, noise = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).half()
    batch = {"latents": x0, "noise": noise, "sigmas": torch.tensor([0.5, 0.4]), "r_sigmas": torch.tensor([0.1, 0.4])}
    layout = TimeLayout(denoiser.spec, denoiser.bare, x0)
    with torch.autocast("cpu", torch.float16):
        sigma, r = stage.times(batch, layout)
        prepared = stage.prepare(batch, layout, sigma, r, None)
        prediction = denoiser(prepared, prepared["noisy_latents"], sigma, r)
        loss, logs = stage.loss(prepared, prediction)
    loss.backward()
    derivative = prepared[TERMS].derivative
    assert derivative.u_plus.dtype == prediction.dtype == torch.float16
    difference = derivative.u_plus.double() - derivative.u_minus.double()
    target = noise.double() - x0.double()
    target[0] -= 0.4 * (difference / derivative.gap.double())[0]
    assert target[0].abs().min() > 0.3 * tangent
    assert prepared["target"].dtype == loss.dtype == torch.float32
    assert torch.allclose(prepared["target"].double(), target, rtol=1e-5)
    losses = (prediction.detach().double() - target).square().flatten(1).mean(1)
    balanced = losses[1] * (1 + losses[0] / (losses[0] + 1e-5)) / 2
    assert loss.item() == pytest.approx(balanced.item(), rel=1e-5)
    assert scale.grad is not None and scale.grad.isfinite() and all(value.isfinite() for value in logs.values())


def test_central_difference_is_exact_for_a_quadratic() -> None:
    """d/ds of x_s^2 s along the path is 2 x v s + x^2, up to eps^2 v^2 of the cubic; the jvp has no error."""
    x0, noise = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma, r = torch.linspace(0.1, 0.9, 5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)

    def u(x: Tensor, s: Tensor, r: Tensor) -> Tensor:
        return x.square() * s[:, None]

    lay = {"to_latents": lambda s: s[:, None]}
    v, x = noise - x0, (1 - sigma[:, None]) * x0 + sigma[:, None] * noise
    exact = 2 * x * v * sigma[:, None] + x.square()
    central = central_difference(u, x0, noise, sigma, r, epsilon=0.005, **lay)
    found = (central.u_plus - central.u_minus) / central.gap
    assert torch.allclose(found, exact + 0.005**2 * v.square(), rtol=0, atol=1e-12)
    forward = exact_derivative(u, x0, noise, sigma, r, **lay)
    assert torch.allclose(forward.u_plus - forward.u_minus, exact, rtol=0, atol=1e-14)


def test_guidance_on_the_right_side() -> None:
    """u_c = 2, u_u = 1, v = 2, t - r = 0.5, dU/dsigma = 4, g = 3: prediction side 4/3, target 2 - 0.5 * 4 / 3 = 4/3."""
    one = torch.ones(1, 1, dtype=torch.float64)
    x0 = torch.zeros_like(one)

    def slope(x: Tensor, s: Tensor, r: Tensor) -> Tensor:
        return 4 * s[:, None]

    sigma, r = torch.tensor([0.75], dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64)
    derivative = central_difference(slope, x0, 2 * one, sigma, r, to_latents=lambda s: s[:, None])
    interval = torch.tensor([[0.5]], dtype=torch.float64)
    target = flowmap_target(derivative.velocity, derivative, interval, guidance_scale=3.0)
    assert target.item() == pytest.approx(4 / 3, abs=1e-12)

    def loss(u_c: Tensor, u_u: Tensor | None, g: float) -> Tensor:
        uncond = {} if u_u is None else {"uncond_prediction": u_u}
        return meanflow_loss(u_c, derivative.velocity, derivative, interval, one, guidance_scale=g, **uncond)

    assert loss(2 * one, one, 3.0).item() == pytest.approx(0.0, abs=1e-24)
    assert loss(3 * one, one, 3.0).item() == pytest.approx(1 / 9, abs=1e-12)
    assert torch.equal(loss(3 * one, one, 1.0), loss(3 * one, None, 1.0))  # off: to the bit
    with pytest.raises(ValueError, match="guidance_scale"):
        loss(2 * one, None, 3.0)
    with pytest.raises(ValueError, match="guidance_scale"):
        loss(2 * one, one, 0.0)


@pytest.mark.parametrize("boundary", ["extrapolate", "clamp"])
def test_points_and_their_gap(boundary: str) -> None:
    sigma = torch.cat([torch.tensor([1.0, 1e-8, 0.0, 0.002, 0.998]), torch.rand(1000)])
    plus, minus, gap = central_points(sigma, EPSILON, boundary)
    assert plus.dtype == minus.dtype == gap.dtype == torch.float32
    noisy = sigma > 0
    assert torch.equal(gap[noisy], (plus - minus)[noisy])  # of what is fed, not 2 epsilon
    assert not plus[~noisy].any() and not minus[~noisy].any() and (gap[~noisy] == 1).all()
    inside = (sigma > EPSILON) & (sigma < 1 - EPSILON)
    assert torch.allclose(gap[inside], torch.tensor(2 * EPSILON), rtol=1e-4)  # float32 below 1: 6e-8 on 0.01
    if boundary == "clamp":
        assert plus.max() == 1 and minus.min() == 0 and gap[0] == pytest.approx(EPSILON, rel=1e-4)
    else:
        assert plus[0].item() == pytest.approx(1 + EPSILON) and minus[1].item() == pytest.approx(1e-8 - EPSILON)


@pytest.mark.parametrize("kind", ["beta08", "gaussian", "uniform"])
@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_weights_have_mean_one_over_the_shifted_schedule(kind: str, shift: float) -> None:
    u = torch.arange(1, 1001, dtype=torch.float64) / 1000
    weight = timestep_weight(shift * u / (1 + (shift - 1) * u), kind, shift)
    assert weight.mean().item() == pytest.approx(1.0, abs=1e-12) and (weight >= 0).all()
    assert timestep_weight(torch.tensor([0.7]), kind, SHIFT).item() == pytest.approx(weight_of(0.7, kind), rel=1e-6)


class TestBalance:
    loss = torch.tensor([0.5, 2.0, 0.0, 8.0], dtype=torch.float64)

    def factors(self, diffusion: list[bool]) -> Tensor:
        mask = torch.tensor(diffusion)
        return adaptive_balance(self.loss, mask, self.loss[mask].sum(), mask.sum())

    def test_others_weigh_as_the_diffusion_samples_do(self) -> None:
        factors = self.factors([True, True, False, False])
        assert torch.allclose(factors, torch.tensor([1, 1, 1.25 / 1e-5, 1.25 / (8 + 1e-5)]).double(), rtol=1e-12)

    @pytest.mark.parametrize("every", [True, False])
    def test_without_a_diffusion_sample_or_with_nothing_else(self, every: bool) -> None:
        assert torch.equal(self.factors([every] * 4), torch.ones(4, dtype=torch.float64))

    def test_takes_no_gradient(self) -> None:
        loss = self.loss.clone().requires_grad_()
        mask = torch.tensor([True, False, False, False])
        assert not adaptive_balance(loss, mask, loss[mask].sum().detach(), mask.sum()).requires_grad


def test_a_large_tangent_in_half_precision_is_finite() -> None:
    """Reductions are in float32 whatever the dtype of the network, under autocast too."""
    generator = torch.Generator().manual_seed(0)
    u_plus, u_minus, prediction = (torch.randn(3, 4, 8, generator=generator) * 100).half()
    prediction.requires_grad_()
    x0, noise = torch.randn(2, 4, 8, generator=generator).half()
    outputs = iter((u_plus, u_minus))
    with torch.autocast("cpu", torch.bfloat16):
        derivative = central_difference(
            lambda x, s, r: next(outputs),
            x0,
            noise,
            torch.full((4,), 0.9),
            torch.zeros(4),
            to_latents=lambda s: s[:, None],
        )
        interval = torch.tensor([[0.9], [0.9], [0.0], [0.9]])
        loss = meanflow_loss(prediction, derivative.velocity, derivative, interval, torch.ones(4))
        target = flowmap_target(derivative.velocity, derivative, interval)
    assert target.abs().max() > 1e4 and loss.dtype == torch.float32 and torch.isfinite(loss).all()
    expected = (prediction.detach().double() - target.double()).square().mean(1)
    assert torch.allclose(loss.double(), expected, rtol=1e-5)  # a float32 mean of 8, from a gap known to 1e-6


def test_where_r_is_t_the_difference_is_not_even_looked_at() -> None:
    x0, noise = torch.randn(2, 2, 4, dtype=torch.float64)
    outputs = iter((torch.full((2, 4), math.inf).double(), torch.full((2, 4), math.nan).double()))
    derivative = central_difference(
        lambda x, s, r: next(outputs),
        x0,
        noise,
        torch.full((2,), 0.5),
        torch.full((2,), 0.5),
        to_latents=lambda s: s[:, None],
    )
    zero = torch.zeros(2, 1, dtype=torch.float64)
    assert torch.equal(flowmap_target(derivative.velocity, derivative, zero), noise - x0)
    loss = meanflow_loss(noise - x0, derivative.velocity, derivative, zero, torch.ones(2).double())
    assert torch.equal(loss, torch.zeros(2, dtype=torch.float64))
