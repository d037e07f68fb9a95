"""Triton kernels of ``interval_inputs`` and their launchers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import accumulation_dtype
from .._triton import ACCUMULATOR, rows_of, tile


@triton.jit
def _store_input(x_ptr, sigma_ptr, x0, noise, offset, mask, time, time_mask, ACCUMULATE: tl.constexpr):
    sigma = tl.load(sigma_ptr + time, mask=time_mask, other=0.0).to(ACCUMULATE)[:, None]
    x = (1 - sigma) * x0 + sigma * noise
    tl.store(x_ptr + offset, x.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _interval_inputs_fwd_kernel(
    x_ptr,
    x_plus_ptr,
    x_minus_ptr,
    velocity_ptr,
    x0_ptr,
    noise_ptr,
    sigma_ptr,
    sigma_plus_ptr,
    sigma_minus_ptr,
    row_count,
    middle,
    frames,
    inner,
    ACCUMULATE: tl.constexpr,
    INDEX: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    offset, mask, time, time_mask = tile(
        tl.program_id(0), row_count, middle, frames, inner, INDEX, TILE_ROWS, TILE_COLUMNS
    )
    x0 = tl.load(x0_ptr + offset, mask=mask, other=0.0).to(ACCUMULATE)
    noise = tl.load(noise_ptr + offset, mask=mask, other=0.0).to(ACCUMULATE)
    tl.store(velocity_ptr + offset, noise - x0, mask=mask)
    _store_input(x_ptr, sigma_ptr, x0, noise, offset, mask, time, time_mask, ACCUMULATE)
    if sigma_plus_ptr is not None:
        _store_input(x_plus_ptr, sigma_plus_ptr, x0, noise, offset, mask, time, time_mask, ACCUMULATE)
        _store_input(x_minus_ptr, sigma_minus_ptr, x0, noise, offset, mask, time, time_mask, ACCUMULATE)


@triton.jit
def _add_gradient(dx0, dnoise, grad_ptr, sigma_ptr, offset, mask, time, time_mask, ACCUMULATE: tl.constexpr):
    if grad_ptr is not None:
        sigma = tl.load(sigma_ptr + time, mask=time_mask, other=0.0).to(ACCUMULATE)[:, None]
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(ACCUMULATE)
        dx0 += (1 - sigma) * grad
        dnoise += sigma * grad
    return dx0, dnoise


@triton.jit
def _interval_inputs_bwd_kernel(
    grad_x0_ptr,
    grad_noise_ptr,
    grad_x_ptr,
    grad_plus_ptr,
    grad_minus_ptr,
    grad_velocity_ptr,
    sigma_ptr,
    sigma_plus_ptr,
    sigma_minus_ptr,
    row_count,
    middle,
    frames,
    inner,
    ACCUMULATE: tl.constexpr,
    INDEX: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    offset, mask, time, time_mask = tile(
        tl.program_id(0), row_count, middle, frames, inner, INDEX, TILE_ROWS, TILE_COLUMNS
    )
    dnoise = tl.zeros((TILE_ROWS, TILE_COLUMNS), ACCUMULATE)
    dx0 = tl.zeros((TILE_ROWS, TILE_COLUMNS), ACCUMULATE)
    if grad_velocity_ptr is not None:
        dnoise += tl.load(grad_velocity_ptr + offset, mask=mask, other=0.0).to(ACCUMULATE)
        dx0 -= dnoise
    dx0, dnoise = _add_gradient(dx0, dnoise, grad_x_ptr, sigma_ptr, offset, mask, time, time_mask, ACCUMULATE)
    dx0, dnoise = _add_gradient(dx0, dnoise, grad_plus_ptr, sigma_plus_ptr, offset, mask, time, time_mask, ACCUMULATE)
    dx0, dnoise = _add_gradient(dx0, dnoise, grad_minus_ptr, sigma_minus_ptr, offset, mask, time, time_mask, ACCUMULATE)
    tl.store(grad_x0_ptr + offset, dx0.to(grad_x0_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_noise_ptr + offset, dnoise.to(grad_noise_ptr.dtype.element_ty), mask=mask)


def interval_inputs(
    x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    sigma_plus: Tensor | None,
    sigma_minus: Tensor | None,
    model_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sigmas = [s for s in (sigma, sigma_plus, sigma_minus) if s is not None]
    accumulate = accumulation_dtype(x0, noise)
    velocity = torch.empty(x0.shape, dtype=accumulate, device=x0.device)
    inputs = [torch.empty(x0.shape, dtype=model_dtype, device=x0.device) for _ in sigmas]
    absent = [torch.empty(0, dtype=model_dtype, device=x0.device) for _ in range(3 - len(sigmas))]
    if x0.numel() > 0:
        tiling, rows = rows_of("interval_inputs", x0.shape, *sigmas)
        missing = [None] * len(absent)
        _interval_inputs_fwd_kernel[(tiling.programs,)](
            *inputs,
            *missing,
            velocity,
            x0.contiguous(),
            noise.contiguous(),
            *rows,
            *missing,
            *tiling.sizes,
            ACCUMULATE=ACCUMULATOR[accumulate],
            **tiling.options,
        )
    return *inputs, *absent, velocity


def interval_inputs_backward(
    grad_x: Tensor | None,
    grad_plus: Tensor | None,
    grad_minus: Tensor | None,
    grad_velocity: Tensor | None,
    sigma: Tensor,
    sigma_plus: Tensor | None,
    sigma_minus: Tensor | None,
    x0_dtype: torch.dtype,
    noise_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    grads = (grad_x, grad_plus, grad_minus, grad_velocity)
    like = next(grad for grad in grads if grad is not None)
    grad_x0, grad_noise = (torch.empty(like.shape, dtype=d, device=like.device) for d in (x0_dtype, noise_dtype))
    if like.numel() > 0:
        sigmas = [s for s in (sigma, sigma_plus, sigma_minus) if s is not None]
        tiling, rows = rows_of("interval_inputs", like.shape, *sigmas)
        _interval_inputs_bwd_kernel[(tiling.programs,)](
            grad_x0,
            grad_noise,
            *(None if g is None else g.contiguous() for g in grads),
            *rows,
            *[None] * (3 - len(rows)),
            *tiling.sizes,
            ACCUMULATE=ACCUMULATOR[accumulation_dtype(grad_x0, grad_noise)],
            **tiling.options,
        )
    return grad_x0, grad_noise
