"""Sigma: schedules, the shift, the draws of the times, the points of a central difference, the weights.

Everything here is in sigma: float32 (float64 stays float64), 1 = noise, 0 = clean. What a model expects instead is its
family's affair (``anyflow.families``).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor


def at_least_float32(value: Tensor) -> Tensor:
    """Times never live below float32: bfloat16 holds 937 as 936."""
    return value if value.dtype == torch.float64 else value.to(torch.float32)


def shift_sigma(u: Any, shift: float) -> Any:
    """sigma = s u / (1 + (s - 1) u): the resolution shift of SD3 (Esser et al. 2024, eq. 23), applied once.

    ``u`` in [0, 1], tensor or number; ``shift`` > 0, 1 leaves u as it is. ValueError for a shift that is not positive.
    """
    _check_shift(shift)
    return shift * u / (1 + (shift - 1) * u)


def unshift_sigma(sigma: Any, shift: float) -> Any:
    """u = sigma / (s - (s - 1) sigma): the inverse of ``shift_sigma``."""
    _check_shift(shift)
    return sigma / (shift - (shift - 1) * sigma)


def _check_shift(shift: float) -> None:
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift!r}")


def sigma_grid(steps: int, shift: float = 1.0) -> Tensor:
    """The ``steps`` + 1 sigmas of an any-step sampler: u uniform from 1 to 0, shifted once; float32, ends in exactly 0.

    Built in float64 on the CPU, so that no device needs float64. ValueError when ``steps`` < 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps!r}")
    return shift_sigma(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64), shift).to(torch.float32)


def sample_r(
    sigma: Tensor, sampler: str, min_interval_ratio: float, generator: torch.Generator | None = None
) -> Tensor:
    """Draw the lower time: r = (1 - m) t U with U uniform in [0, 1) ("uniform"), or r = 0 ("zero").

    ``sigma`` [B, ...] is t. One U is drawn for each sample and shared by its frames or tokens, so 0 <= r <= (1 - m) t
    everywhere and a clean token (t = 0) keeps r = t. The draw is made on the generator's device, float32.
    """
    if sampler == "zero":
        return torch.zeros_like(sigma)
    device = sigma.device if generator is None else generator.device
    u = torch.rand(sigma.shape[0], generator=generator, device=device, dtype=torch.float32).to(sigma.device)
    return (1 - min_interval_ratio) * sigma * u.reshape(-1, *(1,) * (sigma.ndim - 1))


def sample_uniform(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """Draw ``count`` sigmas, u uniform in [0, 1) and shifted once; float32, on the generator's device."""
    u = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float32)
    return shift_sigma(u, shift)


def sample_logit_normal(count: int, shift: float, mean: float, std: float, generator: torch.Generator) -> Tensor:
    """Draw ``count`` sigmas, logit(u) normal(mean, std) and shifted once (Esser et al. 2024); float32, as above."""
    normal = torch.randn(count, generator=generator, device=generator.device, dtype=torch.float32)
    return shift_sigma(torch.sigmoid(mean + std * normal), shift)


def sample_intervals(
    count: int,
    diffusion_ratio: float,
    consistency_ratio: float,
    shift: float,
    phase: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw (sigma_t, sigma_r) for ``count`` samples: two uniform u, sorted into t >= r, both shifted once.

    A sample is in one of three buckets (MeanFlow, arXiv 2505.13447; AnyFlow, arXiv 2605.13724): diffusion has r = t,
    consistency r = 0, the rest keeps its r. The samples, in random order, take the places (i + ``phase``) / count, and
    the buckets are [0, diffusion_ratio), the next ``consistency_ratio``, and what is left of [0, 1). So each bucket
    gets its share of the batch, rounded down or up, and with phases spread evenly over [0, 1) its exact share in the
    long run, at any batch size. ``phase_of_draw`` gives such phases.

    ``phase`` in [0, 1). Returns two float64 tensors [count] on the generator's device, sigma_t in (0, 1].
    """
    device = None if generator is None else generator.device
    u = 1 - torch.rand(2, count, generator=generator, device=device, dtype=torch.float64)
    t, r = u.amax(0), u.amin(0)
    place = torch.randperm(count, generator=generator, device=device) + phase
    r = torch.where(place < (diffusion_ratio + consistency_ratio) * count, 0.0, r)
    r = torch.where(place < diffusion_ratio * count, t, r)
    return shift_sigma(t, shift), shift_sigma(r, shift)


def phase_of_draw(draw: int) -> float:
    """The fractional part of ``draw`` times the golden ratio: any consecutive draws are spread evenly over [0, 1), so
    that batches of one sample, too, have every bucket in its share within a few of them."""
    return draw * 0.6180339887498949 % 1.0


def central_points(sigma: Tensor, epsilon: float, boundary: str) -> tuple[Tensor, Tensor, Tensor]:
    """(sigma + epsilon, sigma - epsilon, their distance): where a derivative in sigma is taken, for sigma_t [...].

    ``boundary``: "extrapolate" goes beyond 0 and 1, "clamp" stops there, which makes the difference one-sided. The
    distance is that of the rounded values that are fed to the model. A clean entry (sigma = 0) stays clean; its
    distance is given as 1.
    """
    plus, minus = sigma + epsilon, sigma - epsilon
    if boundary == "clamp":
        plus, minus = plus.clamp_max(1.0), minus.clamp_min(0.0)
    noisy = sigma > 0
    plus, minus = torch.where(noisy, plus, 0.0), torch.where(noisy, minus, 0.0)
    return plus, minus, torch.where(noisy, plus - minus, 1.0)


def timestep_weight(sigma: Tensor, weighting: str, shift: float) -> Tensor:
    """w(sigma_t), of mean 1 over the 1000 shifted sigmas of a training schedule, in the dtype of ``sigma`` [...].

    beta08: proportional to sigma sqrt(1 - sigma) (AnyFlow, arXiv 2605.13724); gaussian: to exp(-2 (sigma - 1/2)^2)
    less its value at the ends; uniform: 1.
    """
    return _unscaled_weight(sigma, weighting) / _mean_weight(weighting, shift)


def _unscaled_weight(sigma: Tensor, weighting: str) -> Tensor:
    if weighting == "beta08":
        return sigma * (1 - sigma).sqrt()
    if weighting == "gaussian":
        return torch.expm1(2 * sigma * (1 - sigma)) * math.exp(-0.5)  # the difference, without its cancellation
    return torch.ones_like(sigma)


@functools.cache
def _mean_weight(weighting: str, shift: float) -> float:
    grid = shift_sigma(torch.arange(1, 1001, dtype=torch.float64) / 1000, shift)
    return _unscaled_weight(grid, weighting).mean().item()
