"""The critic beside a student: what it leaves alone, how it is run, and its steps."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import adapter_kinds
import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

import anyflow
from anyflow import AnyFlowConfig
from anyflow.adapters import base_mode, critic_parameters, teacher_mode
from anyflow.critic import Critic
from anyflow.patching.names import CRITIC
from anyflow.patching.unwrap import unwrap

SD3 = "SD3Transformer2DModel"
PEFT = [name for name in adapter_kinds.KINDS if "lycoris" not in name]
SIGMAS = [0.9, 0.4]


@torch.no_grad()
def output(model: Any, name: str = SD3, r: Tensor | None = None) -> Tensor:
    return tiny_models.call(model, name, tiny_models.inputs(name), tiny_models.times(name, SIGMAS), r)


def lora_student(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    model = tiny_models.build(SD3, dtype=dtype)
    model.requires_grad_(False)
    anyflow.patch(model)
    options = {"r": 2, "target_modules": ["to_q", "to_v"], "init_lora_weights": False, **options}
    model.add_adapter(LoraConfig(**options))
    return model


def flags(model: nn.Module) -> dict[str, Any]:
    parameters = {n: (p.requires_grad, p.clone()) for n, p in model.named_parameters() if CRITIC not in n}
    return {"state": adapter_kinds.state(model), "parameters": parameters}


@pytest.mark.parametrize("kind", PEFT)
class TestAdding:
    def test_the_student_does_not_notice(self, kind: str) -> None:
        held, _ = adapter_kinds.student(SD3, kind)
        held.eval()
        bare = unwrap(held)
        trained = [name for name, _ in anyflow.trainable_parameters(held)]
        before = {n: (p.requires_grad, p.detach().clone()) for n, p in held.named_parameters()}
        active = [tuple(layer.active_adapters) for layer in bare.modules() if hasattr(layer, "_active_adapter")]
        listed = list(getattr(bare, "peft_config", {}))
        plain, mapped = output(held), output(held, r=tiny_models.times(SD3, [0.1, 0.1]))

        torch.manual_seed(3)
        drawn = torch.rand(1)
        torch.manual_seed(3)
        critic = anyflow.add_critic(held)
        assert torch.equal(torch.rand(1), drawn), "the global generator moved"

        assert torch.equal(output(held), plain)
        assert torch.equal(output(held, r=tiny_models.times(SD3, [0.1, 0.1])), mapped)
        after = dict(held.named_parameters())
        for name, (flag, value) in before.items():
            assert after[name].requires_grad == flag and torch.equal(after[name], value), name
        assert [name for name, _ in anyflow.trainable_parameters(held)] == trained
        layers = [layer for layer in bare.modules() if hasattr(layer, "_active_adapter")]
        assert [tuple(layer.active_adapters) for layer in layers] == active
        assert list(bare.peft_config) == [*listed, CRITIC]
        assert critic and all(p.requires_grad and p.dtype == torch.float32 for _, p in critic)
        assert not any("delta_embedder" in name for name, _ in critic)
        assert anyflow.add_critic(held) == critic

    def test_it_starts_as_the_base_and_runs_alone(self, kind: str) -> None:
        """Alone: the student's adapter, its modules_to_save and its delta embedder are out of it."""
        held, _ = adapter_kinds.student(SD3, kind)
        held.eval()
        tiny_models.perturb_delta(unwrap(held))
        anyflow.add_critic(held)
        base = output(tiny_models.build(SD3))
        with base_mode(unwrap(held), adapter=CRITIC):
            assert torch.allclose(output(held), base, atol=1e-6)
        student = output(held)
        tiny_models.move_critic(held)
        assert torch.equal(output(held), student)
        with teacher_mode(unwrap(held)):
            assert torch.equal(output(held), base)
        with base_mode(unwrap(held), adapter=CRITIC):
            alone = output(held)
        assert not torch.allclose(alone, base, atol=1e-4)

        # The critic is the base with that one adapter: another student makes no difference to it.
        with torch.no_grad():
            for _, parameter in anyflow.trainable_parameters(held):
                parameter.add_(1.0)
        with base_mode(unwrap(held), adapter=CRITIC):
            assert torch.equal(output(held), alone)

    def test_exactly_the_entry_state_comes_back(self, kind: str) -> None:
        held, _ = adapter_kinds.student(SD3, kind)
        bare = unwrap(held)
        anyflow.add_critic(held)
        before = flags(held)

        def unchanged() -> bool:
            now = flags(held)
            same = [
                now["parameters"][name][0] == flag and torch.equal(now["parameters"][name][1], value)
                for name, (flag, value) in before["parameters"].items()
            ]
            return now["state"] == before["state"] and all(same)

        critic = Critic(bare, bare, AnyFlowConfig())
        with critic.scored():
            output(held)
            with teacher_mode(bare), critic.scored():
                output(held)
            assert not bare.training
        assert unchanged()
        with critic.trained(held):
            assert all(p.requires_grad for _, p in critic.named_parameters())
            raised = pytest.raises(TypeError)
            with raised, critic.scored(), teacher_mode(bare):
                held(nonsense=1)
        assert unchanged()


