"""What goes wrong around a trainer: wrappers, ranks, wrong networks, weights that would be lost."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_distiller as protocol
import tiny_models
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from torch import Tensor, nn

import anyflow
from anyflow import AnyFlowConfig, AnyFlowDistiller, AnyStepScheduler

SD3 = "SD3Transformer2DModel"
ONLINE = {"teacher_rollout_steps": 2}

RANK = """
import os, sys
import torch, torch.distributed as dist
import tiny_models, test_distiller as protocol
import anyflow
from peft import LoraConfig

rank, store, order = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
model = tiny_models.build("SD3Transformer2DModel")
if order != "patch last":
    anyflow.patch(model)
model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
if order == "right":
    anyflow.trainable_parameters(model)
ddp = torch.nn.parallel.DistributedDataParallel(model)
try:
    if order == "patch last":
        anyflow.patch(ddp)
    distiller = anyflow.AnyFlowDistiller(ddp, config={"teacher_rollout_steps": 2, "seed": 3})
except ValueError as error:
    print("refused:", error)
    sys.exit(0)
batch = protocol.batch_for("SD3Transformer2DModel", seed=rank)
first = distiller.prepare_batch(batch)["anyflow_r_sigmas"]
loss, _ = distiller.training_step(batch, ddp)
loss.backward()
for name, parameter in distiller.trainable_parameters():
    both = [torch.zeros_like(parameter) for _ in range(2)]
    dist.all_gather(both, parameter.grad)
    assert both[0].norm() > 0 or "delta" not in name, name
    assert torch.equal(*both), name
drawn = [torch.zeros_like(first) for _ in range(2)]
dist.all_gather(drawn, first)
assert not torch.equal(*drawn), "the ranks drew the same r"
folder = store + ".checkpoint"
if rank == 0:
    distiller.on_save_checkpoint(1, folder)
dist.barrier()
expected = distiller.prepare_batch(batch)["anyflow_r_sigmas"]
assert distiller.on_load_checkpoint(folder) == 1
assert torch.equal(distiller.prepare_batch(batch)["anyflow_r_sigmas"], expected), "the stream of this rank is another"
print("equal")
dist.destroy_process_group()
"""


def two_ranks(tmp_path: Path, order: str) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), order],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [out for out, _ in outputs]


def test_two_ranks_have_one_gradient_and_their_own_streams(tmp_path: Path) -> None:
    assert two_ranks(tmp_path, "right") == ["equal\n", "equal\n"]


@pytest.mark.parametrize("order", ["frozen at wrap", "patch last"])
def test_ddp_that_would_not_reduce_the_delta_embedder_is_refused(tmp_path: Path, order: str) -> None:
    for output in two_ranks(tmp_path, order):
        assert "refused: DDP was built before time_text_embed.delta_embedder" in output


class Wrapper(nn.Module):
    """Stands for DDP or a compiled module: holds the model and counts its calls."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod, self.calls = module, 0

    def forward(self, **kwargs: Any) -> Any:
        self.calls += 1
        return self._orig_mod(**kwargs)


def test_training_step_calls_the_wrapper() -> None:
    model = protocol.student(SD3)
    distiller, wrapper = AnyFlowDistiller(model, config=ONLINE), Wrapper(model)
    distiller.training_step(protocol.batch_for(SD3), wrapper)
    assert wrapper.calls == 3  # two of the teacher, one of the student
    with pytest.raises(ValueError, match="model is another SD3"):
        distiller.prepare_batch(protocol.batch_for(SD3), protocol.student(SD3))


@pytest.mark.parametrize("how", ["bias", "unfrozen"])
def test_base_weights_that_would_train_are_refused(how: str) -> None:
    model = tiny_models.build(SD3)
    model.requires_grad_(False)
    anyflow.patch(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], bias="lora_only" if how == "bias" else "none"))
    if how == "unfrozen":
        model.proj_out.requires_grad_(True)
    with pytest.raises(ValueError, match=r"(to_q|proj_out).* the\s+teacher would drift"):
        AnyFlowDistiller(model, config=ONLINE)


def test_trainer_that_forgets_r_is_told() -> None:
    class Forgetful(protocol.Trainer):
        def model_predict(self, batch: dict[str, Any]) -> dict[str, Tensor]:
            return super().model_predict({k: v for k, v in batch.items() if k != "flowmap_r_timesteps"})

    trainer = Forgetful(protocol.student(SD3))
    distiller = AnyFlowDistiller(trainer, config=ONLINE)
    prepared = distiller.prepare_batch(protocol.trainer_batch())
    output = trainer.model_predict(prepared)
    with pytest.raises(RuntimeError, match="flowmap_r_timesteps"):
        distiller.compute_distill_loss(prepared, output)


