"""The flow-map model: a stock denoiser whose forward takes r_timestep."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..families import EmbedderSite, FamilySpec
from .embedder import FlowMapCall, FlowMapEmbedder
from .swap import Swapped

DELTATIME_TYPES = ("r", "t-r")


@dataclass
class FlowMapSettings:
    """What a patched model carries. ``gate_value`` is the truth from which the gate tensor is made again on another
    device, the meta device included; ``pre_scales`` are those of the spec's sites."""

    spec: FamilySpec
    gate_value: float
    deltatime_type: str
    pre_scales: tuple[float, ...]

    def op_deltatime_type(self) -> str:
        """(sigma_t - sigma_r) times |time_scale|, also where the model's time runs backwards."""
        if self.deltatime_type == "r":
            return "r"
        return "t-r" if self.spec.time_scale > 0 else "r-t"


class FlowMapModel(Swapped):
    """Mixin of a patched model.

    The gate is a plain tensor attribute, float32: no buffer, which DDP would broadcast in place between two forwards
    of one graph, and no number, which torch.compile would build into the graph.
    """

    _flowmap: FlowMapSettings
    _flowmap_gate: Tensor
    # (sigma_t, sigma_r), one element each, while a sampler drives the model; fills r where a pipeline gives none.
    _flowmap_schedule: tuple[Tensor, Tensor] | None
    _flowmap_saw_r: bool  # set by every forward that was given r_timestep

    def enable_flowmap_time_conditioning(self, gate_value: float = 0.25, deltatime_type: str = "r") -> None:
        """Set the gate and the type of the delta time on the patched model: the hook that trainers call."""
        set_conditioning(self, gate_value, deltatime_type)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        # Follow the device, never the dtype: 0.3 does not survive bfloat16.
        device = fn(self._flowmap_gate).device
        if device != self._flowmap_gate.device:
            self._flowmap_gate = make_gate(self._flowmap.gate_value, device)
        return result

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        rebuild, arguments, state, *rest = super().__reduce_ex__(protocol)
        return (rebuild, arguments, {**state, "_flowmap_schedule": None}, *rest)  # a copy is driven by no sampler

    @staticmethod
    def _namespace(stock: type[nn.Module]) -> dict[str, Any]:
        signature = inspect.signature(stock.forward)
        names = list(signature.parameters)

        def forward(self: Any, *args: Any, r_timestep: Any = None, **kwargs: Any) -> Any:
            # Samplers run without gradient; a schedule left behind by an interrupted one must not reach training.
            scheduled = self._flowmap_schedule is not None and not torch.is_grad_enabled()
            if r_timestep is None and not scheduled:
                return stock.forward(self, *args, **kwargs)
            settings: FlowMapSettings = self._flowmap
            position = names.index(settings.spec.timestep_arg) - 1
            timestep = args[position] if position < len(args) else kwargs.get(settings.spec.timestep_arg)
            if r_timestep is None:
                t, r = scheduled_times(timestep, self._flowmap_schedule, settings.spec)
            else:
                t, r = explicit_times(timestep, r_timestep)
                self._flowmap_saw_r = True
            embedders = []
            try:
                for site, pre_scale in zip(settings.spec.sites, settings.pre_scales, strict=True):
                    found = begin(self, site, pre_scale, t, r)
                    embedders.append(found)
                output = stock.forward(self, *args, **kwargs)
                for site, found in zip(settings.spec.sites, embedders, strict=True):
                    if not any(embedder._flowmap_calls for embedder in found):
                        raise RuntimeError(f"r_timestep was given, but {site.embedder} was not called in this forward")
                return output
            finally:
                for found in embedders:
                    for embedder in found:
                        embedder._flowmap_call = None

        forward.__signature__ = _with_r_timestep(signature)  # type: ignore[attr-defined]
        forward.__doc__ = stock.forward.__doc__
        return {"forward": forward}


