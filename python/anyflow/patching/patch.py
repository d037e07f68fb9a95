"""patch, unpatch, and what they report."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..families import EmbedderSite, FamilySpec, find_spec
from ..families.resolve import has_module, resolve
from .clone import clone_embedder
from .embedder import FlowMapEmbedder, NarrowEntry
from .model import (
    FlowMapModel,
    FlowMapSettings,
    check_conditioning,
    embedded_sites,
    embedders_at,
    make_gate,
    set_conditioning,
)
from .names import of_critic
from .swap import check_restorable, is_wrapped, restore, swap
from .unwrap import denoisers


@dataclass
class FlowMapPatch:
    """The record of ``patch``: prints what was replaced, what was left and why; ``undo()`` takes it back."""

    models: list[nn.Module]
    replaced: list[tuple[str, str]] = field(default_factory=list)  # (path, what happened)
    left: list[tuple[str, str]] = field(default_factory=list)  # (path, why)

    def undo(self) -> None:
        """Restore every model of this record; models already restored are left alone."""
        for model in self.models:
            if isinstance(model, FlowMapModel):
                _unpatch(model)

    def __str__(self) -> str:
        lines = []
        for model in self.models:
            if isinstance(model, FlowMapModel):
                settings = model._flowmap
                lines.append(
                    f"{settings.spec.class_name}: flow map, gate {settings.gate_value}, "
                    f"deltatime_type {settings.deltatime_type!r}"
                )
            else:
                lines.append(f"{type(model).__name__}: restored")
        lines += [f"  replaced {path}: {what}" for path, what in self.replaced]
        lines += [f"  left     {path}: {why}" for path, why in self.left]
        return "\n".join(lines)


def patch(
    model: Any, *, gate_value: float = 0.25, deltatime_type: str = "r", family: str | None = None
) -> FlowMapPatch:
    """Let a stock diffusers model take ``r_timestep=``, in place; a second call updates gate and type.

    The embedding of time becomes e(t) + gate (d(tau) - e(t)), where d, the delta embedder, starts as a trainable copy
    of e, and tau is r or t - r (AnyFlow, arXiv 2605.13724). ``model(..., r_timestep=None)`` stays the stock model to
    the bit. With type "r" and r = t, a fresh patch changes nothing either (with a fused kernel, no more than its
    rounding); with type "t-r" it does, as d sees 0, and warns.

    ``model``: a diffusers model, one wrapped by peft, DDP or torch.compile, or a pipeline.
    ``gate_value``: in [0, 1].
    ``deltatime_type``: "r", or "t-r": (sigma_t - sigma_r) in the model's time units, positive for every family.
    ``family``: the name of the spec to use, for subclasses; by default the name of the model's class.
    ``r_timestep`` has the units of the model's own time argument, any dtype, and its shape, or one element; over times
    of frames or tokens also [B], for all of a sample's that are not below it. A further time argument of a family
    (``audio_timestep``) has a lower time of its own (``r_audio_timestep``); without it, ``r_timestep`` is taken.

    Only the instance changes: its class, and that of its time embedder, become generated subclasses of the same name;
    no parameter is renamed or moved. Patch before offloading, layerwise casting, quantisation and FSDP; before or after
    peft and torch.compile. A model inside DDP can be patched to sample; to train it, patch it before DDP, which reduces
    only the gradients of the parameters that it was built with.

    A class with a second time itself is driven through that: nothing is cloned, gate and type are its own.

    Raises ValueError for an unknown class (the message shows how to write a spec), a checkpoint or pipeline whose time
    is not linear in sigma, a gate or type out of range, or a model whose embedder cannot be cloned any more; TypeError
    when ``model`` is neither a model nor a pipeline.
    """
    check_conditioning(gate_value, deltatime_type)
    record = FlowMapPatch(denoisers(model))
    # Everything that can be refused is refused before the first model is touched.
    specs = [
        m._flowmap.spec if isinstance(m, FlowMapModel) else _check_patchable(m, find_spec(type(m).__name__, family))
        for m in record.models
    ]
    check_pipeline(model, specs)
    for bare, spec in zip(record.models, specs, strict=True):
        if isinstance(bare, FlowMapModel):
            set_conditioning(bare, gate_value, deltatime_type)
        else:
            _patch(bare, spec, gate_value, deltatime_type)
            if deltatime_type == "t-r" and gate_value > 0 and spec.native is None:
                warnings.warn(
                    "deltatime_type='t-r' with a fresh delta embedder changes the model before any training, also at "
                    "r = t: the copied embedder sees a time of 0 there",
                    stacklevel=2,
                )
        record.replaced.append((spec.class_name, "forward takes r_timestep"))
        if spec.native is not None:
            record.replaced.append((spec.native.arg, "the second time of the class itself, given through r_timestep"))
            record.left.append((spec.native.delta, "trained as it is; gate and type of the delta time are its own"))
        for site in spec.sites:
            record.replaced.append((site.embedder, f"blends in {site.delta}, a trainable clone"))
        record.left += [(path, why) for path, why in spec.left if has_module(bare, path)]
    return record


def unpatch(model: Any) -> None:
    """Restore the stock model exactly: class, state_dict, outputs. A model that is not patched is left alone.

    Raises ValueError, and changes nothing, when another wrapper took hold of the model or an embedder after patching.
    """
    for bare in denoisers(model):
        if isinstance(bare, FlowMapModel):
            _unpatch(bare)


def is_patched(model: Any) -> bool:
    """Whether every denoiser of ``model`` takes ``r_timestep`` through a patch."""
    return all(isinstance(bare, FlowMapModel) for bare in denoisers(model))


def delta_parameters(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of the delta embedders; names are relative to the bare model, free of wrapper prefixes.

    They are trainable after patching. peft freezes every parameter that is not an adapter when one is added:
    ``trainable_parameters``, which the distiller calls, turns these on again. The embedder of a class that has a second
    time itself is as it was: no clone, but part of the base model, and of the teacher. Raises ValueError when the model
    is not patched.
    """
    for bare in denoisers(model):
        for path in delta_paths(_spec(bare)):
            for name, parameter in bare.get_submodule(path).named_parameters():
                yield f"{path}.{name}", parameter


