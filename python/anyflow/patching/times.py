"""The two times of a forward: from what the caller, a sampler or a pipeline gives to float32 pairs (t, r)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..families import FamilySpec

Pair = tuple[Tensor, Tensor]  # t and r, float32, of one shape


class Schedule(NamedTuple):
    """What a sampler lays on the models that it drives, in sigma."""

    start: Tensor  # of the due step, one element
    end: Tensor
    grid: Tensor  # all steps' starts, and 0; empty where no step is due: r = t
    held: bool  # for the length of a block that cleans up after itself, so that it counts under autograd too


def no_step(held: bool) -> Schedule:
    none = torch.empty(0)
    return Schedule(none, none, none, held)


def second_time(spec: FamilySpec, arg: str) -> str:
    """The name in forward of the lower time that goes with the time argument ``arg``."""
    return "r_timestep" if arg == spec.timestep_arg else f"r_{arg}"


def take_native(spec: FamilySpec, arguments: dict[str, Any], second: dict[str, Any], schedule: Schedule | None) -> None:
    """Settle r for a class that has a second time itself: what the caller gives under either name, and r = t where
    forward does not do without. A sampler's schedule goes before what its pipeline has made of it."""
    assert spec.native is not None
    main = spec.timestep_arg
    if second[main] is None and schedule is None:
        second[main] = arguments.get(spec.native.arg)
        if second[main] is None and spec.native.required:
            second[main] = arguments[main]


def all_times(
    spec: FamilySpec, arguments: Mapping[str, Any], second: Mapping[str, Any], schedule: Schedule | None
) -> dict[str, Pair]:
    """(t, r) of every time argument; one that is not given has those of the main one."""
    times: dict[str, Pair] = {}
    for arg in spec.time_args:
        timestep, r = arguments.get(arg), second[arg]
        if timestep is None and r is None and times:
            times[arg] = times[spec.timestep_arg]
        elif r is None and second[spec.timestep_arg] is None:
            assert schedule is not None
            times[arg] = scheduled_times(timestep, schedule, spec)
        else:
            given = second[spec.timestep_arg] if r is None else r
            times[arg] = explicit_times(arguments[spec.timestep_arg] if timestep is None else timestep, given, spec)
    return times


def stock_arguments(spec: FamilySpec, arguments: dict[str, Any], times: Mapping[str, Pair]) -> dict[str, Any]:
    """What the stock forward is given: times of as many rows as r has, in the dtype that it needs, and a native r."""
    dtype = arguments[spec.sample_arg].dtype if spec.time_dtype == "model" else torch.float32
    for arg, (t, _) in times.items():
        given = arguments.get(arg)
        rows = given.numel() if isinstance(given, Tensor) else 1
        if given is not None and (spec.time_dtype == "model" or rows != t.numel()):
            arguments[arg] = t.to(dtype)
    if spec.native is not None:
        arguments[spec.native.arg] = times[spec.timestep_arg][1].to(dtype)
    return arguments


def as_time(value: Any, like: Any) -> Tensor:
    """A time argument as a float32 tensor, on the device of ``like`` when it is a plain number."""
    if isinstance(value, Tensor):
        return value.to(torch.float32)
    device = like.device if isinstance(like, Tensor) else None
    return torch.as_tensor(value, dtype=torch.float32, device=device)


def explicit_times(timestep: Any, r_timestep: Any, spec: FamilySpec) -> Pair:
    """t and r of one shape. An r of one element, or of one for each sample, over times of tokens is the lower time of
    all tokens that are above it; for clean tokens beside them r = t."""
    t, r = as_time(timestep, r_timestep), as_time(r_timestep, timestep)
    if t.device != r.device and t.ndim and r.ndim:
        raise ValueError(f"r_timestep is on {r.device}, the time argument on {t.device}")
    if t.shape == r.shape:
        return t, r
    if r.numel() == 1 or (t.ndim > 1 and r.shape == t.shape[:1]):
        r = r.reshape(-1, *(1,) * (t.ndim - 1)).to(t.device) if t.ndim else r.reshape(()).to(t.device)
        lower = torch.minimum if spec.time_scale > 0 else torch.maximum
        return t, r.expand(t.shape) if t.ndim < 2 and spec.times != "packed" else lower(r.expand(t.shape), t)
    if t.numel() == 1:
        return t.reshape(()).to(r.device).expand(r.shape), r
    raise ValueError(f"r_timestep of shape {tuple(r.shape)} does not fit a time argument of shape {tuple(t.shape)}")


def scheduled_times(timestep: Any, schedule: Schedule, spec: FamilySpec) -> Pair:
    """t and r where a sampler drives the model, from its own float32 sigmas, whatever the pipeline has rounded.

    A time for each sample is that of the due step, as near as half precision comes to it. Times of frames or tokens
    step from their own places on the grid.
    """
    t = timestep.to(torch.float32) if isinstance(timestep, Tensor) else torch.tensor(float(timestep))
    if not schedule.grid.numel():
        return t, t
    start, end, grid = (sigmas.to(t.device) for sigmas in schedule[:3])
    given = spec.sigma(t)
    sigma, below = next_on_grid(given, grid, _rounding(timestep, given, spec))
    if t.ndim < 2 and spec.times != "packed":
        due = ((given - start).abs() <= 5e-3) & (given != 0)  # twice rounded to 8 bits: 1000 sigma, then / 1000
        sigma, below = torch.where(due, start, sigma), torch.where(due, end, below)
    return spec.model_time(sigma), spec.model_time(below)


def next_on_grid(sigma: Tensor, grid: Tensor, rounding: Tensor | float = 1e-5) -> Pair:
    """For each sigma within ``rounding`` of ``grid`` [N + 1], which falls to 0, its place there and the next one below.
    One that is not on the grid stays where it is, as the held rows of a condition do: r = t; so does a clean one."""
    distance = (sigma.unsqueeze(-1) - grid).abs()
    index = distance.argmin(-1)
    on_grid = distance.amin(-1) <= rounding
    return (
        torch.where(on_grid, grid[index], sigma),
        torch.where(on_grid, grid[(index + 1).clamp_max(grid.numel() - 1)], sigma),
    )


def _rounding(timestep: Any, sigma: Tensor, spec: FamilySpec) -> Tensor | float:
    """How far, in sigma, the times that a pipeline hands in can be from its schedule."""
    kind = timestep.dtype if isinstance(timestep, Tensor) else type(timestep)
    if kind in (torch.bfloat16, torch.float16):  # relative to the number that was rounded, be it sigma or the time
        time = torch.as_tensor(timestep).to(torch.float32).abs() / abs(spec.time_scale)
        return torch.maximum(sigma.abs(), time) * 2**-8
    return 1e-5 if kind in (torch.float32, torch.float64, float) else 1.1e-3  # integers are truncated
