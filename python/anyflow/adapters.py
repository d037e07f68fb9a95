"""The teacher is the model with its adapter off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def teacher_mode(*modules: nn.Module, lycoris: Any = None) -> Iterator[None]:
    """Run ``modules`` as the base model: every adapter off, evaluation mode, no gradient, no sampler's r.

    peft layers and modules_to_save are switched by their flag, so that neither ``requires_grad`` nor the set of active
    adapters is touched (FSDP has both in its flat parameters); a LyCORIS network by the multiplier of each of its
    layers. Exactly the entry state comes back, layer by layer, also after an exception and when nested.

    Raises RuntimeError when an adapter is merged into the base weights: then there is no base model to run.
    """
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(_adapters_off(module))
            stack.enter_context(_evaluation_mode(module))
            stack.enter_context(_unscheduled(module))
        if lycoris is not None:
            stack.enter_context(_lycoris_off(lycoris))
        stack.enter_context(torch.no_grad())
        yield


def has_adapter(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(layer, BaseTunerLayer) for layer in module.modules())


def _switchable(module: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [layer for layer in module.modules() if isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


@contextmanager
def _adapters_off(module: nn.Module) -> Iterator[None]:
    layers = _switchable(module)
    merged = sorted({name for layer in layers for name in getattr(layer, "merged_adapters", ())})
    if merged:
        raise RuntimeError(
            f"the adapters {merged} are merged into the base weights, so there is no teacher to run; unmerge them"
        )
    entry = [(layer, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in entry:
            layer._disable_adapters = disabled


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    entry = [(child, child.training) for child in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for child, training in entry:
            child.training = training


@contextmanager
def _unscheduled(module: nn.Module) -> Iterator[None]:
    """A sampler that drives the model fills r in; the teacher is asked without r."""
    entry = [(child, child._flowmap_schedule) for child in module.modules() if hasattr(child, "_flowmap_schedule")]
    try:
        for child, _ in entry:
            child._flowmap_schedule = None  # type: ignore[assignment]
        yield
    finally:
        for child, schedule in entry:
            child._flowmap_schedule = schedule


@contextmanager
def _lycoris_off(network: Any) -> Iterator[None]:
    layers = [network, *getattr(network, "loras", ())]
    entry = [(layer, layer.multiplier) for layer in layers if hasattr(layer, "multiplier")]
    try:
        for layer, multiplier in entry:
            layer.multiplier = multiplier * 0
        yield
    finally:
        for layer, multiplier in entry:
            layer.multiplier = multiplier