def trainable_parameters(model: Any) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of all that a student trains: what requires a gradient, and the delta embedders.

    Turns ``requires_grad`` on for the delta embedders, except where an adapter sits on one: then it trains through
    the adapter, as in the published recipe. Each parameter is listed once; a critic's adapter is no part of the
    student. Give the values to the optimizer.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    listed: list[tuple[str, nn.Parameter]] = []
    for bare in denoisers(model):
        for site in _spec(bare).sites:
            delta = bare.get_submodule(site.delta)
            if not any(isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for module in delta.modules()):
                delta.requires_grad_(True)
        listed += [(name, p) for name, p in bare.named_parameters() if p.requires_grad and not of_critic(name)]
    return listed


def _spec(model: nn.Module) -> FamilySpec:
    if not isinstance(model, FlowMapModel):
        raise ValueError(f"{type(model).__name__} is not patched; call anyflow.patch(model) first")
    return model._flowmap.spec


def delta_paths(spec: FamilySpec) -> list[str]:
    """Where the embedders of the second time are."""
    return [site.delta for site in spec.sites] if spec.native is None else [spec.native.delta]


def check_pipeline(target: Any, specs: Iterable[FamilySpec]) -> None:
    """ValueError, with the reason, for a pipeline whose models are not flow-matching in the time of their class."""
    for name, why in (refused for spec in specs for refused in spec.refused_pipelines):
        if type(target).__name__ == name:
            raise ValueError(f"{name} cannot be made a flow map: {why}")


def _check_patchable(model: nn.Module, spec: FamilySpec) -> FamilySpec:
    if is_wrapped(model):
        raise ValueError(
            f"the forward of this {type(model).__name__} is already wrapped (offloading, accelerator.prepare or a "
            "cache hook). Patch first, then enable it."
        )
    if spec.native is None and "r_timestep" in inspect.signature(model.forward).parameters:
        raise ValueError(f"{type(model).__name__} takes r_timestep by itself: its spec needs native=NativeTime(...)")
    spec = resolve(spec, model)
    for path in delta_paths(spec):
        if spec.native is None and has_module(model, path):
            raise ValueError(f"{type(model).__name__} already has a module {path}")
    return spec


