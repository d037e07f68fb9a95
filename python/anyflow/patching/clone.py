"""Cloning a time embedder into the delta embedder beside it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .swap import is_wrapped


def clone_embedder(embedder: nn.Module, path: str) -> nn.Module:
    """A trainable plain copy: own storage, no hooks, adapters merged into the copied weights, quantised linear layers
    (torchao, bitsandbytes) as plain ones of their dequantised weights; other dtypes as they are.

    Raises ValueError, with the order to use instead, for an embedder whose layers LyCORIS, offloading or layerwise
    casting have hooked, that is sharded, or that is quantised in a way nothing here can take back.
    """
    for name, module in embedder.named_modules():
        _check_forward(module, f"{path}.{name}" if name else path)
    with torch.inference_mode(False):  # it is to be trained, wherever it was made
        clone = copy.deepcopy(embedder)
    clone.state_dict()  # bitsandbytes takes back the layout that inference on a CPU gave its 4 bit layers
    _merge_adapters(clone)
    _dequantise(clone)
    for name, parameter in clone.named_parameters():
        if not _is_plain(parameter):
            raise ValueError(
                f"{path}.{name} is quantised or sharded ({parameter.dtype}, {type(parameter).__name__}) and cannot be "
                "cloned into a trainable embedder. Patch first, or keep the time embedder out of quantisation."
            )
    for module in clone.modules():
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        ):
            hooks.clear()
    return clone.requires_grad_(True)


def is_quantised(parameter: Tensor) -> bool:
    """Whether a parameter is packed integers, or says that it is float and is not."""
    return not parameter.is_floating_point() or type(parameter).__module__.startswith("torchao.")


def _is_plain(parameter: Tensor) -> bool:
    """Whether a parameter is float numbers that an optimizer can move."""
    return parameter.is_floating_point() and parameter.element_size() > 1 and type(parameter) is nn.Parameter


def _check_forward(module: nn.Module, path: str) -> None:
    """Refuse a forward that was replaced on the instance: a copy of it would run the original's weights."""
    wrapped = is_wrapped(module)
    if hasattr(getattr(module.__dict__.get("forward"), "__self__", None), "org_forward"):
        raise ValueError(
            f"LyCORIS is applied to {path}. Patch first: call network.restore(), anyflow.patch, and make and apply the "
            "network again, so that it covers the delta embedder as well."
        )
    if wrapped or hasattr(module, "_diffusers_hook") or hasattr(module, "_hf_hook"):
        raise ValueError(
            f"{path} is already hooked (offloading or layerwise casting). Patch first, then enable it: remove the "
            "hooks, call anyflow.patch, and enable them again."
        )


def _merge_adapters(module: nn.Module) -> None:
    """Replace every peft layer in ``module`` by its base layer, the active adapters merged into it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, child in list(module.named_children()):
        if isinstance(child, BaseTunerLayer):
            if not child.merged and not child.disable_adapters:
                child.merge()
            setattr(module, name, child.get_base_layer())
        else:
            _merge_adapters(child)


def _dequantise(module: nn.Module) -> None:
    """Replace every quantised linear layer in ``module`` by a plain one, where peft knows how to unpack its weight."""
    from peft.utils.integrations import dequantize_module_weight

    for name, child in list(module.named_children()):
        if not isinstance(child, nn.Linear):
            _dequantise(child)
        elif is_quantised(child.weight):
            weight = dequantize_module_weight(child)
            if _is_plain(nn.Parameter(weight.data, requires_grad=False)):
                setattr(module, name, _plain_linear(child, weight.data))


def _plain_linear(layer: nn.Linear, weight: Tensor) -> nn.Linear:
    dtype = weight.dtype if layer.bias is None else layer.bias.dtype  # of the model; some unpack to float32
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight.to(dtype).reshape(plain.weight.shape).clone())
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().clone())
    return plain.train(layer.training)
