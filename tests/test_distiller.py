"""What a trainer talks to: targets through real models, both kinds of teacher, logs, and every refusal."""

from __future__ import annotations

import enum
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
import zoo
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import anyflow
from anyflow import AnyFlowDistiller
from anyflow.families import find_spec

NAMES = [name for name in tiny_models.NAMES if name != "WanTransformer3DModel:tokenwise"]
ONLINE = {"teacher_rollout_steps": 4}
SD3 = "SD3Transformer2DModel"


def latents_of(name: str, batch: int = 2) -> tuple[str, Tensor]:
    spec = find_spec(name.partition(":")[0])
    value = tiny_models.inputs(name, batch=batch)[spec.sample_arg]
    return spec.sample_arg, value if isinstance(value, Tensor) else torch.stack(value).squeeze(2)


def batch_for(name: str, sigmas: Any = (0.9, 0.4), seed: int = 0) -> dict[str, Any]:
    sample_arg, latents = latents_of(name)
    conditioning = {k: v for k, v in tiny_models.inputs(name, seed=seed).items() if k != sample_arg}
    conditioning.pop("return_dict", None)
    return {
        "latents": latents,
        "noise": torch.randn(latents.shape, generator=torch.Generator().manual_seed(7)),
        "sigmas": sigmas if isinstance(sigmas, Tensor) else torch.tensor(sigmas),
        "conditioning": conditioning,
    }


