"""Every kind of student comes back to the bit, its averaged weights too, and LyCORIS networks strictly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import students
import tiny_models
import torch
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from students import FULL, SD3, WAN

import anyflow
from anyflow import load_student, save_student
from anyflow.checkpoints import EMA_FILE, STUDENT_FILE
from anyflow.patching.unwrap import unwrap

PEFT = (
    "lora",
    "lora, wrapped",
    "lora, dropout",
    "dora",
    "rslora",
    "two adapters, one active",
    "two adapters, both active",
    "published recipe",
    "embedders",
    "saved delta",
    "saved head",
    "peft loha",
    "peft lokr",
)
LYCORIS = (
    "lycoris lokr",
    "lycoris lokr, bypass",
    "lycoris lokr, decomposed",
    "lycoris loha",
    "lycoris loha, dropout",
    "lycoris locon, decomposed",
    "lycoris diag-oft",
    "lycoris full",
)


def fresh_for(kind: str, name: str = WAN) -> tuple[Any, Any]:
    """The model before training: stock, except that a LyCORIS network is made by the trainer."""
    held, network = students.make(name, kind) if kind.startswith("lycoris") else (tiny_models.build(name), None)
    return held.eval(), None if network is None else network.eval()


@pytest.mark.parametrize("kind", [*PEFT, *LYCORIS, FULL])
def test_three_steps_of_training_come_back_to_the_bit(kind: str, tmp_path: Path) -> None:
    held, _, distiller = students.trained(WAN, kind)
    distiller.on_save_checkpoint(3, tmp_path)
    fresh, its_network = fresh_for(kind)
    untrained = tiny_models.build(WAN)
    anyflow.patch(untrained, gate_value=0.3)
    load_student(fresh, tmp_path, lycoris=its_network)
    assert torch.equal(students.output(fresh, WAN), students.output(held, WAN))
    assert (students.output(untrained, WAN) - students.output(held, WAN)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["two adapters, both active", "saved delta", "lycoris lokr"])
def test_training_goes_on_as_it_would_have(kind: str, tmp_path: Path) -> None:
    """What trains is what trained, and in the same order, so that the optimizer's state fits."""
    _, _, distiller = students.trained(WAN, kind)
    distiller.on_save_checkpoint(3, tmp_path)
    fresh, its_network = fresh_for(kind)
    load_student(fresh, tmp_path, lycoris=its_network)
    resumed = anyflow.AnyFlowDistiller(fresh, config=students.CONFIG, lycoris=its_network)
    assert resumed.on_load_checkpoint(tmp_path) == 3
    ours, theirs = resumed.trainable_parameters(), distiller.trainable_parameters()
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True))
    losses = [d.training_step(students.batch(WAN, 7))[0] for d in (resumed, distiller)]
    assert torch.equal(*losses)


def test_loading_leaves_what_trains_alone(tmp_path: Path) -> None:
    """A second adapter that is frozen, and the set of active ones, are the trainer's."""
    held, _, _ = students.trained(SD3, "two adapters, one active")
    save_student(held, tmp_path)
    held.set_adapter("first")
    flags = [p.requires_grad for p in held.parameters()]
    load_student(held, tmp_path)
    assert [p.requires_grad for p in held.parameters()] == flags and held.active_adapters() == ["second"]


def test_weights_of_set_adapters_come_back(tmp_path: Path) -> None:
    held, _, _ = students.trained(SD3, "two adapters, both active")
    held.set_adapters(["first", "second"], [0.5, 2.0])
    save_student(held, tmp_path)
    fresh = tiny_models.build(SD3)
    load_student(fresh, tmp_path)
    assert torch.equal(students.output(fresh, SD3), students.output(held, SD3))


def test_a_merged_adapter_is_not_saved(tmp_path: Path) -> None:
    held, _, _ = students.trained(SD3, "embedders")
    held.fuse_lora()
    with pytest.raises(ValueError, match=r"\['default'\] are merged"):
        save_student(held, tmp_path)


