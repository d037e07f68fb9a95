"""Cloning a time embedder into the delta embedder beside it."""

from __future__ import annotations

import copy

from torch import nn


def clone_embedder(embedder: nn.Module, path: str) -> nn.Module:
    """A trainable plain copy: same dtypes, own storage, no hooks, adapters merged into the copied weights.

    Raises ValueError for an embedder that is quantised or whose layers have been hooked by offloading or layerwise
    casting, with the order to use instead.
    """
    for name, module in embedder.named_modules():
        if "forward" in module.__dict__ or hasattr(module, "_diffusers_hook") or hasattr(module, "_hf_hook"):
            raise ValueError(
                f"{path}.{name} is already hooked (offloading or layerwise casting). Patch first, then enable it: "
                "remove the hooks, call anyflow.patch, and enable them again."
            )
    for name, parameter in embedder.named_parameters():
        if not parameter.is_floating_point() or parameter.element_size() == 1 or type(parameter) is not nn.Parameter:
            raise ValueError(
                f"{path}.{name} is quantised or sharded ({parameter.dtype}, {type(parameter).__name__}) and cannot be "
                "cloned into a trainable embedder. Patch first, or keep the time embedder out of quantisation."
            )
    clone = copy.deepcopy(embedder)
    _merge_adapters(clone)
    for module in clone.modules():
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        ):
            hooks.clear()
    return clone.requires_grad_(True)


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
