"""The flow-map model: a stock denoiser whose forward takes r_timestep."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from ..families import EmbedderSite, FamilySpec, Rows, Sinusoid, families, find_spec
from ..families.resolve import config_of, has_module, takes_place
from .embedder import CallTimes, Embeds, Features, FlowMapCall, FlowMapEmbedder
from .swap import Swapped
from .times import Pair, Schedule, all_times, second_time, stock_arguments, take_native

DELTATIME_TYPES = ("r", "t-r")


@dataclass
class FlowMapSettings:
    """What a patched model carries: its own spec, resolved, and the truth from which the gate tensor is made again on
    another device, the meta device included."""

    spec: FamilySpec
    gate_value: float
    deltatime_type: str
    replaced: dict[str, Any] = field(default_factory=dict)  # attributes of the instance, as they were

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
    _flowmap_schedule: Schedule | None  # while a sampler drives the model: fills r where a pipeline gives none
    _flowmap_saw_r: bool  # set by every forward that was given r_timestep

    def enable_flowmap_time_conditioning(self, gate_value: float = 0.25, deltatime_type: str = "r") -> None:
        """Set the gate and the type of the delta time on the patched model: the hook that trainers call."""
        set_conditioning(self, gate_value, deltatime_type)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        # Follow the device, never the dtype: 0.3 does not survive bfloat16.
        device = fn(self._flowmap_gate).device
        if device.type != "meta" and device != self._flowmap_gate.device:
            self._flowmap_gate = make_gate(self._flowmap.gate_value, device)
        return result

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        rebuild, arguments, state, *rest = super().__reduce_ex__(protocol)
        return (rebuild, arguments, {**state, "_flowmap_schedule": None}, *rest)  # a copy is driven by no sampler

    @staticmethod
    def _namespace(stock: type[nn.Module]) -> dict[str, Any]:
        stock_forward = stock.forward  # not looked up on the class: torch.compile does not enter all of them
        signature = inspect.signature(stock_forward)
        names = list(signature.parameters)[1:]

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            spec: FamilySpec = self._flowmap.spec
            schedule: Schedule | None = self._flowmap_schedule
            if schedule is not None and not schedule.held and torch.is_grad_enabled():
                schedule = None  # left behind by a sampler that was interrupted: it must not reach training
            if len(args) > len(names) or any(name in kwargs for name in names[: len(args)]):
                return stock_forward(self, *args, **kwargs)  # raises
            arguments = dict(zip(names, args, strict=False))
            arguments.update(kwargs)
            second = {arg: arguments.pop(second_time(spec, arg), None) for arg in spec.time_args}
            if spec.native is not None:
                take_native(spec, arguments, second, schedule)
            if schedule is None and all(r is None for r in second.values()):
                return stock_forward(self, *args, **{k: v for k, v in kwargs.items() if k in arguments})
            if second[spec.timestep_arg] is not None:
                self._flowmap_saw_r = True
            if spec.checkpointed and torch.is_grad_enabled() and any_checkpointing(self):
                raise ValueError(
                    f"{spec.class_name} embeds its times inside of the blocks that gradient checkpointing runs again, "
                    "where r is not known any more: disable gradient checkpointing to train it as a flow map"
                )
            times = all_times(spec, arguments, second, schedule)
            handed: list[Any] = []
            try:
                for site, embeds in embedded_sites(spec):
                    handed.append(begin(self, site, embeds, arguments, times))
                output = stock_forward(self, **stock_arguments(spec, arguments, times))
                for (site, _), (embedders, call) in zip(embedded_sites(spec), handed, strict=True):
                    check_seen(site, embedders, call)
                return output
            finally:
                for embedders, _ in handed:
                    for embedder in embedders:
                        embedder._flowmap_call = None

        forward.__signature__ = _with_second_times(signature, stock)  # type: ignore[attr-defined]
        forward.__doc__ = stock_forward.__doc__
        return {"forward": forward}


def make_gate(gate_value: float, device: torch.device) -> Tensor:
    """Never on the meta device, from which ``load_state_dict(assign=True)`` would not bring it back."""
    device = torch.device("cpu") if device.type == "meta" else device
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


def _with_second_times(signature: inspect.Signature, stock: type[nn.Module]) -> inspect.Signature:
    """The stock signature with ``r_timestep`` and its like, all optional keywords."""
    name = stock.__name__
    args = find_spec(name).time_args[1:] if name in families() else ()
    second = ["r_timestep", *(f"r_{arg}" for arg in args)]
    keyword, rest = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD
    stock_ones = [p for p in signature.parameters.values() if p.name not in second]
    extra = [inspect.Parameter(name, keyword, default=None) for name in second]
    ahead, behind = ([p for p in stock_ones if (p.kind is rest) is last] for last in (False, True))
    return signature.replace(parameters=[*ahead, *extra, *behind])


def embedded_sites(spec: FamilySpec) -> tuple[tuple[EmbedderSite, Embeds], ...]:
    """The sites of a spec, and what each embeds where nothing is blended in."""
    return tuple((site, "blend") for site in spec.sites) if spec.native is None else spec.native.embeds


def begin(
    model: Any, site: EmbedderSite, embeds: Embeds, arguments: Mapping[str, Any], times: Mapping[str, Pair]
) -> tuple[list[Any], FlowMapCall]:
    """Hand the times of its calls to the embedder of a site, and to the copies that peft keeps in modules_to_save."""
    spec: FamilySpec = model._flowmap.spec
    call = FlowMapCall(
        times=tuple(
            _call_times(rows, site, times, spec)
            for rows in site.calls
            if takes_place(rows, arguments, config_of(model))
        ),
        sinusoid=find_sinusoid(model, site),
        deltatime_type=model._flowmap.op_deltatime_type(),
        gate=model._flowmap_gate,
        delta=model.get_submodule(site.delta) if embeds == "blend" else None,
        embeds=embeds,
    )
    embedders: list[Any] = list(embedders_at(model, site))
    for embedder in embedders:
        embedder._flowmap_call = call
        embedder._flowmap_calls = 0
    return embedders, call


def _call_times(rows: Rows, site: EmbedderSite, times: Mapping[str, Pair], spec: FamilySpec) -> CallTimes | None:
    if rows.of == "constant":
        return None
    t, r = times[spec.timestep_arg if rows.of == "time" else rows.of]
    if site.whole_times:
        t, r = t.trunc(), r.trunc()
    assert not isinstance(site.pre_scale, str)  # resolved
    if site.pre_scale != 1.0:
        t, r = t * site.pre_scale, r * site.pre_scale
    return CallTimes(t, r, rows.constant_tail)


def find_sinusoid(model: Any, site: EmbedderSite) -> Features | None:
    if site.sinusoid is None:
        return None
    if isinstance(site.sinusoid, Sinusoid):
        return partial(
            get_timestep_embedding,
            embedding_dim=site.sinusoid.num_channels,
            flip_sin_to_cos=True,
            downscale_freq_shift=0.0,
            scale=site.sinusoid.scale,
            max_period=site.sinusoid.max_period,
        )
    if has_module(model, site.sinusoid):
        return model.get_submodule(site.sinusoid)
    return getattr(model, site.sinusoid)


def check_seen(site: EmbedderSite, embedders: list[Any], call: FlowMapCall) -> None:
    """A forward in which no call of an embedder saw r is an error, unless that is what the spec expects."""
    first = next((index for index, times in enumerate(call.times) if times is not None), None)
    if first is not None and sum(embedder._flowmap_calls for embedder in embedders) <= first:
        raise RuntimeError(f"r_timestep was given, but {site.embedder} was not called with it in this forward")


def embedders_at(model: nn.Module, site: EmbedderSite) -> Iterator[nn.Module]:
    for module in model.get_submodule(site.embedder).modules():
        if isinstance(module, FlowMapEmbedder):
            yield module


def any_checkpointing(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
