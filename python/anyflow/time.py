"""Sigma: schedules, the shift, and the draw of the lower time r.

Everything here is in sigma: float32 (float64 stays float64), 1 = noise, 0 = clean. What a model expects instead is its
family's affair (``anyflow.families``).
"""

from __future__ import annotations

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
