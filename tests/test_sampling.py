"""Any-step sampling: stock pipelines driven by the schedule, against a plain loop over the patched model."""

from __future__ import annotations

import copy
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
from tiny_models import perturb_delta
from torch import Tensor

import anyflow
from anyflow import AnyFlowDistiller, AnyStepScheduler, any_step
from anyflow.families import find_spec
from anyflow.patching.times import Schedule, next_on_grid, scheduled_times
from anyflow.patching.unwrap import denoisers
from anyflow.time import shift_sigma, sigma_grid

PIPELINES = [*tiny_pipelines.STOCK, *tiny_pipelines.VARIANTS]
PIPELINES = [name for name in PIPELINES if "epsilon" not in name]


def patched(name: str, dtype: torch.dtype = torch.float32) -> Any:
    pipe = tiny_pipelines.build_pipeline(name)
    if dtype != torch.float32:
        pipe.to(dtype)
    anyflow.patch(pipe, gate_value=0.5)
    perturb_delta(pipe, 0.3)
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

    def test_a_schedule_that_was_set_before_changes_nothing(self) -> None:
        """Stock shifts twice: its smallest sigma, 3 / 1000 / (1 + 2 / 1000) when made, has the shift once more then."""
        stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
        assert stock.sigmas[-1].item() == pytest.approx(0.002994, abs=1e-6)
        stock.set_timesteps(1000)
        assert stock.sigmas[-2].item() == pytest.approx(0.008929, abs=1e-6)
        for scheduler in (AnyStepScheduler.like(stock), AnyStepScheduler.like(AnyStepScheduler.like(stock))):
            for _ in range(2):
                scheduler.set_timesteps(1000)
                assert len(scheduler.sigmas) == 1001
                assert scheduler.sigmas[-2].item() == pytest.approx(0.002994, abs=1e-6)
                assert torch.allclose(scheduler.sigmas, sigma_grid(1000, 3.0), rtol=0, atol=1e-6)

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

    def test_schedulers_that_are_not_noise_to_data_flows(self) -> None:
        with pytest.raises(ValueError, match="not a flow-matching"):
            AnyStepScheduler.like(DDIMScheduler())

    @pytest.mark.parametrize("sigmas", [[], [1.2, 0.5], [0.5, 0.5], [0.2, 0.8], [0.5, 0.0], [float("nan")]])
    def test_a_grid_that_does_not_fall(self, sigmas: list[float]) -> None:
        with pytest.raises(ValueError, match="must fall"), any_step(patched("FluxPipeline"), sigmas=sigmas):
            pass


class TestSchedules:
    def driven(self, **config: Any) -> tuple[Any, AnyStepScheduler]:
        model = tiny_models.build("SD3Transformer2DModel")
        anyflow.patch(model)
        return model, AnyStepScheduler.like(FlowMatchEulerDiscreteScheduler(**config), [model])

    def test_inverted_schedules_are_told_in_sigma(self) -> None:
        """Mochi, OmniGen: the scheduler counts 1 - sigma upwards; x moves by the dataward velocity."""
        model, scheduler = self.driven(invert_sigmas=True, num_train_timesteps=1)
        scheduler.set_timesteps(4)
        assert scheduler.timesteps.tolist() == [0.0, 0.25, 0.5, 0.75]
        assert [s.item() for s in model._flowmap_schedule[:2]] == [1.0, 0.75]
        moved = scheduler.step(torch.ones(1), scheduler.timesteps[0], torch.zeros(1)).prev_sample
        assert moved.item() == 0.25 and [s.item() for s in model._flowmap_schedule[:2]] == [0.75, 0.5]
        assert scheduler.r_timestep_for(torch.tensor(0.25)).item() == 0.5

    def test_a_terminal_shift_is_left_out(self) -> None:
        """It divides 0 by 0 on one step; an any-step grid ends in 0 by itself."""
        _, scheduler = self.driven(shift=3.0, shift_terminal=0.1)
        scheduler.set_timesteps(1)
        assert scheduler.sigmas.tolist() == [1.0, 0.0]
        scheduler.set_timesteps(2)
        assert scheduler.sigmas.tolist() == [1.0, 0.75, 0.0]

    def test_copies_drive_no_model(self) -> None:
        model, scheduler = self.driven()
        scheduler.set_timesteps(4)
        other = copy.deepcopy(scheduler)
        other.step(torch.zeros(1), other.timesteps[0], torch.zeros(1))
        assert other.step_index == 1 and scheduler.step_index is None
        assert [s.item() for s in model._flowmap_schedule[:2]] == [1.0, 0.75]

    def test_truncated_timesteps_step_from_their_own(self) -> None:
        _, scheduler = self.driven(shift=3.0)
        scheduler.set_timesteps(4)
        for timestep in scheduler.timesteps.long():
            scheduler.step(torch.zeros(1), timestep, torch.zeros(1))
        assert scheduler.step_index == 4

    def test_a_grid_of_the_users(self) -> None:
        pipe = patched("FluxPipeline")
        seen = record_times(pipe)
        with any_step(pipe, sigmas=[1.0, 0.6, 0.5]):
            pipe.scheduler.set_shift(1.0)
            tiny_pipelines.sample(pipe, "FluxPipeline", steps=7)
        mu_shifted = [round(t.flatten()[0].item(), 3) for t, _ in seen]
        assert len(mu_shifted) == 3 and mu_shifted[0] == 1.0 and mu_shifted[0] > mu_shifted[1] > mu_shifted[2]


