"""Any-step sampling: stock pipelines driven by the schedule, against a plain loop over the patched model."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import tiny_pipelines
import torch
from diffusers import (
    DDIMScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

import anyflow
from anyflow import AnyFlowDistiller, AnyStepScheduler, any_step
from anyflow.families import find_spec
from anyflow.patching.unwrap import denoisers
from anyflow.time import shift_sigma

PIPELINES = [*tiny_pipelines.STOCK, *tiny_pipelines.VARIANTS]
PIPELINES = [name for name in PIPELINES if "epsilon" not in name]


def patched(name: str, dtype: torch.dtype = torch.float32) -> Any:
    pipe = tiny_pipelines.build_pipeline(name)
    if dtype != torch.float32:
        pipe.to(dtype)
    anyflow.patch(pipe, gate_value=0.5)
    with torch.no_grad():
        for index, (_, parameter) in enumerate(anyflow.delta_parameters(pipe)):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter += 0.3 * parameter.std().nan_to_num(1.0) * noise.to(parameter.dtype)
    return pipe


def record_times(pipe: Any) -> list[tuple[Tensor, Tensor]]:
    """(t, r) as the embedder gets them, once for each model call, in sigma."""
    (model,) = denoisers(pipe)
    spec = model._flowmap.spec
    seen: list[tuple[Tensor, Tensor]] = []
    embedder = model.get_submodule(spec.sites[0].embedder)

    def note(module: Any, _: Any) -> None:
        times = module._flowmap_call.times[0]
        seen.append(tuple(spec.sigma(time.double() / spec.sites[0].pre_scale) for time in (times.t, times.r)))

    embedder.register_forward_pre_hook(note)
    return seen


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", PIPELINES)
class TestPipelines:
    def test_n_steps_are_n_calls_on_consecutive_intervals(self, name: str, steps: int) -> None:
        pipe = patched(name)
        seen = record_times(pipe)
        with any_step(pipe):
            latents = tiny_pipelines.sample(pipe, name, steps=steps)
            sigmas = pipe.scheduler.sigmas.double()
        assert torch.isfinite(latents).all() and len(seen) == steps
        assert sigmas[0] == 1 and sigmas[-1] == 0
        for (t, r), sigma_t, sigma_r in zip(seen, sigmas[:-1], sigmas[1:], strict=True):
            # float32 times of a model whose argument is up to 1000: half an ulp of 1000 is 3e-5.
            moving = t.flatten() > 0 if "tokenwise" in name else torch.ones_like(t.flatten(), dtype=torch.bool)
            assert torch.allclose(t.flatten()[moving], sigma_t, atol=1e-7)
            assert torch.allclose(r.flatten()[moving], sigma_r, atol=1e-7)

    def test_everything_comes_back(self, name: str, steps: int) -> None:
        pipe = patched(name)
        scheduler, (model,) = pipe.scheduler, denoisers(pipe)
        config = dict(pipe.config)
        with any_step(pipe):
            tiny_pipelines.sample(pipe, name, steps=steps)
        assert pipe.scheduler is scheduler and model._flowmap_schedule is None and dict(pipe.config) == config

        class Stop(Exception):
            pass

        def stop(*_: Any) -> None:
            raise Stop

        def interrupted() -> None:
            with any_step(pipe):
                tiny_pipelines.sample(pipe, name, steps=2, callback_on_step_end=stop)

        with pytest.raises(Stop):
            interrupted()
        assert pipe.scheduler is scheduler and model._flowmap_schedule is None


@pytest.mark.parametrize("name", ["WanPipeline", "FluxPipeline", "StableDiffusion3Pipeline", "ZImagePipeline"])
def test_pipeline_equals_a_plain_loop(name: str) -> None:
    """x_r = x_t - (sigma_t - sigma_r) u, with the model called directly on what the pipeline gave it."""
    pipe = patched(name)
    (model,) = denoisers(pipe)
    spec = find_spec(type(model).__name__)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    model.register_forward_pre_hook(lambda _, a, k: calls.append((a, k)), with_kwargs=True)
    with any_step(pipe):
        result = tiny_pipelines.sample(pipe, name, steps=3)
        sigmas = pipe.scheduler.sigmas
    captured = list(calls)
    names = [spec.sample_arg, spec.timestep_arg]

    def arguments(index: int) -> dict[str, Any]:
        positional, keywords = captured[index]
        import inspect

        parameters = list(inspect.signature(model.forward).parameters)
        return {**dict(zip(parameters, positional, strict=False)), **keywords}

    x = arguments(0)[names[0]]
    x = torch.stack(list(x)) if spec.sample_layout == "list" else x
    for index in range(3):
        kwargs = {**arguments(index), "return_dict": False}
        batch = x.shape[0]
        t, r = (spec.model_time(s).expand(batch) for s in sigmas[index : index + 2])
        kwargs[names[0]] = list(x) if spec.sample_layout == "list" else x
        kwargs[names[1]] = t
        with torch.no_grad():
            u = model(**kwargs, r_timestep=r)[0]
        u = torch.stack(list(u)) if spec.sample_layout == "list" else u
        x = x - (sigmas[index] - sigmas[index + 1]) * spec.prediction_sign * u
    result = result.unsqueeze(2) if spec.sample_layout == "list" and result.ndim == 4 else result
    assert torch.allclose(x.reshape(-1).sort().values, result.float().reshape(-1).sort().values, atol=1e-5)


@pytest.mark.parametrize("name", PIPELINES)
def test_rounded_timesteps_do_not_reach_the_model(name: str) -> None:
    """bfloat16 pipelines round t; the schedule's float32 sigmas are what the embedder sees."""
    pipe = patched(name, torch.bfloat16)
    seen = record_times(pipe)
    with any_step(pipe):
        tiny_pipelines.sample(pipe, name, steps=3)
        sigmas = pipe.scheduler.sigmas.double()
    for (t, r), sigma_t, sigma_r in zip(seen, sigmas[:-1], sigmas[1:], strict=True):
        moving = t.flatten() > 0
        assert torch.allclose(t.flatten()[moving], sigma_t, atol=1e-7)
        assert torch.allclose(r.flatten()[moving], sigma_r, atol=1e-7)