@pytest.mark.parametrize("wrap", ["add_adapter", "get_peft_model"])
def test_student_gradients_are_those_of_a_run_without_the_switch(wrap: str) -> None:
    """Scores between the student's forward and its backward, with either kind of checkpointing."""

    def gradients(switch: bool, checkpointing: bool | None) -> list[Tensor]:
        torch.manual_seed(0)
        model = tiny_models.build(SD3)
        model.requires_grad_(False)
        anyflow.patch(model)
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        held: Any = model
        if wrap == "get_peft_model":
            held = get_peft_model(model, config)
        else:
            model.add_adapter(config)
        parameters = [p for _, p in anyflow.trainable_parameters(held)]
        anyflow.add_critic(held)
        tiny_models.move_critic(model)
        if checkpointing is not None:

            def checkpoint(function: Any, *arguments: Any) -> Any:
                return torch.utils.checkpoint.checkpoint(function, *arguments, use_reentrant=checkpointing)

            model.enable_gradient_checkpointing(checkpoint)
            model.train()
        inputs, t = tiny_models.inputs(SD3), tiny_models.times(SD3, SIGMAS)
        inputs["hidden_states"].requires_grad_()
        loss = tiny_models.call(held, SD3, inputs, t, t / 2).square().mean()
        if switch:
            critic = Critic(model, model, AnyFlowConfig())
            with critic.scored():
                output(held)
            fresh = tiny_models.inputs(SD3)
            fresh["hidden_states"].requires_grad_()
            with critic.trained(held):
                critic.step(tiny_models.call(held, SD3, fresh, t).square().mean())
        loss.backward()
        return [p.grad for p in parameters if p.grad is not None]

    plain = gradients(False, None)
    for checkpointing in (None, False, True):
        switched = gradients(True, checkpointing)
        assert len(switched) == len(plain) > 0
        for a, b in zip(switched, plain, strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)


