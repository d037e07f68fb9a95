"""Plain PyTorch: the specification of ``flowmap_embedding`` and its CPU path."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import accumulation_dtype


def sinusoid(
    times: Tensor,
    num_channels: int,
    flip_sin_to_cos: bool,
    downscale_freq_shift: float,
    scale: float,
    max_period: float,
) -> Tensor:
    """[M] -> [M, num_channels], in float32 (float64 stays float64). The order of the roundings is that of diffusers'
    ``Timesteps``, so that float32 features are the stock ones to the bit."""
    dtype = accumulation_dtype(times)
    half = num_channels // 2
    exponent = -math.log(max_period) * torch.arange(half, dtype=dtype, device=times.device)
    frequencies = torch.exp(exponent / (half - downscale_freq_shift))
    phase = scale * (times.to(dtype)[:, None] * frequencies[None, :])
    sin, cos = torch.sin(phase), torch.cos(phase)
    features = torch.cat((cos, sin) if flip_sin_to_cos else (sin, cos), dim=-1)
    return F.pad(features, (0, num_channels - 2 * half))


def delta_time(t: Tensor, r: Tensor, deltatime_type: str) -> Tensor:
    if deltatime_type == "r":
        return r
    return t - r if deltatime_type == "t-r" else r - t


def _mlp(features: Tensor, weight_1: Tensor, bias_1: Tensor | None, weight_2: Tensor, bias_2: Tensor | None) -> Tensor:
    hidden = F.silu(F.linear(features.to(weight_1.dtype), weight_1, bias_1))
    return F.linear(hidden.to(weight_2.dtype), weight_2, bias_2)


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast is still on inside an operator: it would run the products in its own dtype, and return that."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        with torch.autocast(arguments[0].device.type, enabled=False):
            return function(*arguments)

    return run


@_without_autocast
def flowmap_embedding(
    t: Tensor,
    r: Tensor,
    base_weight_1: Tensor,
    base_bias_1: Tensor | None,
    base_weight_2: Tensor,
    base_bias_2: Tensor | None,
    delta_weight_1: Tensor,
    delta_bias_1: Tensor | None,
    delta_weight_2: Tensor,
    delta_bias_2: Tensor | None,
    gate: Tensor,
    num_channels: int,
    flip_sin_to_cos: bool,
    downscale_freq_shift: float,
    scale: float,
    max_period: float,
    time_scale: float,
    deltatime_type: str,
    with_silu: bool,
) -> tuple[Tensor, Tensor]:
    times = (t * time_scale, delta_time(t, r, deltatime_type) * time_scale)
    weights = (
        (base_weight_1, base_bias_1, base_weight_2, base_bias_2),
        (delta_weight_1, delta_bias_1, delta_weight_2, delta_bias_2),
    )
    base, delta = (
        _mlp(sinusoid(time, num_channels, flip_sin_to_cos, downscale_freq_shift, scale, max_period), *mlp)
        for time, mlp in zip(times, weights, strict=True)
    )
    accumulate = accumulation_dtype(base, delta)
    e, d, g = base.to(accumulate), delta.to(accumulate), gate.to(accumulate).reshape(())
    blend = e + g * (d - e)
    silu = F.silu(blend).to(base.dtype) if with_silu else base.new_empty(0)
    return blend.to(base.dtype), silu


@_without_autocast
def flowmap_embedding_backward(
    grad: Tensor,
    grad_silu: Tensor | None,
    t: Tensor,
    r: Tensor,
    base_weight_1: Tensor,
    base_bias_1: Tensor | None,
    base_weight_2: Tensor,
    base_bias_2: Tensor | None,
    delta_weight_1: Tensor,
    delta_bias_1: Tensor | None,
    delta_weight_2: Tensor,
    delta_bias_2: Tensor | None,
    gate: Tensor,
    num_channels: int,
    flip_sin_to_cos: bool,
    downscale_freq_shift: float,
    scale: float,
    max_period: float,
    time_scale: float,
    deltatime_type: str,
    need_base: bool,
    need_delta: bool,
    need_gate: bool,
) -> tuple[Tensor, ...]:
    """Gradients of the eight weights and the gate; an empty tensor where none is needed. Activations are computed
    again: they are a few rows, the weights are megabytes."""
    accumulate = accumulation_dtype(base_weight_1, delta_weight_1)
    g = gate.to(accumulate).reshape(())
    times = (t * time_scale, delta_time(t, r, deltatime_type) * time_scale)
    weights = (
        (base_weight_1, base_bias_1, base_weight_2, base_bias_2),
        (delta_weight_1, delta_bias_1, delta_weight_2, delta_bias_2),
    )
    activations = []
    for time, (w1, b1, w2, b2) in zip(times, weights, strict=True):
        features = sinusoid(time, num_channels, flip_sin_to_cos, downscale_freq_shift, scale, max_period)
        features = features.to(w1.dtype).to(accumulate)
        pre = F.linear(features, w1.to(accumulate), None if b1 is None else b1.to(accumulate))
        out = F.linear(F.silu(pre), w2.to(accumulate), None if b2 is None else b2.to(accumulate))
        activations.append((features, pre, out))
    base, delta = activations[0][2], activations[1][2]
    dy = grad.to(accumulate)
    if grad_silu is not None:
        blend = base + g * (delta - base)
        gate_sigmoid = torch.sigmoid(blend)
        dy = dy + grad_silu.to(accumulate) * gate_sigmoid * (1 + blend * (1 - gate_sigmoid))

    grads: list[Tensor] = []
    for (features, pre, _), mlp, factor, needed in zip(
        activations, weights, (1 - g, g), (need_base, need_delta), strict=True
    ):
        if not needed:
            grads += [t.new_empty(0)] * 4
            continue
        w1, b1, w2, b2 = mlp
        dout = factor * dy
        sigmoid = torch.sigmoid(pre)
        dpre = (dout @ w2.to(accumulate)) * sigmoid * (1 + pre * (1 - sigmoid))
        grads += [
            (dpre.T @ features).to(w1.dtype),
            t.new_empty(0) if b1 is None else dpre.sum(0).to(b1.dtype),
            (dout.T @ (pre * sigmoid)).to(w2.dtype),
            t.new_empty(0) if b2 is None else dout.sum(0).to(b2.dtype),
        ]
    grads.append((dy * (delta - base)).sum().to(gate.dtype).reshape(gate.shape) if need_gate else t.new_empty(0))
    # An operator may not return one tensor twice, which the placeholders would be.
    return tuple(x.clone() if x.numel() == 0 else x for x in grads)
