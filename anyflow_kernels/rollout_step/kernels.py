"""Triton kernels of ``rollout_step`` and their launchers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import accumulation_dtype
from .._triton import ACCUMULATOR, rows_of, tile


@triton.jit
def _rollout_step_fwd_kernel(
    new_x_ptr,
    new_average_ptr,
    model_input_ptr,
    model_time_ptr,
    x_ptr,
    average_ptr,
    velocity_ptr,
    uncond_ptr,
    sigma_ptr,
    sigma_next_ptr,
    weight_ptr,
    times_ptr,
    times_count,
    guidance_scale: tl.float64,
    time_scale: tl.float64,
    time_offset: tl.float64,
    row_count,
    middle,
    frames,
    inner,
    SIGN: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ACCUMULATE_TIME: tl.constexpr,
    INDEX: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    offset, mask, time, time_mask = tile(
        tl.program_id(0), row_count, middle, frames, inner, INDEX, TILE_ROWS, TILE_COLUMNS
    )
    v = tl.load(velocity_ptr + offset, mask=mask, other=0.0).to(ACCUMULATE)
    if uncond_ptr is not None:
        v_u = tl.load(uncond_ptr + offset, mask=mask, other=0.0).to(ACCUMULATE)
        v = v_u + tl.full((), guidance_scale, ACCUMULATE) * (v - v_u)
    if SIGN == -1:
        v = -v
    weight = tl.load(weight_ptr + time, mask=time_mask, other=0.0).to(ACCUMULATE)
    average = weight[:, None] * v
    if average_ptr is not None:
        average += tl.load(average_ptr + offset, mask=mask, other=0.0).to(ACCUMULATE)
    tl.store(new_average_ptr + offset, average, mask=mask)
    if new_x_ptr is not None:
        sigma = tl.load(sigma_ptr + time, mask=time_mask, other=0.0).to(ACCUMULATE)
        sigma_next = tl.load(sigma_next_ptr + time, mask=time_mask, other=0.0).to(ACCUMULATE)
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(ACCUMULATE)
        x += (sigma_next - sigma)[:, None] * v
        tl.store(new_x_ptr + offset, x, mask=mask)
        if model_input_ptr is not None:
            tl.store(model_input_ptr + offset, x.to(model_input_ptr.dtype.element_ty), mask=mask)

        first = tl.program_id(0).to(tl.int64) * (TILE_ROWS * TILE_COLUMNS)
        if first < times_count:
            position = first + tl.arange(0, TILE_ROWS * TILE_COLUMNS)
            inside = position < times_count
            next_time = tl.load(times_ptr + position, mask=inside, other=0.0).to(ACCUMULATE_TIME)
            next_time *= tl.full((), time_scale, ACCUMULATE_TIME)
            next_time += tl.full((), time_offset, ACCUMULATE_TIME)
            tl.store(model_time_ptr + position, next_time.to(model_time_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rollout_step_bwd_kernel(
    grad_x_out_ptr,
    grad_velocity_ptr,
    grad_uncond_ptr,
    grad_x_ptr,
    grad_average_ptr,
    grad_input_ptr,
    sigma_ptr,
    sigma_next_ptr,
    weight_ptr,
    guidance_scale: tl.float64,
    row_count,
    middle,
    frames,
    inner,
    SIGN: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    INDEX: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    offset, mask, time, time_mask = tile(
        tl.program_id(0), row_count, middle, frames, inner, INDEX, TILE_ROWS, TILE_COLUMNS
    )
    dx = tl.zeros((TILE_ROWS, TILE_COLUMNS), ACCUMULATE)
    if grad_x_ptr is not None:
        dx += tl.load(grad_x_ptr + offset, mask=mask, other=0.0).to(ACCUMULATE)
    if grad_input_ptr is not None:
        dx += tl.load(grad_input_ptr + offset, mask=mask, other=0.0).to(ACCUMULATE)
    tl.store(grad_x_out_ptr + offset, dx.to(grad_x_out_ptr.dtype.element_ty), mask=mask)

    sigma = tl.load(sigma_ptr + time, mask=time_mask, other=0.0).to(ACCUMULATE)
    sigma_next = tl.load(sigma_next_ptr + time, mask=time_mask, other=0.0).to(ACCUMULATE)
    dv = (sigma_next - sigma)[:, None] * dx
    if grad_average_ptr is not None:
        weight = tl.load(weight_ptr + time, mask=time_mask, other=0.0).to(ACCUMULATE)
        dv += weight[:, None] * tl.load(grad_average_ptr + offset, mask=mask, other=0.0).to(ACCUMULATE)
    if SIGN == -1:
        dv = -dv
    if grad_uncond_ptr is not None:
        du = tl.full((), 1.0 - guidance_scale, ACCUMULATE) * dv
        dv *= tl.full((), guidance_scale, ACCUMULATE)
        tl.store(grad_uncond_ptr + offset, du.to(grad_uncond_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_velocity_ptr + offset, dv.to(grad_velocity_ptr.dtype.element_ty), mask=mask)


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
    device, shape = x.device, x.shape
    new_average = torch.empty(shape, dtype=accumulate, device=device)
    state_shape = torch.Size([0]) if last else shape
    new_x = torch.empty(state_shape, dtype=accumulate, device=device)
    input_shape = state_shape if model_dtype != accumulate else torch.Size([0])
    model_input = torch.empty(input_shape, dtype=model_dtype, device=device)
    times_shape = state_shape if last else sigma_next.shape
    model_time = torch.empty(times_shape, dtype=sigma_next.dtype, device=device)

    if x.numel() == 0:
        return (
            new_x,
            new_average,
            model_input,
            model_time if last else (time_scale * sigma_next + time_offset).contiguous(),
        )
    tiling, rows = rows_of("rollout_step", shape, sigma, sigma_next, weight)
    times = sigma_next.contiguous()
    _rollout_step_fwd_kernel[(tiling.programs,)](
        None if last else new_x,
        new_average,
        None if last or model_dtype == accumulate else model_input,
        None if last else model_time,
        None if last else x.contiguous(),
        None if average is None else average.contiguous(),
        velocity.contiguous(),
        None if uncond_velocity is None else uncond_velocity.contiguous(),
        *rows,
        times,
        times.numel(),
        guidance_scale,
        time_scale,
        time_offset,
        *tiling.sizes,
        SIGN=sign,
        ACCUMULATE=ACCUMULATOR[accumulate],
        ACCUMULATE_TIME=ACCUMULATOR[accumulation_dtype(times)],
        **tiling.options,
    )
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
    grads = (grad_x, grad_average, grad_input)
    accumulate = accumulation_dtype(velocity, *(g for g in grads if g is not None))
    contiguous = torch.contiguous_format
    dx = torch.empty_like(velocity, dtype=x_dtype, memory_format=contiguous)
    dv = torch.empty_like(velocity, memory_format=contiguous)
    du = None if uncond_velocity is None else torch.empty_like(uncond_velocity, memory_format=contiguous)

    if velocity.numel() > 0:
        tiling, rows = rows_of("rollout_step", velocity.shape, sigma, sigma_next, weight)
        _rollout_step_bwd_kernel[(tiling.programs,)](
            dx,
            dv,
            du,
            *(None if g is None else g.contiguous() for g in grads),
            *rows,
            guidance_scale,
            *tiling.sizes,
            SIGN=sign,
            ACCUMULATE=ACCUMULATOR[accumulate],
            **tiling.options,
        )
    return dx, dv, velocity.new_empty(0) if du is None else du
