"""The fake score as a second adapter on the base that the student shares."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import torch
from torch import nn

from ..distributed import is_sharded
from ..patching import is_patched
from ..patching.names import CRITIC, of_critic
from ..patching.patch import delta_paths
from ..patching.unwrap import unwrap
from .teacher import adapter_names, base_of, changes_base, switchable

_INIT = ("init_lora_weights", "init_weights", "init_ia3_weights")
# What wrappers put before the names of parameters, in which DDP looks for those that it shall leave alone.
_WRAPPED = ("", "base_model.model.", "_orig_mod.", "_orig_mod.base_model.model.")


def add_critic(model: nn.Module, config: Any = None, *, seed: int = 0) -> list[tuple[str, nn.Parameter]]:
    """Put the critic's adapter on ``model``, inactive; returns its (name, parameter) pairs, which train.

    The critic starts as the base model: its first value is that of an adapter that changes nothing. It never sits on a
    delta embedder, as it is asked for instantaneous velocities alone. Its weights are float32 in a model of any dtype:
    steps of 2e-6 would round to nothing in bfloat16. The model's other adapters, what is active and what trains, stay
    as they are. peft lists it (``peft_config``) and leaves it out where it saves another adapter, as this library does;
    DDP is told to leave it alone.

    ``config``: of peft; by default that of the student's first active adapter, without its modules_to_save and biases.
    ``seed``: of its first value, equal on all ranks and independent of the global generators.
    A critic that is there already is returned as it is. Add it before FSDP shards the model.

    Raises ValueError when there is no adapter to copy the configuration from, for an initialisation that changes the
    base weights, for a model that FSDP2 has sharded, and where the critic has been made active.
    """
    bare = unwrap(model)
    if any(CRITIC in layer.active_adapters for layer in switchable(bare)):
        raise ValueError("the critic's adapter is active, where the student's belongs: activate that, set_adapter")
    present = critic_parameters(bare)
    if present:
        return present
    if any(map(is_sharded, bare.parameters())):
        raise ValueError("FSDP has sharded this model already: anyflow.add_critic(model) before that")
    config = _own_config(bare) if config is None else copy.deepcopy(config)
    if changes_base(config):
        raise ValueError("the critic must not change the base weights: give it another initialisation")
    _exclude(config, delta_paths(bare._flowmap.spec) if is_patched(bare) else [])  # type: ignore[union-attr, arg-type]
    _inject(bare, config, seed)
    parameters = critic_parameters(bare)
    tensors = [name for name, _ in parameters] + [name for name, _ in bare.named_buffers() if of_critic(name)]
    ignored = list(getattr(bare, "_ddp_params_and_buffers_to_ignore", ()))
    bare._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]
        *ignored,
        *(f"{prefix}{name}" for prefix in _WRAPPED for name in tensors),
    ]
    return parameters


def critic_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of the critic's adapter on ``module``."""
    return [(name, parameter) for name, parameter in module.named_parameters() if of_critic(name)]


def _own_config(bare: nn.Module) -> Any:
    """That of the student's first active adapter, starting at the base model."""
    active = next((name for layer in switchable(bare) for name in layer.active_adapters), None)
    configs: Any = getattr(bare, "peft_config", {})
    if active not in configs:
        raise ValueError(
            f"this {type(bare).__name__} has no active adapter of peft whose configuration the critic could take: give "
            "it one, anyflow.add_critic(model, LoraConfig(...)), or pass a separate critic_model"
        )
    config = copy.deepcopy(configs[active])
    config.modules_to_save = None
    config.inference_mode = False
    if hasattr(config, "bias"):
        config.bias = "none"
    for key in _INIT:
        if getattr(config, key, True) is not True:
            setattr(config, key, True)
    return config


def _exclude(config: Any, paths: list[str]) -> None:
    """Leave ``paths`` out, and what is inside of them."""
    excluded = config.exclude_modules or []
    patterns = [excluded] if isinstance(excluded, str) else [rf"(?:.*\.)?{re.escape(name)}" for name in excluded]
    patterns += [rf"{re.escape(path)}(?:\..*)?" for path in paths]
    config.exclude_modules = "|".join(f"(?:{pattern})" for pattern in patterns) or None


def _inject(bare: nn.Module, config: Any, seed: int) -> None:
    from peft import inject_adapter_in_model

    parameters = [(parameter, parameter.requires_grad) for parameter in bare.parameters()]
    layers = {id(layer): (layer._active_adapter, layer._disable_adapters) for layer in switchable(bare)}
    devices = sorted({p.device.index or 0 for p in bare.parameters() if p.device.type == "cuda"})
    with warnings.catch_warnings(), torch.random.fork_rng(devices=devices):
        warnings.filterwarnings("ignore", message=".*(exclude_modules|Already found a `peft_config`)")
        torch.manual_seed(seed)
        inject_adapter_in_model(config, bare, adapter_name=CRITIC)
    for parameter, flag in parameters:  # older versions of peft freeze what is no adapter
        parameter.requires_grad_(flag)
    for layer in switchable(bare):
        if id(layer) in layers:
            layer._active_adapter, layer._disable_adapters = layers[id(layer)]
        else:
            layer._active_adapter = []
        if CRITIC in adapter_names(layer):  # dropout of a model in evaluation is off
            layer.train(base_of(layer).training)
    for _, parameter in critic_parameters(bare):
        if parameter.element_size() < 4:
            parameter.data = parameter.data.to(torch.float32)
        parameter.requires_grad_(True)
