"""Plain PyTorch: the specification of ``dmd_gradient`` and its CPU path."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import accumulation_dtype, over, per_sample


def dmd_gradient(
    x: Tensor,
    sigma: Tensor,
    x_sigma: Tensor,
    real_velocity: Tensor,
    fake_velocity: Tensor,
    uncond_real_velocity: Tensor | None,
    guidance_scale: float,
    sign: int,
) -> tuple[Tensor, Tensor]:
    accumulate = accumulation_dtype(x, x_sigma, real_velocity)
    x, (sigma,) = x.to(accumulate), over(x.shape, sigma.to(accumulate))
    real, fake = real_velocity.to(accumulate), fake_velocity.to(accumulate)
    if uncond_real_velocity is not None:
        uncond = uncond_real_velocity.to(accumulate)
        real = uncond + guidance_scale * (real - uncond)
    x0_real = x_sigma.to(accumulate) - sigma * (sign * real)
    difference = sigma * (sign * (real - fake))  # x0_fake - x0_real, without the cancellation
    distance = (x - x0_real).abs().contiguous()
    square = difference.square().contiguous()

    count = max(1, per_sample(x).shape[1])
    normaliser = per_sample(distance).sum(1) / count
    size = per_sample(square).sum(1) / count / normaliser / normaliser
    usable = normaliser.isfinite() & size.isfinite()  # of which the second is not where the normaliser is zero

    rows = (-1,) + (1,) * (x.ndim - 1)
    gradient = torch.where(usable.view(rows), difference / normaliser.view(rows), 0).detach().contiguous()
    square = (x - x.detach() + gradient).square()  # as (x - stopgrad(x - gradient))^2, without the rounding
    loss = torch.where(usable, 0.5 * per_sample(square).sum(1) / count, 0)
    return loss, gradient


def dmd_gradient_backward(grad_loss: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    rows = (-1,) + (1,) * (gradient.ndim - 1)
    factor = grad_loss.view(rows) / max(1, per_sample(gradient).shape[1])
    return (factor * gradient).to(dtype).contiguous()
