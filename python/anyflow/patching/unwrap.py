"""Finding the diffusers model inside what a trainer holds."""

from __future__ import annotations

from typing import Any

from torch import nn

PIPELINE_DENOISERS = ("transformer", "transformer_2", "unet")


def denoisers(target: Any) -> list[nn.Module]:
    """The bare models in ``target``: a model, one wrapped by peft, DDP, FSDP or torch.compile, or a pipeline.

    Raises TypeError when there is none.
    """
    if isinstance(target, nn.Module):
        return [unwrap(target)]
    found = [getattr(target, name, None) for name in PIPELINE_DENOISERS]
    models = [unwrap(model) for model in found if isinstance(model, nn.Module)]
    if not models:
        raise TypeError(f"{type(target).__name__} is neither a model nor a pipeline with one of {PIPELINE_DENOISERS}")
    return models


def unwrap(module: nn.Module, until: str | None = None) -> nn.Module:
    """The bare model; or the wrapper whose class is named ``until``, where there is one on the way."""
    while type(module).__name__ != until:
        if hasattr(module, "_orig_mod"):  # torch.compile
            module = module._orig_mod  # type: ignore[assignment]
        elif hasattr(module, "get_base_model"):  # peft
            module = module.get_base_model()  # type: ignore[operator]
        elif type(module).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
            module = module.module  # type: ignore[assignment]
        else:
            break
    return module