@pytest.mark.parametrize("name", ["WanPipeline", "FluxPipeline", "StableDiffusion3Pipeline", "ZImagePipeline"])
def test_guidance_calls_share_the_interval(name: str) -> None:
    pipe = patched(name)
    seen = record_times(pipe)
    with any_step(pipe):
        tiny_pipelines.sample(pipe, name, steps=2, guidance=True)
    times = [(t.flatten()[0].item(), r.flatten()[0].item()) for t, r in seen]
    assert len(set(times)) == 2


def test_without_any_step_the_pipeline_is_stock() -> None:
    name = "StableDiffusion3Pipeline"
    stock = tiny_pipelines.sample(tiny_pipelines.build_pipeline(name), name)
    pipe = patched(name)
    assert torch.equal(tiny_pipelines.sample(pipe, name), stock)
    with any_step(pipe):
        tiny_pipelines.sample(pipe, name)
    assert torch.equal(tiny_pipelines.sample(pipe, name), stock)


def test_two_denoisers() -> None:
    pipe = tiny_pipelines.build_pipeline(
        "WanPipeline", transformer_2=tiny_models.build("WanTransformer3DModel", seed=1), boundary_ratio=0.5
    )
    anyflow.patch(pipe)
    with any_step(pipe):
        latents = tiny_pipelines.sample(pipe, "WanPipeline", steps=4)
    assert torch.isfinite(latents).all()
    assert all(model._flowmap_schedule is None for model in denoisers(pipe))


