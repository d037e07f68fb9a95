"""What was trained comes back to the bit, or a clear error says why nothing was loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import anyflow
from anyflow import AnyFlowDistiller, load_student, save_student
from anyflow.checkpoints import STUDENT_FILE

NAME = "SD3Transformer2DModel"
LAYOUTS: dict[str, dict[str, Any] | None] = {
    "plain delta": {"target_modules": ["to_q", "to_v"]},
    "lora on delta": {"target_modules": r".*to_q|.*(delta|timestep)_embedder\.linear_[12]"},
    "delta in modules_to_save": {"target_modules": ["to_q"], "modules_to_save": ["delta_embedder"]},
    "full rank": None,
}


def trained(layout: str, gate: float = 0.3, deltatime_type: str = "r") -> Any:
    torch.manual_seed(0)
    model = tiny_models.build(NAME)
    anyflow.patch(model, gate_value=gate, deltatime_type=deltatime_type)
    held: Any = model
    config = LAYOUTS[layout]
    if config is not None:
        model.requires_grad_(False)
        if "modules_to_save" in config:
            held = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, **config))
        else:
            model.add_adapter(LoraConfig(r=2, lora_alpha=8, **config))
    optimizer = torch.optim.Adam([p for _, p in anyflow.trainable_parameters(held)], lr=1e-2)
    for _ in range(3):
        output(held, grad=True).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return held


def output(model: Any, grad: bool = False) -> Tensor:
    inputs = tiny_models.inputs(NAME)
    t, r = tiny_models.times(NAME, [0.9, 0.4]), tiny_models.times(NAME, [0.1, 0.05])
    with torch.set_grad_enabled(grad):
        return tiny_models.call(model, NAME, inputs, t, r)


@pytest.mark.parametrize("layout", LAYOUTS)
class TestRoundTrip:
    @pytest.mark.parametrize("into", ["stock", "patched", "adapted"])
    def test_to_the_bit(self, layout: str, into: str, tmp_path: Path) -> None:
        model = trained(layout, gate=0.3, deltatime_type="t-r")
        save_student(model, tmp_path)
        fresh: Any = tiny_models.build(NAME)
        if into != "stock":
            anyflow.patch(fresh)
        if into == "adapted" and LAYOUTS[layout] is not None:
            fresh = get_peft_model(fresh, LoraConfig(r=2, lora_alpha=8, **LAYOUTS[layout]))
        load_student(fresh, tmp_path)
        assert torch.equal(output(fresh), output(model))

    def test_names_are_the_bare_models(self, layout: str, tmp_path: Path) -> None:
        path = save_student(trained(layout), tmp_path)
        keys = list(load_file(path))
        assert any("delta_embedder" in key for key in keys) and len(keys) == len(set(keys))
        assert not any(key.startswith(("base_model.", "module.", "_orig_mod.")) for key in keys)
        if LAYOUTS[layout] is not None:
            assert not any(key.endswith("to_k.weight") for key in keys)


def test_wrapped_models_save_the_same_file(tmp_path: Path) -> None:
    model = trained("plain delta")
    compiled = torch.compile(model, backend="aot_eager")
    first, second = (load_file(save_student(m, tmp_path / n)) for n, m in (("a", model), ("b", compiled)))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class TestStrictness:
    def change(self, path: Path, edit: Any) -> None:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata())
        tensors = load_file(path)
        edit(tensors, metadata)
        save_file(tensors, path, metadata)

    def refuse(self, tmp_path: Path, edit: Any, message: str) -> None:
        path = save_student(trained("plain delta"), tmp_path)
        self.change(path, edit)
        fresh = trained("plain delta", gate=0.25)
        with torch.no_grad():
            for _, parameter in anyflow.delta_parameters(fresh):
                parameter.add_(1)
        before = {k: v.clone() for k, v in fresh.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load_student(fresh, tmp_path)
        assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())

    def test_missing_and_unexpected_delta_keys_are_listed(self, tmp_path: Path) -> None:
        key = "time_text_embed.delta_embedder.linear_1.weight"

        def rename(tensors: dict[str, Tensor], _: Any) -> None:
            tensors["other.delta.weight"] = tensors.pop(key)

        self.refuse(tmp_path, rename, rf"Missing: \['{key}'\]; unexpected: \['other\.delta\.weight'\]")

    def test_other_shape(self, tmp_path: Path) -> None:
        def shrink(tensors: dict[str, Tensor], _: Any) -> None:
            key = "time_text_embed.delta_embedder.linear_1.bias"
            tensors[key] = tensors[key][:-1].clone()

        self.refuse(tmp_path, shrink, "linear_1.bias: ")

    @pytest.mark.parametrize(("key", "value"), [("format", "lora"), ("format_version", "2"), ("family", "Flux")])
    def test_other_metadata(self, key: str, value: str, tmp_path: Path) -> None:
        self.refuse(tmp_path, lambda _, metadata: metadata.update({key: value}), value)

    def test_truncated_and_foreign_files(self, tmp_path: Path) -> None:
        path = save_student(trained("plain delta"), tmp_path)
        fresh = tiny_models.build(NAME)
        for content in (path.read_bytes()[:-10], b"not a checkpoint", b""):
            path.write_bytes(content)
            with pytest.raises(ValueError, match="not a readable safetensors file"):
                load_student(fresh, tmp_path)
        path.unlink()
        with pytest.raises(FileNotFoundError):
            load_student(fresh, tmp_path)
        assert not anyflow.is_patched(fresh)

    def test_stock_model_has_no_student(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no student"):
            save_student(tiny_models.build(NAME), tmp_path)


def test_a_failed_write_leaves_the_last_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("plain delta")
    path = save_student(model, tmp_path)
    content = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_student(model, tmp_path)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]
    assert path.name == STUDENT_FILE


def test_distiller_resumes_its_stream_and_student(tmp_path: Path) -> None:
    config = {"target_mode": "linear", "seed": 3}
    batch = {
        "latents": torch.zeros(2, 4, 32, 32),
        "noise": torch.ones(2, 4, 32, 32),
        "sigmas": torch.tensor([0.9, 0.5]),
        "conditioning": {},
    }
    first = AnyFlowDistiller(trained("plain delta"), config=config)
    first.prepare_batch(batch)
    first.on_save_checkpoint(17, tmp_path)
    expected = first.prepare_batch(batch)["anyflow_r_sigmas"]
    torch.manual_seed(9)
    model = tiny_models.build(NAME)
    anyflow.patch(model)
    second = AnyFlowDistiller(model, config=config)
    assert second.on_load_checkpoint(tmp_path) == 17
    assert torch.equal(second.prepare_batch(batch)["anyflow_r_sigmas"], expected)
    assert torch.equal(output(model), output(first.student.bare))
