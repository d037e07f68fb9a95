"""The teacher is the model with its adapter off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..patching.names import CRITIC, of_critic
from .lycoris import lycoris_layers, lycoris_off

# Initialisations of peft's LoRA that take the adapter's first value out of the base weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@contextmanager
def teacher_mode(*modules: nn.Module, lycoris: Any = None) -> Iterator[None]:
    """Run ``modules`` as the base model: every adapter off, evaluation mode, no gradient, no sampler's r.

    peft layers and modules_to_save are switched by their flag, so that neither ``requires_grad`` nor the set of active
    adapters is touched (FSDP has both in its flat parameters); layers that LyCORIS wraps run their own forward.
    ``lycoris``: the network, if there is one; needed where its layers cannot be seen from the model. Exactly the entry
    state comes back, layer by layer, also after an exception and when nested.

    Raises RuntimeError when an adapter is merged into the base weights: then there is no base model to run; and when a
    backward of the student runs inside: checkpointed blocks would be recomputed without the adapter.
    """
    with base_mode(*modules, lycoris=lycoris), frozen(*modules, lycoris=lycoris):
        yield


@contextmanager
def base_mode(*modules: nn.Module, adapter: str | None = None, lycoris: Any = None) -> Iterator[None]:
    """``teacher_mode`` without evaluation mode, and with gradients: the base model, and ``adapter`` alone on it, where
    a layer has it."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(_only_adapter(module, adapter))
            stack.enter_context(lycoris_off(module, lycoris))
            stack.enter_context(_unscheduled(module))
            stack.enter_context(_no_backward(module))
        if isinstance(lycoris, nn.Module):
            stack.enter_context(_no_backward(lycoris))
        yield


@contextmanager
def frozen(*modules: nn.Module, lycoris: Any = None) -> Iterator[None]:
    """Run ``modules`` as they are, adapters on, but in evaluation mode, without gradient and without a sampler's r: the
    same input gives the same output, also where dropout would act in training. The entry state comes back."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(_evaluation_mode(module))
            stack.enter_context(_unscheduled(module))
        if isinstance(lycoris, nn.Module):
            stack.enter_context(_evaluation_mode(lycoris))
        stack.enter_context(torch.no_grad())
        yield


def has_adapter(module: nn.Module) -> bool:
    """Whether an adapter of peft, other than the critic's, or of LyCORIS sits on a layer of ``module``."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = (layer for layer in module.modules() if isinstance(layer, BaseTunerLayer))
    tuned = any(adapter_names(layer) - {CRITIC} for layer in layers)
    return tuned or next(lycoris_layers(module), None) is not None


def check_base(module: nn.Module) -> None:
    """Raise ValueError when a LoRA was initialised from the base weights and changed them: the model with its adapter
    off is then not the model that was loaded."""
    configs: Any = getattr(module, "peft_config", {})
    for name, config in configs.items():
        if changes_base(config):
            raise ValueError(
                f"the adapter {name!r} has init_lora_weights={config.init_lora_weights!r}, which changes the base "
                "weights, so the model with its adapter off is no teacher: initialise it otherwise, or pass a separate "
                "student_model"
            )


def changes_base(config: Any) -> bool:
    """Whether an adapter of this configuration takes its first value out of the base weights."""
    how = getattr(config, "init_lora_weights", True)
    return isinstance(how, str) and how.lower().startswith(_CHANGES_BASE)


def switchable(module: nn.Module) -> list[Any]:
    """The layers of peft, modules_to_save included."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [layer for layer in module.modules() if isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def base_of(layer: Any) -> nn.Module:
    """What a layer of peft wraps."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.original_module


@contextmanager
def _only_adapter(module: nn.Module, adapter: str | None) -> Iterator[None]:
    layers = switchable(module)
    merged = sorted({name for layer in layers for name in getattr(layer, "merged_adapters", ())})
    if merged:
        raise RuntimeError(
            f"the adapters {merged} are merged into the base weights, so there is no teacher to run; unmerge them"
        )
    entry = [(layer, layer._disable_adapters, layer._active_adapter) for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = adapter not in adapter_names(layer)
            if not layer._disable_adapters:
                layer._active_adapter = [adapter]
        yield
    finally:
        for layer, disabled, active in entry:
            layer._disable_adapters, layer._active_adapter = disabled, active


def adapter_names(layer: Any) -> set[str]:
    """The adapters that have weights in a layer of peft."""
    return {name for part in layer.adapter_layer_names for name in getattr(layer, part, ())}


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
def _no_backward(module: nn.Module) -> Iterator[None]:
    """One hook tells of every backward: all of a student's losses reach its first trained parameter."""
    student = (p for name, p in module.named_parameters() if p.requires_grad and not of_critic(name))
    parameter = next(student, None)
    handle = None if parameter is None else parameter.register_hook(_refuse)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _refuse(grad: Tensor) -> NoReturn:
    raise RuntimeError(
        "backward inside of teacher_mode: checkpointed blocks would be recomputed with the adapter off, and its "
        "gradients would be wrong. Leave teacher_mode first."
    )
