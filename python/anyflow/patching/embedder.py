"""The flow-map embedder: a stock time embedder that blends in its delta sibling when r is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from anyflow_kernels import EmbedderWeights, flowmap_embedding, gate_blend

from .swap import Swapped


class FlowMapCall(NamedTuple):
    """What the model hands to one of its embedders for the length of a forward."""

    t: Tensor  # the model's own time argument, float32
    r: Tensor  # float32, the shape of t
    gate: Tensor  # float32, 0-d
    deltatime_type: str  # "r", "t-r", or "r-t" for a family whose time runs backwards
    delta: nn.Module
    sinusoid: nn.Module | None
    pre_scale: float
    kinds: tuple[str, ...]  # what each call embeds: "flow" or "constant"


class FlowMapEmbedder(Swapped):
    """Mixin. ``_flowmap_call`` is None outside a forward with r: then this is the stock embedder."""

    _flowmap_call: FlowMapCall | None
    _flowmap_calls: int

    @staticmethod
    def _namespace(stock: type[nn.Module]) -> dict[str, Any]:
        def forward(self: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            call: FlowMapCall | None = self._flowmap_call
            if call is None:
                return stock.forward(self, sample, *args, **kwargs)
            index = self._flowmap_calls
            self._flowmap_calls = index + 1
            if index >= len(call.kinds):
                raise RuntimeError(
                    f"{stock.__name__} was called {index + 1} times in one forward; its spec knows {call.kinds}"
                )

            def base(times: Tensor) -> Tensor:
                return stock.forward(self, times, *args, **kwargs)

            def delta(times: Tensor) -> Tensor:
                return call.delta(times, *args, **kwargs)

            if call.kinds[index] == "constant":
                # The rows of a fixed time have r = t: both embedders see what the stock one sees, or no difference.
                tau = sample if call.deltatime_type == "r" else torch.zeros_like(sample)
                if call.deltatime_type != "r" and call.sinusoid is not None:
                    tau = call.sinusoid(sample.new_zeros(sample.shape[:-1], dtype=torch.float32).reshape(-1))
                    tau = tau.reshape(sample.shape)
                return _blend(base, delta, sample, tau, call)
            if call.sinusoid is None:
                t, r = _rows(call, sample.shape, sample.device)
                return _blend(base, delta, t * call.pre_scale, _delta_time(t, r, call) * call.pre_scale, call)
            t, r = _rows(call, sample.shape[:-1], sample.device)
            if not args and not kwargs and _fusable(self, stock, sample, call):
                return _fused(self, t, r, call)
            features = _features(t, call).to(sample.dtype)
            return _blend(base, delta, features, _features(_delta_time(t, r, call), call), call)

        return {"forward": forward}


def _rows(call: FlowMapCall, shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """t and r laid out as the rows that the stock embedder was given: equal in number, or one for all."""
    t, r = call.t.to(device), call.r.to(device)
    if t.numel() == shape.numel():
        return t.reshape(shape), r.reshape(shape)
    if t.numel() == 1:
        return t.reshape(()).expand(shape), r.reshape(()).expand(shape)
    raise RuntimeError(f"the embedder was given rows {tuple(shape)} for times {tuple(t.shape)}: no rule in the spec")


def _delta_time(t: Tensor, r: Tensor, call: FlowMapCall) -> Tensor:
    if call.deltatime_type == "r":
        return r
    return t - r if call.deltatime_type == "t-r" else r - t


def _features(times: Tensor, call: FlowMapCall) -> Tensor:
    assert call.sinusoid is not None
    return call.sinusoid(times.reshape(-1) * call.pre_scale).reshape(*times.shape, -1)


def _blend(
    base: Callable[[Tensor], Tensor], delta: Callable[[Tensor], Tensor], x: Tensor, tau: Tensor, call: FlowMapCall
) -> Tensor:
    """The composite path: whatever the embedders are (with an adapter, quantised, offloaded), they are called."""
    weight = next((p for p in call.delta.parameters() if p.is_floating_point()), None)
    if weight is not None and weight.element_size() > 1:  # a one-byte dtype is storage only: its module casts
        tau = tau.to(weight.dtype) if call.sinusoid is not None else tau
    else:
        tau = tau.to(x.dtype)
    embedding = base(x)
    return gate_blend(embedding, delta(tau), call.gate.to(embedding.device))


def _fused(embedder: Any, t: Tensor, r: Tensor, call: FlowMapCall) -> Tensor:
    sinusoid: Any = call.sinusoid
    embedding = flowmap_embedding(
        t,
        r,
        _weights(embedder),
        _weights(call.delta),
        call.gate.to(t.device),
        num_channels=sinusoid.num_channels,
        flip_sin_to_cos=sinusoid.flip_sin_to_cos,
        downscale_freq_shift=sinusoid.downscale_freq_shift,
        scale=sinusoid.scale,
        time_scale=call.pre_scale,
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
        stock is TimestepEmbedding
        and type(call.delta) is TimestepEmbedding
        and type(call.sinusoid) is Timesteps
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
