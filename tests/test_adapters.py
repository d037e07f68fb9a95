"""The teacher is the pristine base to the bit, whatever the adapter, and the exact entry state comes back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import adapter_kinds
import pytest
import tiny_models
import torch
from adapter_kinds import KINDS, state, student
from lycoris import create_lycoris
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.checkpoint import checkpoint

import anyflow
from anyflow import AnyFlowDistiller
from anyflow.adapters import GradientCheck, teacher_mode
from anyflow.patching.unwrap import unwrap

WAN, SD3 = "WanTransformer3DModel", "SD3Transformer2DModel"
ONLINE = {"teacher_rollout_steps": 2}
LYCORIS = [kind for kind in KINDS if kind.startswith("lycoris")]


def arguments(name: str) -> tuple[dict[str, Any], Tensor, Tensor]:
    return tiny_models.inputs(name), tiny_models.times(name, [0.9, 0.4]), tiny_models.times(name, [0.2, 0.1])


def batch_for(name: str) -> dict[str, Any]:
    conditioning = tiny_models.inputs(name)
    latents = conditioning.pop("hidden_states")
    return {
        "latents": latents,
        "noise": torch.randn(latents.shape, generator=torch.Generator().manual_seed(7)),
        "sigmas": torch.tensor([0.9, 0.4]),
        "r_sigmas": torch.tensor([0.2, 0.1]),
        "conditioning": conditioning,
    }


@torch.no_grad()
def pristine(name: str) -> tuple[Tensor, Tensor]:
    """What the unpatched base predicts, and the target that a distiller makes of it."""
    inputs, t, _ = arguments(name)
    reference = AnyFlowDistiller(tiny_models.build(name), tiny_models.build(name), config=ONLINE)
    return tiny_models.call(tiny_models.build(name), name, inputs, t), reference.prepare_batch(batch_for(name))[
        "target"
    ]


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [WAN, SD3])
@pytest.mark.filterwarnings("ignore:.*got no gradient")  # LyCORIS is on all layers, and SD3 does not use all
class TestTeacher:
    def test_is_the_pristine_base_before_between_and_after_steps(
        self, name: str, kind: str, checkpointing: bool
    ) -> None:
        prediction, target = pristine(name)
        held, network = student(name, kind)
        if checkpointing:
            unwrap(held).enable_gradient_checkpointing()
        distiller = AnyFlowDistiller(held, config=ONLINE, lycoris=network)
        trained = {id(p) for _, p in distiller.trainable_parameters()}
        base = [p for p in held.parameters() if id(p) not in trained]
        values = [p.clone() for p in base]
        optimizer = torch.optim.Adam([p for _, p in distiller.trainable_parameters()], lr=1e-2)
        inputs, t, r = arguments(name)
        with torch.no_grad():
            first = tiny_models.call(held, name, inputs, t, r)
        for step in range(4):
            before = state(held, network)
            with teacher_mode(held, lycoris=network):
                teacher = tiny_models.call(held, name, inputs, t)
            assert torch.equal(teacher, prediction) and not teacher.requires_grad
            assert torch.equal(distiller.prepare_batch(batch_for(name))["target"], target)
            assert state(held, network) == before
            if step < 3:
                distiller.training_step(batch_for(name))[0].backward()
                assert all(p.grad is None for p in base)
                optimizer.step()
                optimizer.zero_grad()
        assert all(torch.equal(p, value) for p, value in zip(base, values, strict=True))
        with torch.no_grad():
            assert (tiny_models.call(held, name, inputs, t, r) - first).abs().max() > 1e-3, "the student did not learn"


@pytest.mark.parametrize("kind", KINDS)
class TestEntryState:
    def test_returns_nested_and_after_an_exception(self, kind: str) -> None:
        held, network = student(SD3, kind)
        next(m for m in held.modules() if isinstance(m, nn.LayerNorm)).eval()
        before = state(held, network)
        with teacher_mode(held, lycoris=network):
            inside = state(held, network)
            with teacher_mode(held, held, lycoris=network):
                pass
            assert state(held, network) == inside != before
        assert state(held, network) == before

        def fail() -> None:
            with teacher_mode(held, lycoris=network):
                raise KeyError("boom")

        with pytest.raises(KeyError, match="boom"):
            fail()
        assert state(held, network) == before and torch.is_grad_enabled()

    def test_backward_inside_is_refused(self, kind: str) -> None:
        held, network = student(SD3, kind)
        distiller = AnyFlowDistiller(held, config=ONLINE, lycoris=network)
        loss, _ = distiller.training_step(batch_for(SD3))

        def inside() -> None:
            with teacher_mode(held, lycoris=network):
                loss.backward()

        with pytest.raises(RuntimeError, match=r"backward inside of teacher_mode"):
            inside()
        distiller.training_step(batch_for(SD3))[0].backward()  # and is none of anyone's business after it


def test_disabled_adapters_stay_disabled() -> None:
    held, _ = student(SD3, "lora, wrapped")
    held.base_model.disable_adapter_layers()
    before = state(held)
    with teacher_mode(held):
        pass
    assert state(held) == before


def test_full_rank_student_has_a_separate_teacher() -> None:
    prediction, target = pristine(WAN)
    teacher, model = tiny_models.build(WAN), tiny_models.build(WAN)
    model.train()
    distiller = AnyFlowDistiller(teacher, model, config=ONLINE)
    stock, before = type(teacher), state(teacher)
    optimizer = torch.optim.SGD([p for _, p in distiller.trainable_parameters()], lr=1e-2)
    inputs, t, _ = arguments(WAN)
    for _ in range(3):
        loss, _ = distiller.training_step(batch_for(WAN))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with teacher_mode(teacher):
            assert torch.equal(tiny_models.call(teacher, WAN, inputs, t), prediction)
        assert torch.equal(distiller.prepare_batch(batch_for(WAN))["target"], target)
    assert state(teacher) == before and type(teacher) is stock
    with torch.no_grad():
        assert not torch.equal(tiny_models.call(model, WAN, inputs, t), prediction)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["lora", "two adapters, one active", "published recipe", "lycoris lokr"])
def test_a_teacher_between_forward_and_backward_leaves_gradients_alone(kind: str, use_reentrant: bool) -> None:
    """Also where checkpointing runs the blocks again, and where another adapter is active."""
    grads = []
    for checkpointing in (False, True):
        held, network = student(SD3, kind)
        without_dropout(held)
        if checkpointing:
            held.enable_gradient_checkpointing(lambda f, *a: checkpoint(f, *a, use_reentrant=use_reentrant))
        trained = AnyFlowDistiller(held, config=ONLINE, lycoris=network).trainable_parameters()
        inputs, t, r = arguments(SD3)
        loss = tiny_models.call(held, SD3, inputs, t, r).square().sum()
        with teacher_mode(held, lycoris=network):
            tiny_models.call(held, SD3, inputs, t)
        loss.backward()
        grads.append({name: parameter.grad for name, parameter in trained})
    scale = max(grad.abs().max().item() for grad in grads[0].values() if grad is not None)
    for name, grad in grads[0].items():
        if grad is None:  # of the inactive adapter
            assert grads[1][name] is None
        else:
            assert torch.allclose(grads[1][name], grad, atol=1e-6 * scale), name  # one more order of float32 sums


class TestMerged:
    def test_peft(self) -> None:
        held, _ = student(SD3, "lora, wrapped")
        held.merge_adapter()
        with pytest.raises(RuntimeError, match="merged"), teacher_mode(held):
            pass

    def test_lycoris(self) -> None:
        held, network = student(SD3, "lycoris lokr")
        before = state(held, network)
        network.onfly_merge()
        with pytest.raises(RuntimeError, match="merged into the base weights"), teacher_mode(held):
            pass
        network.onfly_restore()
        assert state(held, network) == before

    @pytest.mark.parametrize("how", ["pissa", "olora"])
    def test_initialisations_that_change_the_base(self, how: str) -> None:
        model = tiny_models.build(SD3)
        model.requires_grad_(False)
        anyflow.patch(model)
        held = get_peft_model(model, LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=how))
        with pytest.raises(ValueError, match=f"init_lora_weights='{how}', which changes the base weights"):
            AnyFlowDistiller(held, config=ONLINE)
        AnyFlowDistiller(tiny_models.build(SD3), held, config=ONLINE)


class TestLycoris:
    def test_multiplier_is_untouched_and_comes_back(self) -> None:
        held, network = student(SD3, "lycoris loha")
        network.loras[0].multiplier = 0.3
        with teacher_mode(held, lycoris=network):
            pass
        assert network.multiplier == 0.7 and [x.multiplier for x in network.loras][:2] == [0.3, 0.7]

    @pytest.mark.parametrize("kind", LYCORIS)
    def test_is_found_without_being_named(self, kind: str) -> None:
        prediction, _ = pristine(SD3)
        held, _ = student(SD3, kind)
        inputs, t, _ = arguments(SD3)
        with teacher_mode(held):
            assert torch.equal(tiny_models.call(held, SD3, inputs, t), prediction)

    def test_two_networks_on_one_layer(self) -> None:
        prediction, _ = pristine(SD3)
        held, network = student(SD3, "lycoris lokr")
        _, second = adapter_kinds.lycoris("loha", dora_wd=True)(held)
        with torch.no_grad():
            for parameter in second.parameters():
                parameter.add_(0.1)
        inputs, t, _ = arguments(SD3)
        before = state(held, network), state(held, second)
        with teacher_mode(held, lycoris=second):
            assert torch.equal(tiny_models.call(held, SD3, inputs, t), prediction)
        assert (state(held, network), state(held, second)) == before

    def test_a_network_that_the_model_does_not_show(self) -> None:
        class Layer:
            multiplier = 0.7

        network = SimpleNamespace(multiplier=0.7, loras=(Layer(), Layer()))
        with teacher_mode(nn.Identity(), lycoris=network):
            assert [x.multiplier for x in (network, *network.loras)] == [0, 0, 0]
        assert [x.multiplier for x in (network, *network.loras)] == [0.7, 0.7, 0.7]

    def test_trainer_holds_the_network(self) -> None:
        """accelerator._lycoris_wrapped_network, as existing trainers have it."""
        _, target = pristine(WAN)
        held, network = student(WAN, "lycoris lokr, decomposed")

        def predict(batch: dict[str, Any]) -> dict[str, Tensor]:
            inputs = {**batch["conditioning"], "hidden_states": batch["noisy_latents"], "timestep": batch["timesteps"]}
            return {"model_prediction": held(**inputs, r_timestep=batch.get("flowmap_r_timesteps")).sample}

        trainer = SimpleNamespace(
            model_predict=predict,
            get_trained_component=lambda: held,
            config=SimpleNamespace(lora_type="lycoris"),
            accelerator=SimpleNamespace(_lycoris_wrapped_network=network),
        )
        distiller = AnyFlowDistiller(trainer, config=ONLINE)
        prepared = distiller.prepare_batch(batch_for(WAN))
        assert torch.equal(prepared["target"], target)
        distiller.compute_distill_loss(prepared, predict(prepared))[0].backward()
        assert all(p.grad is not None for _, p in distiller.trainable_parameters())

    def test_a_network_that_is_not_named_is_refused(self) -> None:
        held, _ = student(SD3, "lycoris lokr")
        with pytest.raises(ValueError, match="pass it as lycoris="):
            AnyFlowDistiller(held, config=ONLINE)

    def test_delta_embedder_trains_through_lycoris_where_that_sits_on_it(self) -> None:
        held, network = student(SD3, "lycoris lokr")
        assert all(name.startswith("lycoris.") for name, _ in self.trained(held, network))
        held, network = student(SD3, "lycoris full")
        assert sum("delta_embedder" in name for name, _ in self.trained(held, network)) == 4

    @staticmethod
    def trained(held: Any, network: Any) -> list[tuple[str, nn.Parameter]]:
        return AnyFlowDistiller(held, config=ONLINE, lycoris=network).trainable_parameters()

    def test_on_the_time_embedder_it_comes_after_the_patch(self) -> None:
        model = tiny_models.build(SD3)
        network = create_lycoris(model, 1.0, 2, 1, algo="lokr", warn_on_unmatched=False)
        network.apply_to()
        with pytest.raises(
            ValueError, match=r"LyCORIS is applied to time_text_embed.timestep_embedder.linear_1\. Patch"
        ):
            anyflow.patch(model)
        network.restore()
        anyflow.patch(model)
        inputs, t, _ = arguments(SD3)
        with torch.no_grad():
            assert torch.equal(tiny_models.call(model, SD3, inputs, t, t), pristine(SD3)[0])
        anyflow.unpatch(model)

    def test_elsewhere_it_may_come_before(self) -> None:
        prediction, _ = pristine(SD3)
        model = tiny_models.build(SD3)
        held, network = adapter_kinds.lycoris_full(model)
        anyflow.patch(held)
        inputs, t, _ = arguments(SD3)
        with teacher_mode(held, lycoris=network):
            assert torch.equal(tiny_models.call(held, SD3, inputs, t), prediction)


def test_a_sampler_that_drives_the_model_is_out_of_the_way() -> None:
    model = tiny_models.build(SD3)
    inputs, t, _ = arguments(SD3)
    prediction, _ = pristine(SD3)
    anyflow.patch(model)
    schedule = (torch.tensor([0.9]), torch.tensor([0.1]))
    model._flowmap_schedule = schedule
    with teacher_mode(model):
        assert torch.equal(tiny_models.call(model, SD3, inputs, t), prediction)
    assert model._flowmap_schedule is schedule


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
class TestFlatParameters:
    """FSDP makes one parameter of what it wraps, and so of trained and frozen ones."""

    def wrapped(self, use_orig_params: bool, frozen: bool) -> Any:
        model = tiny_models.build(SD3)
        model.requires_grad_(False)
        anyflow.patch(model)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
        if frozen:
            model.requires_grad_(False)
        else:
            anyflow.trainable_parameters(model)
        return FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))

    def test_a_frozen_flat_parameter_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"no parameters of its own: FSDP .* Wrap with use_orig_params=True"):
            AnyFlowDistiller(self.wrapped(False, frozen=True), config=ONLINE)

    def test_original_parameters_train_and_no_gradient_is_missed(self) -> None:
        _, target = pristine(SD3)
        held = self.wrapped(True, frozen=False)
        distiller = AnyFlowDistiller(held, config=ONLINE)
        assert torch.equal(distiller.prepare_batch(batch_for(SD3), held)["target"], target)
        distiller.training_step(batch_for(SD3), held)[0].backward()
        assert all(p.grad is not None for _, p in distiller.trainable_parameters())
        distiller.prepare_batch(batch_for(SD3), held)  # warns of nothing


class TestGradientCheck:
    """A loss that is finite, and parameters that never move."""

    def steps(self, distiller: AnyFlowDistiller, count: int = 2) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(count):
                distiller.training_step(batch_for(SD3))[0].backward()
            distiller.prepare_batch(batch_for(SD3))
        return [str(w.message) for w in caught if "got no gradient" in str(w.message)]

    def adapted(self, **options: Any) -> Any:
        model = tiny_models.build(SD3)
        model.requires_grad_(False)
        anyflow.patch(model)
        model.add_adapter(LoraConfig(**{"r": 2, "target_modules": ["to_q"], **options}))
        return model

    def test_a_fresh_lora_is_not_suspicious(self) -> None:
        """Its A has a gradient of zero, as its B starts at zero."""
        assert self.steps(AnyFlowDistiller(self.adapted(), config=ONLINE)) == []

    def test_a_layer_that_the_prediction_does_not_see(self) -> None:
        """The queries of the text in the last block of SD3: B's gradient is zero, and A is not."""
        messages = self.steps(AnyFlowDistiller(self.adapted(target_modules=["to_q", "add_q_proj"]), config=ONLINE), 3)
        assert len(messages) == 1, "once"
        assert "transformer_blocks.1.attn.add_q_proj.lora_B" in messages[0] and "and 0 more of 12" in messages[0]

    def test_a_gate_of_zero(self) -> None:
        model = self.adapted()
        with torch.no_grad():
            for name, parameter in anyflow.delta_parameters(model):
                if name.endswith("bias"):
                    parameter.zero_()  # explains nothing: these are no factors
        messages = self.steps(AnyFlowDistiller(model, config={**ONLINE, "gate_value": 0.0}))
        assert "time_text_embed.delta_embedder.linear_1.weight and 3 more" in messages[0]

    def test_reentrant_checkpointing_of_frozen_inputs(self) -> None:
        frozen, adapter, head = (nn.Linear(4, 4) for _ in range(3))
        frozen.requires_grad_(False)
        x = frozen(torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
        for use_reentrant, expected in ((True, 1), (False, 0)):
            check = GradientCheck()
            loss = head(checkpoint(adapter, x, use_reentrant=use_reentrant)).square().mean()
            check.watch(loss, lambda: [*adapter.named_parameters("adapter"), *head.named_parameters("head")])
            check.report()  # nothing has run backward yet
            loss.backward()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                check.report()
                check.report()
            assert len(caught) == expected
            assert not expected or "adapter.weight and 1 more of 4 trained tensors" in str(caught[0].message)

    def test_layers_that_lycoris_drops_at_random(self) -> None:
        held, network = student(WAN, "lycoris loha, dropout")
        for index, layer in enumerate(network.loras):
            layer.module_dropout, layer.rank_dropout = float(index % 2), 0.0
        distiller = AnyFlowDistiller(held, config=ONLINE, lycoris=network)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            distiller.training_step(batch_for(WAN))[0].backward()
            distiller.prepare_batch(batch_for(WAN))

    def test_nothing_is_left_on_the_parameters(self) -> None:
        model = self.adapted()
        self.steps(AnyFlowDistiller(model, config=ONLINE))
        assert not any(p._post_accumulate_grad_hooks or p._backward_hooks for p in model.parameters())
