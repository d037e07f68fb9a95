"""``anyflow convert``: the names of other trainers, both ways, and every doubt an error."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import students
import tiny_models
import tiny_pipelines
import torch
import zoo
from diffusers import AnyFlowTransformer3DModel
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from students import FULL, SD3, WAN
from torch import Tensor

import anyflow
from anyflow.checkpoints import NAMINGS, STUDENT_FILE
from anyflow.cli import main
from anyflow.families import registry
from anyflow.families.registry import find_spec

OURS = "condition_embedder.delta_embedder."
PATHS = {
    "student": OURS,
    "anyflow": OURS,
    "delta-prefix": "condition_embedder.delta_time_embedder.",
    "r-embedder": "r_embedder.time_embedder.",
}


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def edit(path: Path, change: Any, metadata: dict[str, str] | None = None) -> Path:
    tensors = load_file(path)
    kept = header(path) if metadata is None else metadata
    changed = change(tensors)
    save_file(tensors if changed is None else changed, path, kept)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return anyflow.save_student(students.trained(WAN, FULL, steps=1)[0], tmp_path_factory.mktemp("saved"))


@pytest.fixture
def whole(saved: Path, tmp_path: Path) -> Path:
    """A full-rank student of Wan."""
    (tmp_path / "whole").mkdir()
    return Path(shutil.copy(saved, tmp_path / "whole"))


@pytest.fixture
def deltas(whole: Path, tmp_path: Path) -> Path:
    """Its delta embedder alone, without a word about it."""
    path = tmp_path / "deltas.safetensors"
    save_file({key: tensor for key, tensor in load_file(whole).items() if key.startswith(OURS)}, path)
    return path


def converted(source: Path, tmp_path: Path, to: str, *options: str) -> Path:
    target = tmp_path / f"{to}-{len(list(tmp_path.iterdir()))}.safetensors"
    assert main(["convert", str(source), str(target), "--to", to, *options]) == 0
    return target


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("to", [name for name in NAMINGS if name != "student"])
class TestThereAndBack:
    def test_a_whole_model(self, to: str, whole: Path, tmp_path: Path) -> None:
        there = converted(whole, tmp_path, to)
        assert sum(key.startswith(PATHS[to]) for key in load_file(there)) == 4
        assert load_file(there).keys() - load_file(whole).keys() == {
            key.replace(OURS, PATHS[to]) for key in load_file(whole) if key.startswith(OURS) and PATHS[to] != OURS
        }
        back = converted(there, tmp_path, "student")
        assert same(load_file(back), load_file(whole))
        fresh = tiny_models.build(WAN)
        back.rename(back.with_name(STUDENT_FILE))
        anyflow.load_student(fresh, tmp_path)
        assert fresh._flowmap.gate_value == 0.3

    def test_delta_embedders_alone(self, to: str, deltas: Path, tmp_path: Path) -> None:
        there = converted(deltas, tmp_path, to)
        assert all(key.startswith(PATHS[to]) for key in load_file(there))
        back = converted(there, tmp_path, "student", "--gate-value", "0.4", "--deltatime-type", "t-r")
        assert same(load_file(back), load_file(deltas))
        fresh = tiny_models.build(WAN)
        before = {key: tensor.clone() for key, tensor in fresh.state_dict().items()}
        back.rename(back.with_name(STUDENT_FILE))
        anyflow.load_student(fresh, tmp_path)
        assert (fresh._flowmap.gate_value, fresh._flowmap.deltatime_type) == (0.4, "t-r")
        assert all(torch.equal(fresh.state_dict()[key], tensor) for key, tensor in before.items())
        assert torch.equal(fresh.state_dict()[f"{OURS}linear_1.weight"], load_file(deltas)[f"{OURS}linear_1.weight"])

    @pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
    def test_a_lora(self, to: str, options: dict[str, Any], tmp_path: Path) -> None:
        model = tiny_models.build(WAN)
        anyflow.patch(model, gate_value=0.3)
        targets = r".*to_q|.*(delta|time)_embedder\.linear_[12]"
        model.add_adapter(LoraConfig(r=2, lora_alpha=7, target_modules=targets, **options))
        with torch.no_grad():
            for _, parameter in anyflow.trainable_parameters(model):
                parameter.add_(0.1)
        source = anyflow.save_student(model, tmp_path / "source")
        there = converted(source, tmp_path, to)
        assert not any(".default." in key or "base_layer" in key for key in load_file(there))
        assert json.loads(header(there)["lora_adapter_metadata"])["lora_alpha"] == 7
        back = converted(there, tmp_path, "student")
        assert same(load_file(back), load_file(source))
        fresh = tiny_models.build(WAN)
        back.rename(back.with_name(STUDENT_FILE))
        anyflow.load_student(fresh, tmp_path)
        assert torch.equal(students.output(fresh, WAN), students.output(model, WAN))


def test_a_published_directory_loads_and_the_model_computes_the_same(tmp_path: Path) -> None:
    """A diffusers AnyFlow checkpoint becomes a student of Wan; gate and type are read from its config.json."""
    held, _, _ = students.trained(WAN, "published recipe")
    held.enable_flowmap_time_conditioning(0.3, "t-r")
    anyflow.export_pipeline(tiny_pipelines.build_pipeline("WanPipeline", held), tmp_path / "published")
    assert main(["convert", str(tmp_path / "published"), str(tmp_path / STUDENT_FILE), "--to", "student"]) == 0
    fresh = tiny_models.build(WAN, seed=3)
    anyflow.load_student(fresh, tmp_path)
    assert (fresh._flowmap.gate_value, fresh._flowmap.deltatime_type) == (0.3, "t-r")
    assert (students.output(fresh, WAN) - students.output(held, WAN)).abs().max() < 1e-5


def test_a_student_becomes_what_the_published_class_loads(whole: Path, tmp_path: Path) -> None:
    path = converted(whole, tmp_path, "anyflow")
    config = tiny_models.TINY[WAN]["config"]
    stock = AnyFlowTransformer3DModel(**config, gate_value=float(header(path)["gate_value"]))
    stock.load_state_dict(load_file(path), strict=True)


def test_shards_are_read_together(whole: Path, tmp_path: Path) -> None:
    tensors = load_file(whole)
    folder = tmp_path / "sharded" / "transformer"
    folder.mkdir(parents=True)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for name, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / name)
    index = {"weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert same(load_file(converted(tmp_path / "sharded", tmp_path, "anyflow")), tensors)
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        anyflow.convert(tmp_path / "sharded", tmp_path / "x.safetensors", "anyflow")


@pytest.mark.parametrize("prefix", ["transformer.", "module.", "_orig_mod.", "base_model.model.", "module._orig_mod."])
def test_prefixes_of_wrappers_go_away(prefix: str, whole: Path, tmp_path: Path) -> None:
    tensors = load_file(whole)
    edit(whole, lambda t: {f"{prefix}{key}": tensor for key, tensor in t.items()})
    assert same(load_file(converted(whole, tmp_path, "anyflow")), tensors)


def test_a_trained_copy_takes_the_place_of_its_original(tmp_path: Path) -> None:
    held, _, _ = students.trained(WAN, "saved delta")
    source = anyflow.save_student(held, tmp_path / "source")
    edit(source, lambda t: {key: tensor for key, tensor in t.items() if "lora_" not in key}, {})
    found = load_file(converted(source, tmp_path, "r-embedder"))
    copied = f"{OURS}modules_to_save.default.linear_1.weight"
    assert len(found) == 4
    assert torch.equal(found["r_embedder.time_embedder.linear_1.weight"], load_file(source)[copied])


def test_two_embedders_with_a_name_in_common(tmp_path: Path) -> None:
    """Cosmos: delta_norm is its name here and with the prefix; only the other one tells them apart."""
    model = zoo.build("CosmosTransformer3DModel")
    anyflow.patch(model)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    source = anyflow.save_student(model, tmp_path / "source")
    there = converted(source, tmp_path, "delta-prefix")
    assert any("delta_t_embedder" in key for key in load_file(there))
    assert same(load_file(converted(there, tmp_path, "student")), load_file(source))


def test_another_family(tmp_path: Path) -> None:
    held, _, _ = students.trained(SD3, "lora", steps=1)
    source = anyflow.save_student(held, tmp_path / "source")
    there = converted(source, tmp_path, "delta-prefix")
    assert sum(key.startswith("time_text_embed.delta_timestep_embedder.") for key in load_file(there)) == 4
    assert same(load_file(converted(there, tmp_path, "student")), load_file(source))


class TestRepeats:
    """A trainer with a second embedder may write the projection behind it twice; here it is shared."""

    def repeated(self, whole: Path, tmp_path: Path, change: float) -> Path:
        path = converted(whole, tmp_path, "r-embedder")
        ours, theirs = "condition_embedder.time_proj.", "r_embedder.time_proj."
        return edit(
            path, lambda t: t.update({key.replace(ours, theirs): x + change for key, x in t.items() if ours in key})
        )

    def test_equal_ones_are_dropped(self, whole: Path, tmp_path: Path) -> None:
        source = self.repeated(whole, tmp_path, 0.0)
        for to in NAMINGS:
            assert not any("r_embedder.time_proj" in key for key in load_file(converted(source, tmp_path, to)))

    def test_others_are_refused(self, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source = self.repeated(whole, tmp_path, 1.0)
        assert main(["convert", str(source), str(tmp_path / "x.safetensors"), "--to", "anyflow"]) == 1
        assert "r_embedder.time_proj" in capsys.readouterr().err


class TestRefusals:
    def refuse(self, capsys: pytest.CaptureFixture[str], source: Path, to: str, *messages: str) -> None:
        target = source.parent / "target.safetensors"
        assert main(["convert", str(source), str(target), "--to", to]) == 1
        error = capsys.readouterr().err
        assert error.startswith("anyflow convert: ") and error.count("\n") == 1
        for message in messages:
            assert message in error
        assert not target.exists()

    def test_every_missing_and_unexpected_name_is_listed(self, whole: Path, capsys: Any) -> None:
        lost, new = ["blocks.1.attn1.to_q.weight", f"{OURS}linear_2.bias"], ["blocks.0.attn1.to_x.weight", "extra"]

        def change(tensors: dict[str, Tensor]) -> None:
            for old, name in zip(lost, new, strict=True):
                tensors[name] = tensors.pop(old)

        edit(whole, change)
        self.refuse(capsys, whole, "anyflow", f"Missing: {sorted(lost)}", f"unexpected: {sorted(new)}")

    def test_a_block_that_is_missing(self, whole: Path, capsys: Any) -> None:
        edit(whole, lambda t: {key: tensor for key, tensor in t.items() if not key.startswith("blocks.0.")})
        self.refuse(capsys, whole, "r-embedder", "blocks.0.attn1.to_q.weight", "blocks.0.scale_shift_table")

    def test_two_namings_at_once(self, whole: Path, capsys: Any) -> None:
        edit(whole, lambda t: t.update({f"{PATHS['delta-prefix']}linear_1.bias": t[f"{OURS}linear_1.bias"].clone()}))
        self.refuse(capsys, whole, "anyflow", "here they have several", OURS, PATHS["delta-prefix"])

    def test_no_delta_embedder(self, whole: Path, capsys: Any) -> None:
        edit(whole, lambda t: {key: tensor for key, tensor in t.items() if not key.startswith(OURS)})
        self.refuse(capsys, whole, "anyflow", "none of", *PATHS.values())

    def test_one_name_twice(self, whole: Path, capsys: Any) -> None:
        edit(whole, lambda t: t.update({f"module.{OURS}linear_1.bias": t[f"{OURS}linear_1.bias"].clone()}))
        self.refuse(capsys, whole, "anyflow", "named alike", f"{OURS}linear_1.bias")

    def test_image_to_video(self, tmp_path: Path, capsys: Any) -> None:
        model = tiny_models.build(WAN, added_kv_proj_dim=24, image_dim=16)
        anyflow.patch(model)
        source = anyflow.save_student(model, tmp_path)
        self.refuse(capsys, source, "anyflow", "add_k_proj", "unexpected")

    def test_a_student_needs_gate_and_type(self, deltas: Path, capsys: Any) -> None:
        self.refuse(capsys, deltas, "student", "gate_value and deltatime_type")

    def test_a_lora_without_its_configuration(self, tmp_path: Path, capsys: Any) -> None:
        source = anyflow.save_student(students.make(WAN, "lora")[0], tmp_path)
        edit(source, lambda _: None, {})
        self.refuse(capsys, source, "delta-prefix", "alpha is unknown")

    def test_half_a_lora(self, tmp_path: Path, capsys: Any) -> None:
        source = anyflow.save_student(students.make(WAN, "lora")[0], tmp_path)
        lost = "blocks.0.attn1.to_q.lora_B.default.weight"
        edit(source, lambda t: {key: tensor for key, tensor in t.items() if key != lost})
        self.refuse(capsys, source, "delta-prefix", "blocks.0.attn1.to_q.lora_B.weight")

    def test_a_lora_on_a_layer_that_is_not_there(self, tmp_path: Path, capsys: Any) -> None:
        source = anyflow.save_student(students.make(WAN, "lora")[0], tmp_path)
        edit(source, lambda t: {key.replace("blocks.0.attn1", "blocks.0.attn9"): x for key, x in t.items()})
        self.refuse(capsys, source, "delta-prefix", "unexpected: ['blocks.0.attn9.to_q.lora_A.weight'")

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            ("two adapters, one active", "['first', 'second']"),
            ("peft lokr", "only a LoRA"),
            ("lycoris lokr", "LyCORIS"),
        ],
    )
    def test_adapters_that_have_no_names_elsewhere(self, kind: str, message: str, tmp_path: Path, capsys: Any) -> None:
        held, network = students.make(WAN, kind)
        self.refuse(capsys, anyflow.save_student(held, tmp_path, lycoris=network), "anyflow", message)

    def test_a_changed_scale(self, tmp_path: Path, capsys: Any) -> None:
        held, _ = students.make(WAN, "lora")
        held.set_adapters(["default"], [0.5])
        self.refuse(capsys, anyflow.save_student(held, tmp_path), "anyflow", "another scale")

    def test_a_naming_of_one_family(self, tmp_path: Path, capsys: Any) -> None:
        source = anyflow.save_student(students.make(SD3, "lora")[0], tmp_path)
        self.refuse(capsys, source, "r-embedder", "known for WanTransformer3DModel, not for SD3Transformer2DModel")

    def test_a_class_of_nobody(self, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        spec = dataclasses.replace(find_spec(WAN), class_name="TheirTransformer")
        monkeypatch.setitem(registry._specs, "TheirTransformer", spec)
        edit(whole, lambda _: None, {"family": "TheirTransformer"})
        self.refuse(capsys, whole, "delta-prefix", "TheirTransformer is no class of diffusers")

    def test_a_class_without_defaults(self, tmp_path: Path, capsys: Any) -> None:
        model = zoo.build("EasyAnimateTransformer3DModel")
        anyflow.patch(model)
        source = anyflow.save_student(model, tmp_path)
        self.refuse(capsys, source, "delta-prefix", "EasyAnimateTransformer3DModel", "config.json")

    @pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.ckpt"])
    def test_pickles(self, name: str, tmp_path: Path, capsys: Any) -> None:
        torch.save({f"{OURS}linear_1.bias": torch.zeros(2)}, tmp_path / name)
        self.refuse(capsys, tmp_path / name, "anyflow", "only safetensors files are read")

    def test_a_cut_file(self, whole: Path, capsys: Any) -> None:
        whole.write_bytes(whole.read_bytes()[:-5])
        self.refuse(capsys, whole, "anyflow", "not a readable safetensors file")

    def test_a_file_that_is_not_there(self, tmp_path: Path, capsys: Any) -> None:
        self.refuse(capsys, tmp_path / "nothing.safetensors", "anyflow", "no such file")

    def test_an_unknown_family(self, whole: Path, capsys: Any) -> None:
        edit(whole, lambda _: None, {})
        target = ["convert", str(whole), str(whole.parent / "x.safetensors"), "--to", "anyflow", "--family", "Nothing"]
        assert main(target) == 1
        assert "no family 'Nothing'" in capsys.readouterr().err

    def test_a_target_that_is_no_safetensors_file(self, whole: Path, capsys: Any) -> None:
        assert main(["convert", str(whole), str(whole.parent / "x.bin"), "--to", "anyflow"]) == 1
        assert "must be named *.safetensors" in capsys.readouterr().err

    def test_wrong_usage(self, whole: Path, capsys: Any) -> None:
        for arguments in (["convert", str(whole)], ["convert", "a", "b", "--to", "nothing"], []):
            with pytest.raises(SystemExit, match="2"):
                main(arguments)
        assert "usage: anyflow" in capsys.readouterr().err


def test_a_failed_write_leaves_the_target(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = converted(whole, tmp_path, "anyflow")
    content = target.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    assert main(["convert", str(whole), str(target), "--to", "r-embedder"]) == 1
    assert target.read_bytes() == content and not list(tmp_path.glob(".*"))


def test_as_a_command(whole: Path, tmp_path: Path) -> None:
    target = tmp_path / "published.safetensors"
    command = [sys.executable, "-m", "anyflow.cli", "convert", str(whole), str(target), "--to", "r-embedder"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert (result.returncode, result.stdout) == (0, f"wrote {target}\n"), result.stderr
    assert any(key.startswith("r_embedder.") for key in load_file(target))
