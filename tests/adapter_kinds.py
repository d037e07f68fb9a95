"""Every kind of adapter that a student can have, put on tiny models with weights that make a difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny_models
import torch
from lycoris import LycorisNetwork, create_lycoris
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

import anyflow

ATTENTION = ["to_q", "to_v"]
Held = tuple[Any, Any]  # what the trainer holds: the model, perhaps wrapped, and a LyCORIS network or None


def lora(how: str, **options: Any) -> Callable[[Any], Held]:
    return peft_adapter(how, LoraConfig, **{"r": 2, "target_modules": ATTENTION, **options})


def peft_adapter(how: str, kind: type, **options: Any) -> Callable[[Any], Held]:
    def put(model: Any) -> Held:
        config = kind(**options)
        if how == "get_peft_model":
            return get_peft_model(model, config), None
        if how == "add_adapter":
            model.add_adapter(config)
        else:
            inject_adapter_in_model(config, model)
        return model, None

    return put


def recipe(model: Any) -> Held:
    model.add_adapter(LoraConfig(r=2, target_modules=anyflow.lora_targets(model)))
    return model, None


def two(active: list[str]) -> Callable[[Any], Held]:
    def put(model: Any) -> Held:
        model.add_adapter(LoraConfig(r=2, target_modules=ATTENTION), adapter_name="first")
        model.add_adapter(LoraConfig(r=3, target_modules=["to_q", "to_k"]), adapter_name="second")
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.set_adapter([name for name in active if name in layer.lora_A])
        return model, None

    return put


def lycoris(algo: str, **options: Any) -> Callable[[Any], Held]:
    def put(model: Any) -> Held:
        network = create_lycoris(model, 0.7, 2, 1, warn_on_unmatched=False, algo=algo, factor=4, **options)
        network.apply_to()
        return model, network.train()

    return put


def lycoris_full(model: Any) -> Held:
    """The kind that takes the weights off the layers; Wan's forward reads those of its embedder, so not everywhere."""
    own = {"target_module": LycorisNetwork.TARGET_REPLACE_MODULE, "target_name": LycorisNetwork.TARGET_REPLACE_NAME}
    LycorisNetwork.apply_preset({"target_module": [], "target_name": [r".*attn.*\.to_[qv]"]})  # of the class
    try:
        network = LycorisNetwork(model, 0.7, network_module="full", warn_on_unmatched=False)
    finally:
        LycorisNetwork.apply_preset(own)
    network.apply_to()
    return model, network.train()


KINDS: dict[str, Callable[[Any], Held]] = {
    "lora": lora("add_adapter"),
    "lora, wrapped": lora("get_peft_model"),
    "lora, injected": lora("inject"),
    "lora, dropout": lora("add_adapter", lora_dropout=0.5),
    "dora": lora("add_adapter", use_dora=True),
    "rslora": lora("add_adapter", use_rslora=True),
    "two adapters, one active": two(["second"]),
    "two adapters, both active": two(["first", "second"]),
    "published recipe": recipe,
    "embedders": lora("inject", target_modules=r".*(time|timestep|delta)_embedder\.linear_[12]|.*to_q"),
    "saved delta": lora("get_peft_model", modules_to_save=["delta_embedder"]),
    "saved head": lora("get_peft_model", modules_to_save=["proj_out"]),
    "peft loha": peft_adapter("inject", LoHaConfig, r=2, target_modules=ATTENTION),
    "peft lokr": peft_adapter("inject", LoKrConfig, r=2, target_modules=ATTENTION),
    "peft ia3": peft_adapter("inject", IA3Config, target_modules=ATTENTION, feedforward_modules=[]),
    "peft oft": peft_adapter("inject", OFTConfig, oft_block_size=4, target_modules=ATTENTION),
    "lycoris lokr": lycoris("lokr"),
    "lycoris lokr, bypass": lycoris("lokr", bypass_mode=True),
    "lycoris lokr, decomposed": lycoris("lokr", dora_wd=True),
    "lycoris loha": lycoris("loha"),
    "lycoris loha, dropout": lycoris("loha", rank_dropout=0.3, module_dropout=0.3),
    "lycoris locon": lycoris("locon"),
    "lycoris locon, decomposed": lycoris("locon", dora_wd=True),
    "lycoris diag-oft": lycoris("diag-oft"),
    "lycoris full": lycoris_full,
}


def student(name: str, kind: str, scale: float = 0.05) -> Held:
    """A patched student with an adapter whose every weight has been moved."""
    torch.manual_seed(0)
    model = tiny_models.build(name)
    model.requires_grad_(False)
    anyflow.patch(model)
    held, network = KINDS[kind](model)
    held.train()
    moved = [p for _, p in anyflow.trainable_parameters(held)] if network is None else list(network.parameters())
    with torch.no_grad():
        for parameter in moved:
            parameter.add_(scale * torch.randn_like(parameter))
    return held, network


def state(held: nn.Module, network: Any = None) -> list[Any]:
    """All that a teacher's forward may disturb, layer by layer."""
    layers = [
        (
            name,
            module.training,
            getattr(module, "_disable_adapters", None),
            tuple(module.active_adapters) if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) else (),
            module.__dict__.get("forward"),
            [(p.requires_grad, p.grad is None) for p in module.parameters(recurse=False)],
        )
        for name, module in held.named_modules()
    ]
    if network is not None:
        layers += [(name, module.training) for name, module in network.named_modules()]
        layers += [(network.multiplier, [(x.multiplier, x.org_forward) for x in network.loras])]
    return layers
