"""Triton kernels of ``gate_blend`` and their launchers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import accumulation_dtype
from .._triton import ACCUMULATOR, LaunchConfig
from .._tuning import size_of, tuned


@triton.jit
def _gate_blend_fwd_kernel(y_ptr, base_ptr, delta_ptr, gate_ptr, numel, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < numel
    e = tl.load(base_ptr + offset, mask=mask, other=0.0).to(ACCUMULATE)
    d = tl.load(delta_ptr + offset, mask=mask, other=0.0).to(ACCUMULATE)
    g = tl.load(gate_ptr).to(ACCUMULATE)
    y = e + g * (d - e)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gate_blend_bwd_kernel(
    grad_base_ptr,
    grad_delta_ptr,
    partial_ptr,
    grad_ptr,
    base_ptr,
    delta_ptr,
    gate_ptr,
    numel,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    offset = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < numel
    dy = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(ACCUMULATE)
    g = tl.load(gate_ptr).to(ACCUMULATE)
    tl.store(grad_base_ptr + offset, ((1 - g) * dy).to(grad_base_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_delta_ptr + offset, (g * dy).to(grad_delta_ptr.dtype.element_ty), mask=mask)
    if partial_ptr is not None:
        e = tl.load(base_ptr + offset, mask=mask, other=0.0).to(ACCUMULATE)
        d = tl.load(delta_ptr + offset, mask=mask, other=0.0).to(ACCUMULATE)
        tl.store(partial_ptr + program, tl.sum(dy * (d - e), axis=0))


def _config(base: Tensor) -> LaunchConfig:
    return tuned("gate_blend", size_of(base.numel()), LaunchConfig(), base.device)


def gate_blend(base: Tensor, delta: Tensor, gate: Tensor) -> Tensor:
    y = torch.empty_like(base, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    config = _config(base)
    _gate_blend_fwd_kernel[(triton.cdiv(y.numel(), config.block),)](
        y,
        base.contiguous(),
        delta.contiguous(),
        gate,
        y.numel(),
        ACCUMULATE=ACCUMULATOR[accumulation_dtype(base, delta)],
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
    return y


def gate_blend_backward(
    grad: Tensor, base: Tensor, delta: Tensor, gate: Tensor, need_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_base = torch.empty_like(base, memory_format=torch.contiguous_format)
    grad_delta = torch.empty_like(delta, memory_format=torch.contiguous_format)
    numel = base.numel()
    if numel == 0:
        return grad_base, grad_delta, gate.new_zeros(gate.shape)
    accumulate = accumulation_dtype(base, delta)
    config = _config(base)
    programs = triton.cdiv(numel, config.block)
    partial = torch.empty(programs, dtype=accumulate, device=base.device) if need_gate else None
    _gate_blend_bwd_kernel[(programs,)](
        grad_base,
        grad_delta,
        partial,
        grad.contiguous(),
        base.contiguous() if need_gate else None,
        delta.contiguous() if need_gate else None,
        gate,
        numel,
        ACCUMULATE=ACCUMULATOR[accumulate],
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
    grad_gate = gate.new_zeros(gate.shape) if partial is None else partial.sum().to(gate.dtype).reshape(gate.shape)
    return grad_base, grad_delta, grad_gate
