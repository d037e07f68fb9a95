"""The on-policy stage through the distiller: who is asked what, what moves, and what a checkpoint brings back."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import adapter_kinds
import pytest
import test_distiller as protocol
import tiny_models
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import anyflow
from anyflow import AnyFlowDistiller
from anyflow.adapters import critic_parameters
from anyflow.denoiser import _is_of_prompt
from anyflow.families import find_spec
from anyflow.patching.names import CRITIC
from anyflow.stages import onpolicy

SD3, WAN = "SD3Transformer2DModel", "WanTransformer3DModel"
NAMES = [name for name in tiny_models.NAMES if name != "WanTransformer3DModel:tokenwise"]
CONFIG: dict[str, Any] = {
    "target_mode": "onpolicy",
    "onpolicy_forward": "linear",
    "schedule_shift": 3.0,
    "critic_learning_rate": 1e-3,
}


def make(name: str = SD3, *, dtype: torch.dtype = torch.float32, **config: Any) -> tuple[Any, AnyFlowDistiller]:
    """A student whose delta embedder has left the embedder, with a critic that has left the base."""
    model = protocol.student(name, dtype=dtype)
    tiny_models.perturb_delta(model)
    distiller = AnyFlowDistiller(model, config={**CONFIG, **config})
    tiny_models.move_critic(model)
    return model, distiller


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class Spy:
    """Every call of a model: who answered, what it was given and what it said."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[dict[str, Any]] = []
        layer: Any = next(m for m in model.modules() if hasattr(m, "_disable_adapters"))

        def note(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            who = "base" if layer._disable_adapters else "critic" if layer.active_adapters == [CRITIC] else "student"
            prediction = output[0] if isinstance(output, tuple) else output
            entry = {"who": who, "grad": torch.is_grad_enabled(), "training": module.training, "args": args}
            self.calls.append({**entry, "kwargs": kwargs, "output": prediction})

        model.register_forward_hook(note, with_kwargs=True)

    def by(self, who: str) -> list[dict[str, Any]]:
        return [call for call in self.calls if call["who"] == who]


class Seen:
    """What the stage hands to its objectives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.simulations: list[tuple[Tensor, list[Tensor], Tensor]] = []
        self.matching: list[tuple[Tensor, Tensor, Tensor]] = []
        self.fitting: list[tuple[Tensor, Tensor, Tensor]] = []

        def simulate(flow_map: Any, noise: Tensor, path: Any, **options: Any) -> Tensor:
            x = simulation(flow_map, noise, path, **options)
            self.simulations.append((noise, list(path), x.detach()))
            return x

        def match(x: Tensor, noise: Tensor, sigma: Tensor, *rest: Any, **options: Any) -> Tensor:
            self.matching.append((x.detach(), noise, sigma))
            return matching(x, noise, sigma, *rest, **options)

        def fit(x: Tensor, noise: Tensor, sigma: Tensor, *rest: Any, **options: Any) -> Tensor:
            self.fitting.append((x.detach(), noise, sigma))
            return fitting(x, noise, sigma, *rest, **options)

        simulation, matching, fitting = (
            onpolicy.backward_simulation,
            onpolicy.distribution_matching,
            onpolicy.fake_score_loss,
        )
        monkeypatch.setattr(onpolicy, "backward_simulation", simulate)
        monkeypatch.setattr(onpolicy, "distribution_matching", match)
        monkeypatch.setattr(onpolicy, "fake_score_loss", fit)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


def reference_critic(model: nn.Module) -> Any:
    """The stock model with a stock LoRA of the critic's weights."""
    stock = tiny_models.build(SD3)
    stock.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    own = dict(critic_parameters(model))
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if "lora_" in name:
                parameter.copy_(own.pop(name.replace(".default.", f".{CRITIC}.")))
    assert not own
    return stock


class TestGeneratorStep:
    @pytest.mark.parametrize("guidance", [1.0, 2.5])
    def test_loss_and_gradients_are_those_of_the_formulas(self, guidance: float, seen: Seen) -> None:
        """The student in plain PyTorch, the base as a stock model, the critic as a stock LoRA."""
        model, distiller = make(
            real_guidance_scale=guidance, dmd_weight=0.7, loss_weight=2.0, critic_steps_per_generator_step=0
        )
        negative = protocol.batch_for(SD3, seed=5)["conditioning"]
        batch = {**protocol.batch_for(SD3), "r_sigmas": torch.tensor([0.3, 0.0]), "negative_conditioning": negative}
        loss, _ = distiller.training_step(batch)
        loss.backward()
        got = {name: p.grad.clone() for name, p in distiller.trainable_parameters() if p.grad is not None}
        for _, parameter in distiller.trainable_parameters():
            parameter.grad = None

        def ask(network: Any, x: Tensor, s: Tensor, conditioning: Any, r: Tensor | None = None) -> Tensor:
            time = {"timestep": 1000 * s} if r is None else {"timestep": 1000 * s, "r_timestep": 1000 * r}
            return network(hidden_states=x, **conditioning, **time, return_dict=False)[0]

        positive, column = batch["conditioning"], (-1, 1, 1, 1)
        sigma, r = batch["sigmas"], batch["r_sigmas"]
        s = sigma.view(column)
        x_t = (1 - s) * batch["latents"] + s * batch["noise"]
        forward = (ask(model, x_t, sigma, positive, r) - (batch["noise"] - batch["latents"])).square().mean()

        (start, path, _), (_, noise, level) = seen.simulations[0], seen.matching[0]
        x = start
        for t, r in pairwise(path):
            x = x - (t - r).view(column) * ask(model, x, t, positive, r)
        with torch.no_grad():
            s = level.view(column)
            x_s = (1 - s) * x + s * noise
            base, critic = tiny_models.build(SD3), reference_critic(model)
            v_real = ask(base, x_s, level, positive)
            if guidance != 1:
                v_uncond = ask(base, x_s, level, negative)
                v_real = v_uncond + guidance * (v_real - v_uncond)
            x0_real, x0_fake = x_s - s * v_real, x_s - s * ask(critic, x_s, level, positive)
            scale = (x - x0_real).abs().mean((1, 2, 3)).view(column)
            target = x - (x0_fake - x0_real) / scale
        expected = 2 * (forward + 0.7 * 0.5 * (x - target).square().mean())
        expected.backward()

        # float32 networks on both sides, from states that differ by roundings.
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        exact = {name: p.grad for name, p in distiller.trainable_parameters() if p.grad is not None}
        assert got.keys() == exact.keys()
        largest = max(grad.abs().max().item() for grad in exact.values())
        for name, grad in exact.items():
            assert torch.allclose(got[name], grad, rtol=1e-4, atol=1e-5 * largest), name

    def test_gradient_flows_through_every_jump(self, seen: Seen) -> None:
        """Of a matching loss alone, with u in place of the network: the derivative passes through all the jumps."""
        model, distiller = make(critic_steps_per_generator_step=0, simulation_steps=(4,))
        spy = Spy(model)
        while not seen.simulations or len(seen.simulations[-1][1]) < 4:
            prepared = distiller.prepare_batch(protocol.batch_for(SD3))
            spy.calls.clear()
            loss, _ = distiller.compute_distill_loss(prepared, prepared["target"])
        outputs = [call["output"] for call in spy.by("student")]
        assert len(outputs) == 3
        gradients = torch.autograd.grad(loss, outputs)
        assert all(gradient.any() for gradient in gradients)


class TestWhoIsAskedWhat:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("forward", ["linear", "meanflow"])
    def test_scores_have_no_r_and_jumps_have_theirs(self, name: str, forward: str, seen: Seen) -> None:
        """In the model's own time."""
        model, distiller = make(
            name, onpolicy_forward=forward, fuse_guidance_scale=1.0, real_guidance_scale=2.0, simulation_steps=(4,)
        )
        spec, spy = find_spec(name.partition(":")[0]), Spy(model)
        batch = protocol.batch_for(name)
        if forward == "meanflow":
            del batch["sigmas"]
        batch["negative_conditioning"] = protocol.batch_for(name, seed=5)["conditioning"]
        for _ in range(2):
            spy.calls.clear()
            loss, _ = distiller.training_step(batch)
            loss.backward()
            scores = [*spy.by("base"), *spy.by("critic")]
            assert len(spy.by("base")) == 2 and len(spy.by("critic")) == 2
            assert all(call["kwargs"].get("r_timestep") is None for call in scores)
            assert [call["grad"] for call in scores] == [False, False, True, False]
            jumps = [
                (spec.model_time(t), spec.model_time(r)) for _, path, _ in seen.simulations for t, r in pairwise(path)
            ]
            asked = [(c["kwargs"][spec.timestep_arg], c["kwargs"].get("r_timestep")) for c in spy.by("student")]
            assert all(r is not None for _, r in asked)
            for t, r in jumps:
                assert any(torch.equal(t, at) and torch.equal(r, to) for at, to in asked)
            for call, (_, _, sigma) in zip(
                (spy.by("critic")[0], spy.by("critic")[1]), (seen.fitting[-1], seen.matching[-1]), strict=True
            ):
                time = call["kwargs"][spec.timestep_arg]
                assert time.dtype == torch.float32 and torch.equal(time, spec.model_time(sigma))
            seen.simulations.clear()

    def test_the_delta_embedder_does_not_leak_into_the_scores(self) -> None:
        """Stock networks, which have none, say the same."""
        model, distiller = make()
        tiny_models.perturb_delta(model)
        spy = Spy(model)
        prepared = distiller.prepare_batch(protocol.batch_for(SD3))
        spy.calls.clear()
        distiller.compute_distill_loss(prepared, prepared["target"])
        for who, stock in (("base", tiny_models.build(SD3)), ("critic", reference_critic(model))):
            (call,) = spy.by(who)
            given = {key: value for key, value in call["kwargs"].items() if key != "r_timestep"}
            with torch.no_grad():
                (expected,) = stock(**{**given, "return_dict": False})
            # The same weights; the critic's is a layer of another copy of the model.
            assert torch.allclose(call["output"], expected, rtol=0, atol=1e-6), who

    def test_scores_are_evaluated_and_the_student_is_as_it_was(self) -> None:
        model, distiller = make()
        model.train()
        spy = Spy(model)
        distiller.training_step(protocol.batch_for(SD3))
        assert not any(call["training"] for call in (*spy.by("base"), spy.by("critic")[-1]))
        assert spy.by("critic")[0]["training"], "the critic trains in the model's own mode"
        with_gradient = [call for call in spy.by("student") if call["grad"]]
        assert with_gradient and all(call["training"] for call in with_gradient)
        assert not any(call["training"] for call in spy.by("student") if not call["grad"])
        assert model.training and all(module.training for module in model.modules())

    def test_samples_and_their_sigmas(self, seen: Seen) -> None:
        """x_1 is noise, sigma is that of the shifted draws, nothing is drawn twice."""
        _, distiller = make(schedule_shift=5.0, simulation_steps=(2, 4))
        batch = protocol.batch_for(SD3)
        for _ in range(40):
            distiller.compute_distill_loss(prepared := distiller.prepare_batch(batch), prepared["target"])
        uniform = torch.cat([sigma for _, _, sigma in seen.matching])
        logit_normal = torch.cat([sigma for _, _, sigma in seen.fitting])
        # The mean of 80 draws: 0.747 and 0.788 in the long run, with standard deviations of 0.024 and 0.018.
        assert uniform.mean().item() == pytest.approx(0.747, abs=0.1)
        assert logit_normal.mean().item() == pytest.approx(0.788, abs=0.08)
        drawn = [noise for noise, _, _ in seen.simulations] + [noise for _, noise, _ in seen.matching + seen.fitting]
        assert len({tuple(noise.flatten()[:4].tolist()) for noise in drawn}) == len(drawn) == 160
        assert torch.stack(drawn).std().item() == pytest.approx(1.0, abs=0.02)
        lengths = {len(path) for _, path, _ in seen.simulations}
        assert lengths == {3, 4}  # of 4 steps, k in the middle has three jumps; of 2, both ends have two


class TestUnconditional:
    @staticmethod
    def tensors(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            for part in value.values():
                yield from TestUnconditional.tensors(part)
        elif isinstance(value, (list, tuple)):
            for part in value:
                yield from TestUnconditional.tensors(part)

    @pytest.mark.parametrize("name", NAMES)
    def test_no_tensor_of_the_prompt_reaches_it(self, name: str) -> None:
        model, distiller = make(name, real_guidance_scale=3.0)
        spy = Spy(model)
        batch = protocol.batch_for(name)
        negative = protocol.batch_for(name, seed=5)["conditioning"]
        before = copy.deepcopy(negative)
        distiller.training_step({**batch, "negative_conditioning": negative})
        conditional, unconditional = spy.by("base")
        positive = {t.data_ptr() for t in self.tensors(batch["conditioning"])}
        assert positive & {t.data_ptr() for t in self.tensors(conditional["kwargs"])}
        assert not positive & {t.data_ptr() for t in self.tensors(unconditional["kwargs"])}
        given = {t.data_ptr() for t in self.tensors(unconditional["kwargs"])}
        assert {t.data_ptr() for t in self.tensors(negative)} <= given
        assert str(before) == str(negative), "the negative conditioning was changed"

    def test_of_a_trainers_object(self) -> None:
        """A stale mask is dropped, a nested dict is replaced and not changed, and a missing pooled embedding raises."""
        trainer = protocol.Trainer(protocol.student(SD3))
        distiller = AnyFlowDistiller(trainer, config={**CONFIG, "real_guidance_scale": 3.0})
        tiny_models.move_critic(trainer.model)
        nested = {"text_embeds": torch.zeros(2, 3), "time_ids": torch.ones(2, 6)}
        negative = protocol.batch_for(SD3, seed=5)["conditioning"]
        negative["added_cond_kwargs"] = {"text_embeds": torch.ones(2, 3), "time_ids": torch.ones(2, 6)}
        batch = protocol.trainer_batch()
        del batch["conditioning"]
        batch |= {"encoder_attention_mask": torch.ones(2, 12), "added_cond_kwargs": nested, "prompts": ["a", "b"]}
        prompt = [batch[key] for key in ("encoder_hidden_states", "pooled_projections", "encoder_attention_mask")]
        prompt.append(nested["text_embeds"])
        prepared = distiller.prepare_batch({**batch, "negative_conditioning": negative})
        trainer.seen.clear()
        trainer.model._flowmap_saw_r = True
        distiller.compute_distill_loss(prepared, prepared["target"])
        negatives = [s for s in trainer.seen if s["encoder_hidden_states"] is negative["encoder_hidden_states"]]
        assert len(negatives) == 1 and "encoder_attention_mask" not in negatives[0]
        reached = {t.data_ptr() for t in self.tensors({k: v for k, v in negatives[0].items() if "negative" not in k})}
        assert not reached & {t.data_ptr() for t in prompt}
        assert torch.equal(nested["text_embeds"], torch.zeros(2, 3))

        lacking = {key: value for key, value in negative.items() if key != "pooled_projections"}
        with pytest.raises(ValueError, match="pooled_projections of the batch is the positive prompt's"):
            distiller.compute_distill_loss({**prepared, "negative_conditioning": lacking}, prepared["target"])

        lacking = {key: value for key, value in negative.items() if key != "added_cond_kwargs"}
        with pytest.raises(ValueError, match="text_embeds of the batch is the positive prompt's"):
            distiller.compute_distill_loss({**prepared, "negative_conditioning": lacking}, prepared["target"])

    def test_of_the_forward_loss_beside(self) -> None:
        _, distiller = make(onpolicy_forward="meanflow", fuse_guidance_scale=3.0)
        with pytest.raises(ValueError, match=r"fuse_guidance_scale=3\.0 needs negative_conditioning"):
            distiller.prepare_batch(protocol.batch_for(SD3))

    def test_missing_altogether(self) -> None:
        _, distiller = make(real_guidance_scale=3.0)
        with pytest.raises(ValueError, match=r"real_guidance_scale=3\.0 needs negative_conditioning"):
            distiller.prepare_batch(protocol.batch_for(SD3))


@pytest.mark.parametrize(
    ("key", "of_prompt"),
    {
        **dict.fromkeys(("prompt_embeds", "add_text_embeds", "encoder_attention_mask", "pooled_projections"), True),
        **dict.fromkeys(("caption", "encoder_hidden_states", "text_ids", "t5_attention_mask"), True),
        **dict.fromkeys(("context_latents", "texture", "image_encoder_latents", "image_embeds", "pixels"), False),
    }.items(),
)
def test_names_of_what_was_made_of_a_prompt(key: str, of_prompt: bool) -> None:
    assert _is_of_prompt(key, torch.zeros(1)) == of_prompt


class TestNeverMoveEachOther:
    def test_step_by_step(self) -> None:
        model, distiller = make(critic_steps_per_generator_step=3, critic_learning_rate=1e-2)
        student = {name for name, _ in distiller.trainable_parameters()}
        critic = {name for name, _ in critic_parameters(model)}
        optimizer = torch.optim.AdamW([p for _, p in distiller.trainable_parameters()], lr=1e-2)
        assert not student & critic
        for _ in range(2):
            before = weights(model)
            prepared = distiller.prepare_batch(protocol.batch_for(SD3))  # the critic's steps
            middle = weights(model)
            assert {name for name in before if not torch.equal(before[name], middle[name])} == critic
            assert all(parameter.grad is None for _, parameter in model.named_parameters())
            x = prepared["noisy_latents"]
            output = model(
                x,
                timestep=prepared["timesteps"],
                r_timestep=prepared["flowmap_r_timesteps"],
                **prepared["conditioning"],
            )
            loss, _ = distiller.compute_distill_loss(prepared, output)
            loss.backward()
            assert all(parameter.grad is None for _, parameter in critic_parameters(model))
            optimizer.step()
            optimizer.zero_grad()
            after = weights(model)
            moved = {name for name in middle if not torch.equal(middle[name], after[name])}
            assert moved <= student and len(moved) > len(student) // 2

    @pytest.mark.parametrize("steps", [0, 1, 3])
    def test_critic_steps_of_each_generator_step(self, steps: int, seen: Seen) -> None:
        model, distiller = make(critic_steps_per_generator_step=steps)
        before = weights(model)
        distiller.prepare_batch(protocol.batch_for(SD3))
        assert len(seen.fitting) == steps and not seen.matching
        changed = any(not torch.equal(before[name], p) for name, p in critic_parameters(model))
        assert changed == (steps > 0)

    def test_the_critic_learns_the_students_samples(self) -> None:
        """On the same draws as one that does not learn."""
        ends = []
        for rate in (3e-2, 0.0):
            _, distiller = make(critic_learning_rate=rate, simulation_steps=(1,), dmd_weight=0.0)
            losses = []
            for _ in range(60):
                prepared = distiller.prepare_batch(protocol.batch_for(SD3))
                losses.append(prepared["anyflow_critic_logs"]["anyflow_critic_loss"].item())
            ends.append(sum(losses[-10:]))
        assert ends[0] < 0.97 * ends[1]  # half of what it gains

    def test_weight_decay_of_the_students_optimizer_reaches_no_critic(self) -> None:
        """An optimizer over all that requires a gradient, as careless trainers make it."""
        model, distiller = make()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
        loss, _ = distiller.training_step(protocol.batch_for(SD3))
        before = weights(model)
        loss.backward()
        optimizer.step()
        assert all(torch.equal(before[name], parameter) for name, parameter in critic_parameters(model))


class TestTrainers:
    def test_a_loop_of_ones_own_is_the_training_step(self) -> None:
        results = []
        for own in (False, True):
            _, distiller = make()
            batch = {**protocol.batch_for(SD3), "r_sigmas": torch.tensor([0.3, 0.0])}
            if own:
                prepared = distiller.prepare_batch(batch, state={"global_step": 3})
                output = distiller.student.bare(
                    prepared["noisy_latents"],
                    timestep=prepared["timesteps"],
                    r_timestep=prepared["flowmap_r_timesteps"],
                    **prepared["conditioning"],
                )
                loss, logs = distiller.compute_distill_loss(prepared, output, torch.zeros(()))
            else:
                loss, logs = distiller.training_step(batch)
            loss.backward()
            results.append((loss, [p.grad for _, p in distiller.trainable_parameters()], logs))
        (loss, gradients, logs), (other, others, _) = results
        assert torch.equal(loss, other)
        assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
        assert {"anyflow_forward_loss", "anyflow_dmd_loss", "anyflow_critic_loss", "anyflow_simulation_steps"} <= set(
            logs
        )
        assert all(value.ndim == 0 and not value.requires_grad for value in logs.values())
        whole = logs["anyflow_forward_loss"] + logs["anyflow_dmd_loss"]
        assert logs["anyflow_loss"].item() == pytest.approx(whole.item(), rel=1e-6)

    def test_a_trainers_object_is_the_bare_model(self) -> None:
        losses = []
        for wrapped in (False, True):
            model = protocol.student(SD3)
            held = protocol.Trainer(model) if wrapped else model
            distiller = AnyFlowDistiller(held, config=CONFIG)
            tiny_models.move_critic(model)
            batch = protocol.trainer_batch() if wrapped else protocol.batch_for(SD3)
            prepared = distiller.prepare_batch({**batch, "r_sigmas": torch.tensor([0.3, 0.0])})
            if wrapped:
                output = held.model_predict(prepared)
            else:
                output = model(
                    prepared["noisy_latents"],
                    timestep=prepared["timesteps"],
                    r_timestep=prepared["flowmap_r_timesteps"],
                    **prepared["conditioning"],
                )
            losses.append(distiller.compute_distill_loss(prepared, output)[0])
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)

    def test_the_wrapper_is_what_is_called(self) -> None:
        model, distiller = make()
        calls = 0

        class Wrapper(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self._orig_mod = model

            def forward(self, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                return self._orig_mod(**kwargs)

        spy = Spy(model)
        distiller.training_step(protocol.batch_for(SD3), Wrapper())
        assert calls == len(spy.calls)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing(self, reentrant: bool) -> None:
        """The critic trains although all inputs of the blocks are frozen; the student's gradients are the same."""
        gradients = []
        for checkpointing in (False, True):
            model, distiller = make()
            if checkpointing:

                def checkpoint(function: Any, *arguments: Any) -> Any:
                    return torch.utils.checkpoint.checkpoint(function, *arguments, use_reentrant=reentrant)

                model.enable_gradient_checkpointing(checkpoint)
            model.train()
            before = weights(model)
            batch = {**protocol.batch_for(SD3), "r_sigmas": torch.tensor([0.3, 0.0])}
            batch["conditioning"]["encoder_hidden_states"].requires_grad_()  # re-entrant: the trainer's own affair
            loss, _ = distiller.training_step(batch)
            loss.backward()
            assert any(not torch.equal(before[name], p) for name, p in critic_parameters(model))
            gradients.append([p.grad for _, p in distiller.trainable_parameters()])
        for a, b in zip(*gradients, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-8)

    def test_reentrant_checkpointing_of_frozen_inputs_cuts_nothing_off(self) -> None:
        """Neither the critic, nor the student in the first jump."""

        def checkpoint(function: Any, *arguments: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(function, *arguments, use_reentrant=True)

        gradients = []
        for checkpointing in (False, True):
            model, distiller = make(simulation_steps=(1,))
            if checkpointing:
                model.enable_gradient_checkpointing(checkpoint)
            model.train()
            before = weights(model)
            prepared = distiller.prepare_batch(protocol.batch_for(SD3))
            assert any(not torch.equal(before[name], p) for name, p in critic_parameters(model))
            loss, _ = distiller.compute_distill_loss(prepared, prepared["target"])  # matching alone has a gradient
            loss.backward()
            gradients.append([p.grad for _, p in distiller.trainable_parameters()])
        for a, b in zip(*gradients, strict=True):
            assert a is not None and torch.allclose(a, b, rtol=1e-4, atol=1e-9)

    @pytest.mark.parametrize("kind", ["dora", "peft lokr", "saved delta", "embedders", "two adapters, both active"])
    def test_other_adapters(self, kind: str) -> None:
        held, _ = adapter_kinds.student(SD3, kind)
        distiller = AnyFlowDistiller(held, config=CONFIG)
        for _ in range(2):
            loss, _ = distiller.training_step(protocol.batch_for(SD3))
            loss.backward()
        assert torch.isfinite(loss) and all(p.grad is not None for _, p in distiller.trainable_parameters())

    def test_beside_lycoris(self) -> None:
        """The student is a LyCORIS network, the critic a LoRA of peft under it."""
        model, network = adapter_kinds.student(SD3, "lycoris lokr")
        with pytest.raises(ValueError, match=r"anyflow\.add_critic"):
            AnyFlowDistiller(model, config=CONFIG, lycoris=network)
        anyflow.add_critic(model, LoraConfig(r=2, target_modules=["to_q", "to_k"]))
        distiller = AnyFlowDistiller(model, config=CONFIG, lycoris=network)
        tiny_models.move_critic(model)
        before, kept = weights(model), [p.detach().clone() for p in network.parameters()]
        loss, _ = distiller.training_step(protocol.batch_for(SD3))
        loss.backward()
        changed = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
        assert changed == {name for name, _ in critic_parameters(model)}
        assert all(torch.equal(a, b) for a, b in zip(kept, network.parameters(), strict=True))
        assert all(p.grad is not None for _, p in distiller.trainable_parameters())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_low_precision_and_autocast(self, dtype: torch.dtype, seen: Seen) -> None:
        model, distiller = make(dtype=dtype)
        batch = protocol.batch_for(SD3)
        batch["conditioning"] = {key: value.to(dtype) for key, value in batch["conditioning"].items()}
        spy = Spy(model)
        with torch.autocast("cpu", dtype):
            loss, _ = distiller.training_step(batch)
        assert loss.dtype == torch.float32 and torch.isfinite(loss)
        assert all(x.dtype == torch.float32 for _, _, x in seen.simulations)
        assert all(call["kwargs"]["timestep"].dtype == torch.float32 for call in spy.calls)
        assert all(call["kwargs"]["hidden_states"].dtype == dtype for call in spy.calls)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for _, p in distiller.trainable_parameters())


class TestFullRank:
    def test_networks_that_cannot_play_their_parts(self) -> None:
        def networks() -> list[nn.Module]:
            return [tiny_models.build(SD3, seed=seed).requires_grad_(False) for seed in (0, 1, 2)]

        teacher, student, critic = networks()
        with pytest.raises(ValueError, match="no weight of critic_model trains"):
            AnyFlowDistiller(teacher, student.requires_grad_(True), critic_model=critic, config=CONFIG)
        teacher, student, _ = networks()
        anyflow.add_critic(teacher.requires_grad_(True), LoraConfig(target_modules=["to_q"]))
        with pytest.raises(ValueError, match="of the teacher requires a gradient"):
            AnyFlowDistiller(teacher, student.requires_grad_(True), config=CONFIG)
        _, student, _ = networks()
        anyflow.patch(student.requires_grad_(True))
        anyflow.add_critic(student, LoraConfig(target_modules=["to_q"]))
        with pytest.raises(ValueError, match="the critic is an adapter on a full-rank student"):
            anyflow.save_student(student, "nowhere")

    def test_a_critic_in_another_memory_format_is_saved(self, tmp_path: Path) -> None:
        teacher, student, critic = (tiny_models.build("UNet2DConditionModel", seed=seed) for seed in (0, 1, 2))
        teacher.requires_grad_(False)
        critic.to(memory_format=torch.channels_last)
        assert not all(parameter.is_contiguous() for parameter in critic.parameters())
        distiller = AnyFlowDistiller(teacher, student, critic_model=critic, config=CONFIG)
        distiller.training_step(protocol.batch_for("UNet2DConditionModel"))
        before = weights(critic)
        distiller.on_save_checkpoint(1, tmp_path)
        distiller.training_step(protocol.batch_for("UNet2DConditionModel"))
        distiller.on_load_checkpoint(tmp_path)
        assert all(torch.equal(before[name], parameter) for name, parameter in critic.named_parameters())

    def test_three_networks(self) -> None:
        teacher, student, critic = (tiny_models.build(SD3, seed=seed) for seed in (0, 1, 2))
        teacher.requires_grad_(False)
        distiller = AnyFlowDistiller(teacher, student, critic_model=critic, config=CONFIG)
        assert anyflow.is_patched(student) and not anyflow.is_patched(critic) and not anyflow.is_patched(teacher)
        optimizer = torch.optim.AdamW([p for _, p in distiller.trainable_parameters()], lr=1e-2)
        models = {"teacher": teacher, "student": student, "critic": critic}
        before = {key: weights(model) for key, model in models.items()}

        def moved(key: str) -> bool:
            return any(not torch.equal(before[key][name], p) for name, p in models[key].named_parameters())

        prepared = distiller.prepare_batch(protocol.batch_for(SD3))
        assert moved("critic") and not moved("student") and not moved("teacher")
        before["critic"] = weights(critic)
        output = student(
            prepared["noisy_latents"],
            timestep=prepared["timesteps"],
            r_timestep=prepared["flowmap_r_timesteps"],
            **prepared["conditioning"],
        )
        distiller.compute_distill_loss(prepared, output)[0].backward()
        optimizer.step()
        assert moved("student") and not moved("critic") and not moved("teacher")
        assert all(p.grad is None for model in (teacher, critic) for p in model.parameters())

    def test_saved_and_resumed(self, tmp_path: Path) -> None:
        def made(seed: int) -> tuple[Any, nn.Module]:
            teacher, student, critic = (tiny_models.build(SD3, seed=s) for s in (0, 1 + seed, 2 + seed))
            return AnyFlowDistiller(teacher, student, critic_model=critic, config=CONFIG), critic

        first, critic = made(0)
        first.training_step(protocol.batch_for(SD3))
        first.on_save_checkpoint(3, tmp_path)
        second, other = made(5)
        assert second.on_load_checkpoint(tmp_path) == 3
        for distiller in (first, second):
            distiller.training_step(protocol.batch_for(SD3))
        assert all(torch.equal(a, b) for a, b in zip(critic.parameters(), other.parameters(), strict=True))

    def test_a_critic_on_the_frozen_teacher(self) -> None:
        teacher, student = tiny_models.build(SD3), tiny_models.build(SD3, seed=1)
        teacher.requires_grad_(False)
        with pytest.raises(ValueError, match="critic_model"):
            AnyFlowDistiller(teacher, student, config=CONFIG)
        anyflow.add_critic(teacher, LoraConfig(r=2, target_modules=["to_q"]))
        distiller = AnyFlowDistiller(teacher, student, config=CONFIG)
        before = weights(teacher)
        loss, _ = distiller.training_step(protocol.batch_for(SD3))
        loss.backward()
        changed = {name for name, p in teacher.named_parameters() if not torch.equal(before[name], p)}
        assert changed and changed <= {name for name, _ in critic_parameters(teacher)}
        assert all(p.grad is None for p in teacher.parameters())

    def test_one_network_in_two_roles_is_refused(self) -> None:
        teacher, student = tiny_models.build(SD3), tiny_models.build(SD3)
        for critic in (teacher, student):
            with pytest.raises(ValueError, match="critic_model is the teacher's or the student's"):
                AnyFlowDistiller(teacher, student, critic_model=critic, config=CONFIG)

    def test_where_a_critic_model_has_no_place(self) -> None:
        with pytest.raises(ValueError, match="target_mode='linear' has no critic_model"):
            AnyFlowDistiller(
                protocol.student(SD3), critic_model=tiny_models.build(SD3), config={"target_mode": "linear"}
            )
        trainer = protocol.Trainer(protocol.student(SD3))
        with pytest.raises(ValueError, match="trainer's object calls its own network"):
            AnyFlowDistiller(trainer, critic_model=tiny_models.build(SD3), config=CONFIG)

    def test_no_adapter_and_no_teacher(self) -> None:
        with pytest.raises(ValueError, match="no adapter to switch off"):
            AnyFlowDistiller(tiny_models.build(SD3), config=CONFIG)


class TestFrames:
    def test_clean_first_frame_stays_clean(self, seen: Seen) -> None:
        _, distiller = make(WAN)
        sigmas = torch.tensor([[0.0, 0.9], [0.0, 0.4]])
        batch = {**protocol.batch_for(WAN, sigmas), "r_sigmas": torch.zeros(2, 2)}
        loss, _ = distiller.training_step(batch)
        loss.backward()
        assert torch.isfinite(loss)
        for start, path, x in seen.simulations:
            assert torch.equal(start[:, :, 0], batch["latents"][:, :, 0])
            assert torch.equal(x[:, :, 0], batch["latents"][:, :, 0])
            assert not torch.equal(x[:, :, 1], start[:, :, 1])
            tokens = path[0].shape[1]
            assert all(not s[:, : tokens // 2].any() for s in path)
        for _, _, sigma in seen.matching + seen.fitting:
            assert not sigma[:, : sigma.shape[1] // 2].any() and sigma[:, sigma.shape[1] // 2 :].all()

    def test_frames_equal_to_one_time_per_sample(self) -> None:
        losses = []
        for spread in (False, True):
            _, distiller = make(WAN)
            batch = {**protocol.batch_for(WAN), "r_sigmas": torch.tensor([0.3, 0.0])}
            if spread:
                batch |= {key: batch[key][:, None].repeat(1, 2) for key in ("sigmas", "r_sigmas")}
            losses.append(distiller.training_step(batch)[0].item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


class TestStreams:
    def test_nothing_outside_changes_a_run(self) -> None:
        runs = []
        for outside in (False, True):
            _, distiller = make()
            torch.manual_seed(int(outside))
            losses = []
            for _ in range(3):
                losses.append(distiller.training_step(protocol.batch_for(SD3))[0].item())
                if outside:
                    torch.rand(7)
            runs.append(losses)
        assert runs[0] == runs[1] and len(set(runs[0])) == 3

    def test_another_seed_is_another_run(self) -> None:
        losses = [make(seed=seed)[1].training_step(protocol.batch_for(SD3))[0].item() for seed in (0, 1)]
        assert losses[0] != losses[1]

    def test_shift_of_the_scheduler(self, seen: Seen) -> None:
        model = protocol.student(SD3)
        config = {key: value for key, value in CONFIG.items() if key != "schedule_shift"} | {"simulation_steps": (2,)}
        with pytest.raises(ValueError, match="schedule_shift"):
            AnyFlowDistiller(model, config=config)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
        distiller = AnyFlowDistiller(model, noise_scheduler=scheduler, config=config)
        distiller.training_step(protocol.batch_for(SD3))
        middle = 5 * 0.5 / (1 + 4 * 0.5)
        for _, path, _ in seen.simulations:
            assert [round(float(s[0]), 6) for s in path] == [1.0, round(middle, 6), 0.0]


class TestCheckpoints:
    def test_the_students_file_holds_no_critic(self, tmp_path: Path) -> None:
        model, distiller = make()
        distiller.training_step(protocol.batch_for(SD3))
        distiller.on_save_checkpoint(7, tmp_path)
        text = (tmp_path / "anyflow_student.safetensors").read_bytes()
        assert CRITIC.encode() not in text
        fresh = tiny_models.build(SD3)
        anyflow.load_student(fresh, tmp_path)
        assert not critic_parameters(fresh)
        inputs, t = tiny_models.inputs(SD3), tiny_models.times(SD3, [0.9, 0.4])
        with torch.no_grad():
            expected = tiny_models.call(model, SD3, inputs, t, t / 3)
            assert torch.equal(tiny_models.call(fresh, SD3, inputs, t, t / 3), expected)
            # Into a model that has a critic, which is left as it is.
            other, _ = make()
            critic = weights(other)
            anyflow.load_student(other, tmp_path)
            assert torch.equal(tiny_models.call(other, SD3, inputs, t, t / 3), expected)
        assert all(torch.equal(critic[n], p) and p.requires_grad for n, p in critic_parameters(other))
        exported = load_file(anyflow.export_lora(model, tmp_path / "lora"))
        assert exported and not any(CRITIC in key for key in exported)

    @pytest.mark.parametrize("saved", [{"target_mode": "linear"}, {"onpolicy_forward": "meanflow"}])
    def test_a_checkpoint_of_another_mode_changes_nothing(self, saved: dict[str, Any], tmp_path: Path) -> None:
        _, other = make(**saved)
        other.streams.draws = 5
        other.on_save_checkpoint(3, tmp_path)
        model, distiller = make()
        before = weights(model)
        with pytest.raises(ValueError, match=r"_mode='(linear|meanflow)', this distiller has"):
            distiller.on_load_checkpoint(tmp_path)
        assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
        assert distiller.streams.draws == 0

    def test_a_checkpoint_of_another_critic_changes_nothing(self, tmp_path: Path) -> None:
        model = protocol.student(SD3)
        anyflow.add_critic(model, LoraConfig(r=2, target_modules=["to_q"]))
        AnyFlowDistiller(model, config=CONFIG).on_save_checkpoint(3, tmp_path)
        model, distiller = make()
        before = weights(model)
        with pytest.raises(ValueError, match="another critic"):
            distiller.on_load_checkpoint(tmp_path)
        assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())

    def test_all_of_it_comes_back(self, tmp_path: Path) -> None:
        model, distiller = make()
        for step in range(3):
            distiller.training_step(protocol.batch_for(SD3, seed=step))
        distiller.on_save_checkpoint(3, tmp_path)
        after = [distiller.training_step(protocol.batch_for(SD3, seed=step))[0] for step in (3, 4)]
        other, resumed = make()
        tiny_models.move_critic(other, 1.0)
        assert resumed.on_load_checkpoint(tmp_path) == 3
        again = [resumed.training_step(protocol.batch_for(SD3, seed=step))[0] for step in (3, 4)]
        assert all(torch.equal(a, b) for a, b in zip(after, again, strict=True))
        assert all(
            torch.equal(a, b) for (_, a), (_, b) in zip(critic_parameters(model), critic_parameters(other), strict=True)
        )

    def test_twenty_steps_killed_and_resumed(self, tmp_path: Path) -> None:
        """A run of 20 steps; one that is killed in step 14 and goes on from its checkpoint of step 10."""
        whole = self.run(tmp_path / "whole", "20", "never")
        assert self.run(tmp_path / "killed", "20", "14") == -signal.SIGKILL and whole == 0
        assert not (tmp_path / "killed" / "final.safetensors").exists()
        assert self.run(tmp_path / "killed", "20", "never") == 0
        expected, got = (load_file(tmp_path / run / "final.safetensors") for run in ("whole", "killed"))
        assert expected.keys() == got.keys() and any(CRITIC in key for key in expected)
        start = weights(make()[0])
        assert all(torch.equal(expected[key], got[key]) for key in expected)
        assert sum(not torch.equal(expected[key], start[key]) for key in start) >= 20

    @staticmethod
    def run(folder: Path, steps: str, killed_at: str) -> int:
        code = "import sys, test_onpolicy; test_onpolicy.resumable_run(*sys.argv[1:])"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        command = [sys.executable, "-c", code, str(folder), steps, killed_at]
        return subprocess.run(command, env=environment, capture_output=True, timeout=200, check=False).returncode


def resumable_run(folder: str, steps: str, killed_at: str) -> None:
    """A trainer: everything of the student's optimizer is its own, all else the distiller's; saves at step 10."""
    path = Path(folder)
    model, distiller = make(onpolicy_forward="meanflow", fuse_guidance_scale=1.0)
    named = distiller.trainable_parameters()
    optimizer = torch.optim.AdamW([p for _, p in named], lr=1e-3)
    first = 0
    if (path / "optimizer.safetensors").exists():
        first = distiller.on_load_checkpoint(path)
        for key, value in load_file(path / "optimizer.safetensors").items():
            kind, _, name = key.partition(":")
            optimizer.state[dict(named)[name]][kind] = value
    for step in range(first, int(steps)):
        loss, _ = distiller.training_step(protocol.batch_for(SD3, seed=step))
        loss.backward()
        if str(step) == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        optimizer.zero_grad()
        if step == 9 and killed_at != "never":
            distiller.on_save_checkpoint(10, path)
            state = {f"{k}:{name}": v for name, p in named for k, v in optimizer.state[p].items()}
            save_file(state, path / "optimizer.safetensors")
    path.mkdir(exist_ok=True)
    save_file(weights(model), path / "final.safetensors")