def test_between_the_loops_of_a_call_r_is_t() -> None:
    """A call of the model that no step is due for (one that fills a cache) is the flow map at r = t, not stock."""
    pipe = patched("StableDiffusion3Pipeline")
    (model,) = denoisers(pipe)
    inputs = tiny_models.inputs("SD3Transformer2DModel")
    t = tiny_models.times("SD3Transformer2DModel", [0.9, 0.4])
    with torch.no_grad():
        stock = tiny_models.call(model, "SD3Transformer2DModel", inputs, t)
        at_t = tiny_models.call(model, "SD3Transformer2DModel", inputs, t, t)
        with any_step(pipe):
            assert torch.equal(tiny_models.call(model, "SD3Transformer2DModel", inputs, t), at_t)
            tiny_pipelines.sample(pipe, "StableDiffusion3Pipeline", steps=1)
            assert torch.equal(tiny_models.call(model, "SD3Transformer2DModel", inputs, t), at_t)
        assert torch.equal(tiny_models.call(model, "SD3Transformer2DModel", inputs, t), stock)


def test_levels_on_the_grid_step_from_there_and_others_stay() -> None:
    grid = torch.tensor([1.0, 0.9, 0.6, 0.0])
    t, r = next_on_grid(torch.tensor([[1.0, 0.900001, 0.6, 0.0, 0.899, 0.3]]), grid)
    torch.testing.assert_close(t, torch.tensor([[1.0, 0.9, 0.6, 0.0, 0.899, 0.3]]), rtol=0, atol=1e-7)
    torch.testing.assert_close(r, torch.tensor([[0.9, 0.6, 0.0, 0.0, 0.899, 0.3]]), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_step_from_their_own_level_in_either_dtype(dtype: torch.dtype) -> None:
    """Three frames on three neighbouring points of a grid of 50 with a shift of 8, and a clean one."""
    spec = find_spec("WanTransformer3DModel")
    grid = shift_sigma(torch.linspace(1, 0, 51), 8.0)
    schedule = Schedule(grid[0:1], grid[1:2], grid, held=True)
    levels = torch.cat([grid[20:23], torch.zeros(1)])
    t, r = scheduled_times((1000 * levels).to(dtype)[None], schedule, spec)
    torch.testing.assert_close(t, 1000 * levels[None])
    torch.testing.assert_close(r, 1000 * torch.cat([grid[21:24], torch.zeros(1)])[None])


@pytest.mark.parametrize("kind", ["float", "int", "bfloat16", "int64"])
def test_a_single_time_is_that_of_the_due_step(kind: str) -> None:
    spec = find_spec("WanTransformer3DModel")
    grid = shift_sigma(torch.linspace(1, 0, 251), 8.0)
    for k in range(250):
        t = 1000 * grid[k]
        given = {"float": float(t), "int": int(t), "bfloat16": t.bfloat16()[None], "int64": t.long()[None]}[kind]
        found = scheduled_times(given, Schedule(grid[k : k + 1], grid[k + 1 : k + 2], grid, held=True), spec)
        assert [time.item() for time in found] == (1000 * grid[k : k + 2]).tolist()


def test_a_sampler_that_takes_gradients_is_told_r() -> None:
    """Rewards are backpropagated through the sampling: inside the block, the schedule counts under autograd too."""
    pipe = patched("FluxPipeline")
    seen = record_times(pipe)
    with any_step(pipe):
        stock = type(pipe).__mro__[1].__call__.__wrapped__
        arguments = {**tiny_pipelines.call_kwargs("FluxPipeline"), "num_inference_steps": 2}
        with torch.enable_grad():
            stock(pipe, **arguments)
    assert len(seen) == 2


def test_nested_blocks() -> None:
    pipe = patched("StableDiffusion3Pipeline")
    (model,) = denoisers(pipe)
    arguments = {k: v for k, v in tiny_pipelines.call_kwargs("StableDiffusion3Pipeline").items() if "guidance" not in k}
    batches: list[int] = []
    model.register_forward_pre_hook(lambda _, a, k: batches.append(len(k["hidden_states"])), with_kwargs=True)
    with any_step(pipe):
        with any_step(pipe, guidance=True):
            pipe(**arguments, num_inference_steps=1)
        assert model._flowmap_schedule is not None  # the outer block still holds
        pipe(**arguments, num_inference_steps=1)
    assert batches == [2, 1] and model._flowmap_schedule is None


def test_unpatching_inside_the_block_leaves_nothing() -> None:
    pipe = patched("StableDiffusion3Pipeline")
    (model,) = denoisers(pipe)
    with any_step(pipe):
        anyflow.unpatch(pipe)
    assert not [name for name in model.__dict__ if "flowmap" in name]


@pytest.mark.parametrize("given", [{"guidance_scale": 5.0}, {}], ids=["asked", "not"])
def test_classifier_free_guidance_only_when_asked_for(given: dict[str, float]) -> None:
    pipe = patched("StableDiffusion3Pipeline")  # its own default is a scale of 7
    arguments = {
        k: v for k, v in tiny_pipelines.call_kwargs("StableDiffusion3Pipeline").items() if k != "guidance_scale"
    }
    batches: list[int] = []
    (model,) = denoisers(pipe)
    model.register_forward_pre_hook(lambda _, a, k: batches.append(len(k["hidden_states"])), with_kwargs=True)
    with any_step(pipe):
        pipe(**arguments, **given, num_inference_steps=2)
    assert batches == ([2, 2] if given else [1, 1])
    with any_step(pipe, guidance=True):
        pipe(**arguments, num_inference_steps=1)
    assert batches[-1] == 2


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
