"""From the spec of a class to the spec of one model: what its config decides, and where its modules are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .spec import GIVEN, EmbedderSite, FamilySpec, Rows, Sinusoid


def holds(condition: Mapping[str, Any], *sources: Mapping[str, Any]) -> bool:
    """Whether every name of ``condition`` has its value in the first of ``sources`` that knows it."""
    for name, wanted in condition.items():
        value = next((source[name] for source in sources if name in source), None)
        if (value is None) if wanted == GIVEN else (value != wanted):
            return False
    return True


def takes_place(rows: Rows, arguments: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    if rows.unless and holds(rows.unless, arguments, config):
        return False
    return holds(rows.when, arguments, config)


def resolve(spec: FamilySpec, model: nn.Module) -> FamilySpec:
    """The spec with the variant that the model's config names, the config's numbers, and one site for each module.

    Raises ValueError when the config is one that the spec refuses, or a module is not where the spec says.
    """
    config = config_of(model)
    for condition, why in spec.refused:
        if holds(condition, config):
            raise ValueError(f"{spec.class_name} with {dict(condition)}: {why}")
    for condition, changes in spec.variants:
        if holds(condition, config):
            spec = replace(spec, **changes)
    sites = tuple(found for site in spec.sites for found in _found(site, model, spec))
    native = spec.native
    if native is not None:
        embeds = tuple((found, what) for site, what in native.embeds for found in _found(site, model, spec))
        native = replace(native, embeds=embeds)
    return replace(spec, sites=sites, native=native, variants=(), refused=())


def _found(site: EmbedderSite, model: nn.Module, spec: FamilySpec) -> list[EmbedderSite]:
    sinusoid = site.sinusoid
    if isinstance(sinusoid, Sinusoid):
        numbers = {name: _number(value, model) for name, value in vars(sinusoid).items()}
        sinusoid = Sinusoid(**numbers)
    site = replace(site, sinusoid=sinusoid, pre_scale=_number(site.pre_scale, model))
    paths = _fitting(site.embedder, model)
    for path in [*paths, sinusoid] if isinstance(sinusoid, str) else paths:
        if not has_module(model, path) and not callable(getattr(model, path, None)):
            raise ValueError(f"{type(model).__name__} has no {path}, which the spec {spec.class_name} names")
    if not paths:
        raise ValueError(f"{type(model).__name__} has no {site.embedder}, which the spec {spec.class_name} names")
    return [replace(site, embedder=path) for path in paths]


def config_of(model: Any) -> Mapping[str, Any]:
    config = getattr(model, "config", None)
    return config if isinstance(config, Mapping) else {}


def _number(value: Any, model: nn.Module) -> Any:
    return config_of(model)[value] if isinstance(value, str) else value


def _fitting(pattern: str, model: nn.Module) -> list[str]:
    if "*" not in pattern:
        return [pattern]
    parts = pattern.split(".")
    return [
        path
        for path, _ in model.named_modules()
        if len(names := path.split(".")) == len(parts) and all(map(fnmatchcase, names, parts))
    ]


def has_module(model: nn.Module, path: str) -> bool:
    try:
        return isinstance(model.get_submodule(path), nn.Module)
    except AttributeError:
        return False
