"""Triton kernels of ``dmd_gradient`` and their launchers: the sums of each sample, then its gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import accumulation_dtype
from .._triton import (
    ACCUMULATOR,
    add_partials,
    arrival_counters,
    arrives_last,
    rows_of_samples,
    tile_of_sample,
)


@triton.jit
def _scores(
    real_ptr,
    fake_ptr,
    uncond_ptr,
    sigma_ptr,
    guidance_scale,
    offset,
    mask,
    time,
    time_mask,
    SIGN: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """sigma v of the real score, and x0_fake - x0_real"""
    sigma = SIGN * tl.load(sigma_ptr + time, mask=time_mask, other=0.0).to(ACCUMULATE)[:, None]
    real = tl.load(real_ptr + offset, mask=mask, other=0.0).to(ACCUMULATE)
    if uncond_ptr is not None:
        uncond = tl.load(uncond_ptr + offset, mask=mask, other=0.0).to(ACCUMULATE)
        real = uncond + tl.full((), guidance_scale, ACCUMULATE) * (real - uncond)
    fake = tl.load(fake_ptr + offset, mask=mask, other=0.0).to(ACCUMULATE)
    return sigma * real, sigma * (real - fake)


@triton.jit
def _dmd_gradient_sums_kernel(
    loss_ptr,
    normaliser_ptr,
    partial_ptr,
    counter_ptr,
    x_ptr,
    x_sigma_ptr,
    real_ptr,
    fake_ptr,
    uncond_ptr,
    sigma_ptr,
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
    """The loss and the normaliser of each sample; both zero where they are of no use."""
    sample, programs, offset, mask, time, time_mask = tile_of_sample(
        row_count, middle, frames, inner, INDEX, TILE_ROWS, TILE_COLUMNS
    )
    step, difference = _scores(
        real_ptr, fake_ptr, uncond_ptr, sigma_ptr, guidance_scale, offset, mask, time, time_mask, SIGN, ACCUMULATE
    )
    x0_real = tl.load(x_sigma_ptr + offset, mask=mask, other=0.0).to(ACCUMULATE) - step
    distance = tl.abs(tl.load(x_ptr + offset, mask=mask, other=0.0).to(ACCUMULATE) - x0_real)
    square_partial_ptr = partial_ptr + tl.num_programs(0)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.sum(distance, axis=1), axis=0))
    tl.store(square_partial_ptr + tl.program_id(0), tl.sum(tl.sum(difference * difference, axis=1), axis=0))
    if arrives_last(counter_ptr + sample, programs):
        first = sample * programs
        count = tl.full((), 1, tl.int64) * row_count * inner
        normaliser = add_partials(partial_ptr + first, programs, ACCUMULATE) / count
        size = add_partials(square_partial_ptr + first, programs, ACCUMULATE) / count / normaliser / normaliser
        usable = size < float("inf")  # nor is it where the normaliser is zero; an infinite one makes zeros by itself
        tl.store(loss_ptr + sample, tl.where(usable, 0.5 * size, 0.0))
        tl.store(normaliser_ptr + sample, tl.where(usable, normaliser, 0.0))


@triton.jit
def _dmd_gradient_fwd_kernel(
    gradient_ptr,
    normaliser_ptr,
    real_ptr,
    fake_ptr,
    uncond_ptr,
    sigma_ptr,
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
    sample, _, offset, mask, time, time_mask = tile_of_sample(
        row_count, middle, frames, inner, INDEX, TILE_ROWS, TILE_COLUMNS
    )
    _, difference = _scores(
        real_ptr, fake_ptr, uncond_ptr, sigma_ptr, guidance_scale, offset, mask, time, time_mask, SIGN, ACCUMULATE
    )
    normaliser = tl.load(normaliser_ptr + sample)
    usable = normaliser > 0
    gradient = tl.where(usable, difference / tl.where(usable, normaliser, 1.0), 0.0)
    tl.store(gradient_ptr + offset, gradient, mask=mask)


@triton.jit
def _dmd_gradient_bwd_kernel(
    grad_x_ptr,
    grad_loss_ptr,
    gradient_ptr,
    factor: tl.float64,
    row_count,
    middle,
    frames,
    inner,
    ACCUMULATE: tl.constexpr,
    INDEX: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    sample, _, offset, mask, _, _ = tile_of_sample(row_count, middle, frames, inner, INDEX, TILE_ROWS, TILE_COLUMNS)
    scale = tl.load(grad_loss_ptr + sample) * tl.full((), factor, ACCUMULATE)
    grad = scale * tl.load(gradient_ptr + offset, mask=mask, other=0.0)
    tl.store(grad_x_ptr + offset, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)


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
    shape, device = x.shape, x.device
    accumulate = accumulation_dtype(x, x_sigma, real_velocity)
    gradient = torch.empty(shape, dtype=accumulate, device=device)
    if x.numel() == 0:
        return torch.zeros(shape[0], dtype=accumulate, device=device), gradient
    loss = torch.empty(shape[0], dtype=accumulate, device=device)
    normaliser = torch.empty_like(loss)
    tiling, rows = rows_of_samples("dmd_gradient", shape, sigma)
    programs = shape[0] * tiling.programs
    scores = (
        real_velocity.contiguous(),
        fake_velocity.contiguous(),
        None if uncond_real_velocity is None else uncond_real_velocity.contiguous(),
        *rows,
        guidance_scale,
        *tiling.sizes,
    )
    options = {"SIGN": sign, "ACCUMULATE": ACCUMULATOR[accumulate], **tiling.options}
    _dmd_gradient_sums_kernel[(programs,)](
        loss,
        normaliser,
        torch.empty((2, programs), dtype=accumulate, device=device),
        arrival_counters(device, shape[0]),
        x.contiguous(),
        x_sigma.contiguous(),
        *scores,
        **options,
    )
    _dmd_gradient_fwd_kernel[(programs,)](gradient, normaliser, *scores, **options)
    return loss, gradient


def dmd_gradient_backward(grad_loss: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    shape = gradient.shape
    grad_x = torch.empty(shape, dtype=dtype, device=gradient.device)
    if grad_x.numel() > 0:
        tiling, _ = rows_of_samples("dmd_gradient", shape, grad_loss)
        _dmd_gradient_bwd_kernel[(shape[0] * tiling.programs,)](
            grad_x,
            grad_loss.contiguous(),
            gradient.contiguous(),
            1 / (tiling.row_count * tiling.inner),
            *tiling.sizes,
            ACCUMULATE=ACCUMULATOR[gradient.dtype],
            **tiling.options,
        )
    return grad_x
