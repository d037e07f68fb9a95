"""Plain PyTorch: the specification of ``rollout_step`` and its CPU path."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import accumulation_dtype, over


def rollout_step(
    x: Tensor,
    average: Tensor | None,
    velocity: Tensor,
    uncond_velocity: Tensor | None,
    sigma: Tensor,
    sigma_next: Tensor,
    weight: Tensor,
    guidance_scale: float,
    sign: int,
    time_scale: float,
    time_offset: float,
    model_dtype: torch.dtype,
    last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    accumulate = accumulation_dtype(x, velocity)
    model_time = (time_scale * sigma_next + time_offset).contiguous()
    sigma, sigma_next, weight = over(x.shape, sigma, sigma_next, weight)
    v = velocity.to(accumulate)
    if uncond_velocity is not None:
        v_u = uncond_velocity.to(accumulate)
        v = v_u + guidance_scale * (v - v_u)
    v = sign * v
    new_average = weight.to(accumulate) * v
    if average is not None:
        new_average = average.to(accumulate) + new_average
    new_average = new_average.contiguous()
    if last:
        return x.new_empty(0, dtype=accumulate), new_average, x.new_empty(0, dtype=model_dtype), sigma_next.new_empty(0)
    step = sigma_next.to(accumulate) - sigma.to(accumulate)
    new_x = (x.to(accumulate) + step * v).contiguous()
    model_input = new_x.to(model_dtype) if model_dtype != accumulate else x.new_empty(0, dtype=model_dtype)
    return new_x, new_average, model_input, model_time


def rollout_step_backward(
    grad_x: Tensor | None,
    grad_average: Tensor | None,
    grad_input: Tensor | None,
    velocity: Tensor,
    uncond_velocity: Tensor | None,
    sigma: Tensor,
    sigma_next: Tensor,
    weight: Tensor,
    guidance_scale: float,
    sign: int,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The step is linear in x and the velocities: gradients need only the coefficients."""
    given = [g for g in (grad_x, grad_average, grad_input) if g is not None]
    accumulate = torch.promote_types(accumulation_dtype(velocity, *given), torch.float32)
    sigma, sigma_next, weight = over(velocity.shape, sigma, sigma_next, weight)
    states = [g.to(accumulate) for g in (grad_x, grad_input) if g is not None]
    dx = sum(states[1:], states[0]) if states else velocity.new_zeros(velocity.shape, dtype=accumulate)
    dv = (sigma_next.to(accumulate) - sigma.to(accumulate)) * dx
    if grad_average is not None:
        dv = dv + weight.to(accumulate) * grad_average.to(accumulate)
    dv = sign * dv
    new_x = dx.to(x_dtype, copy=len(states) == 1).contiguous()  # a gradient of one's own, also where one was given
    if uncond_velocity is None:
        return new_x, dv.to(velocity.dtype).contiguous(), velocity.new_empty(0)
    grad_velocity = (guidance_scale * dv).to(velocity.dtype).contiguous()
    return new_x, grad_velocity, ((1 - guidance_scale) * dv).to(uncond_velocity.dtype).contiguous()