def test_trainer_sees_sigmas_in_its_own_shape() -> None:
    trainer = protocol.Trainer(protocol.student(SD3))
    distiller = AnyFlowDistiller(trainer, config=ONLINE)
    batch = protocol.trainer_batch()
    distiller.prepare_batch({**batch, "sigmas": batch["sigmas"].reshape(2, 1, 1, 1)})
    assert all(seen["sigmas"].shape == (2, 1, 1, 1) for seen in trainer.seen)


def test_lycoris_network_is_trained_and_kept(tmp_path: Path) -> None:
    """The adapter lives outside of the model; only it and the delta embedders train, and both come back."""

    class Network(nn.Linear):
        multiplier = 1.0
        loras = ()

    def make(seed: int) -> tuple[AnyFlowDistiller, Network]:
        torch.manual_seed(seed)
        model = tiny_models.build(SD3)
        anyflow.patch(model)
        model.requires_grad_(False)
        network = Network(2, 2)
        trainer = protocol.Trainer(model, lora_type="lycoris")
        trainer.accelerator = type("Accelerator", (), {"_lycoris_wrapped_network": network})()  # type: ignore[attr-defined]
        return AnyFlowDistiller(trainer, config=ONLINE), network

    first, network = make(0)
    names = [name for name, _ in first.trainable_parameters()]
    assert names[:2] == ["lycoris.weight", "lycoris.bias"] and all("delta_embedder" in name for name in names[2:])
    assert all(parameter.requires_grad for _, parameter in first.trainable_parameters())
    with torch.no_grad():
        for _, parameter in first.trainable_parameters():
            parameter.add_(1)
    first.on_save_checkpoint(5, tmp_path)
    second, other = make(1)
    assert second.on_load_checkpoint(tmp_path) == 5
    assert torch.equal(other.weight, network.weight)
    for (_, a), (_, b) in zip(first.trainable_parameters(), second.trainable_parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_config_object_changes_only_what_it_says() -> None:
    model = protocol.student(SD3)
    anyflow.patch(model, gate_value=0.5)
    assert AnyFlowDistiller(model, config=AnyFlowConfig(teacher_rollout_steps=4)).config.gate_value == 0.5
    assert (
        AnyFlowDistiller(model, config=AnyFlowConfig(teacher_rollout_steps=4, gate_value=0.1)).config.gate_value == 0.1
    )


def test_timestep_scale_reaches_every_path() -> None:
    model = protocol.student(SD3)
    AnyFlowDistiller(model, config={**ONLINE, "timestep_scale": 1.0})
    assert model._flowmap.spec.time_scale == 1.0
    with pytest.raises(ValueError, match="scale alone cannot replace"):
        AnyFlowDistiller(protocol.student("ZImageTransformer2DModel"), config={**ONLINE, "timestep_scale": 1.0})


def test_subclasses_patched_by_family_can_be_distilled() -> None:
    model = tiny_models.build(SD3)
    model.__class__ = type("MySD3", (type(model),), {})
    model.requires_grad_(False)
    anyflow.patch(model, family=SD3)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    loss, _ = AnyFlowDistiller(model, config=ONLINE).training_step(protocol.batch_for(SD3))
    assert torch.isfinite(loss)


def test_z_image_lists_are_stacked() -> None:
    name = "ZImageTransformer2DModel"
    distiller = AnyFlowDistiller(protocol.student(name), config=ONLINE)
    prepared = distiller.prepare_batch(protocol.batch_for(name))
    output = distiller.student.bare(
        list(prepared["noisy_latents"].unsqueeze(2)),
        prepared["timesteps"],
        **prepared["conditioning"],
        r_timestep=prepared["flowmap_r_timesteps"],
    )
    loss, _ = distiller.compute_distill_loss(prepared, output)
    assert torch.isfinite(loss)


def test_z_image_time_scale_is_the_models_own() -> None:
    name = "ZImageTransformer2DModel"
    model = tiny_models.build(name, t_scale=1.0)
    inputs, t = tiny_models.inputs(name), tiny_models.times(name, [0.9, 0.4])
    with torch.no_grad():
        stock = tiny_models.call(model, name, inputs, t)
        anyflow.patch(model)
        assert torch.equal(tiny_models.call(model, name, inputs, t, t), stock)


class TestLeftovers:
    """What an interrupted sampler leaves on the model must reach neither training nor copies."""

    def interrupted(self) -> tuple[Any, AnyStepScheduler]:
        model = protocol.student(SD3)
        scheduler = AnyFlowDistiller(
            model, noise_scheduler=FlowMatchEulerDiscreteScheduler(), config=ONLINE
        ).get_scheduler()
        scheduler.set_timesteps(4)
        return model, scheduler

    def test_with_gradient_the_model_is_stock(self) -> None:
        model, scheduler = self.interrupted()
        inputs, t = tiny_models.inputs(SD3), tiny_models.times(SD3, [0.9, 0.4])
        left = tiny_models.call(model, SD3, inputs, t).detach()
        scheduler.release()
        assert torch.equal(left, tiny_models.call(model, SD3, inputs, t).detach())

    def test_copies_and_the_next_batch_are_free_of_it(self) -> None:
        model, _ = self.interrupted()
        assert copy.deepcopy(model)._flowmap_schedule is None and model._flowmap_schedule is not None
        AnyFlowDistiller(model, config=ONLINE).prepare_batch(protocol.batch_for(SD3))
        assert model._flowmap_schedule is None


def test_own_scheduler_is_a_source() -> None:
    scheduler = AnyStepScheduler.like(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert AnyStepScheduler.like(scheduler).shift == 3.0


def test_rounded_timesteps_on_a_dense_grid() -> None:
    scheduler = AnyStepScheduler.like(FlowMatchEulerDiscreteScheduler(shift=12.0))
    scheduler.set_timesteps(50)
    exact = scheduler.timesteps
    assert torch.equal(scheduler.r_timestep_for(exact)[:-1], exact[1:])
    with pytest.raises(ValueError, match="between several steps"):
        scheduler.r_timestep_for(exact[3].bfloat16())
    for index in range(4):
        rounded = exact[index].bfloat16()
        assert scheduler.r_timestep_for(rounded) == exact[index + 1]
        scheduler.step(torch.zeros(1), exact[index], torch.zeros(1))


def test_image_to_image_noise() -> None:
    scheduler = AnyStepScheduler.like(FlowMatchEulerDiscreteScheduler())
    scheduler.set_timesteps(4)
    noisy = scheduler.add_noise(torch.zeros(1, 2), torch.ones(1, 2), scheduler.timesteps[1:2])
    assert torch.equal(noisy, torch.full((1, 2), 0.75))


class TestInstances:
    def test_building_the_class_anew_gives_a_stock_model(self) -> None:
        model = tiny_models.build(SD3)
        stock = type(model)
        anyflow.patch(model)
        again = type(model).from_config(model.config)
        assert type(again) is stock
        again.to(torch.float64)

    def test_gate_made_under_inference_mode_trains(self) -> None:
        model = protocol.student(SD3)
        distiller = AnyFlowDistiller(model, config=ONLINE)
        with torch.inference_mode():
            model.to("cpu")
            model.enable_flowmap_time_conditioning(0.3)
        loss, _ = distiller.training_step(protocol.batch_for(SD3))
        loss.backward()

    def test_unpatching_under_a_hook_is_refused(self) -> None:
        from accelerate.hooks import ModelHook, add_hook_to_module

        model = tiny_models.build(SD3)
        anyflow.patch(model)
        add_hook_to_module(model, ModelHook())
        with pytest.raises(ValueError, match="remove the hooks"):
            anyflow.unpatch(model)
        assert anyflow.is_patched(model)

    def test_own_list_of_float32_modules_stays(self) -> None:
        model = tiny_models.build("WanTransformer3DModel")
        model._keep_in_fp32_modules = ["time_embedder", "mine"]
        anyflow.patch(model)
        assert model._keep_in_fp32_modules == ["time_embedder", "mine", "delta_embedder"]
        anyflow.unpatch(model)
        assert model._keep_in_fp32_modules == ["time_embedder", "mine"]


def test_loading_keeps_the_dtypes_of_the_file(tmp_path: Path) -> None:
    """A float32 LoRA trained on a bfloat16 model comes back as float32, to the bit."""
    model = protocol.student(SD3, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.float() + 1e-3
    anyflow.save_student(model, tmp_path)
    fresh = tiny_models.build(SD3, dtype=torch.bfloat16)
    anyflow.load_student(fresh, tmp_path)
    saved, loaded = (dict(m.named_parameters()) for m in (model, fresh))
    for name, parameter in loaded.items():
        assert parameter.dtype == saved[name].dtype and torch.equal(parameter, saved[name]), name


def test_a_file_that_does_not_fit_leaves_no_trace(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = anyflow.save_student(protocol.student(SD3), tmp_path)
    tensors = load_file(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors.popitem()
    save_file(tensors, path, metadata)
    fresh = tiny_models.build(SD3)
    keys, stock = list(fresh.state_dict()), type(fresh)
    with pytest.raises(ValueError, match="does not fit"):
        anyflow.load_student(fresh, tmp_path)
    assert list(fresh.state_dict()) == keys and type(fresh) is stock and not hasattr(fresh, "peft_config")