@pytest.mark.parametrize(("option", "value"), [("lora_alpha", 4), ("use_rslora", True)])
def test_the_same_tensors_with_another_meaning(option: str, value: Any, tmp_path: Path) -> None:
    save_student(students.trained(SD3, "lora")[0], tmp_path)
    fresh = tiny_models.build(SD3)
    fresh.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], **{option: value}))
    with pytest.raises(ValueError, match=f"{option} of 'default' is {value}"):
        load_student(fresh, tmp_path)
    assert not anyflow.is_patched(fresh)


def test_the_scale_of_time_comes_back(tmp_path: Path) -> None:
    held, _ = students.make(SD3, "lora")
    anyflow.AnyFlowDistiller(held, config={**students.CONFIG, "timestep_scale": 1.0})
    save_student(held, tmp_path)
    fresh = tiny_models.build(SD3)
    load_student(fresh, tmp_path)
    assert fresh._flowmap.spec.time_scale == 1.0


def test_a_distiller_of_another_scale_of_time_does_not_go_on(tmp_path: Path) -> None:
    held, _ = students.make(SD3, "lora")
    anyflow.AnyFlowDistiller(held, config={**students.CONFIG, "timestep_scale": 1.0}).on_save_checkpoint(1, tmp_path)
    other = anyflow.AnyFlowDistiller(students.make(SD3, "lora")[0], config=students.CONFIG)
    with pytest.raises(ValueError, match=r"timestep_scale=1\.0, not 1000\.0"):
        other.on_load_checkpoint(tmp_path)


class TestLycoris:
    def save(self, tmp_path: Path, kind: str = "lycoris lokr") -> tuple[Any, Any]:
        held, network, _ = students.trained(SD3, kind)
        save_student(held, tmp_path, lycoris=network)
        return held, network

    def refuse(self, tmp_path: Path, held: Any, network: Any, message: str) -> None:
        before = [t.clone() for m in (held, network) if m is not None for t in m.state_dict().values()]
        with pytest.raises(ValueError, match=message):
            load_student(held, tmp_path, lycoris=network)
        after = [t for m in (held, network) if m is not None for t in m.state_dict().values()]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))

    def test_the_network_is_needed_for_both(self, tmp_path: Path) -> None:
        held, _ = self.save(tmp_path)
        with pytest.raises(ValueError, match="pass lycoris=network"):
            save_student(held, tmp_path)
        self.refuse(tmp_path, students.make(SD3, "lycoris lokr")[0], None, "pass it as lycoris=network")

    def test_another_network(self, tmp_path: Path) -> None:
        self.save(tmp_path)
        self.refuse(tmp_path, *students.make(SD3, "lycoris loha"), "another LyCORIS network")
        self.refuse(tmp_path, *students.make(SD3, "lycoris lokr, bypass"), "another LyCORIS network")

    def test_a_network_that_is_not_there(self, tmp_path: Path) -> None:
        save_student(students.trained(SD3, "lora")[0], tmp_path)
        self.refuse(tmp_path, *students.make(SD3, "lycoris lokr"), "holds no LyCORIS network")

    def test_a_network_of_another_model(self, tmp_path: Path) -> None:
        held, _ = students.make(SD3, "lycoris lokr")
        _, other = students.make(SD3, "lycoris lokr")
        with pytest.raises(ValueError, match="are not applied to this SD3"):
            save_student(held, tmp_path, lycoris=other)

    def test_the_multiplier_comes_back(self, tmp_path: Path) -> None:
        held, network = students.make(SD3, "lycoris lokr")
        network.set_multiplier(0.3)
        save_student(held, tmp_path, lycoris=network)
        fresh, other = students.make(SD3, "lycoris lokr")
        load_student(fresh, tmp_path, lycoris=other)
        assert other.multiplier == 0.3 and {layer.multiplier for layer in other.loras} == {0.3}

    def test_missing_tensors_are_listed(self, tmp_path: Path) -> None:
        _, network = self.save(tmp_path)
        path = tmp_path / STUDENT_FILE
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata())
        tensors = load_file(path)
        lost = next(key for key in tensors if key.startswith("lycoris."))
        save_file({key: tensor for key, tensor in tensors.items() if key != lost}, path, metadata)
        self.refuse(tmp_path, *students.make(SD3, "lycoris lokr"), lost)
        assert all(f"lycoris.{name}" in tensors for name, _ in network.named_parameters())


