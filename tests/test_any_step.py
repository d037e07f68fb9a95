"""any_step on the stock pipelines of all families: the model is told the interval that the scheduler steps over."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import tiny_pipelines_image
import tiny_pipelines_video
import torch
from tiny_models import perturb_delta
from torch import Tensor

import anyflow
from anyflow.patching.unwrap import denoisers

pytestmark = pytest.mark.usefixtures("quiet_dependencies")

IMAGE, VIDEO = tiny_pipelines_image, tiny_pipelines_video
NAMES = [pytest.param(module, name, id=name) for module in (IMAGE, VIDEO) for name in module.PIPELINES]


def patched(module: Any, name: str) -> Any:
    """The pipeline with patched models whose delta embedders differ from their sources."""
    pipe = module.build_pipeline(name)
    anyflow.patch(pipe)
    for model in denoisers(pipe):
        perturb_delta(model, 0.3)
    return pipe


class Record:
    """What the models of a pipeline see: for each call, the times at the first embedder, in sigma."""

    def __init__(self, pipe: Any) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.steps: list[tuple[float, float, float]] = []  # sigma before and after, and how well the step fits
        for model in denoisers(pipe):
            spec = model._flowmap.spec
            site = spec.sites[0] if spec.native is None else (spec.native.embeds or (None,))[0]
            site = site[0] if isinstance(site, tuple) else site
            if site is None:  # AnyFlow: the model's own code
                model.register_forward_pre_hook(self._note_native, with_kwargs=True)
                continue
            for embedder in model.get_submodule(site.embedder).modules():
                if hasattr(embedder, "_flowmap_call"):
                    embedder.register_forward_pre_hook(lambda e, _, s=spec, p=site.pre_scale: self._note(e, s, p))

    def _note_native(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        r = kwargs["r_timestep"].double() / 1000
        self.calls.append((kwargs["timestep"].double() / 1000, r))

    def _note(self, embedder: Any, spec: Any, pre_scale: float) -> None:
        call = embedder._flowmap_call
        assert call is not None, "a call of the model without r"
        times = call.times[embedder._flowmap_calls] if embedder._flowmap_calls < len(call.times) else None
        if times is not None:
            pair = (spec.sigma(time.double() / pre_scale) for time in (times.t, times.r))
            self.calls.append(tuple(pair))  # type: ignore[arg-type]

    def watch(self, scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Note the steps of this scheduler, not those of its copies."""
        stock = type(scheduler).step

        def spy(taking: Any, output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = stock(taking, output, timestep, sample, *args, **kwargs)
            if taking is not scheduler:
                return result
            start, end = (float(scheduler.sigmas[i]) for i in (taking.step_index - 1, taking.step_index))
            after = (result[0] if isinstance(result, tuple) else result.prev_sample).double()
            # With times of tokens, diffusers' step goes the other way, and its one pipeline negates the output.
            sign = -1 if kwargs.get("per_token_timesteps") is not None else 1
            expected = sample.double() + sign * (end - start) * output.double()
            moved = after != sample.double() if sign == -1 else torch.ones_like(after, dtype=torch.bool)
            error = float((after - expected)[moved].abs().max() / (expected.abs().max() + 1e-6))
            inverted = scheduler.config.invert_sigmas
            self.steps.append((1 - start, 1 - end, error) if inverted else (start, end, error))
            return result

        monkeypatch.setattr(type(scheduler), "step", spy)


def run(module: Any, pipe: Any, name: str, steps: int) -> Tensor:
    guidance = module.PIPELINES[name].get("plain") is None
    return module.sample(pipe, name, steps=steps, guidance=guidance)


OWN_SCHEDULER = ("MiniMaxH3ModularPipeline",)
ONE_FOR_EACH_FRAME = ("SkyReelsV2DiffusionForcingPipeline", "SkyReelsV2DiffusionForcingPipeline:staggered")
DRIVEN = [param for param in NAMES if param.id not in (*OWN_SCHEDULER, *ONE_FOR_EACH_FRAME)]


# Stock, these fail in bfloat16: a float32 embedder is cast along, a grid is made in float32, inputs stay float32.
FLOAT32_ONLY = ("Kandinsky5T2IPipeline", "Kandinsky5T2VPipeline", "SanaWMPipeline", "MiniMaxMusic3ModularPipeline")
IN_BFLOAT16 = [param for param in DRIVEN if param.id not in FLOAT32_ONLY]


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(("module", "name"), DRIVEN)
def test_the_model_is_told_the_steps_that_are_taken(
    module: Any, name: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x_r = x_t + (sigma_r - sigma_t) u, with the (t, r) of the step at the embedder of every call of the model."""
    # float32 latents and two roundings in one step.
    assert check_steps(patched(module, name), module, name, steps, monkeypatch) < 1e-5


@pytest.mark.parametrize(("module", "name"), IN_BFLOAT16)
def test_rounded_times_do_not_reach_the_model(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 most pipelines round their times before the model gets them."""
    pipe = patched(module, name)
    if hasattr(pipe, "to"):
        pipe.to(torch.bfloat16)
    check_steps(pipe, module, name, 4, monkeypatch)


def check_steps(pipe: Any, module: Any, name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """Sample and compare; returns the largest relative error of a step."""
    stock, stock_class = pipe.scheduler, type(pipe)
    record = Record(pipe)
    given = steps
    sigmas = None
    if name == "MochiPipeline" and steps == 1:  # its own schedule of one step divides by zero
        given, sigmas = 2, [1.0]
    with anyflow.any_step(pipe, sigmas=sigmas):
        record.watch(pipe.scheduler, monkeypatch)
        result = run(module, pipe, name, given)
    assert result.isfinite().all()
    assert pipe.scheduler is stock and type(pipe) is stock_class
    assert all(model._flowmap_schedule is None for model in denoisers(pipe))
    taken = record.steps
    if name.startswith("StableDiffusionXLImg2Img") and steps == 1:
        assert not taken  # half of one step: SDXL rounds it to none, the others to one
        return 0.0
    runs = sum(end == 0.0 for _, end, _ in taken)  # some pipelines make a video in several runs of the loop
    assert runs and taken[-1][1] == 0.0
    assert len(taken) == runs * (steps if "strength" not in module.PIPELINES[name]["call"] else max(1, steps // 2))
    for (_, end, _), (start, _, _) in pairwise(taken):
        assert start == (taken[0][0] if end == 0.0 else end)
    # A pass that fills a cache of clean tokens has t = r = 0; all others are of a step, equally many for each.
    calls = [(t, r) for t, r in record.calls if (t.abs() > 1e-6).any() or (r.abs() > 1e-6).any()]
    assert len(calls) % len(taken) == 0
    each = len(calls) // len(taken)
    for index, (t, r) in enumerate(calls):
        start, end, _ = taken[index // each]
        noisy = t.abs() > 1e-6
        # 1e-6: times of 1000 in float32 are 6e-5 apart; Sana WM embeds whole ones. Clean rows keep t = r = 0.
        atol = 1e-3 if name == "SanaWMPipeline" else 1e-6
        torch.testing.assert_close(t[noisy], torch.full_like(t[noisy], start), rtol=0, atol=atol)
        torch.testing.assert_close(r[noisy], torch.full_like(r[noisy], end), rtol=0, atol=atol)
        torch.testing.assert_close(r[~noisy], torch.zeros_like(r[~noisy]), rtol=0, atol=1e-6)
    return max(error for *_, error in taken)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", ONE_FOR_EACH_FRAME)
def test_frames_that_step_on_their_own(name: str, steps: int) -> None:
    """Each frame has its own copy of the scheduler: r is the next point of the grid below the frame's own time."""
    pipe = patched(VIDEO, name)
    record = Record(pipe)
    with anyflow.any_step(pipe):
        grid = None
        result = run(VIDEO, pipe, name, steps)
        grid = pipe.scheduler.sigmas.double().tolist()
    assert result.isfinite().all() and len(grid) == steps + 1
    seen = {
        (round_5(a), round_5(b))
        for t, r in record.calls
        for a, b in zip(t.flatten().tolist(), r.flatten().tolist(), strict=True)
    }
    expected = {(round_5(a), round_5(b)) for a, b in pairwise(grid)}
    assert seen - {(0.0, 0.0)} == expected


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_two_grids(steps: int) -> None:
    """MiniMax-H3: the rows of the sound end at its own next sigma, also where they start at the video's."""
    pipe = patched(VIDEO, "MiniMaxH3ModularPipeline")
    (model,) = denoisers(pipe)
    seen: list[tuple[list[float], list[float]]] = []
    calls = 0

    def note(embedder: Any, _: Any) -> None:
        times = embedder._flowmap_call.times[0]
        seen.append(tuple((1 - time.double()).tolist() for time in (times.t, times.r)))  # type: ignore[arg-type]

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.get_submodule("time_embedder").register_forward_pre_hook(note)
    model.register_forward_pre_hook(count)
    with anyflow.any_step(pipe):
        result = run(VIDEO, pipe, "MiniMaxH3ModularPipeline", steps)
    assert result.isfinite().all() and calls == steps
    video, audio = (s.sigmas.double().tolist() for s in (pipe.scheduler, pipe.audio_scheduler))
    for k, (t, r) in enumerate(seen):
        rows = len(t) // 2
        ends = [dict(zip(map(round_5, grid), grid[1:], strict=False)) for grid in (video, audio)]
        for half, grid_ends in zip((0, 1), ends, strict=True):
            for a, b in zip(t[half * rows :][:rows], r[half * rows :][:rows], strict=True):
                assert b == pytest.approx(grid_ends.get(round_5(a), a), abs=1e-6)
        assert round_5(video[k]) in map(round_5, t[:rows]) and round_5(audio[k]) in map(round_5, t[rows:])
    assert seen[0][1][0] != seen[0][1][len(seen[0][1]) // 2] or steps == 1  # one level, two ends


def test_two_grids_are_not_replaced_by_one() -> None:
    pipe = patched(VIDEO, "MiniMaxH3ModularPipeline")
    with pytest.raises(ValueError, match="its own two schedulers"), anyflow.any_step(pipe, sigmas=[1.0]):
        pass


def round_5(value: float) -> float:
    return round(value, 5)


def model_rows(module: Any, name: str, arguments: dict[str, Any], **options: Any) -> list[int]:
    """How many rows each call of the model has."""
    pipe = patched(module, name)
    seen: list[int] = []

    def note(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents = kwargs.get(model._flowmap.spec.sample_arg, args[0] if args else None)
        seen.append(len(latents))

    for model in denoisers(pipe):
        model.register_forward_pre_hook(note, with_kwargs=True)
    with anyflow.any_step(pipe, **options):
        pipe(**arguments, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    return seen


# Not those whose guidance is a component, which the helpers of these pipelines set themselves.
GUIDED = [
    param
    for param in DRIVEN
    for facts in (param.values[0].PIPELINES[param.id],)
    if facts.get("guided") and not facts.get("guider") and "Modular" not in param.id
]
# They call their model with guidance whatever the scale; at its neutral one it has no effect.
ALWAYS = ("Ideogram4Pipeline", "OmniGenPipeline", "DreamLitePipeline", "DreamLitePipeline:image")


@pytest.mark.parametrize(("module", "name"), GUIDED)
def test_guidance_is_off_unless_asked_for(module: Any, name: str) -> None:
    """A call that says nothing of guidance has as many rows as one that turns it off by hand."""
    plain = module.call_kwargs(name, name in ALWAYS)
    silent = {
        key: value
        for key, value in module.call_kwargs(name, True).items()
        if not any(word in key for word in ("guidance", "stg", "modality", "cfg"))
    }
    assert model_rows(module, name, silent) == model_rows(module, name, plain)
