"""``gate_blend``: the blend of two time embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _library
from . import reference

__all__ = ["gate_blend"]


def gate_blend(base: Tensor, delta: Tensor, gate: Tensor) -> Tensor:
    """y = base + gate (delta - base)

    The gate between the embedding of t and the embedding of r (AnyFlow, arXiv 2605.13724), in the form that is exact
    where both embeddings agree and where the gate is 0. For embedders that are not two plain linear layers;
    ``flowmap_embedding`` does the whole conditioning.

    Shapes: ``base`` and ``delta`` alike, any shape, any strides; ``gate`` has one element.
    Dtypes: any floating point, mixed freely. Computed in float32 (float64 when an input is float64) and rounded once,
        to the dtype of ``base``. Gradients come back in the dtype of each input.
    Ranges: ``gate`` is usually in [0, 1], not checked (that would synchronise with the device).
    Saved for backward: the gate; also ``base`` and ``delta`` (for the gradient of the gate).
    Deterministic. The result is contiguous and aliases no input.

    Raises ValueError for unequal shapes, a gate of several elements, mixed devices or non-floating dtypes;
    NotImplementedError under forward-mode differentiation.
    """
    if base.shape != delta.shape:
        raise ValueError(
            f"gate_blend: base and delta must have one shape, got {tuple(base.shape)} and {tuple(delta.shape)}"
        )
    if gate.numel() != 1:
        raise ValueError(f"gate_blend: gate must have one element, got shape {tuple(gate.shape)}")
    _library.floating_on_one_device("gate_blend", base=base, delta=delta, gate=gate)
    _library.refuse_forward_ad("gate_blend", base, delta, gate)
    return torch.ops.anyflow_kernels.gate_blend.default(base, delta, gate)


def _fake(base: Tensor, delta: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(base, memory_format=torch.contiguous_format)


def _backward_fake(
    grad: Tensor, base: Tensor, delta: Tensor, gate: Tensor, need_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(base, memory_format=contiguous),
        torch.empty_like(delta, memory_format=contiguous),
        torch.empty_like(gate, memory_format=contiguous),
    )


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    base, delta, gate = ctx.saved_tensors
    grads = torch.ops.anyflow_kernels.gate_blend_backward.default(grad, base, delta, gate, ctx.needs_input_grad[2])
    return tuple(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=True))


_library.define(
    "gate_blend",
    "(Tensor base, Tensor delta, Tensor gate) -> Tensor",
    fake=_fake,
    implementations={"reference": reference.gate_blend, "triton": f"{__name__}.kernels:gate_blend"},
    autograd=(_setup_context, _backward),
)
_library.define(
    "gate_blend_backward",
    "(Tensor grad, Tensor base, Tensor delta, Tensor gate, bool need_gate) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    implementations={
        "reference": reference.gate_blend_backward,
        "triton": f"{__name__}.kernels:gate_blend_backward",
    },
)
