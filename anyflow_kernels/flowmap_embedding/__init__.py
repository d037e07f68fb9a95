"""``flowmap_embedding``: the embedding of a pair of times."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _library
from . import reference

__all__ = ["EmbedderWeights", "flowmap_embedding"]

DELTATIME_TYPES = ("r", "t-r", "r-t")


class EmbedderWeights(NamedTuple):
    """The two linear layers of a time embedder: [H, num_channels], [H] or None, [D, H], [D] or None."""

    weight_1: Tensor
    bias_1: Tensor | None
    weight_2: Tensor
    bias_2: Tensor | None


def flowmap_embedding(
    t: Tensor,
    r: Tensor,
    base: EmbedderWeights,
    delta: EmbedderWeights,
    gate: Tensor,
    *,
    num_channels: int = 256,
    flip_sin_to_cos: bool = True,
    downscale_freq_shift: float = 0.0,
    scale: float = 1.0,
    max_period: float = 10000.0,
    time_scale: float = 1.0,
    deltatime_type: str = "r",
    with_silu: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = e + gate (d - e),  e = base(sinusoid(time_scale t)),  d = delta(sinusoid(time_scale tau))

    The dual-time embedding of a flow map (AnyFlow, arXiv 2605.13724), each embedder being linear, SiLU, linear, and
    tau = r, t - r or r - t by ``deltatime_type``. With C = num_channels and f_i = max_period^(-i / (C/2 - shift)) the
    sinusoid is [cos(scale tau f), sin(scale tau f)] (sine first when ``flip_sin_to_cos`` is false), zero-padded for
    odd C (DDPM, arXiv 2006.11239, as diffusers' ``Timesteps`` writes it).

    Shapes: ``t`` and ``r`` alike, any shape [...]; the result is [..., D], and with ``with_silu`` the pair of it and
        SiLU of it. ``base`` and ``delta`` may differ in their hidden width H. ``gate`` has one element. Dimensions that
        are expanded (stride 0) in both ``t`` and ``r`` are computed once.
    Dtypes: ``t`` and ``r`` float32 or float64, never lower: bfloat16 holds 937 as 936. Each embedder works in the dtype
        of its own weights, from features rounded to it; the blend is accumulated in float32 (float64 for float64) and
        rounded once, to the dtype of ``base.weight_2``. Gradients come back in the dtype of each input.
    Units: t and r in the model's own time units; ``time_scale`` is the factor that the model applies before the
        sinusoid, e.g. 1000 for a model whose argument is sigma.
    Saved for backward: the inputs; activations are computed again. Differentiable in the weights and the gate, not in
        the times.
    Deterministic. Slower than a matrix product in the model's dtype for thousands of distinct rows: then blend two
        embedder calls with ``gate_blend``.

    Raises ValueError for unequal shapes, an unknown ``deltatime_type``, times that are not float32 or float64 or that
    require gradients, weights that do not fit, mixed devices; NotImplementedError under forward-mode differentiation.
    """
    if t.shape != r.shape:
        raise ValueError(f"flowmap_embedding: t and r must have one shape, got {tuple(t.shape)} and {tuple(r.shape)}")
    if deltatime_type not in DELTATIME_TYPES:
        raise ValueError(f"flowmap_embedding: deltatime_type {deltatime_type!r} is none of {DELTATIME_TYPES}")
    for name, time in (("t", t), ("r", r)):
        if time.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"flowmap_embedding: {name} must be float32 or float64, got {time.dtype}")
        if time.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"flowmap_embedding: not differentiable in {name}, which requires a gradient; detach it")
    if gate.numel() != 1:
        raise ValueError(f"flowmap_embedding: gate must have one element, got shape {tuple(gate.shape)}")
    base, delta = EmbedderWeights(*base), EmbedderWeights(*delta)
    _check_weights("base", base, num_channels)
    _check_weights("delta", delta, num_channels)
    if base.weight_2.shape[0] != delta.weight_2.shape[0]:
        raise ValueError(
            f"flowmap_embedding: base gives {base.weight_2.shape[0]} channels, delta {delta.weight_2.shape[0]}"
        )
    named = {f"base.{n}": w for n, w in base._asdict().items()} | {f"delta.{n}": w for n, w in delta._asdict().items()}
    _library.floating("flowmap_embedding", gate=gate, **named)
    _library.same_device("flowmap_embedding", t=t, r=r, gate=gate, **named)
    _library.refuse_forward_ad("flowmap_embedding", t, r, gate, *base, *delta)

    shape = t.shape
    t, r = _drop_expanded(t, r)
    embedding, silu = torch.ops.anyflow_kernels.flowmap_embedding.default(
        t.reshape(-1),
        r.reshape(-1),
        *base,
        *delta,
        gate,
        num_channels,
        flip_sin_to_cos,
        float(downscale_freq_shift),
        float(scale),
        float(max_period),
        float(time_scale),
        deltatime_type,
        with_silu,
    )
    distinct, channels = t.shape, base.weight_2.shape[0]

    def restore(rows: Tensor) -> Tensor:
        return rows.reshape(*distinct, channels).expand(*shape, channels).contiguous()

    return (restore(embedding), restore(silu)) if with_silu else restore(embedding)


