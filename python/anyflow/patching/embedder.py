"""The flow-map embedder: a stock time embedder that blends in its delta sibling when r is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.autograd import forward_ad

from anyflow_kernels import EmbedderWeights, flowmap_embedding, gate_blend
from anyflow_kernels.gate_blend.reference import gate_blend as plain_gate_blend

from .swap import Swapped

Features = Callable[[Tensor], Tensor]  # times [M] -> [M, ...]
Embeds = Literal["blend", "t", "r", "t-r"]  # of t and of r, blended; or one alone, for a native second time


class CallTimes(NamedTuple):
    """The times that one call of an embedder embeds, in the units that its sinusoid takes."""

    t: Tensor  # float32
    r: Tensor  # float32, the shape of t
    constant_tail: bool  # the rows after these are of fixed times: r = t


class FlowMapCall(NamedTuple):
    """What the model hands to one of its embedders for the length of a forward."""

    times: tuple[CallTimes | None, ...]  # of each call in turn; None: rows of fixed times, r = t
    sinusoid: Features | None  # None: the embedder takes times
    deltatime_type: str  # "r", "t-r", or "r-t" for a family whose time runs backwards
    gate: Tensor  # float32, 0-d
    delta: nn.Module | None  # None unless something is blended in
    embeds: Embeds


class FlowMapEmbedder(Swapped):
    """Mixin. ``_flowmap_call`` is None outside a forward with r: then this is the stock embedder."""

    _flowmap_call: FlowMapCall | None
    _flowmap_calls: int

    @staticmethod
    def _namespace(stock: type[nn.Module]) -> dict[str, Any]:
        stock_forward = stock.forward

        def forward(self: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            call: FlowMapCall | None = self._flowmap_call
            if call is None:
                return stock_forward(self, sample, *args, **kwargs)
            index = self._flowmap_calls
            self._flowmap_calls = index + 1
            if index >= len(call.times):
                raise RuntimeError(
                    f"{stock.__name__} was called {index + 1} times in one forward; its spec knows {len(call.times)}"
                )
            times = call.times[index]

            def base(x: Tensor) -> Any:
                return stock_forward(self, x, *args, **kwargs)

            if call.delta is None:
                return base(sample if times is None else _input(_native_time(times, call), sample, times, call))
            if times is not None and not args and not kwargs and _fusable(self, stock, sample, call):
                return _fused(self, sample, times, call)

            def delta(x: Tensor) -> Tensor:
                assert call.delta is not None
                return call.delta(x, *args, **kwargs)

            if times is None:
                return _blend(base, delta, sample, _constant_delta(sample, call), call)
            tau = _input(_delta_time(times, call), sample, times, call, of_delta=True)
            return _blend(base, delta, _input(times.t, sample, times, call), tau, call)

        return {"forward": forward}


class NarrowEntry(Swapped):
    """Mixin of the first layer inside an embedder that takes times: its features stay float32 up to here."""

    @staticmethod
    def _namespace(stock: type[nn.Module]) -> dict[str, Any]:
        stock_forward = stock.forward

        def forward(self: Any, features: Tensor) -> Tensor:
            return stock_forward(self, features.to(_compute_dtype(self.weight, features.dtype)))

        return {"forward": forward}


def _delta_time(times: CallTimes, call: FlowMapCall) -> Tensor:
    if call.deltatime_type == "r":
        return times.r
    return times.t - times.r if call.deltatime_type == "t-r" else times.r - times.t


def _native_time(times: CallTimes, call: FlowMapCall) -> Tensor:
    if call.embeds == "t-r":
        return times.t - times.r
    return times.t if call.embeds == "t" else times.r


def _input(tau: Tensor, sample: Tensor, times: CallTimes, call: FlowMapCall, of_delta: bool = False) -> Tensor:
    """What the embedder is given for ``tau``, laid out as ``sample``, what the stock model gives: float32 times, or
    features. Rows of a fixed time that follow are taken from ``sample``."""
    tau = tau.to(sample.device)
    rows = tau if call.sinusoid is None else _features(call.sinusoid, tau)
    if times.constant_tail:
        tail = sample[rows.shape[0] :]
        rows = torch.cat([rows, (_constant_delta(tail, call) if of_delta else tail).to(rows.dtype)])
    if rows.numel() == sample.numel():
        rows = rows.reshape(sample.shape)
    elif tau.numel() == 1:  # one time for all rows
        own = rows.shape[1:] if call.sinusoid is not None else ()
        rows = rows.reshape((1,) * (sample.ndim - len(own)) + tuple(own)).expand(sample.shape)
    else:
        raise RuntimeError(
            f"the embedder was given {tuple(sample.shape)} for times {tuple(tau.shape)}: no rule in the spec"
        )
    return rows if call.sinusoid is None or of_delta else rows.to(sample.dtype)


def _features(sinusoid: Features, tau: Tensor) -> Tensor:
    """float32 features, also from a sinusoid with weights of its own, and inside autocast."""
    with torch.autocast(tau.device.type, enabled=False):
        if isinstance(sinusoid, nn.Module):
            narrow = {name: p.to(torch.float32) for name, p in sinusoid.named_parameters() if p.element_size() < 4}
            if narrow:
                return torch.func.functional_call(sinusoid, narrow, (tau.reshape(-1),))
        return sinusoid(tau.reshape(-1))


def _constant_delta(sample: Tensor, call: FlowMapCall) -> Tensor:
    """The delta embedder's input for rows of a fixed time: r = t."""
    if call.deltatime_type == "r":
        return sample
    if call.sinusoid is None:
        return torch.zeros_like(sample)
    zero = _features(call.sinusoid, torch.zeros(1, device=sample.device))
    return zero.reshape((1,) * (sample.ndim - zero.ndim + 1) + tuple(zero.shape[1:])).expand(sample.shape)


