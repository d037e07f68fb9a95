"""``rollout_step``: one Euler step of the teacher, with the running average velocity."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _library
from . import reference

__all__ = ["RolloutState", "rollout_step"]


class RolloutState(NamedTuple):
    """What a rollout carries from step to step. ``x`` and ``average`` are float32 (float64 stays float64)."""

    x: Tensor | None  # the state at sigma_next; None after the last step
    average: Tensor  # sum of weight_k velocity_k so far, noiseward
    model_input: Tensor | None  # x in the model's dtype; None after the last step
    model_time: Tensor | None  # time_scale sigma_next + time_offset, in the shape of sigma; None after the last step


def rollout_step(
    x: Tensor,
    average: Tensor | None,
    velocity: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    weight: Tensor,
    *,
    uncond_velocity: Tensor | None = None,
    guidance_scale: float = 1.0,
    sign: int = 1,
    time_scale: float = 1.0,
    time_offset: float = 0.0,
    model_dtype: torch.dtype | None = None,
    last: bool = False,
) -> RolloutState:
    """x' = x + (sigma_next - sigma) v,  average' = average + weight v,  v = sign (v_u + guidance_scale (v_c - v_u))

    One Euler step of dx/dsigma = v. Over a rollout with weights w_k = (sigma_{k+1} - sigma_k) / (sigma_r - sigma_t),
    or 1/N on a uniform grid, ``average`` ends as the average velocity over [r, t] (AnyFlow, arXiv 2605.13724), without
    the cancellation of (x_N - x_0) / (sigma_r - sigma_t). The first step passes ``average=None``; the last step passes
    ``last=True`` and computes nothing but the average.

    Shapes: ``x``, ``average``, ``velocity`` (v_c), ``uncond_velocity`` (v_u) alike, [B, ...], any strides. ``sigma``,
        ``sigma_next`` and ``weight`` alike: one element, [B], or anything of x's rank that broadcasts to x.
    Dtypes: any floating point. Computed in float32 (float64 when x or the velocity is float64); ``x`` and ``average``
        are returned in that dtype, ``model_input`` in ``model_dtype`` (default: the dtype of ``velocity``).
    Units: sigma in [0, 1], 1 = noise; velocities are noiseward after ``sign`` (+1 or -1; -1 for a model that predicts
        x0 - noise). ``model_time`` is what the model's own time argument expects at ``sigma_next``.
    Saved for backward: sigma, sigma_next, weight, and the velocities for their dtypes. Differentiable in ``x``,
        ``average`` and both velocities, not in the times and weights.
    Deterministic. Results are contiguous and alias no input; where ``model_dtype`` is the dtype of ``x``,
        ``model_input`` is ``x`` itself.

    Raises ValueError for unequal or non-broadcastable shapes, mixed devices, dtypes that are not floating point, a sign
    other than +1 or -1, a guidance scale without ``uncond_velocity``, or times that require gradients;
    NotImplementedError under forward-mode differentiation.
    """
    _library.same_shape("rollout_step", x=x, average=average, velocity=velocity, uncond_velocity=uncond_velocity)
    if sign not in (1, -1):
        raise ValueError(f"rollout_step: sign must be 1 or -1, got {sign!r}")
    _library.guidance("rollout_step", guidance_scale, "uncond_velocity", uncond_velocity)
    _library.floating_dtype("rollout_step", model_dtype=model_dtype)
    _library.same_shape("rollout_step", sigma=sigma, sigma_next=sigma_next, weight=weight)
    _library.floating_on_one_device(
        "rollout_step",
        x=x,
        average=average,
        velocity=velocity,
        uncond_velocity=uncond_velocity,
        sigma=sigma,
        sigma_next=sigma_next,
        weight=weight,
    )
    _library.constant("rollout_step", sigma=sigma, sigma_next=sigma_next, weight=weight)
    _library.refuse_forward_ad("rollout_step", x, average, velocity, uncond_velocity, sigma, sigma_next, weight)
    _library.broadcasts("rollout_step", x, sigma=sigma)
    model_dtype = velocity.dtype if model_dtype is None else model_dtype
    new_x, new_average, model_input, model_time = torch.ops.anyflow_kernels.rollout_step.default(
        x,
        average,
        velocity,
        uncond_velocity,
        sigma,
        sigma_next,
        weight,
        float(guidance_scale),
        sign,
        float(time_scale),
        float(time_offset),
        model_dtype,
        last,
    )
    if last:
        return RolloutState(None, new_average, None, None)
    if model_dtype == new_x.dtype:
        model_input = new_x
    if model_time.requires_grad:
        model_time = model_time.detach()
    return RolloutState(new_x, new_average, model_input, model_time)


def _fake(
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
    accumulate = _library.accumulation_dtype(x, velocity)
    new_average = torch.empty(x.shape, dtype=accumulate, device=x.device)
    if last:
        return x.new_empty(0, dtype=accumulate), new_average, x.new_empty(0, dtype=model_dtype), sigma_next.new_empty(0)
    new_x = torch.empty(x.shape, dtype=accumulate, device=x.device)
    input_shape = x.shape if model_dtype != accumulate else (0,)
    model_input = torch.empty(input_shape, dtype=model_dtype, device=x.device)
    return new_x, new_average, model_input, torch.empty(sigma_next.shape, dtype=sigma_next.dtype, device=x.device)


def _backward_fake(
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
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(velocity, dtype=x_dtype, memory_format=contiguous),
        torch.empty_like(velocity, memory_format=contiguous),
        velocity.new_empty(0)
        if uncond_velocity is None
        else torch.empty_like(uncond_velocity, memory_format=contiguous),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, average, velocity, uncond_velocity, sigma, sigma_next, weight, guidance_scale, sign = inputs[:9]
    ctx.save_for_backward(velocity, uncond_velocity, sigma, sigma_next, weight)
    ctx.guidance_scale, ctx.sign, ctx.x_dtype = guidance_scale, sign, x.dtype
    ctx.average_dtype = None if average is None else average.dtype
    ctx.has_state = not inputs[12]
    ctx.has_input = ctx.has_state and inputs[11] != output[0].dtype
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_x: Tensor | None, grad_average: Tensor | None, grad_input: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    if grad_x is None and grad_average is None and grad_input is None:
        return (None,) * 13
    velocity, uncond_velocity, sigma, sigma_next, weight = ctx.saved_tensors
    dx, dv, du = torch.ops.anyflow_kernels.rollout_step_backward.default(
        grad_x if ctx.has_state else None,
        grad_average,
        grad_input if ctx.has_input else None,
        velocity,
        uncond_velocity,
        sigma,
        sigma_next,
        weight,
        ctx.guidance_scale,
        ctx.sign,
        ctx.x_dtype,
    )
    needs = ctx.needs_input_grad
    return (
        dx if needs[0] else None,
        grad_average.to(ctx.average_dtype) if needs[1] and grad_average is not None else None,
        dv if needs[2] else None,
        du if needs[3] else None,
        *(None,) * 9,
    )


_library.define(
    "rollout_step",
    "(Tensor x, Tensor? average, Tensor velocity, Tensor? uncond_velocity, Tensor sigma, Tensor sigma_next, "
    "Tensor weight, float guidance_scale, int sign, float time_scale, float time_offset, ScalarType model_dtype, "
    "bool last) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    implementations={"reference": reference.rollout_step, "triton": f"{__name__}.kernels:rollout_step"},
    autograd=(_setup_context, _backward),
)
_library.define(
    "rollout_step_backward",
    "(Tensor? grad_x, Tensor? grad_average, Tensor? grad_input, Tensor velocity, Tensor? uncond_velocity, "
    "Tensor sigma, Tensor sigma_next, Tensor weight, float guidance_scale, int sign, ScalarType x_dtype) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    implementations={
        "reference": reference.rollout_step_backward,
        "triton": f"{__name__}.kernels:rollout_step_backward",
    },
)