class TestScheduler:
    @pytest.mark.parametrize(
        ("stock", "shift"),
        [
            (FlowMatchEulerDiscreteScheduler(shift=3.0), 3.0),
            (FlowMatchHeunDiscreteScheduler(shift=2.0), 2.0),
            (FlowMapEulerDiscreteScheduler(shift=4.0), 4.0),
            (
                UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0),
                5.0,
            ),
        ],
        ids=lambda v: type(v).__name__,
    )
    @pytest.mark.parametrize("steps", [1, 2, 4, 50])
    def test_grid_has_the_shift_of_the_stock_scheduler_once(self, stock: Any, shift: float, steps: int) -> None:
        scheduler = AnyStepScheduler.like(stock)
        for _ in range(2):  # a second call gives the same
            scheduler.set_timesteps(steps)
            u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
            assert torch.allclose(scheduler.sigmas.double(), shift_sigma(u, shift), atol=1e-6)
            assert len(scheduler.timesteps) == steps and scheduler.sigmas[-1] == 0
            assert torch.equal(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])

    def test_set_shift_is_kept(self) -> None:
        stock = FlowMatchEulerDiscreteScheduler(shift=1.0)
        stock.set_shift(6.0)
        assert AnyStepScheduler.like(stock).shift == 6.0

    def test_step(self) -> None:
        scheduler = AnyStepScheduler.like(FlowMatchEulerDiscreteScheduler())
        scheduler.set_timesteps(4)
        x, u = torch.randn(2, 3), torch.randn(2, 3)
        following = scheduler.step(u, scheduler.timesteps[0], x, return_dict=False)[0]
        assert torch.allclose(following, x - 0.25 * u, atol=1e-7)

    def test_r_timestep_for(self) -> None:
        scheduler = AnyStepScheduler.like(FlowMatchEulerDiscreteScheduler(shift=3.0))
        with pytest.raises(RuntimeError, match="set_timesteps"):
            scheduler.r_timestep_for(500.0)
        scheduler.set_timesteps(4)
        expected = torch.cat([scheduler.timesteps[1:], torch.zeros(1)])
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            assert torch.equal(scheduler.r_timestep_for(scheduler.timesteps.to(dtype)), expected)
        assert scheduler.r_timestep_for(scheduler.timesteps[-1]).item() == 0.0
        assert scheduler.r_timestep_for(scheduler.timesteps[:1].expand(5)).shape == (5,)
        with pytest.raises(ValueError, match=r"640\.0 is not on the schedule"):
            scheduler.r_timestep_for(640.0)

    def test_mid_schedule_start(self) -> None:
        model = tiny_models.build("SD3Transformer2DModel")
        anyflow.patch(model)
        scheduler = AnyStepScheduler.like(FlowMatchEulerDiscreteScheduler(), [model])
        scheduler.set_timesteps(4)
        scheduler.set_begin_index(2)
        assert [s.item() for s in model._flowmap_schedule[:2]] == [0.5, 0.25]
        scheduler.step(torch.zeros(1), scheduler.timesteps[2], torch.zeros(1))
        assert [s.item() for s in model._flowmap_schedule[:2]] == [0.25, 0.0]
        scheduler.step(torch.zeros(1), scheduler.timesteps[3], torch.zeros(1))
        assert model._flowmap_schedule is None

    def test_a_start_that_was_not_announced_raises(self) -> None:
        model = tiny_models.build("SD3Transformer2DModel")
        anyflow.patch(model)
        scheduler = AnyStepScheduler.like(FlowMatchEulerDiscreteScheduler(), [model])
        scheduler.set_timesteps(4)
        with pytest.raises(RuntimeError, match=r"index 2.*index 0"):
            scheduler.step(torch.zeros(1), scheduler.timesteps[2], torch.zeros(1))

    def test_no_steps(self) -> None:
        with pytest.raises(ValueError, match="at least 1"):
            AnyStepScheduler.like(FlowMatchEulerDiscreteScheduler()).set_timesteps(0)


class TestRefusals:
    def test_unpatched_pipeline(self) -> None:
        with pytest.raises(ValueError, match="not patched"), any_step(tiny_pipelines.build_pipeline("FluxPipeline")):
            pass

    def test_model_instead_of_pipeline(self) -> None:
        with pytest.raises(TypeError, match="takes a pipeline"), any_step(torch.nn.Identity()):
            pass

    def test_epsilon_pipeline(self) -> None:
        pipe = tiny_pipelines.build_pipeline("StableDiffusionXLPipeline:epsilon")
        anyflow.patch(pipe)
        with pytest.raises(ValueError, match="epsilon"), any_step(pipe):
            pass

    @pytest.mark.parametrize("scheduler", [DDIMScheduler(), FlowMatchEulerDiscreteScheduler(invert_sigmas=True)])
    def test_schedulers_that_are_not_noise_to_data_flows(self, scheduler: Any) -> None:
        with pytest.raises(ValueError, match=r"not a flow-matching|invert_sigmas"):
            AnyStepScheduler.like(scheduler)


def test_validation_scheduler_of_the_distiller() -> None:
    """The trainer gives the distiller's scheduler to its own pipeline: the live student samples with r."""
    name = "StableDiffusion3Pipeline"
    pipe = patched(name)
    with any_step(pipe):
        expected = tiny_pipelines.sample(pipe, name, steps=2)
    distiller = AnyFlowDistiller(
        pipe.transformer, noise_scheduler=pipe.scheduler, config={"target_mode": "linear", "gate_value": 0.5}
    )
    pipe.scheduler = distiller.get_scheduler()
    assert torch.equal(tiny_pipelines.sample(pipe, name, steps=2), expected)
    assert pipe.transformer._flowmap_schedule is None