def student(name: str, kind: str = "add_adapter", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = tiny_models.build(name, dtype=dtype)
    model.requires_grad_(False)
    anyflow.patch(model)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    if kind == "get_peft_model":
        return get_peft_model(model, config)
    model.add_adapter(config)
    return model


def oracle(
    name: str, batch: dict[str, Any], r: Tensor, steps: int, guidance: float = 1.0, negative: Any = None
) -> Tensor:
    """1/N sum_k v(x_k, s_k) along the Euler path, in float64 with the pristine model's own velocities."""
    spec = find_spec(name.partition(":")[0])
    model = tiny_models.build(name)
    sigma = batch["sigmas"].double()
    column = (-1,) + (1,) * (batch["latents"].ndim - 1)
    s0 = batch["sigmas"].reshape(column)
    x = ((1 - s0) * batch["latents"] + s0 * batch["noise"]).double()
    total = torch.zeros_like(x)

    def velocity(x: Tensor, s: Tensor, conditioning: Any) -> Tensor:
        latents: Any = x.float()
        if spec.sample_layout == "list":
            latents = list(latents.unsqueeze(2).unbind(0))
        inputs = {**conditioning, spec.sample_arg: latents}
        with torch.no_grad():
            out = tiny_models.call(model, name, inputs, spec.model_time(s).float())
        out = out.squeeze(2) if spec.sample_layout == "list" else out
        return spec.prediction_sign * out.double()

    for k in range(steps):
        s, following = (sigma + (j / steps) * (r.double() - sigma) for j in (k, k + 1))
        v = velocity(x, s, batch["conditioning"])
        if negative is not None:
            v_u = velocity(x, s, negative)
            v = v_u + guidance * (v - v_u)
        total += v / steps
        x = x + (following - s).reshape(column) * v
    return spec.prediction_sign * total  # in the model's own sign


@pytest.mark.parametrize("name", NAMES)
class TestOnlineTeacher:
    def test_target_is_the_average_velocity_of_the_base_model(self, name: str) -> None:
        model = student(name)
        distiller = AnyFlowDistiller(model, config=ONLINE)
        batch = {**batch_for(name), "r_sigmas": torch.tensor([0.3, 0.0])}
        prepared = distiller.prepare_batch(batch)
        expected = oracle(name, batch, batch["r_sigmas"], 4)
        # The network itself runs in float32 on both sides, from states that differ by a rounding.
        assert torch.allclose(prepared["target"].double(), expected, atol=1e-5, rtol=1e-5)
        assert prepared["target"] is prepared["flow_target"]
        spec = find_spec(name.partition(":")[0])
        assert torch.equal(prepared["flowmap_r_timesteps"], spec.model_time(batch["r_sigmas"]))
        assert torch.equal(prepared["timesteps"], spec.model_time(batch["sigmas"]))
        assert torch.equal(prepared["anyflow_r_timesteps"], prepared["flowmap_r_timesteps"])
        assert torch.allclose(prepared["anyflow_timestep_interval"], torch.tensor([0.6, 0.4]))

    def test_guided(self, name: str) -> None:
        model = student(name)
        distiller = AnyFlowDistiller(model, config={**ONLINE, "teacher_guidance_scale": 2.5})
        batch = {**batch_for(name), "r_sigmas": torch.tensor([0.3, 0.0])}
        negative = batch_for(name, seed=5)["conditioning"]
        prepared = distiller.prepare_batch({**batch, "negative_conditioning": negative})
        expected = oracle(name, batch, batch["r_sigmas"], 4, 2.5, negative)
        assert torch.allclose(prepared["target"].double(), expected, atol=3e-5, rtol=3e-5)
        with pytest.raises(ValueError, match=r"teacher_guidance_scale=2\.5 needs negative_conditioning"):
            distiller.prepare_batch(batch)

    @pytest.mark.parametrize("kind", ["add_adapter", "get_peft_model"])
    def test_training_reduces_the_loss(self, name: str, kind: str) -> None:
        model = student(name, kind)
        distiller = AnyFlowDistiller(model, config=ONLINE)
        optimizer = torch.optim.Adam([p for _, p in distiller.trainable_parameters()], lr=3e-3)
        batch = {**batch_for(name), "r_sigmas": torch.tensor([0.3, 0.0])}
        losses = []
        for _ in range(8):
            loss, logs = distiller.training_step(batch)
            loss.backward()
            assert all(p.grad is not None for _, p in anyflow.delta_parameters(model))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert set(logs) == {"anyflow_loss", "anyflow_timestep", "anyflow_r_timestep", "anyflow_interval"}
        assert not any(value.requires_grad for value in logs.values())

    def test_the_batch_is_not_changed(self, name: str) -> None:
        distiller = AnyFlowDistiller(student(name), config=ONLINE)
        batch = batch_for(name)
        keys, latents = set(batch), batch["latents"].clone()
        distiller.prepare_batch(batch)
        assert set(batch) == keys and torch.equal(batch["latents"], latents)


@pytest.mark.parametrize("name", NAMES)
def test_linear_target_has_the_models_sign(name: str) -> None:
    distiller = AnyFlowDistiller(student(name), config={"target_mode": "linear"})
    batch = batch_for(name)
    target = distiller.prepare_batch(batch)["target"]
    sign = find_spec(name.partition(":")[0]).prediction_sign
    assert torch.equal(target, sign * (batch["noise"] - batch["latents"]))


def test_logs_are_in_sigma() -> None:
    distiller = AnyFlowDistiller(student("ZImageTransformer2DModel"), config={"target_mode": "linear"})
    prepared = distiller.prepare_batch(
        {**batch_for("ZImageTransformer2DModel", (0.8, 0.8)), "r_sigmas": torch.tensor([0.3, 0.3])}
    )
    assert torch.allclose(prepared["timesteps"], torch.tensor(0.2)) and torch.allclose(
        prepared["flowmap_r_timesteps"], torch.tensor(0.7)
    )
    _, logs = distiller.compute_distill_loss(prepared, prepared["target"])
    assert logs["anyflow_interval"].item() == pytest.approx(0.5)
    assert logs["anyflow_timestep"].item() == pytest.approx(0.8)
    assert logs["anyflow_loss"].item() == 0.0


def test_a_time_that_runs_backwards_is_told_in_training_rollout_and_sampling() -> None:
    """sigma 0.8 and 0.3 are t = 0.2 and r = 0.7 for Z-Image, for teacher, student and sampler."""
    name = "ZImageTransformer2DModel"
    model, told = student(name), []
    model.register_forward_pre_hook(lambda _, a, k: told.append((k["t"], k.get("r_timestep"))), with_kwargs=True)
    distiller = AnyFlowDistiller(
        model, config={"teacher_rollout_steps": 2}, noise_scheduler=FlowMatchEulerDiscreteScheduler()
    )
    _, logs = distiller.training_step({**batch_for(name, (0.8, 0.8)), "r_sigmas": torch.tensor([0.3, 0.3])})
    assert logs["anyflow_interval"].item() == pytest.approx(0.5)
    for (t, r), (sigma, below) in zip(told, [(0.8, None), (0.55, None), (0.8, 0.3)], strict=True):
        assert torch.allclose(t, torch.tensor(1 - sigma))
        assert (r is None) == (below is None) and (r is None or torch.allclose(r, torch.tensor(0.7)))

    embedder = model.get_submodule(find_spec(name).sites[0].embedder)
    embedded: list[Any] = []
    embedder.register_forward_pre_hook(lambda e, _: embedded.append(e._flowmap_call.times[0]))
    scheduler = distiller.get_scheduler()
    scheduler.set_timesteps(sigmas=[0.8, 0.3])
    with torch.no_grad():  # as its pipeline calls it: the time of the step, and no r
        tiny_models.call(model, name, tiny_models.inputs(name), (1000 - scheduler.timesteps[:1].expand(2)) / 1000)
    # The embedder takes 1000 t.
    assert torch.allclose(embedded[0].t / 1000, torch.tensor(0.2)) and torch.allclose(
        embedded[0].r / 1000, torch.tensor(0.7)
    )


@pytest.mark.parametrize("mode", ["linear", "meanflow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_noise_is_mixed_at_the_sigma_that_the_model_is_told(dtype: torch.dtype, mode: str) -> None:
    """At times that bfloat16 does not hold, in a bfloat16 model under autocast."""
    sigmas = torch.tensor([0.937, 0.833, 0.75, 0.99839, 0.978261])
    distiller = AnyFlowDistiller(
        student(SD3, dtype=torch.bfloat16),
        config={"target_mode": mode, "schedule_shift": 1.0, "fuse_guidance_scale": 1.0},
    )
    inputs = tiny_models.inputs(SD3, batch=5, dtype=torch.bfloat16)
    latents = torch.randn(5, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    noise = torch.randn(5, 4, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    conditioning = {key: value for key, value in inputs.items() if key != "hidden_states"}
    batch = {"latents": latents, "noise": noise, "sigmas": sigmas, "r_sigmas": sigmas / 2}
    with torch.autocast("cpu", torch.bfloat16):
        prepared = distiller.prepare_batch({**batch, "conditioning": conditioning})
    assert torch.equal(prepared["timesteps"], 1000 * sigmas) and prepared["timesteps"].dtype == torch.float32
    s = sigmas.double().reshape(-1, 1, 1, 1)
    exact = (1 - s) * latents.double() + s * noise.double()
    assert prepared["noisy_latents"].dtype == dtype
    if mode == "linear" and dtype == torch.float32:
        assert torch.allclose(prepared["noisy_latents"].double(), exact, rtol=0, atol=1e-6)
    else:  # Rounded once, from float32, for the model. Sigmas of 8 bits are off by 5e-4, and a tenth of these.
        assert (prepared["noisy_latents"] != exact.bfloat16()).double().mean() < 2e-3


@pytest.mark.parametrize("form", ["tensor", "dict", "tuple", "output"])
def test_loss(form: str) -> None:
    distiller = AnyFlowDistiller(student(SD3), config={"target_mode": "linear", "loss_weight": 2.0})
    prepared = distiller.prepare_batch(batch_for(SD3))
    prediction = (prepared["target"] + 3).to(torch.bfloat16).requires_grad_()
    output: Any = {
        "tensor": prediction,
        "dict": {"model_prediction": prediction},
        "tuple": (prediction,),
        "output": SimpleNamespace(sample=prediction),
    }[form]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = distiller.compute_distill_loss(prepared, output, torch.tensor(5.0))
    expected = 2 * (prediction.double() - prepared["target"].double()).square().mean()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert prediction.grad is not None
    with pytest.raises(ValueError, match="shape"):
        distiller.compute_distill_loss(prepared, prediction[:1])


@pytest.mark.parametrize("sampler", ["uniform", "zero"])
def test_r_is_drawn_from_a_private_stream(sampler: str) -> None:
    draws = []
    for noise in (0, 3):
        distiller = AnyFlowDistiller(student(SD3), config={"target_mode": "linear", "r_timestep_sampler": sampler})
        torch.manual_seed(noise)
        draws.append([distiller.prepare_batch(batch_for(SD3))["anyflow_r_sigmas"] for _ in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))
    if sampler == "zero":
        assert not draws[0][0].any()
    else:
        assert not torch.equal(draws[0][0], draws[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sampler", ["uniform", "zero"])
def test_times_next_to_zero(sampler: str, dtype: torch.dtype) -> None:
    """Intervals of no length to speak of: nothing is divided by them, and the target is the velocity there."""
    distiller = AnyFlowDistiller(student(SD3), config={**ONLINE, "r_timestep_sampler": sampler})
    sigmas = torch.tensor([1e-8, 0.01], dtype=dtype)
    for _ in range(5):
        prepared = distiller.prepare_batch(batch_for(SD3, sigmas))
        sigma, r = prepared["anyflow_sigmas"], prepared["anyflow_r_sigmas"]
        assert sigma.dtype == r.dtype == torch.float32 and torch.equal(sigma, sigmas.float())
        assert ((r >= 0) & (r <= 0.98 * sigma)).all()
        assert prepared["target"].isfinite().all()
    batch = {**batch_for(SD3, sigmas), "r_sigmas": sigmas * 0.5}
    instantaneous = oracle(SD3, {**batch, "sigmas": sigmas.float()}, sigmas.float(), 1)
    # Of the first sample, whose interval is 5e-9; the network's own rounding.
    assert torch.allclose(distiller.prepare_batch(batch)["target"][0].double(), instantaneous[0], atol=1e-5)


@pytest.mark.parametrize("mode", ["online_teacher", "linear"])
def test_ranks_of_one_context_parallel_group_draw_one_r(mode: str) -> None:
    """Four processes, two for each sample."""
    groups = [
        AnyFlowDistiller(student(SD3), config={**ONLINE, "target_mode": mode}, dp_rank=rank // 2, dp_size=2)
        for rank in range(4)
    ]
    for _ in range(3):
        drawn = [distiller.prepare_batch(batch_for(SD3))["anyflow_r_sigmas"] for distiller in groups]
        assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[2], drawn[3])
        assert not torch.equal(drawn[0], drawn[2])


def test_separate_teacher_and_full_rank_student() -> None:
    teacher, full = tiny_models.build(SD3), tiny_models.build(SD3, seed=1)
    distiller = AnyFlowDistiller(teacher, student_model=full, config=ONLINE)
    assert anyflow.is_patched(full) and not anyflow.is_patched(teacher)
    batch = {**batch_for(SD3), "r_sigmas": torch.tensor([0.3, 0.0])}
    expected = oracle(SD3, batch, batch["r_sigmas"], 4)
    loss, _ = distiller.training_step(batch)
    loss.backward()
    assert torch.allclose(distiller.prepare_batch(batch)["target"].double(), expected, atol=1e-5, rtol=1e-5)
    assert len(distiller.trainable_parameters()) == len(list(full.parameters()))
    assert all(p.grad is None for p in teacher.parameters())


def test_teacher_cannot_be_a_full_rank_student() -> None:
    with pytest.raises(ValueError, match="no adapter to switch off"):
        AnyFlowDistiller(tiny_models.build(SD3), config=ONLINE)


def test_delta_is_trainable_although_peft_froze_it() -> None:
    model = student(SD3)
    assert not any(p.requires_grad for _, p in anyflow.delta_parameters(model))
    AnyFlowDistiller(model, config=ONLINE)
    assert all(p.requires_grad for _, p in anyflow.delta_parameters(model))


def test_configuration_and_patch_agree() -> None:
    model = student(SD3)
    anyflow.patch(model, gate_value=0.4, deltatime_type="t-r")
    assert AnyFlowDistiller(model, config=ONLINE).config.gate_value == 0.4
    distiller = AnyFlowDistiller(model, config={**ONLINE, "gate_value": 0.1})
    assert model._flowmap.gate_value == 0.1 and distiller.config.deltatime_type == "t-r"


def test_one_rollout_step_warns_once() -> None:
    with pytest.warns(UserWarning, match="teacher_rollout_steps=1"):
        AnyFlowDistiller(student(SD3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AnyFlowDistiller(student(SD3), config=ONLINE)
        AnyFlowDistiller(student(SD3), config={"target_mode": "linear"})


@pytest.mark.parametrize("name", ["CogView4Transformer2DModel", "GlmImageTransformer2DModel"])
def test_a_class_whose_pipeline_tells_times_from_before_the_shift_warns(name: str) -> None:
    with pytest.warns(UserWarning, match=f"pipeline of {name} tells its model the times from before the shift"):
        AnyFlowDistiller(zoo.build(name), zoo.build(name), config=ONLINE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wrapped_module_is_the_one_called(dtype: torch.dtype) -> None:
    model = student(SD3, dtype=dtype)
    distiller = AnyFlowDistiller(model, config=ONLINE)

    calls: list[dict[str, Any]] = []

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._orig_mod = module

        def forward(self, **kwargs: Any) -> Any:
            calls.append(kwargs)
            return self._orig_mod(**kwargs)

    batch = batch_for(SD3)
    batch["conditioning"] = {key: value.to(dtype) for key, value in batch["conditioning"].items()}
    prepared = distiller.prepare_batch(batch, model=Wrapper(model))
    assert len(calls) == 4 and not any("r_timestep" in call for call in calls)
    assert all(call["hidden_states"].dtype == dtype for call in calls)
    assert all(call["timestep"].dtype == torch.float32 for call in calls)
    assert prepared["target"].dtype == torch.float32


class TestTokens:
    name = "WanTransformer3DModel"

    def distiller(self) -> AnyFlowDistiller:
        return AnyFlowDistiller(student(self.name), config=ONLINE)

    def test_frames_equal_to_one_time_per_sample(self) -> None:
        distiller, batch = self.distiller(), {**batch_for(self.name), "r_sigmas": torch.tensor([0.3, 0.0])}
        plain = distiller.prepare_batch(batch)["target"]
        frames = batch["latents"].shape[2]
        for count in (frames, tiny_models.wan_tokens(tiny_models.inputs(self.name))):
            spread = {k: batch[k][:, None].repeat(1, count) for k in ("sigmas", "r_sigmas")}
            assert torch.allclose(distiller.prepare_batch({**batch, **spread})["target"], plain, atol=2e-5)
            loss, _ = distiller.training_step({**batch, **spread})
            assert torch.isfinite(loss)

    def test_clean_first_frame(self) -> None:
        sigmas = torch.tensor([[0.0, 0.9], [0.0, 0.4]])
        prepared = self.distiller().prepare_batch(batch_for(self.name, sigmas))
        assert torch.isfinite(prepared["target"]).all()
        tokens = prepared["timesteps"].shape[1]
        assert not prepared["timesteps"][:, : tokens // 2].any()
        assert torch.equal(prepared["flowmap_r_timesteps"][:, : tokens // 2], prepared["timesteps"][:, : tokens // 2])
        assert torch.equal(prepared["noisy_latents"][:, :, 0], batch_for(self.name)["latents"][:, :, 0])

    def test_wrong_shape_names_it(self) -> None:
        with pytest.raises(ValueError, match=r"\[2, 3\] do not fit.*\[2, 2\] \(frame\), \[2, 32\] \(token\)"):
            self.distiller().prepare_batch(batch_for(self.name, torch.full((2, 3), 0.5)))
        with pytest.raises(ValueError, match=r"\[3\] do not fit"):
            self.distiller().prepare_batch(batch_for(self.name, torch.full((3,), 0.5)))


class Prediction(enum.Enum):
    FLOW_MATCHING = "flow_matching"
    EPSILON = "epsilon"


class Trainer:
    """The protocol of existing trainers, on a tiny SD3."""

    PREDICTION_TYPE: Any = Prediction.FLOW_MATCHING

    def __init__(self, model: nn.Module, **config: Any) -> None:
        self.model, self.config = model, SimpleNamespace(**config)
        self.seen: list[dict[str, Any]] = []

    def get_trained_component(self) -> nn.Module:
        return self.model

    def model_predict(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        self.seen.append(batch)
        keys = ("encoder_hidden_states", "pooled_projections")
        r = batch.get("flowmap_r_timesteps")
        extra = {} if r is None else {"r_timestep": r}
        output = self.model(
            batch["noisy_latents"],
            timestep=batch["timesteps"],
            **{k: batch[k] for k in keys},
            **extra,
            return_dict=False,
        )
        return {"model_prediction": output[0]}


def trainer_batch() -> dict[str, Any]:
    batch = batch_for(SD3)
    s = batch["sigmas"].reshape(-1, 1, 1, 1)
    noisy = (1 - s) * batch["latents"] + s * batch["noise"]
    return {**batch, **batch.pop("conditioning"), "noisy_latents": noisy, "timesteps": 1000 * batch["sigmas"]}


class TestTrainerProtocol:
    def test_equals_the_bare_model(self) -> None:
        trainer = Trainer(student(SD3), lora_type="standard")
        distiller = AnyFlowDistiller(trainer, config=ONLINE)
        batch = {**trainer_batch(), "r_sigmas": torch.tensor([0.3, 0.0])}
        prepared = distiller.prepare_batch(batch, model=trainer.model, state={"global_step": 3})
        assert len(trainer.seen) == 4 and not any("flowmap_r_timesteps" in seen for seen in trainer.seen)
        bare = {**batch_for(SD3), "r_sigmas": batch["r_sigmas"]}
        assert torch.allclose(prepared["target"].double(), oracle(SD3, bare, batch["r_sigmas"], 4), atol=1e-5)
        loss, _ = distiller.compute_distill_loss(prepared, trainer.model_predict(prepared), torch.zeros(()))
        loss.backward()
        assert torch.equal(trainer.seen[-1]["flowmap_r_timesteps"], 1000 * batch["r_sigmas"])
        assert all(p.grad is not None for _, p in anyflow.delta_parameters(trainer.model))

    def test_guided_with_the_prompt_replaced(self) -> None:
        trainer = Trainer(student(SD3))
        distiller = AnyFlowDistiller(trainer, config={**ONLINE, "teacher_guidance_scale": 2.0})
        negative = batch_for(SD3, seed=5)["conditioning"]
        batch = {**trainer_batch(), "r_sigmas": torch.tensor([0.3, 0.0]), "negative_conditioning": negative}
        prepared = distiller.prepare_batch(batch)
        bare = {**batch_for(SD3), "r_sigmas": batch["r_sigmas"]}
        expected = oracle(SD3, bare, batch["r_sigmas"], 4, 2.0, negative)
        assert torch.allclose(prepared["target"].double(), expected, atol=2e-5)
        for seen in trainer.seen[1::2]:
            assert all(seen[key] is negative[key] for key in negative)

    @pytest.mark.parametrize("mode", ["online_teacher", "meanflow"])
    def test_no_tensor_of_the_prompt_is_left_without_it(self, mode: str) -> None:
        """A mask that the negative prompt has not, and what is nested, are in no unconditional call."""
        trainer = Trainer(student(SD3))
        config = {**ONLINE, "teacher_guidance_scale": 2.0, "fuse_guidance_scale": 3.0, "schedule_shift": 1.0}
        distiller = AnyFlowDistiller(trainer, config={**config, "target_mode": mode})
        negative = batch_for(SD3, seed=5)["conditioning"]
        nested = {"text_embeds": torch.zeros(2, 3), "time_ids": torch.ones(2, 6)}
        negative["added_cond_kwargs"] = {"text_embeds": torch.ones(2, 3), "time_ids": torch.ones(2, 6)}
        batch = {**trainer_batch(), "encoder_attention_mask": torch.ones(2, 12), "added_cond_kwargs": nested}
        prompt = ("encoder_hidden_states", "pooled_projections", "encoder_attention_mask", "added_cond_kwargs")
        distiller.prepare_batch({**batch, "r_sigmas": torch.tensor([0.3, 0.0]), "negative_conditioning": negative})
        conditional = [seen for seen in trainer.seen if seen["encoder_hidden_states"] is batch[prompt[0]]]
        others = [seen for seen in trainer.seen if seen["encoder_hidden_states"] is negative[prompt[0]]]
        assert (len(conditional), len(others)) == ((4, 4) if mode == "online_teacher" else (2, 1))
        assert all(seen[key] is batch[key] for seen in conditional for key in prompt)
        assert all("encoder_attention_mask" not in seen for seen in others)
        assert all(seen[key] is negative[key] for seen in others for key in negative)
        assert set(nested) == {"text_embeds", "time_ids"} and not nested["text_embeds"].any()

    def test_own_conversions(self) -> None:
        """A trainer whose model predicts x0 - noise, and says so itself."""
        model = student(SD3)

        class Reversed(Trainer):
            def model_predict(self, batch: dict[str, Any]) -> dict[str, Tensor]:
                return {"model_prediction": -super().model_predict(batch)["model_prediction"]}

            def prediction_to_noiseward_flow(self, prediction: Tensor) -> Tensor:
                return -prediction

            def noiseward_flow_to_prediction(self, flow: Tensor) -> Tensor:
                return -flow

        batch = {**trainer_batch(), "r_sigmas": torch.tensor([0.3, 0.0])}
        plain = AnyFlowDistiller(Trainer(model), config=ONLINE).prepare_batch(batch)["target"]
        reverse = AnyFlowDistiller(Reversed(model), config=ONLINE).prepare_batch(batch)["target"]
        assert torch.equal(reverse, -plain)

    def test_timestep_scale(self) -> None:
        distiller = AnyFlowDistiller(Trainer(student(SD3)), config={**ONLINE, "timestep_scale": 1.0})
        assert torch.equal(distiller.prepare_batch(trainer_batch())["timesteps"], torch.tensor([0.9, 0.4]))

    @pytest.mark.parametrize("kind", [Prediction.EPSILON, "epsilon", "v_prediction", "sample"])
    def test_other_predictions_are_refused(self, kind: Any) -> None:
        trainer = Trainer(student(SD3))
        trainer.PREDICTION_TYPE = kind
        with pytest.raises(ValueError, match=str(getattr(kind, "value", kind))):
            AnyFlowDistiller(trainer, config=ONLINE)

    def test_text_encoder_training_is_refused(self) -> None:
        with pytest.raises(ValueError, match="train_text_encoder"):
            AnyFlowDistiller(Trainer(student(SD3), train_text_encoder=True), config=ONLINE)

    def test_lycoris_needs_its_network(self) -> None:
        with pytest.raises(ValueError, match="_lycoris_wrapped_network"):
            AnyFlowDistiller(Trainer(student(SD3), lora_type="lycoris"), config=ONLINE)


class TestRefusals:
    def distiller(self) -> AnyFlowDistiller:
        return AnyFlowDistiller(student(SD3), config={"target_mode": "linear"})

    def test_epsilon_scheduler(self) -> None:
        with pytest.raises(ValueError, match="epsilon"):
            AnyFlowDistiller(student(SD3), noise_scheduler=DDPMScheduler(), config=ONLINE)

    def test_unpatchable_model(self) -> None:
        with pytest.raises(ValueError, match="FamilySpec"):
            AnyFlowDistiller(nn.Linear(2, 2), config=ONLINE)

    @pytest.mark.parametrize("key", ["latents", "noise", "sigmas", "conditioning"])
    def test_missing_key(self, key: str) -> None:
        batch = batch_for(SD3)
        del batch[key]
        with pytest.raises(ValueError, match=f"the batch lacks {key}"):
            self.distiller().prepare_batch(batch)

    @pytest.mark.parametrize(
        ("sigmas", "r", "message"),
        [
            ((float("nan"), 0.5), None, "finite.*nan"),
            ((1.5, 0.5), None, r"\[0, 1\].*1\.5"),
            ((-0.1, 0.5), None, r"\[0, 1\].*-0\.1"),
            ((0.0, 0.5), None, "time 0"),
            ((0.5, 0.4), (0.5, 0.1), "below t"),
            ((0.5, 0.4), (0.6, 0.1), "below t"),
            ((0.5, 0.4), (-0.1, 0.1), "r must be"),
            ((0.5, 0.4), (float("nan"), 0.1), "r must be"),
        ],
    )
    def test_bad_times(self, sigmas: Any, r: Any, message: str) -> None:
        batch = batch_for(SD3, sigmas)
        if r is not None:
            batch["r_sigmas"] = torch.tensor(r)
        with pytest.raises(ValueError, match=message):
            self.distiller().prepare_batch(batch)

    def test_mixed_devices(self) -> None:
        with pytest.raises(ValueError, match="meta"):
            self.distiller().prepare_batch({**batch_for(SD3), "noise": batch_for(SD3)["noise"].to("meta")})

    def test_shapes(self) -> None:
        with pytest.raises(ValueError, match="noise has shape"):
            self.distiller().prepare_batch({**batch_for(SD3), "noise": torch.zeros(1)})


def test_get_scheduler_takes_the_shift() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    distiller = AnyFlowDistiller(student(SD3), noise_scheduler=scheduler, config=ONLINE)
    assert distiller.get_scheduler().shift == 3.0
    assert distiller.get_scheduler(FlowMatchEulerDiscreteScheduler(shift=5.0)).shift == 5.0
    with pytest.raises(ValueError, match="needs a scheduler"):
        AnyFlowDistiller(student(SD3), config=ONLINE).get_scheduler()