def _blend(base: Features, delta: Features, x: Tensor, tau: Tensor, call: FlowMapCall) -> Tensor:
    """The composite path: whatever the embedders are (with an adapter, quantised, offloaded), they are called."""
    assert call.delta is not None
    if call.sinusoid is not None:
        weight = next((p for p in call.delta.parameters() if p.is_floating_point()), None)
        tau = tau.to(x.dtype if weight is None else _compute_dtype(weight, x.dtype))
    embedding = base(x)
    blend = plain_gate_blend if _forward_mode() else gate_blend
    return blend(embedding, delta(tau), call.gate.to(embedding.device))


def _forward_mode() -> bool:
    """Whether a forward-mode derivative is taken, which the plain PyTorch functions have and the operators have not."""
    return forward_ad._current_level >= 0


def _compute_dtype(weight: Tensor, otherwise: torch.dtype) -> torch.dtype:
    """The dtype of ``weight``, unless it is storage only (one byte, or packed): then its module casts."""
    return weight.dtype if weight.is_floating_point() and weight.element_size() > 1 else otherwise


def _fused(embedder: Any, sample: Tensor, times: CallTimes, call: FlowMapCall) -> Tensor:
    sinusoid: Any = call.sinusoid
    shape = sample.shape[:-1]
    one = times.t.numel() == 1
    t, r = (time.reshape(()).expand(shape) if one else time.reshape(shape) for time in (times.t, times.r))
    embedding = flowmap_embedding(
        t.to(sample.device),
        r.to(sample.device),
        _weights(embedder),
        _weights(call.delta),
        call.gate.to(sample.device),
        num_channels=sinusoid.num_channels,
        flip_sin_to_cos=sinusoid.flip_sin_to_cos,
        downscale_freq_shift=sinusoid.downscale_freq_shift,
        scale=sinusoid.scale,
        deltatime_type=call.deltatime_type,
    )
    assert isinstance(embedding, Tensor)
    return embedding


def _weights(embedder: Any) -> EmbedderWeights:
    first, second = embedder.linear_1, embedder.linear_2
    return EmbedderWeights(first.weight, first.bias, second.weight, second.bias)


def _fusable(embedder: nn.Module, stock: type[nn.Module], sample: Tensor, call: FlowMapCall) -> bool:
    """Whether both embedders are what the fused op computes, and nothing watches their layers being called.

    Under autocast the layers' own casts are part of what the stock model computes, so they are called.
    """
    return (
        not _forward_mode()
        and stock is TimestepEmbedding
        and type(call.delta) is TimestepEmbedding
        and type(call.sinusoid) is Timesteps
        and not any(times is not None and times.constant_tail for times in call.times)
        and not torch.is_autocast_enabled(sample.device.type)
        and _is_plain_mlp(embedder, sample)
        and _is_plain_mlp(call.delta, sample)
        and not _is_watched(call.delta)
        and embedder.get_submodule("linear_1").weight.dtype == sample.dtype
    )


def _is_plain_mlp(embedder: Any, sample: Tensor) -> bool:
    if type(embedder.act) is not nn.SiLU or embedder.post_act is not None or _is_watched(embedder.act):
        return False
    for linear in (embedder.linear_1, embedder.linear_2):
        weight = getattr(linear, "weight", None)
        if (
            type(linear) is not nn.Linear
            or _is_watched(linear)
            or type(weight) is not nn.Parameter
            or not weight.is_floating_point()
            or weight.element_size() == 1
            or weight.device != sample.device
        ):
            return False
    return True


def _is_watched(layer: nn.Module) -> bool:
    """Hooks of a layer, or a forward replaced on the instance, would be skipped by reading its weights."""
    return "forward" in layer.__dict__ or bool(
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    )