class TestStep:
    def test_only_the_critic_moves_and_the_students_gradients_stay(self) -> None:
        model = lora_student()
        names = {name for name, _ in anyflow.trainable_parameters(model)}
        critic = Critic(model, model, AnyFlowConfig(critic_learning_rate=1e-2))
        own = {name for name, _ in critic.named_parameters()}
        assert not own & names
        in_optimizer = {id(p) for group in critic.optimizer.param_groups for p in group["params"]}
        assert in_optimizer == {id(p) for _, p in critic.named_parameters()}
        tiny_models.call(
            model, SD3, tiny_models.inputs(SD3), tiny_models.times(SD3, SIGMAS), tiny_models.times(SD3, [0, 0])
        ).sum().backward()
        before = {
            n: (p.detach().clone(), None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()
        }
        for _ in range(2):  # LoRA's A has no gradient while B is zero
            with critic.trained(model):
                prediction = tiny_models.call(model, SD3, tiny_models.inputs(SD3), tiny_models.times(SD3, SIGMAS))
                critic.step(prediction.square().mean())
        for name, parameter in model.named_parameters():
            value, grad = before[name]
            if name in own:
                assert not torch.equal(parameter, value) and parameter.grad is None, name
            else:
                assert torch.equal(parameter, value), name
                assert (parameter.grad is None) == (grad is None), name
                assert grad is None or torch.equal(parameter.grad, grad), name
        assert any(before[name][1] is not None for name in names)

    def test_adamw_of_the_recipe(self) -> None:
        model = lora_student()
        group = Critic(model, model, AnyFlowConfig()).optimizer.param_groups[0]
        assert (group["lr"], group["betas"], group["weight_decay"]) == (2e-6, (0.0, 0.999), 0.0)

    @pytest.mark.parametrize("limit", [1.0, None])
    def test_gradient_is_clipped_to_a_norm(self, limit: float | None) -> None:
        critic = separate(critic_max_grad_norm=limit, critic_learning_rate=1.0)
        weight = critic.named_parameters()[0][1]
        seen: list[Tensor] = []
        critic.optimizer.register_step_pre_hook(lambda *_: seen.append(weight.grad.clone()))  # type: ignore[union-attr]
        norm = critic.step((weight * torch.tensor([[3.0, 4.0]])).sum())
        assert norm.item() == pytest.approx(5.0)
        assert torch.allclose(seen[0], torch.tensor([[3.0, 4.0]]) / (5 if limit else 1), rtol=1e-5)

    @pytest.mark.parametrize("value", ["nan", "inf"])
    def test_a_gradient_that_is_not_finite_counts_as_zero(self, value: str) -> None:
        critic = separate(critic_learning_rate=1.0)
        weight = critic.named_parameters()[0][1]
        before = weight.detach().clone()
        norm = critic.step((weight * float(value)).sum())
        assert not norm.isfinite() and torch.equal(weight, before)
        critic.step(weight.sum())
        assert weight.isfinite().all() and not torch.equal(weight, before)

    def test_peft_freezing_it_does_not_stop_it(self) -> None:
        """``set_adapter`` and ``enable_adapters``, which trainers call around validation, freeze what is not active."""
        model = lora_student()
        critic = Critic(model, model, AnyFlowConfig(critic_learning_rate=1e-2))
        model.disable_adapters()
        model.enable_adapters()
        assert not any(p.requires_grad for _, p in critic.named_parameters())
        before = [p.detach().clone() for _, p in critic.named_parameters()]
        with critic.trained(model):
            prediction = tiny_models.call(model, SD3, tiny_models.inputs(SD3), tiny_models.times(SD3, SIGMAS))
            critic.step(prediction.square().mean())
        assert any(not torch.equal(p, b) for (_, p), b in zip(critic.named_parameters(), before, strict=True))

    def test_checkpointing_that_cuts_it_off_is_told(self) -> None:
        """Re-entrant checkpointing of blocks whose inputs are frozen."""
        model = lora_student()
        critic = Critic(model, model, AnyFlowConfig())

        def checkpoint(function: Any, *arguments: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(function, *arguments, use_reentrant=True)

        model.enable_gradient_checkpointing(checkpoint)
        model.train()
        with warnings.catch_warnings(), critic.trained(model):
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
            prediction = tiny_models.call(model, SD3, tiny_models.inputs(SD3), tiny_models.times(SD3, SIGMAS))
            with pytest.warns(UserWarning, match="no gradient reached the critic"):
                critic.step(prediction.square().mean())

    def test_a_critic_ahead_of_the_student_may_go_backward(self) -> None:
        """Its parameters come first in the model; only a student's backward is refused."""
        model = lora_student()
        anyflow.add_critic(model, LoraConfig(r=2, target_modules=["context_embedder"]))
        critic = Critic(model, model, AnyFlowConfig(critic_learning_rate=1e-2))
        before = critic.named_parameters()[1][1].detach().clone()
        with critic.trained(model):
            prediction = tiny_models.call(model, SD3, tiny_models.inputs(SD3), tiny_models.times(SD3, SIGMAS))
            critic.step(prediction.square().mean())
        assert not torch.equal(critic.named_parameters()[1][1], before)

    def test_ddp_is_told_that_the_backward_is_not_its_own(self) -> None:
        synchronises = [True]

        class DistributedDataParallel(nn.Module):
            def __init__(self, module: nn.Module) -> None:
                super().__init__()
                self.module = module

            @contextmanager
            def no_sync(self) -> Iterator[None]:
                synchronises.append(False)
                yield
                synchronises.append(True)

        model = lora_student()
        critic = Critic(model, model, AnyFlowConfig())
        with critic.trained(DistributedDataParallel(model)):
            assert not synchronises[-1]
        assert synchronises == [True, False, True]

    def test_a_students_backward_inside_is_refused(self) -> None:
        model = lora_student()
        critic = Critic(model, model, AnyFlowConfig())
        t = tiny_models.times(SD3, SIGMAS)
        loss = tiny_models.call(model, SD3, tiny_models.inputs(SD3), t, t / 2).square().mean()
        with critic.trained(model), pytest.raises(RuntimeError, match="backward inside of teacher_mode"):
            loss.backward()


def separate(**config: Any) -> Critic:
    network = nn.Linear(2, 1, bias=False)
    return Critic(nn.Identity(), nn.Identity(), AnyFlowConfig(**config), separate=network)


class TestWeights:
    def test_float32_in_a_bfloat16_model(self) -> None:
        """A step of 2e-6 is below half an ulp of bfloat16 weights; in float32 it is made."""
        model = lora_student(torch.bfloat16)
        critic = Critic(model, model, AnyFlowConfig())
        tiny_models.move_critic(model)
        before = {name: p.detach().clone() for name, p in critic.named_parameters()}
        inputs = tiny_models.inputs(SD3, dtype=torch.bfloat16)
        with critic.trained(model):
            critic.step(tiny_models.call(model, SD3, inputs, tiny_models.times(SD3, SIGMAS)).float().square().mean())
        for name, parameter in critic.named_parameters():
            assert parameter.dtype == torch.float32 and (parameter != before[name]).float().mean() > 0.9, name

    def test_it_starts_as_the_base_whatever_the_student_started_as(self) -> None:
        model = lora_student(init_lora_weights=False)
        critic = Critic(model, model, AnyFlowConfig())
        with critic.scored():
            assert torch.allclose(output(model), output(tiny_models.build(SD3)), atol=1e-6)

    def test_a_separate_network_in_bfloat16_warns(self) -> None:
        with pytest.warns(UserWarning, match="round to nothing"):
            Critic(nn.Identity(), nn.Identity(), AnyFlowConfig(), separate=nn.Linear(2, 2).to(torch.bfloat16))

    def test_first_value_depends_on_the_seed_alone(self) -> None:
        values = []
        for outside, seed in ((0, 5), (1, 5), (1, 6)):
            model = lora_student()
            torch.manual_seed(outside)
            values.append([p.detach() for _, p in anyflow.add_critic(model, seed=seed)])
        assert all(torch.equal(a, b) for a, b in zip(values[0], values[1], strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(values[0], values[2], strict=True))

    def test_own_configuration(self) -> None:
        model = lora_student()
        config = LoraConfig(r=3, target_modules=["to_k", "linear_1"], exclude_modules=["context_embedder"])
        names = [name for name, _ in anyflow.add_critic(model, config)]
        assert any("to_k" in name for name in names) and any("timestep_embedder.linear_1" in name for name in names)
        assert not any("delta_embedder" in name or "to_q" in name for name in names)
        assert set(config.exclude_modules) == {"context_embedder"}, "the caller's configuration was changed"

    def test_exclusions_of_every_form(self) -> None:
        for excluded, left in ((["linear_2"], False), (r".*linear_2", False), (None, True)):
            model = lora_student()
            config = LoraConfig(r=2, target_modules=["linear_1", "linear_2"], exclude_modules=excluded)
            names = [name for name, _ in anyflow.add_critic(model, config)]
            assert any("linear_2" in name for name in names) == left
            assert names and not any("delta_embedder" in name for name in names)

    def test_dropout_follows_the_model(self) -> None:
        model = lora_student(lora_dropout=0.5)
        model.eval()
        anyflow.add_critic(model)
        tiny_models.move_critic(model)
        with base_mode(model, adapter=CRITIC):
            assert torch.equal(output(model), output(model))

    def test_scores_have_no_dropout(self) -> None:
        model = lora_student(lora_dropout=0.5)
        model.train()
        critic = Critic(model, model, AnyFlowConfig())
        tiny_models.move_critic(model)
        with critic.scored():
            assert torch.equal(output(model), output(model))
        assert model.training and all(m.training for m in model.modules())

    def test_copies_have_their_own(self) -> None:
        model = lora_student()
        anyflow.add_critic(model)
        copied = copy.deepcopy(model)
        tiny_models.move_critic(copied)
        assert not any(
            torch.equal(a, b)
            for (_, a), (_, b) in zip(critic_parameters(model), critic_parameters(copied), strict=True)
        )


@pytest.mark.parametrize("wrap", ["add_adapter", "get_peft_model"])
def test_peft_and_diffusers_save_the_student_alone(wrap: str, tmp_path: Path) -> None:
    model = tiny_models.build(SD3)
    anyflow.patch(model)
    config = LoraConfig(r=2, target_modules=["to_q"])
    held = model
    if wrap == "add_adapter":
        model.add_adapter(config)
    else:
        held = get_peft_model(model, config)
    anyflow.add_critic(held)
    assert not any(CRITIC in key for key in get_peft_model_state_dict(held))
    if wrap == "add_adapter":
        model.save_lora_adapter(tmp_path)
        path = tmp_path / "pytorch_lora_weights.safetensors"
    else:
        held.save_pretrained(tmp_path, selected_adapters=["default"])
        path = tmp_path / "adapter_model.safetensors"
    assert path.exists() and CRITIC.encode() not in path.read_bytes()


class TestRefusals:
    def test_no_adapter_to_copy(self) -> None:
        model = tiny_models.build(SD3)
        with pytest.raises(ValueError, match=r"no active adapter of peft.*anyflow\.add_critic"):
            anyflow.add_critic(model)

    def test_one_that_changes_the_base(self) -> None:
        config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="pissa")
        with pytest.raises(ValueError, match="must not change the base"):
            anyflow.add_critic(lora_student(), config)

    def test_an_active_critic(self) -> None:
        model = lora_student()
        anyflow.add_critic(model)
        for layer in model.modules():
            if hasattr(layer, "lora_A"):
                layer.set_adapter([CRITIC])
        with pytest.raises(ValueError, match="critic's adapter is active"):
            Critic(model, model, AnyFlowConfig())

    def test_a_sharded_model(self, tmp_path: Path) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            model = lora_student()
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
            with pytest.raises(ValueError, match="FSDP has sharded"):
                anyflow.add_critic(model)
        finally:
            torch.distributed.destroy_process_group()

    def test_a_merged_student(self) -> None:
        model = lora_student()
        critic = Critic(model, model, AnyFlowConfig())
        next(layer for layer in model.modules() if hasattr(layer, "lora_A")).merge()
        with pytest.raises(RuntimeError, match="merged"), critic.scored():
            pass


class TestState:
    def run(self, critic: Critic, model: Any, steps: int) -> None:
        for step in range(steps):
            inputs = tiny_models.inputs(SD3, seed=step)
            with critic.trained(model):
                prediction = tiny_models.call(model, SD3, inputs, tiny_models.times(SD3, SIGMAS))
                critic.step(prediction.square().mean())

    def test_resumed_bit_for_bit(self) -> None:
        config = AnyFlowConfig(critic_learning_rate=1e-2, critic_betas=(0.5, 0.9))
        model = lora_student()
        critic = Critic(model, model, config)
        self.run(critic, model, 3)
        state = {key: value.clone() for key, value in critic.state().items()}
        self.run(critic, model, 2)

        other = lora_student()
        resumed = Critic(other, other, config)
        self.run(resumed, other, 1)  # whatever it was before
        resumed.load_state(state)
        self.run(resumed, other, 2)
        for (name, a), (_, b) in zip(critic.named_parameters(), resumed.named_parameters(), strict=True):
            assert torch.equal(a, b), name
        final, again = critic.state(), resumed.state()
        assert final.keys() == again.keys() and any("exp_avg_sq" in key for key in final)
        assert all(torch.equal(final[key], again[key]) for key in final)

    def test_before_the_first_step(self) -> None:
        model = lora_student()
        critic = Critic(model, model, AnyFlowConfig())
        state = critic.state()
        assert not any("optimizer" in key for key in state)
        self.run(critic, model, 1)
        critic.load_state(state)
        assert not critic.optimizer.state

    @pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "moment"])
    def test_another_critic_is_refused_and_nothing_changed(self, fault: str) -> None:
        model = lora_student()
        critic = Critic(model, model, AnyFlowConfig())
        self.run(critic, model, 1)
        state = {key: value.clone() for key, value in critic.state().items()}
        key = next(key for key in state if key.startswith("critic."))
        if fault == "missing":
            del state[key]
        elif fault == "shape":
            state[key] = state[key][:1]
        elif fault == "unexpected":
            state["critic.other"] = torch.zeros(1)
        else:
            state["critic_optimizer.exp_avg.other"] = torch.zeros(1)
        self.run(critic, model, 1)
        before = [p.detach().clone() for _, p in critic.named_parameters()]
        with pytest.raises(ValueError, match="another critic"):
            critic.load_state(state)
        assert all(torch.equal(p, b) for (_, p), b in zip(critic.named_parameters(), before, strict=True))