def _patch(model: nn.Module, spec: FamilySpec, gate_value: float, deltatime_type: str) -> None:
    embedders = [_embedders(model.get_submodule(site.embedder)) for site, _ in embedded_sites(spec)]
    clones = [clone_embedder(found[-1], site.embedder) for site, found in zip(spec.sites, embedders, strict=False)]
    for site, delta in zip(spec.sites, clones, strict=True):
        parent, _, name = site.delta.rpartition(".")
        model.get_submodule(parent).add_module(name, delta)
        _narrow(delta, site)
    for (site, _), found in zip(embedded_sites(spec), embedders, strict=True):
        for embedder in found:
            _narrow(embedder, site)
            swap(embedder, FlowMapEmbedder)
            embedder._flowmap_call = None  # type: ignore[assignment]
            embedder._flowmap_calls = 0  # type: ignore[assignment]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    swap(model, FlowMapModel)
    model._flowmap = FlowMapSettings(spec, float(gate_value), deltatime_type)  # type: ignore[assignment]
    model._flowmap_gate = make_gate(gate_value, device)
    model._flowmap_schedule = None  # type: ignore[assignment]
    model._flowmap_saw_r = False  # type: ignore[assignment]
    _follow_rules_of_source(model, spec)


def _narrow(embedder: nn.Module, site: EmbedderSite) -> None:
    if site.first_linear is not None:
        swap(_first_linear(embedder, site.first_linear), NarrowEntry)


def _first_linear(embedder: nn.Module, path: str) -> nn.Module:
    layer = embedder.get_submodule(path)
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer  # type: ignore[operator]


def _embedders(module: nn.Module) -> list[nn.Module]:
    """The embedder, or where peft holds it for modules_to_save: the original and its trained copies."""
    if hasattr(module, "original_module"):
        return [module.original_module, *module.modules_to_save.values()]  # type: ignore[list-item, operator]
    return [module]


def _follow_rules_of_source(model: nn.Module, spec: FamilySpec) -> None:
    """Where the source embedder is kept in float32, or out of layerwise casting, by name, so is the delta embedder."""
    names = [site.delta.rpartition(".")[2] for site in spec.sites if _is_kept(model, site)]
    _extend(model, "_keep_in_fp32_modules", names)
    patterns = [re.escape(site.delta) for site in spec.sites if _skips(model, site.embedder)]
    _extend(model, "_skip_layerwise_casting_patterns", patterns)


def _is_kept(model: Any, site: EmbedderSite) -> bool:
    return not set(site.embedder.split(".")).isdisjoint(getattr(model, "_keep_in_fp32_modules", None) or ())


def _skips(model: Any, path: str) -> bool:
    patterns = getattr(model, "_skip_layerwise_casting_patterns", None) or ()
    return any(re.search(pattern, path) for pattern in patterns)


def _extend(model: Any, attribute: str, entries: list[str]) -> None:
    """Add to a list that the class declares, on this instance; ``_unpatch`` takes it back."""
    if entries:
        model._flowmap.replaced[attribute] = model.__dict__.get(attribute)
        setattr(model, attribute, [*(getattr(model, attribute, None) or ()), *entries])


def _unpatch(model: Any) -> None:
    spec = _spec(model)
    embedders = [(site, embedder) for site, _ in embedded_sites(spec) for embedder in embedders_at(model, site)]
    swapped = [model, *(embedder for _, embedder in embedders)]
    swapped += [_first_linear(embedder, site.first_linear) for site, embedder in embedders if site.first_linear]
    for module in swapped:
        check_restorable(module)  # all of them, before the first is touched
    for module in swapped:
        restore(module)
    for _, embedder in embedders:
        del embedder._flowmap_call, embedder._flowmap_calls
    for site in spec.sites:
        parent, _, name = site.delta.rpartition(".")
        delattr(model.get_submodule(parent), name)
    for attribute, own in model._flowmap.replaced.items():
        if own is None:
            del model.__dict__[attribute]
        else:
            setattr(model, attribute, own)
    for name in ("_flowmap", "_flowmap_gate", "_flowmap_schedule", "_flowmap_saw_r"):
        delattr(model, name)
