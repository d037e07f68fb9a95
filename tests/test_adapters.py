"""The teacher sees the adapter off, and the exact entry state comes back."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

import anyflow
from anyflow.adapters import teacher_mode

NAME = "SD3Transformer2DModel"
CONFIGS = {
    "lora": {"target_modules": ["to_q", "to_v"], "lora_dropout": 0.5},
    "dora": {"target_modules": ["to_q"], "use_dora": True},
    "embedders": {"target_modules": r".*(timestep|delta)_embedder\.linear_[12]|.*to_q"},
    "modules_to_save": {"target_modules": ["to_q"], "modules_to_save": ["proj_out", "delta_embedder"]},
}


def state(model: nn.Module) -> list[Any]:
    return [
        (
            name,
            module.training,
            getattr(module, "_disable_adapters", None),
            tuple(module.active_adapters) if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) else (),
            [p.requires_grad for p in module.parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    ]


def adapted(kind: str) -> tuple[nn.Module, Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = tiny_models.build(NAME)
    inputs, t, r = tiny_models.inputs(NAME), tiny_models.times(NAME, [0.9, 0.4]), tiny_models.times(NAME, [0.2, 0.1])
    with torch.no_grad():
        pristine = tiny_models.call(model, NAME, inputs, t)
    anyflow.patch(model)
    held = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **CONFIGS[kind]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "delta_embedder" in name:
                parameter.add_(0.1)
    return held, inputs, t, r, pristine


@pytest.mark.parametrize("kind", CONFIGS)
class TestTeacher:
    def test_is_the_pristine_base_to_the_bit(self, kind: str) -> None:
        held, inputs, t, r, pristine = adapted(kind)
        held.train()
        before = state(held)
        optimizer = torch.optim.SGD([p for _, p in anyflow.trainable_parameters(held)], lr=1e-2)
        before = state(held)
        for _ in range(3):
            with teacher_mode(held):
                teacher = tiny_models.call(held, NAME, inputs, t)
            assert not teacher.requires_grad and torch.equal(teacher, pristine)
            assert state(held) == before
            tiny_models.call(held, NAME, inputs, t, r).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def test_base_tensors_get_no_gradient(self, kind: str) -> None:
        held, inputs, t, *_ = adapted(kind)
        with teacher_mode(held):
            tiny_models.call(held, NAME, inputs, t)
        assert all(p.grad is None for p in held.parameters())
        assert torch.is_grad_enabled()

    @pytest.mark.parametrize("entry", ["enabled", "disabled"])
    def test_entry_state_returns_nested_and_after_an_exception(self, kind: str, entry: str) -> None:
        held, *_ = adapted(kind)
        held.train()
        next(m for m in held.modules() if isinstance(m, nn.LayerNorm)).eval()
        if entry == "disabled":
            held.base_model.disable_adapter_layers()
        before = state(held)
        with teacher_mode(held), teacher_mode(held):
            pass
        assert state(held) == before

        def fail() -> None:
            with teacher_mode(held):
                raise KeyError("boom")

        with pytest.raises(KeyError, match="boom"):
            fail()
        assert state(held) == before and torch.is_grad_enabled()


def test_two_adapters_keep_their_activity() -> None:
    held, inputs, t, _, pristine = adapted("lora")
    held.add_adapter("critic", LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]))
    held.set_adapter("critic")
    before = state(held)
    with teacher_mode(held):
        assert torch.equal(tiny_models.call(held, NAME, inputs, t), pristine)
    assert state(held) == before


def test_merged_adapters_leave_no_teacher() -> None:
    held, *_ = adapted("lora")
    held.merge_adapter()

    def enter() -> None:
        with teacher_mode(held):
            pass

    with pytest.raises(RuntimeError, match="merged"):
        enter()


def test_lycoris_multiplier_comes_back() -> None:
    class Layer:
        def __init__(self, multiplier: float) -> None:
            self.multiplier = multiplier

    class Network(Layer):
        loras = (Layer(0.7), Layer(0.3))

    network = Network(0.7)
    with teacher_mode(nn.Identity(), lycoris=network):
        assert network.multiplier == 0 and [x.multiplier for x in network.loras] == [0, 0]
    assert network.multiplier == 0.7 and [x.multiplier for x in network.loras] == [0.7, 0.3]


def test_a_sampler_that_drives_the_model_is_out_of_the_way() -> None:
    model = tiny_models.build(NAME)
    inputs, t = tiny_models.inputs(NAME), tiny_models.times(NAME, [0.9, 0.4])
    with torch.no_grad():
        pristine = tiny_models.call(model, NAME, inputs, t)
    anyflow.patch(model)
    schedule = (torch.tensor([0.9]), torch.tensor([0.1]))
    model._flowmap_schedule = schedule
    with teacher_mode(model):
        assert torch.equal(tiny_models.call(model, NAME, inputs, t), pristine)
    assert model._flowmap_schedule is schedule


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_with_checkpointing_when_the_teacher_runs_before_backward(use_reentrant: bool) -> None:
    grads = []
    for checkpointing in (False, True):
        held, inputs, t, r, _ = adapted("lora")
        for module in held.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        held.train()
        if checkpointing:
            held.base_model.model.enable_gradient_checkpointing(
                lambda f, *a: torch.utils.checkpoint.checkpoint(f, *a, use_reentrant=use_reentrant)
            )
        anyflow.trainable_parameters(held)
        loss = tiny_models.call(held, NAME, inputs, t, r).square().sum()
        with teacher_mode(held):
            tiny_models.call(held, NAME, inputs, t)
        loss.backward()
        grads.append({n: p.grad for n, p in held.named_parameters() if p.requires_grad})
    scale = max(grad.abs().max().item() for grad in grads[0].values())
    for name, grad in grads[0].items():
        assert torch.allclose(grads[1][name], grad, atol=1e-6 * scale), name  # one more order of float32 sums
