"""Adapters of peft: what describes them, adding them again, and the state of their layers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from ..adapters.teacher import base_of
from ..families import FamilySpec
from ..patching.names import CRITIC

# What decides what the tensors of an adapter mean.
_MEANING = ("peft_type", "r", "alpha", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def flowmap_spec(bare: Any) -> FamilySpec:
    """The spec that a patched model carries."""
    return bare._flowmap.spec


def tuner_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, layer) of the layers of peft, wrappers of modules_to_save included."""
    return ((path, layer) for path, layer in module.named_modules() if _is_of_peft(layer))


def _is_of_peft(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def check_unmerged(bare: nn.Module) -> None:
    """ValueError when an adapter is merged into the base weights: they would be counted twice when loaded."""
    merged = sorted({name for _, layer in tuner_layers(bare) for name in getattr(layer, "merged_adapters", ())})
    if merged:
        raise ValueError(f"the adapters {merged} are merged into the base weights; unmerge them before saving")


def adapter_configs(bare: nn.Module) -> dict[str, Any]:
    """The configuration of every adapter of the student by its name, as JSON holds it."""
    configs = {name: config for name, config in getattr(bare, "peft_config", {}).items() if name != CRITIC}
    return {name: json.loads(json.dumps(config.to_dict(), default=_plain)) for name, config in configs.items()}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def check_configs(bare: nn.Module, configs: Mapping[str, Any]) -> None:
    """ValueError where an adapter that is on the model is not the one of the file, by name or by what it means."""
    present = adapter_configs(bare)
    extra = sorted(present.keys() - configs.keys())
    if extra:
        raise ValueError(f"the model has the adapters {extra}, which the file does not hold")
    different = [
        f"{key} of {name!r} is {present[name].get(key)!r} in the model, {configs[name].get(key)!r} in the file"
        for name in present
        for key in _MEANING
        if (present[name].get(key) or None) != (configs[name].get(key) or None)
    ]
    if different:
        raise ValueError(f"nothing was loaded: {'; '.join(different)}")


def lora_scale(alpha: float, rank: int, config: Mapping[str, Any]) -> float:
    """The factor of B A: alpha / r, or alpha / sqrt(r) with rsLoRA."""
    return alpha / rank ** (0.5 if config.get("use_rslora") else 1)


def lora_header(names: Iterable[str], config: Mapping[str, Any], prefix: str = "") -> str:
    """JSON of a LoRA's configuration as diffusers keeps it in a file's header, its targets the layers in ``names``."""
    targets = sorted({name.partition(".lora_")[0] for name in names if ".lora_" in name})
    config = {**config, "target_modules": targets, "modules_to_save": None, "exclude_modules": None}
    return json.dumps({f"{prefix}{key}": value for key, value in config.items() if value is not None}, sort_keys=True)


def add_adapters(bare: nn.Module, configs: Mapping[str, Any], *, only_names: bool = False) -> None:
    """Add the adapters that are not there. ``only_names``: for a copy without storage, from which no first value of an
    adapter can be computed."""
    from peft import get_peft_config, inject_adapter_in_model

    present = getattr(bare, "peft_config", {})
    for name, values in configs.items():
        if name in present:
            continue
        config = get_peft_config({key: value for key, value in values.items() if value is not None})
        if only_names and isinstance(getattr(config, "init_lora_weights", None), str):
            config.init_lora_weights = True
        inject_adapter_in_model(config, bare, adapter_name=name)
        for _, layer in tuner_layers(bare):  # dropout of a model in evaluation is off
            layer.train(base_of(layer).training)
        if not hasattr(bare, "peft_config"):
            bare.peft_config = {}  # type: ignore[assignment]
        bare.peft_config[name] = config  # type: ignore[index, operator]
        if hasattr(bare, "_hf_peft_config_loaded"):
            bare._hf_peft_config_loaded = True  # type: ignore[assignment]


def layer_states(bare: nn.Module) -> dict[str, Any]:
    """path -> active adapters and their scales, which ``set_adapters`` changes behind the configuration's back."""

    def scales(layer: Any) -> dict[str, float]:
        return {name: scale for name, scale in getattr(layer, "scaling", {}).items() if name != CRITIC}

    return {
        path: {"active": list(layer.active_adapters), "scaling": scales(layer)} for path, layer in tuner_layers(bare)
    }


def restore_layers(bare: nn.Module, states: Mapping[str, Any]) -> None:
    """The inverse of ``layer_states``, for the layers that both know. Adapters that are active train, as in peft."""
    for path, layer in tuner_layers(bare):
        state = states.get(path)
        if state is not None:
            layer.set_adapter(state["active"])
            getattr(layer, "scaling", {}).update(state["scaling"])


def remove_adapters(module: nn.Module) -> None:
    """Put the base layers and the originals of modules_to_save back into the places of the layers of peft."""
    for name, child in list(module.named_children()):
        base: Any = child
        while _is_of_peft(base):
            base = base_of(base)
        setattr(module, name, base)
        remove_adapters(base)
    module.__dict__.pop("peft_config", None)