def average(parameters: list[Any]) -> EMAModel:
    return EMAModel(parameters, decay=0.75, use_ema_warmup=True)


EMA_KINDS = ("lora", "embedders", "saved delta", "two adapters, both active", "lycoris lokr", FULL)


class TestEma:
    @pytest.mark.parametrize("kind", EMA_KINDS)
    def test_an_ema_model_comes_back_to_the_bit(self, kind: str, tmp_path: Path) -> None:
        held, network, distiller = students.trained(WAN, kind, ema=average)
        ema: Any = distiller.average  # type: ignore[attr-defined]
        names = [name for name, _ in distiller.trainable_parameters()]
        save_student(held, tmp_path, lycoris=network, ema=ema)
        saved = load_file(tmp_path / EMA_FILE)
        assert all(torch.equal(saved[name], shadow) for name, shadow in zip(names, ema.shadow_params, strict=True))
        assert any("delta_embedder" in name for name in names)
        # Every tensor of the delta embedder is in both files, each once and under the name that the bare model has.
        live = {name: value for name, value in unwrap(held).state_dict().items() if "delta_embedder" in name}
        student = load_file(tmp_path / STUDENT_FILE)
        for file in (student, saved):
            assert {name for name in file if "delta_embedder" in name and not name.startswith("lycoris.")} == set(live)
        assert all(torch.equal(student[name], value) for name, value in live.items())

        fresh, its_network, other = students.trained(WAN, kind, steps=1, ema=average)
        restored: Any = other.average  # type: ignore[attr-defined]
        load_student(fresh, tmp_path, lycoris=its_network, ema=restored)
        assert torch.equal(students.output(fresh, WAN), students.output(held, WAN))
        live, loaded = ema.state_dict(), restored.state_dict()
        assert all(
            torch.equal(a, b) for a, b in zip(live.pop("shadow_params"), loaded.pop("shadow_params"), strict=True)
        )
        assert live == loaded and live["optimization_step"] == 3 and restored.cur_decay_value == ema.cur_decay_value

        sampler, network_too = fresh_for(kind)
        load_student(sampler, tmp_path, lycoris=network_too, which="ema")
        ema.copy_to([parameter for _, parameter in distiller.trainable_parameters()])
        assert torch.equal(students.output(sampler, WAN), students.output(held, WAN))
        assert not torch.equal(students.output(sampler, WAN), students.output(fresh, WAN))

    def test_a_copy_of_the_model_comes_back_to_the_bit(self, tmp_path: Path) -> None:
        held, _, _ = students.trained(WAN, "embedders")
        copied = copy.deepcopy(held)
        with torch.no_grad():
            for _, parameter in anyflow.trainable_parameters(copied):
                parameter.mul_(0.5)
        expected = students.output(copied, WAN)
        save_student(held, tmp_path, ema=copied)
        fresh, its_copy = tiny_models.build(WAN), tiny_models.build(WAN)
        load_student(fresh, tmp_path, ema=its_copy)
        assert torch.equal(students.output(fresh, WAN), students.output(held, WAN))
        assert torch.equal(students.output(its_copy, WAN), expected)
        load_student(fresh, tmp_path, which="ema")
        assert torch.equal(students.output(fresh, WAN), expected)

    @pytest.mark.parametrize(
        ("choose", "message"),
        [
            (lambda model: [p for n, p in anyflow.trainable_parameters(model) if "delta" not in n], "the EMA averages"),
            (lambda model: [p for _, p in anyflow.trainable_parameters(model)][::-1], "another list of tensors"),
        ],
    )
    def test_a_wrong_list_is_refused(self, choose: Any, message: str, tmp_path: Path) -> None:
        held, _, _ = students.trained(SD3, "lora")
        wrong = average(choose(held))
        with pytest.raises(ValueError, match=message):
            save_student(held, tmp_path, ema=wrong)
        assert not list(tmp_path.iterdir())
        save_student(held, tmp_path, ema=average([p for _, p in anyflow.trainable_parameters(held)]))
        fresh = tiny_models.build(SD3)
        with pytest.raises(ValueError, match=message):
            load_student(fresh, tmp_path, ema=wrong)
        assert not anyflow.is_patched(fresh)

    def test_trained_base_weights_are_refused(self, tmp_path: Path) -> None:
        held, _, _ = students.trained(SD3, "lora")
        held.proj_out.requires_grad_(True)
        ema = average([p for _, p in anyflow.trainable_parameters(held)])
        with pytest.raises(ValueError, match=r"proj_out\.weight'\] are trained, but"):
            save_student(held, tmp_path, ema=ema)

    def test_a_file_without_an_average_of_everything(self, tmp_path: Path) -> None:
        held, _, distiller = students.trained(SD3, "lora", ema=average)
        ema: Any = distiller.average  # type: ignore[attr-defined]
        save_student(held, tmp_path, ema=ema)
        path = tmp_path / EMA_FILE
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata())
        tensors = load_file(path)
        lost = next(key for key in tensors if "lora_B" in key)
        save_file({key: tensor for key, tensor in tensors.items() if key != lost}, path, metadata)
        before = [shadow.clone() for shadow in ema.shadow_params]
        with pytest.raises(ValueError, match=lost):
            load_student(held, tmp_path, ema=ema)
        assert all(torch.equal(a, b) for a, b in zip(before, ema.shadow_params, strict=True))

    @pytest.mark.parametrize("which", ["student", "ema"])
    def test_a_file_without_a_tensor_of_the_delta_embedder(self, which: Any, tmp_path: Path) -> None:
        held, _, distiller = students.trained(SD3, "lora", ema=average)
        save_student(held, tmp_path, ema=distiller.average)  # type: ignore[attr-defined]
        path = tmp_path / (EMA_FILE if which == "ema" else STUDENT_FILE)
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata())
        tensors = load_file(path)
        lost = next(key for key in tensors if "delta_embedder.linear_2.bias" in key)
        tensors["delta_embedder.other"] = tensors.pop(lost)
        save_file(tensors, path, metadata)
        fresh = tiny_models.build(SD3)
        with pytest.raises(ValueError, match=rf"Missing: \['{lost}'\]; unexpected: \['delta_embedder\.other'\]"):
            load_student(fresh, tmp_path, which=which)
        assert not anyflow.is_patched(fresh)

    def test_a_copy_under_lycoris_is_refused(self, tmp_path: Path) -> None:
        held, network = students.make(SD3, "lycoris lokr")
        with pytest.raises(ValueError, match=r"average by an EMAModel"):
            save_student(held, tmp_path, lycoris=network, ema=copy.deepcopy(held))

    def test_another_model_is_no_copy(self, tmp_path: Path) -> None:
        held, _, _ = students.trained(SD3, "lora")
        with pytest.raises(ValueError, match="no copy of the student"):
            save_student(held, tmp_path, ema=students.make(SD3, "embedders")[0])

    def test_without_a_file_nothing_is_loaded(self, tmp_path: Path) -> None:
        held, _, _ = students.trained(SD3, "lora")
        save_student(held, tmp_path)
        fresh = tiny_models.build(SD3)
        for arguments in ({"which": "ema"}, {"ema": average([p for _, p in anyflow.trainable_parameters(held)])}):
            with pytest.raises(FileNotFoundError):
                load_student(fresh, tmp_path, **arguments)
        with pytest.raises(ValueError, match="which must be"):
            load_student(fresh, tmp_path, which="best")  # type: ignore[arg-type]
        assert not anyflow.is_patched(fresh)


def test_wrapped_or_not_the_names_are_those_of_the_bare_model(tmp_path: Path) -> None:
    held, _, _ = students.trained(SD3, "lora, wrapped")
    path = save_student(held, tmp_path)
    assert load_file(path).keys() <= unwrap(held).state_dict().keys()
