"""Triton kernels of ``flowmap_loss`` and their launchers."""

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
def _flowmap_loss_fwd_kernel(
    loss_ptr,
    unweighted_ptr,
    residual_ptr,
    partial_ptr,
    counter_ptr,
    prediction_ptr,
    target_ptr,
    uncond_ptr,
    u_plus_ptr,
    u_minus_ptr,
    interval_ptr,
    gap_ptr,
    weight_ptr,
    cond_factor: tl.float64,  # 1 / g
    uncond_factor: tl.float64,  # (g - 1) / g
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
    sample, programs, offset, mask, time, time_mask = tile_of_sample(
        row_count, middle, frames, inner, INDEX, TILE_ROWS, TILE_COLUMNS
    )
    p = tl.load(prediction_ptr + offset, mask=mask, other=0.0).to(ACCUMULATE)
    if uncond_ptr is not None:
        u = tl.load(uncond_ptr + offset, mask=mask, other=0.0).to(ACCUMULATE)
        p = tl.full((), cond_factor, ACCUMULATE) * p + tl.full((), uncond_factor, ACCUMULATE) * u
    v = tl.load(target_ptr + offset, mask=mask, other=0.0).to(ACCUMULATE)
    residual = SIGN * p - v
    if u_plus_ptr is not None:
        interval = tl.load(interval_ptr + time, mask=time_mask, other=0.0).to(ACCUMULATE)
        gap = tl.load(gap_ptr + time, mask=time_mask, other=1.0).to(ACCUMULATE)
        differs = interval != 0  # elsewhere u_plus and u_minus are not even read
        factor = SIGN * tl.full((), cond_factor, ACCUMULATE) * tl.where(differs, interval / gap, 0.0)
        difference_mask = mask & differs[:, None]
        difference = tl.load(u_plus_ptr + offset, mask=difference_mask, other=0.0).to(ACCUMULATE)
        difference -= tl.load(u_minus_ptr + offset, mask=difference_mask, other=0.0).to(ACCUMULATE)
        residual += factor[:, None] * difference
    if residual_ptr is not None:
        tl.store(residual_ptr + offset, residual, mask=mask)

    square = tl.where(mask, residual * residual, 0.0)
    weight = tl.load(weight_ptr + time, mask=time_mask, other=0.0).to(ACCUMULATE)
    unweighted_partial_ptr = partial_ptr + tl.num_programs(0)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.sum(weight[:, None] * square, axis=1), axis=0))
    tl.store(unweighted_partial_ptr + tl.program_id(0), tl.sum(tl.sum(square, axis=1), axis=0))
    if arrives_last(counter_ptr + sample, programs):
        first = sample * programs
        count = tl.full((), 1, tl.int64) * row_count * inner
        tl.store(loss_ptr + sample, add_partials(partial_ptr + first, programs, ACCUMULATE) / count)
        tl.store(unweighted_ptr + sample, add_partials(unweighted_partial_ptr + first, programs, ACCUMULATE) / count)


@triton.jit
def _flowmap_loss_bwd_kernel(
    grad_prediction_ptr,
    grad_loss_ptr,
    grad_unweighted_ptr,
    residual_ptr,
    weight_ptr,
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
    sample, _, offset, mask, time, time_mask = tile_of_sample(
        row_count, middle, frames, inner, INDEX, TILE_ROWS, TILE_COLUMNS
    )
    scale = tl.zeros((TILE_ROWS,), ACCUMULATE)
    if grad_loss_ptr is not None:
        weight = tl.load(weight_ptr + time, mask=time_mask, other=0.0).to(ACCUMULATE)
        scale += weight * tl.load(grad_loss_ptr + sample)
    if grad_unweighted_ptr is not None:
        scale += tl.load(grad_unweighted_ptr + sample)
    scale *= tl.full((), factor, ACCUMULATE)
    grad = scale[:, None] * tl.load(residual_ptr + offset, mask=mask, other=0.0)
    tl.store(grad_prediction_ptr + offset, grad.to(grad_prediction_ptr.dtype.element_ty), mask=mask)


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
    shape, device = prediction.shape, prediction.device
    accumulate = accumulation_dtype(prediction, target_velocity)
    residual = torch.empty(shape if need_residual else 0, dtype=accumulate, device=device)
    if prediction.numel() == 0:
        loss, unweighted = (torch.zeros(shape[0], dtype=accumulate, device=device) for _ in range(2))
        return loss, unweighted, residual
    loss = torch.empty(shape[0], dtype=accumulate, device=device)
    unweighted = torch.empty(shape[0], dtype=accumulate, device=device)
    times = [time for time in (interval, gap, weight) if time is not None]
    tiling, rows = rows_of_samples("flowmap_loss", shape, *times)
    programs = shape[0] * tiling.programs
    _flowmap_loss_fwd_kernel[(programs,)](
        loss,
        unweighted,
        residual if need_residual else None,
        torch.empty((2, programs), dtype=accumulate, device=device),
        arrival_counters(device, shape[0]),
        prediction.contiguous(),
        target_velocity.contiguous(),
        *(None if u is None else u.contiguous() for u in (uncond_prediction, u_plus, u_minus)),
        *[None] * (3 - len(rows)),
        *rows,
        1 / guidance_scale,
        (guidance_scale - 1) / guidance_scale,
        *tiling.sizes,
        SIGN=sign,
        ACCUMULATE=ACCUMULATOR[accumulate],
        **tiling.options,
    )
    return loss, unweighted, residual


def flowmap_loss_backward(
    grad_loss: Tensor | None,
    grad_unweighted: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    guidance_scale: float,
    sign: int,
    dtype: torch.dtype,
) -> Tensor:
    shape = residual.shape
    grad = torch.empty(shape, dtype=dtype, device=residual.device)
    if grad.numel() > 0:
        tiling, rows = rows_of_samples("flowmap_loss", shape, weight)
        _flowmap_loss_bwd_kernel[(shape[0] * tiling.programs,)](
            grad,
            *(None if g is None else g.contiguous() for g in (grad_loss, grad_unweighted)),
            residual.contiguous(),
            *rows,
            2 * sign / guidance_scale / (tiling.row_count * tiling.inner),
            *tiling.sizes,
            ACCUMULATE=ACCUMULATOR[residual.dtype],
            **tiling.options,
        )
    return grad