def _drop_expanded(t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Narrow the dimensions that are expanded in both: their rows are equal, known without looking at a value."""
    for dim in range(t.ndim):
        if t.shape[dim] > 1 and t.stride(dim) == 0 and r.stride(dim) == 0:
            t, r = t.narrow(dim, 0, 1), r.narrow(dim, 0, 1)
    return t, r


def _check_weights(name: str, weights: EmbedderWeights, num_channels: int) -> None:
    w1, b1, w2, b2 = weights
    fits = (
        w1.ndim == 2
        and w2.ndim == 2
        and w1.shape[1] == num_channels
        and w2.shape[1] == w1.shape[0]
        and (b1 is None or b1.shape == w1.shape[:1])
        and (b2 is None or b2.shape == w2.shape[:1])
    )
    if not fits:
        shapes = [None if w is None else tuple(w.shape) for w in weights]
        raise ValueError(f"flowmap_embedding: the weights of {name} do not fit {num_channels} channels: {shapes}")
    for weight, bias in ((w1, b1), (w2, b2)):
        if bias is not None and bias.dtype != weight.dtype:
            raise ValueError(f"flowmap_embedding: {name} has a {weight.dtype} weight with a {bias.dtype} bias")


def _fake(t: Tensor, r: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    base_weight_2, with_silu = arguments[2], arguments[-1]
    shape = (t.shape[0], base_weight_2.shape[0])
    return base_weight_2.new_empty(shape), base_weight_2.new_empty(shape if with_silu else (0,))


def _backward_fake(grad: Tensor, grad_silu: Tensor | None, t: Tensor, r: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    weights, gate, needs = arguments[:8], arguments[8], arguments[-3:]
    needed = [needs[0]] * 4 + [needs[1]] * 4 + [needs[2]]
    return tuple(
        torch.empty(w.shape, dtype=w.dtype, device=w.device) if n and w is not None else t.new_empty(0)
        for w, n in zip((*weights, gate), needed, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:11])
    ctx.options, ctx.with_silu = inputs[11:18], inputs[18]


def _backward(ctx: Any, grad: Tensor, grad_silu: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    grads = torch.ops.anyflow_kernels.flowmap_embedding_backward.default(
        grad,
        grad_silu if ctx.with_silu else None,
        *ctx.saved_tensors,
        *ctx.options,
        any(needs[2:6]),
        any(needs[6:10]),
        needs[10],
    )
    kept = [g if needed else None for g, needed in zip(grads, needs[2:11], strict=True)]
    return (None, None, *kept, *(None,) * 8)


_TIMES_AND_WEIGHTS = (
    "Tensor t, Tensor r, Tensor base_weight_1, Tensor? base_bias_1, Tensor base_weight_2, Tensor? base_bias_2, "
    "Tensor delta_weight_1, Tensor? delta_bias_1, Tensor delta_weight_2, Tensor? delta_bias_2, Tensor gate, "
    "int num_channels, bool flip_sin_to_cos, float downscale_freq_shift, float scale, float max_period, "
    "float time_scale, str deltatime_type"
)
_library.define(
    "flowmap_embedding",
    f"({_TIMES_AND_WEIGHTS}, bool with_silu) -> (Tensor, Tensor)",
    fake=_fake,
    implementations={"reference": reference.flowmap_embedding, "triton": f"{__name__}.kernels:flowmap_embedding"},
    autograd=(_setup_context, _backward),
)
_library.define(
    "flowmap_embedding_backward",
    f"(Tensor grad, Tensor? grad_silu, {_TIMES_AND_WEIGHTS}, bool need_base, bool need_delta, bool need_gate) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    implementations={
        "reference": reference.flowmap_embedding_backward,
        "triton": f"{__name__}.kernels:flowmap_embedding_backward",
    },
)
