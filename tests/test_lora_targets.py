"""lora_targets names what the published recipe adapts, in every family, and peft takes exactly that."""

from __future__ import annotations

import re
from typing import Any

import pytest
import tiny_models
import zoo
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import anyflow
from anyflow.adapters import GradientCheck
from anyflow.families import families
from anyflow.families.lora import LORA_RULES, LoraRule
from anyflow.patching.model import embedded_sites
from anyflow.patching.patch import delta_paths

WAN = "WanTransformer3DModel"
# Attention with another sequence, and blocks that see the conditioning alone; SD3.5's attn2 attends to itself.
FOREIGN = re.compile(
    r"attn2\.|cross|_to_\w+_attn|(context|token|text)_refiner|refiner_blocks|perceiver|text_fusion|txt_mode|"
    r"text_transformer|norm|mod\b|modulation|adaln|patch|blocks\.\d+\.proj_in|kv_mapper|face_|image_emb|caption_|head"
)
# What the tiny inputs leave out: reference images, cameras.
NOT_RUN = {"Flux3Transformer2DModel": r"mode_blocks\.image_cond\.", "SanaWMTransformer3DModel": r"_proj_cam\."}
NO_BACKWARD = ("AnyFlowFARTransformer3DModel", "Kandinsky6SRTransformer3DModel")  # FlexAttention on a CPU
OPTIONS = {"HiDreamImageTransformer2DModel": {"force_inference_output": False}}  # experts without gradient otherwise
NUCLEUS = "NucleusMoEImageTransformer2DModel"
EXPERTS = {"moe_enabled": True, "num_experts": 2, "dense_moe_strategy": "leave_first_block_dense"}


def patched(name: str, **config: Any) -> Any:
    model = zoo.build(name, **config).train()
    model.requires_grad_(False)
    anyflow.patch(model)
    return model


def adapted_layers(model: nn.Module) -> list[str]:
    return sorted(path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer))


def test_wan_is_the_published_list() -> None:
    embedders = [f"condition_embedder.{kind}_embedder.linear_{i}" for kind in ("time", "delta") for i in (1, 2)]
    inner = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    expected = [*embedders, *(f"blocks.{block}.{layer}" for block in (0, 1) for layer in inner)]
    assert sorted(anyflow.lora_targets(patched(WAN))) == sorted(expected)


def test_all_families_are_tried() -> None:
    assert set(zoo.CLASSES) == set(families()) and set(families()) >= LORA_RULES.keys()


@pytest.mark.parametrize("name", zoo.CLASSES)
def test_peft_takes_exactly_the_targets_and_all_of_them_train(name: str) -> None:
    model = patched(name, **OPTIONS.get(name, {}))
    targets = anyflow.lora_targets(model)
    assert len(targets) == len(set(targets))
    for target in targets:
        layer = model.get_submodule(target)
        assert isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)), target
    spec = model._flowmap.spec
    deltas = [path for path in delta_paths(spec) if linears(model, path)]
    assert all(any(f"{target}.".startswith(f"{path}.") for target in targets) for path in deltas)
    time = [site.embedder for site, _ in embedded_sites(spec)]
    embedders = (*deltas, *time, *LORA_RULES.get(name, LoraRule()).time)
    in_blocks = [target for target in targets if not target.startswith(embedders)]
    if name.startswith("HunyuanVideo"):  # peft cannot tell the time embedder from that of the text refiner
        in_blocks = [
            target for target in in_blocks if not target.startswith("context_embedder.time_text_embed.timestep")
        ]
    assert any("attn" in target or "attention" in target for target in in_blocks)
    assert [target for target in in_blocks if FOREIGN.search(target) or not re.search(r"\.\d+\.", target)] == []

    inject_adapter_in_model(LoraConfig(r=1, target_modules=targets), model)
    assert adapted_layers(model) == sorted(targets)
    assert anyflow.lora_targets(model) == targets, "another list once the adapter is there"

    trained = anyflow.trainable_parameters(model)
    if name in NO_BACKWARD:
        return
    inputs = zoo.inputs(name, model)
    prediction = zoo.call(model, name, inputs, zoo.times(name, inputs), zoo.times(name, inputs, zoo.LOWER))
    check, loss = GradientCheck(), prediction.square().sum()
    check.watch(loss, lambda: trained)
    loss.backward()
    assert [path for path in check.suspicious() if not re.search(NOT_RUN.get(name, "(?!)"), path)] == []
    assert any(p.grad.any() for path, p in trained if path.startswith(tuple(deltas)))


def linears(model: nn.Module, path: str) -> list[nn.Module]:
    return [module for module in model.get_submodule(path).modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("how", ["add_adapter", "get_peft_model"])
def test_through_the_usual_doors(how: str) -> None:
    model = patched(WAN)
    targets = anyflow.lora_targets(model)
    config = LoraConfig(r=2, target_modules=targets)
    held = get_peft_model(model, config) if how == "get_peft_model" else model
    if how == "add_adapter":
        model.add_adapter(config)
    assert adapted_layers(model) == sorted(targets) and anyflow.lora_targets(held) == targets


def test_saved_copies_are_no_targets() -> None:
    model = patched(WAN)
    targets = anyflow.lora_targets(model)
    held = get_peft_model(model, LoraConfig(target_modules=["to_q"], modules_to_save=["delta_embedder"]))
    assert anyflow.lora_targets(held) == [target for target in targets if "delta_embedder" not in target]


def test_a_model_that_is_not_patched_is_told() -> None:
    with pytest.raises(ValueError, match="its delta embedder would be missed"):
        anyflow.lora_targets(tiny_models.build(WAN))


def test_sd35_attends_to_itself_twice() -> None:
    model = patched("SD3Transformer2DModel", dual_attention_layers=(0, 1))
    targets = anyflow.lora_targets(model)
    assert {f"transformer_blocks.{i}.attn2.{p}" for i in (0, 1) for p in ("to_q", "to_k", "to_v", "to_out.0")} <= set(
        targets
    )


def test_experts_of_nucleus() -> None:
    """Stacked experts cannot take a LoRA, their router gets none, and the shared expert does."""
    model = patched(NUCLEUS, **EXPERTS)
    targets = [t for t in anyflow.lora_targets(model) if t.startswith("transformer_blocks.1.img_mlp")]
    assert targets and all(".shared_expert." in target for target in targets)
    assert isinstance(model.get_submodule("transformer_blocks.1.img_mlp.gate"), nn.Linear)


@pytest.mark.parametrize("name", LORA_RULES)
def test_every_exception_changes_something(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched(name, **(EXPERTS if name == NUCLEUS else {}))
    targets = anyflow.lora_targets(model)
    monkeypatch.delitem(LORA_RULES, name)
    assert anyflow.lora_targets(model) != targets
