"""Weights free of adapters: folding adapters into them, and placing them where adapters are."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import lycoris_layers

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:base_layer\.|original_module\.|modules_to_save\.[^.]+\.|_orig_mod\.)")


def plain_name(key: str) -> str:
    """``key`` without what peft and torch.compile put into the names of a module's tensors."""
    return _WRAPPERS.sub("", key)


@torch.no_grad()
def plain_state(module: nn.Module, *, adapted: bool = True) -> dict[str, Tensor]:
    """name -> tensor of the stock module that computes what ``module`` computes in evaluation, adapters merged.

    ``adapted=False``: of the base weights under the adapters. One layer at a time is copied; ``module`` is not
    touched. The sums round in the dtype of the weights. Raises ValueError for an adapter that cannot be merged.
    """
    state: dict[str, Tensor] = {}
    wrapped = {id(layer) for layer, _ in lycoris_layers(module)}

    def collect(child: nn.Module, path: str) -> None:
        plain = _plain_module(child, path, adapted, wrapped)
        for name, tensor in plain._parameters.items():
            if tensor is not None:
                state[f"{path}{name}"] = tensor.detach()
        for name, buffer in plain._buffers.items():
            if buffer is not None and name not in plain._non_persistent_buffers_set:
                state[f"{path}{name}"] = buffer
        for name, grandchild in plain.named_children():
            collect(grandchild, f"{path}{name}.")

    collect(module, "")
    return state


def _plain_module(module: nn.Module, path: str, adapted: bool, wrapped: set[int]) -> nn.Module:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, AuxiliaryTrainingWrapper):
        return _plain_module(_running(module, path, adapted), path, adapted, wrapped)
    if isinstance(module, BaseTunerLayer):
        base: Any = module.get_base_layer()
        if id(base) in wrapped:
            raise ValueError(f"{path[:-1]} has adapters of peft and of LyCORIS, which cannot be merged together")
        return _merged(module).get_base_layer() if adapted else base
    return _probed(module, path) if id(module) in wrapped and adapted else module


def _running(wrapper: Any, path: str, adapted: bool) -> nn.Module:
    """What peft runs in the place of a module: its trained copy, if all active adapters have one."""
    copies = getattr(wrapper, "modules_to_save", None)
    if copies is None:
        raise ValueError(f"{path[:-1]} is a {type(wrapper).__name__}, which cannot be merged")
    active = wrapper.active_adapters
    on = adapted and not wrapper.disable_adapters and active and all(name in copies for name in active)
    return copies[active[0]] if on else wrapper.original_module


def _merged(layer: Any) -> Any:
    """A copy of a layer of peft with its active adapters merged."""
    if layer.merged or layer.disable_adapters:
        return layer
    copied = copy.deepcopy(layer)
    copied.merge(safe_merge=True)
    return copied


def _probed(layer: nn.Module, path: str) -> nn.Module:
    """The weight and bias that a layer under LyCORIS has: its answers to the unit inputs and to zero.

    Right for every kind, with dropout, decomposition and bypass, whatever it does to its weights.
    """
    units = _unit_inputs(layer, path)
    around = [network_layer for _, layers in lycoris_layers(layer) for network_layer in layers]
    like = next(chain(layer.parameters(), *(network_layer.parameters() for network_layer in around)))
    try:
        answers = _answers(layer, units.to(like.device))
    except RuntimeError:  # a kind that makes float32 tensors of its own
        answers = _answers(layer, units.to(like.device, torch.float32))
    weight = (answers[1:] - answers[:1]).T.reshape(-1, *units.shape[1:])
    plain = nn.Module()
    plain.weight = nn.Parameter(weight.to(like.dtype).contiguous(), requires_grad=False)
    if any(getattr(holder, "bias", None) is not None for holder in (layer, *around)):
        plain.bias = nn.Parameter(answers[0].to(like.dtype), requires_grad=False)
    return plain


def _answers(layer: nn.Module, units: Tensor) -> Tensor:
    """[1 + n, outputs] of a copy in evaluation, in the dtype of ``units``: to zero, and to each unit input."""
    twin = copy.deepcopy(layer).to(units.dtype).eval()
    for _, layers in lycoris_layers(twin):
        for network_layer in layers:
            network_layer.to(units.dtype).eval()
    return twin(torch.cat([torch.zeros_like(units[:1]), units])).flatten(1)


def _unit_inputs(layer: nn.Module, path: str) -> Tensor:
    """[n, ...]: one input of the size of the kernel for every weight of an output, 1 there and 0 elsewhere."""
    if isinstance(layer, nn.Linear):
        return torch.eye(layer.in_features, dtype=torch.float64)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and _covers_its_kernel(layer):
        size = (layer.in_channels, *layer.kernel_size)
        return torch.eye(math.prod(size), dtype=torch.float64).reshape(-1, *size)
    raise ValueError(f"{path[:-1]} is a {layer}: under LyCORIS, linear layers and patch embeddings can be merged")


def _covers_its_kernel(layer: Any) -> bool:
    """Whether an input of the size of the kernel has one output."""
    return layer.groups == 1 and not any(layer.padding) and all(step == 1 for step in layer.dilation)


def placed(module: nn.Module, weights: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """key -> value that make ``module`` compute with ``weights``, whatever adapters of peft are on it.

    A weight goes under ``base_layer`` of a LoRA, whose B becomes 0, or into the trained copies of modules_to_save,
    whose originals become ``base``. LoRA's A keeps its value. Raises ValueError for other adapters.
    """
    found: dict[str, Tensor] = {}
    for key, own in module.state_dict().items():
        name = plain_name(key)
        if name in weights:
            found[key] = base[name] if "original_module." in key else weights[name]
        elif ".lora_B." in key:
            found[key] = torch.zeros(own.shape, dtype=own.dtype)
        elif ".lora_magnitude_vector." in key:
            weight = weights[f"{key.partition('.lora_magnitude_vector.')[0]}.weight"]
            found[key] = torch.linalg.norm(weight, dim=1).to(weight.dtype)
        elif ".lora_A." not in key:
            raise ValueError(f"no rule to place a plain weight under the adapter that has {key}")
    return found
