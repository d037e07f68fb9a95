"""A delta embedder that is plain, under a LoRA, or in modules_to_save takes the weights of each of the three."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import students
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from students import SD3
from torch import Tensor

import anyflow
from anyflow import load_student, save_student
from anyflow.patching.unwrap import unwrap

LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["to_q"]},
    "lora": {"target_modules": r".*to_q|.*delta_embedder\.linear_[12]"},
    "dora": {"target_modules": r".*to_q|.*delta_embedder\.linear_[12]", "use_dora": True},
    "saved": {"target_modules": ["to_q"], "modules_to_save": ["delta_embedder"]},
}
THREE = ("plain", "lora", "saved")
DELTA = "time_text_embed.delta_embedder"
# Folding a LoRA rounds each weight once: relative to the largest, half a unit in the last place of float32, and as much
# again where the sum of the LoRA itself is ordered otherwise.
FOLDED = 2.0**-22


def laid_out(layout: str, seed: int = 0, moved: bool = True) -> Any:
    model = tiny_models.build(SD3)
    model.requires_grad_(False)
    anyflow.patch(model, gate_value=0.3 if moved else 0.25)
    held = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, **LAYOUTS[layout]))
    if moved:
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in [*anyflow.trainable_parameters(held), *anyflow.delta_parameters(held)]:
                if "original_module" not in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return held.eval()


def effective(model: Any) -> dict[str, Tensor]:
    """The delta embedder's answers to unit inputs and zero, layer by layer: its weights, whatever computes them."""
    delta = unwrap(model).get_submodule(DELTA)
    with torch.no_grad():
        return {
            name: getattr(delta, name)(torch.eye(getattr(delta, name).in_features)) for name in ("linear_1", "linear_2")
        }


@pytest.mark.parametrize("file", THREE)
@pytest.mark.parametrize("model", THREE)
def test_nine_combinations(file: str, model: str, tmp_path: Path) -> None:
    source, target = laid_out(file), laid_out(model, seed=5)
    expected = effective(source)
    save_student(source, tmp_path)
    load_student(target, tmp_path)
    found = effective(target)
    if file == model or "lora" not in (file, model):
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert torch.equal(students.output(target, SD3), students.output(source, SD3))
    elif file != "lora":  # under a LoRA that is 0
        base = {n: p for n, p in unwrap(target).named_parameters() if n.startswith(DELTA) and "base_layer" in n}
        assert len(base) == 4 and not any(p.any() for n, p in target.named_parameters() if DELTA in n and "lora_B" in n)
        saved = load_file(tmp_path / "anyflow_student.safetensors")
        for name, parameter in base.items():
            key = name.replace("base_layer.", "")
            copied = key.replace(f"{DELTA}.", f"{DELTA}.modules_to_save.default.")
            assert torch.equal(parameter, saved[copied if file == "saved" else key])
    for name in expected:
        assert (found[name] - expected[name]).abs().max() <= FOLDED * expected[name].abs().max()
    assert unwrap(target)._flowmap.gate_value == 0.3


@pytest.mark.parametrize(
    ("file", "model"), [("dora", "plain"), ("dora", "saved"), ("plain", "dora"), ("saved", "dora")]
)
def test_weight_decomposition_on_the_delta_of_one_side(file: str, model: str) -> None:
    source, target = laid_out(file), laid_out(model, seed=5)
    found = placed_into(target, source)
    for name, expected in effective(source).items():
        assert (found[name] - expected).abs().max() <= 4 * FOLDED * expected.abs().max()


def test_no_folding_hides_a_difference_elsewhere(tmp_path: Path) -> None:
    """The LoRA of to_q is weight-decomposed in the file, and not in the model."""
    save_student(laid_out("dora"), tmp_path)
    with pytest.raises(ValueError, match=r"unexpected: \['transformer_blocks.0.attn.to_q.lora_magnitude_vector"):
        load_student(laid_out("lora"), tmp_path)


def placed_into(target: Any, source: Any) -> dict[str, Tensor]:
    from anyflow.checkpoints.plain import placed, plain_state

    ours, theirs = (unwrap(model).get_submodule(DELTA) for model in (target, source))
    state = ours.state_dict()
    for key, value in placed(ours, plain_state(theirs), plain_state(theirs, adapted=False)).items():
        state[key].copy_(value.reshape(state[key].shape))
    return effective(target)


@pytest.mark.parametrize("file", THREE)
def test_a_model_without_a_second_time_gets_it(file: str, tmp_path: Path) -> None:
    source = laid_out(file)
    save_student(source, tmp_path)
    fresh = tiny_models.build(SD3)
    load_student(fresh, tmp_path)
    assert anyflow.is_patched(fresh) and fresh._flowmap.gate_value == 0.3
    assert torch.equal(students.output(fresh, SD3), students.output(source, SD3))


@pytest.mark.parametrize("file", THREE)
def test_an_adapter_that_came_before_the_patch(file: str, tmp_path: Path) -> None:
    """The inference worker that adds its LoRA first: there was no delta embedder for it to sit on."""
    source = laid_out(file)
    save_student(source, tmp_path)
    fresh = tiny_models.build(SD3)
    options = {key: value for key, value in LAYOUTS[file].items() if key != "modules_to_save"}
    fresh.add_adapter(LoraConfig(r=2, lora_alpha=8, **options))
    load_student(fresh, tmp_path)
    assert (students.output(fresh, SD3) - students.output(source, SD3)).abs().max() < 1e-5
    for name, expected in effective(source).items():
        assert (effective(fresh)[name] - expected).abs().max() <= FOLDED * expected.abs().max()


@pytest.mark.parametrize("file", THREE)
def test_the_original_under_a_trained_copy_is_the_base(file: str, tmp_path: Path) -> None:
    source, target = laid_out(file), laid_out("saved", seed=5)
    save_student(source, tmp_path)
    load_student(target, tmp_path)
    original = unwrap(target).get_submodule(DELTA).original_module.linear_1.weight
    saved = load_file(tmp_path / "anyflow_student.safetensors")
    base = {
        "plain": "linear_1.weight",
        "lora": "linear_1.base_layer.weight",
        "saved": "original_module.linear_1.weight",
    }
    assert torch.equal(original, saved[f"{DELTA}.{base[file]}"])


def test_an_adapter_that_the_file_does_not_hold(tmp_path: Path) -> None:
    save_student(laid_out("plain"), tmp_path)
    target = laid_out("lora", moved=False)
    target.add_adapter("second", LoraConfig(r=2, target_modules=["to_k"]))
    with pytest.raises(ValueError, match=r"the adapters \['second'\], which the file does not hold"):
        load_student(target, tmp_path)


def test_a_full_rank_student_is_no_adapter(tmp_path: Path) -> None:
    model = tiny_models.build(SD3)
    anyflow.patch(model)
    save_student(model, tmp_path)
    target = laid_out("plain")
    before = students.output(target, SD3)
    with pytest.raises(ValueError, match="which the file does not hold"):
        load_student(target, tmp_path)
    assert torch.equal(students.output(target, SD3), before)
