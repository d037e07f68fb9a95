"""Plain PyTorch: the specification of ``gate_blend`` and its CPU path."""

from __future__ import annotations

from torch import Tensor

from .._library import accumulation_dtype


def gate_blend(base: Tensor, delta: Tensor, gate: Tensor) -> Tensor:
    accumulate = accumulation_dtype(base, delta)
    e, d, g = base.to(accumulate), delta.to(accumulate), gate.to(accumulate).reshape(())
    return (e + g * (d - e)).to(base.dtype).contiguous()


def gate_blend_backward(
    grad: Tensor, base: Tensor, delta: Tensor, gate: Tensor, need_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    accumulate = accumulation_dtype(base, delta)
    dy, g = grad.to(accumulate), gate.to(accumulate).reshape(())
    grad_delta = g * dy
    grad_base = (1 - g) * dy
    if need_gate:
        grad_gate = (dy * (delta.to(accumulate) - base.to(accumulate))).sum().to(gate.dtype).reshape(gate.shape)
    else:
        grad_gate = gate.new_zeros(gate.shape)
    return grad_base.to(base.dtype).contiguous(), grad_delta.to(delta.dtype).contiguous(), grad_gate