def make_gate(gate_value: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it takes part in training, wherever the model was moved
        return torch.tensor(gate_value, dtype=torch.float32, device=device)


def set_conditioning(model: Any, gate_value: float, deltatime_type: str) -> None:
    check_conditioning(gate_value, deltatime_type)
    model._flowmap.gate_value, model._flowmap.deltatime_type = float(gate_value), deltatime_type
    model._flowmap_gate = make_gate(gate_value, model._flowmap_gate.device)


def check_conditioning(gate_value: float, deltatime_type: str) -> None:
    if not 0.0 <= gate_value <= 1.0:
        raise ValueError(f"gate_value must be in [0, 1], got {gate_value!r}")
    if deltatime_type not in DELTATIME_TYPES:
        raise ValueError(f"deltatime_type must be 'r' or 't-r', got {deltatime_type!r}")


def _with_r_timestep(signature: inspect.Signature) -> inspect.Signature:
    parameters = list(signature.parameters.values())
    r = inspect.Parameter("r_timestep", inspect.Parameter.KEYWORD_ONLY, default=None)
    at = next((i for i, p in enumerate(parameters) if p.kind is inspect.Parameter.VAR_KEYWORD), len(parameters))
    return signature.replace(parameters=[*parameters[:at], r, *parameters[at:]])


def begin(model: Any, site: EmbedderSite, pre_scale: float, t: Tensor, r: Tensor) -> list[Any]:
    """Hand (t, r) to the embedder of a site, and to its copies if peft keeps some in modules_to_save."""
    embedders: list[Any] = list(embedders_at(model, site))
    call = FlowMapCall(
        t=t,
        r=r,
        gate=model._flowmap_gate,
        deltatime_type=model._flowmap.op_deltatime_type(),
        delta=model.get_submodule(site.delta),
        sinusoid=None if site.sinusoid is None else model.get_submodule(site.sinusoid),
        pre_scale=pre_scale,
        kinds=site.calls,
    )
    for embedder in embedders:
        embedder._flowmap_call = call
        embedder._flowmap_calls = 0
    return embedders


def embedders_at(model: nn.Module, site: EmbedderSite) -> Iterator[nn.Module]:
    for module in model.get_submodule(site.embedder).modules():
        if isinstance(module, FlowMapEmbedder):
            yield module


def as_time(value: Any, like: Any) -> Tensor:
    """A time argument as a float32 tensor, on the device of ``like`` when it is a plain number."""
    if isinstance(value, Tensor):
        return value.to(torch.float32)
    device = like.device if isinstance(like, Tensor) else None
    return torch.as_tensor(value, dtype=torch.float32, device=device)


def explicit_times(timestep: Any, r_timestep: Any) -> tuple[Tensor, Tensor]:
    t, r = as_time(timestep, r_timestep), as_time(r_timestep, timestep)
    if t.device != r.device and t.ndim and r.ndim:
        raise ValueError(f"r_timestep is on {r.device}, the time argument on {t.device}")
    if t.shape == r.shape:
        return t, r
    if r.numel() == 1:
        return t, r.reshape(()).to(t.device).expand(t.shape)
    if t.numel() == 1:
        return t.reshape(()).to(r.device).expand(r.shape), r
    raise ValueError(f"r_timestep of shape {tuple(r.shape)} does not fit a time argument of shape {tuple(t.shape)}")


def scheduled_times(timestep: Any, schedule: tuple[Tensor, Tensor], spec: FamilySpec) -> tuple[Tensor, Tensor]:
    """t and r from the sampler's own float32 sigmas: what the pipeline hands in may have been through int64 or bf16.

    Where the pipeline gives a time for each token, clean tokens keep r = t = 0 and the others move in proportion.
    """
    sigma_t, sigma_r = schedule
    if isinstance(timestep, Tensor) and timestep.ndim > 1:
        t = timestep.to(torch.float32)
        return t, spec.model_time(spec.sigma(t) * (sigma_r / sigma_t).to(t.device))
    shape = timestep.shape if isinstance(timestep, Tensor) else ()
    device = timestep.device if isinstance(timestep, Tensor) else sigma_t.device
    t, r = (spec.model_time(sigma).to(device).reshape(()) for sigma in schedule)
    return t.expand(shape), r.expand(shape)
