"""LyCORIS keeps its layers outside of the model and puts their forward in the place of that of the model's layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def lycoris_layers(module: nn.Module) -> Iterator[tuple[nn.Module, list[Any]]]:
    """(layer of ``module``, the LyCORIS layers around it, outermost first)."""
    for layer in module.modules():
        around = _around(layer.__dict__.get("forward"))
        if around:
            yield layer, around


def _around(forward: Callable[..., Any] | None) -> list[Any]:
    """A LyCORIS layer keeps the forward that it replaced, which may be another's, as ``org_forward``."""
    around = []
    owner = getattr(forward, "__self__", None)
    while owner is not None and hasattr(owner, "org_forward"):
        around.append(owner)
        owner = getattr(owner.org_forward, "__self__", None)
    return around


def random_parameters(network: Any) -> set[int]:
    """id of the parameters that a forward may leave out: of layers that are dropped as a whole, or by ranks."""
    layers = [layer for layer in getattr(network, "loras", ()) if isinstance(layer, nn.Module)]
    dropped = [layer for layer in layers if getattr(layer, "module_dropout", 0) or getattr(layer, "rank_dropout", 0)]
    return {id(parameter) for layer in dropped for parameter in layer.parameters()}


@contextmanager
def lycoris_off(module: nn.Module, network: Any = None) -> Iterator[None]:
    """The layers of ``module`` run the forward that they had before LyCORIS.

    A multiplier of 0 would not do: with weight decomposition that is another weight than the base. It is set to 0 only
    where the base is not reached otherwise, and there it is exact. ``network``: one whose layers may not be seen from
    the model, because offloading has wrapped them once more.

    Raises RuntimeError when a LyCORIS layer is merged into the base weights.
    """
    switches = [*_bypasses(module), *_multipliers(network)]
    entry = [(owner, name, getattr(owner, name)) for owner, name, _ in switches]
    try:
        for owner, name, value in switches:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in entry:
            setattr(owner, name, value)


def _bypasses(module: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """(object, attribute, its value while LyCORIS is off)."""
    for layer, around in lycoris_layers(module):
        merged = [outer.lora_name for outer in around if hasattr(outer, "cached_org_weight")]
        if merged:
            raise RuntimeError(
                f"the LyCORIS layer {merged[0]} is merged into the base weights, so there is no teacher to run; call "
                "onfly_restore() first"
            )
        if getattr(layer, "weight", None) is not None:
            yield layer, "forward", around[-1].org_forward
        else:  # the kind "full" keeps the layer's weight, and adds multiplier * (its own - that)
            yield from ((outer, "multiplier", 0.0) for outer in around)


def _multipliers(network: Any) -> Iterator[tuple[Any, str, Any]]:
    for layer in () if network is None else (network, *getattr(network, "loras", ())):
        if hasattr(layer, "multiplier"):
            yield layer, "multiplier", layer.multiplier * 0
