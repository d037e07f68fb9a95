"""Plain PyTorch: the specification of ``flowmap_loss`` and its CPU path."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import accumulation_dtype, over, per_sample


def flowmap_loss(
    prediction: Tensor,
    target_velocity: Tensor,
    uncond_prediction: Tensor | None,
    u_plus: Tensor | None,
    u_minus: Tensor | None,
    interval: Tensor | None,
    gap: Tensor | None,
    weight: Tensor,
    guidance_scale: float,
    sign: int,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    accumulate = accumulation_dtype(prediction, target_velocity)
    p = prediction.to(accumulate)
    if uncond_prediction is not None:
        p = (p + (guidance_scale - 1) * uncond_prediction.to(accumulate)) / guidance_scale
    residual = sign * p - target_velocity.to(accumulate)
    if u_plus is not None and u_minus is not None and interval is not None and gap is not None:
        interval, gap = over(prediction.shape, interval.to(accumulate), gap.to(accumulate))
        derivative = sign * (u_plus.to(accumulate) - u_minus.to(accumulate)) / gap
        residual = residual + torch.where(interval == 0, 0, interval * derivative / guidance_scale)
    residual = residual.contiguous()
    square = residual.square()
    count = max(1, per_sample(square).shape[1])
    unweighted = per_sample(square).sum(1) / count
    (weight,) = over(square.shape, weight.to(accumulate))
    loss = per_sample(weight * square).sum(1) / count
    return loss, unweighted, residual if need_residual else residual.new_empty(0)


def flowmap_loss_backward(
    grad_loss: Tensor | None,
    grad_unweighted: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    guidance_scale: float,
    sign: int,
    dtype: torch.dtype,
) -> Tensor:
    rows = (-1,) + (1,) * (residual.ndim - 1)
    factor = residual.new_zeros(())
    if grad_loss is not None:
        (weight,) = over(residual.shape, weight.to(residual.dtype))
        factor = factor + weight * grad_loss.view(rows)
    if grad_unweighted is not None:
        factor = factor + grad_unweighted.view(rows)
    factor = factor * (2 * sign / guidance_scale / max(1, per_sample(residual).shape[1]))
    return (factor * residual).to(dtype).contiguous()
