"""The operators as a trainer writes them in plain PyTorch: stock modules' arithmetic, in the model's dtype. On float64
tensors they are exact, and what the correctness gate compares with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Embedder = tuple[Tensor, Tensor, Tensor, Tensor]  # weight, bias, weight, bias


def sinusoid(times: Tensor, channels: int) -> Tensor:
    half = channels // 2
    exponent = -math.log(10000.0) * torch.arange(half, dtype=times.dtype, device=times.device) / half
    phase = times[:, None] * torch.exp(exponent)[None, :]
    return torch.cat([torch.cos(phase), torch.sin(phase)], dim=-1)


def embed(times: Tensor, embedder: Embedder) -> Tensor:
    weight_1, bias_1, weight_2, bias_2 = embedder
    features = sinusoid(times, weight_1.shape[1]).to(weight_1.dtype)
    return F.linear(F.silu(F.linear(features, weight_1, bias_1)), weight_2, bias_2)


def flowmap_embedding(t: Tensor, r: Tensor, base: Embedder, delta: Embedder, gate: Tensor) -> Tensor:
    e, d = embed(t, base), embed(r, delta)
    return e + gate.to(e.dtype) * (d - e)


def gate_blend(base: Tensor, delta: Tensor, gate: Tensor) -> Tensor:
    return base + gate.to(base.dtype) * (delta - base)


def rollout_step(
    x: Tensor,
    average: Tensor,
    velocity: Tensor,
    uncond_velocity: Tensor | None,
    sigma: Tensor,
    sigma_next: Tensor,
    weight: Tensor,
    guidance_scale: float,
    time_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Guidance in the model's dtype, as diffusers' pipelines have it; the state in float32."""
    v = velocity
    if uncond_velocity is not None:
        v = uncond_velocity + guidance_scale * (velocity - uncond_velocity)
    rows = (-1, *(1,) * (x.ndim - 1))
    average = average + weight.view(rows) * v.to(x.dtype)
    x = x + (sigma_next - sigma).view(rows) * v.to(x.dtype)
    return x, average, x.to(velocity.dtype), time_scale * sigma_next


def interval_inputs(
    x0: Tensor, noise: Tensor, sigma: Tensor, sigma_plus: Tensor, sigma_minus: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums in the dtype of the sigmas, inputs in that of the latents."""
    rows = (-1, *(1,) * (x0.ndim - 1))

    def at(s: Tensor) -> Tensor:
        return ((1 - s.view(rows)) * x0 + s.view(rows) * noise).to(x0.dtype)

    return at(sigma), at(sigma_plus), at(sigma_minus), noise.to(sigma.dtype) - x0.to(sigma.dtype)


def flowmap_loss(
    prediction: Tensor,
    target_velocity: Tensor,
    uncond_prediction: Tensor,
    u_plus: Tensor,
    u_minus: Tensor,
    interval: Tensor,
    gap: Tensor,
    weight: Tensor,
    guidance_scale: float,
) -> tuple[Tensor, Tensor]:
    """Guidance in the model's dtype, differences and the loss in that of the velocity."""
    rows = (-1, *(1,) * (prediction.ndim - 1))
    p = (prediction + (guidance_scale - 1) * uncond_prediction) / guidance_scale
    derivative = (u_plus.to(gap.dtype) - u_minus.to(gap.dtype)) / gap.view(rows)
    target = target_velocity - interval.view(rows) * derivative / guidance_scale
    unweighted = F.mse_loss(p.to(target.dtype), target, reduction="none").flatten(1).mean(1)
    return weight * unweighted, unweighted


def dmd_gradient(
    x: Tensor,
    sigma: Tensor,
    x_sigma: Tensor,
    real_velocity: Tensor,
    fake_velocity: Tensor,
    uncond_real_velocity: Tensor,
    guidance_scale: float,
) -> tuple[Tensor, Tensor]:
    """In the dtype of the sample."""
    rows = (-1, *(1,) * (x.ndim - 1))
    with torch.no_grad():
        cond, uncond, fake = (v.to(x.dtype) for v in (real_velocity, uncond_real_velocity, fake_velocity))
        x0_real = x_sigma.to(x.dtype) - sigma.view(rows) * (uncond + guidance_scale * (cond - uncond))
        x0_fake = x_sigma.to(x.dtype) - sigma.view(rows) * fake
        normaliser = (x - x0_real).abs().flatten(1).mean(1).view(rows)
        gradient = torch.nan_to_num((x0_fake - x0_real) / normaliser)
        target = x - gradient
    return 0.5 * F.mse_loss(x, target, reduction="none").flatten(1).mean(1), gradient
