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
