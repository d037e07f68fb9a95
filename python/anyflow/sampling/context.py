"""any_step: a stock pipeline as an any-step sampler, for the length of a block."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from itertools import pairwise
from typing import Any

from diffusers import MiniMaxH3Scheduler
from torch import nn

from ..patching import is_patched
from ..patching.patch import check_pipeline
from ..patching.unwrap import denoisers
from .minimax_h3 import two_grids
from .scheduler import AnyStepScheduler


@contextmanager
def any_step(pipe: Any, *, guidance: bool = False, sigmas: Sequence[float] | None = None) -> Iterator[Any]:
    """Inside the block, the pipeline samples its patched model with flow-map steps: ``with any_step(pipe): pipe(...)``.

    r is the end of the step that the scheduler takes, 0 for the last; N steps are N model calls (twice that where the
    pipeline calls the model once more for guidance). Multistep solvers (Wan ships UniPC) are replaced by Euler steps
    with the same shift. On exit, also after an exception, the pipeline has its own scheduler and the model no schedule.

    ``guidance``: a student of a guided teacher has the guidance learned, so classifier-free guidance is off, unless
        the call asks for it (``pipe(..., guidance_scale=4.0)``; what else the pipeline guides with then has its own
        defaults); with True, the pipeline's own defaults hold. Guidance that the model embeds is left as it is.
    ``sigmas``: the starts of the steps before the shift, falling from at most 1, instead of a uniform grid; the
        pipeline's ``num_inference_steps`` does not count then.

    Raises ValueError when a denoiser of the pipeline is not patched, its scheduler is not a flow-matching one, its
    time is not linear in sigma, or ``sigmas`` do not fall; TypeError when ``pipe`` is not a pipeline.
    """
    if isinstance(pipe, nn.Module):
        raise TypeError(f"any_step takes a pipeline, got the model {type(pipe).__name__}")
    models: list[Any] = denoisers(pipe)
    for model in models:
        if not is_patched(model):
            raise ValueError(f"{type(model).__name__} is not patched; call anyflow.patch(pipe) first")
    check_pipeline(pipe, [model._flowmap.spec for model in models])
    grid = None if sigmas is None else _checked_grid(sigmas)
    with ExitStack() as stack:
        if isinstance(pipe.scheduler, MiniMaxH3Scheduler):
            if grid is not None:
                raise ValueError("MiniMax-H3 keeps its own two schedulers, and with them their grids: no sigmas=")
            stack.enter_context(two_grids(pipe, models[0]))
        else:
            scheduler = AnyStepScheduler.like(pipe.scheduler, [*models, *_patched_guides(pipe)])
            scheduler._grid = grid
            stack.callback(_set_scheduler, pipe, pipe.scheduler)
            stack.enter_context(scheduler.holding())
            _set_scheduler(pipe, scheduler)
        stack.enter_context(own_guidance(pipe) if guidance else unguided(pipe, models))
        yield pipe


def _checked_grid(sigmas: Sequence[float]) -> list[float]:
    grid = [float(sigma) for sigma in sigmas]
    if not grid or not 0 < grid[-1] <= grid[0] <= 1 or any(a <= b for a, b in pairwise(grid)):
        raise ValueError(f"sigmas must fall within (0, 1], got {grid}")
    return grid


def _set_scheduler(pipe: Any, scheduler: Any) -> None:
    if hasattr(pipe, "update_components"):  # a modular pipeline
        pipe.update_components(scheduler=scheduler)
    else:
        pipe.scheduler = scheduler


def _patched_guides(pipe: Any) -> list[nn.Module]:
    """A second model that only guides (Ideogram 4) takes part when it is a flow map too."""
    guide = getattr(pipe, "unconditional_transformer", None)
    return [guide] if isinstance(guide, nn.Module) and is_patched(guide) else []


@contextmanager
def own_guidance(pipe: Any) -> Iterator[None]:
    """Inside the block, the pipeline's own defaults hold, also within a block of ``unguided``."""
    inside = type(pipe)
    stock, guider_on = getattr(inside, "_anyflow_stock", (inside, False))
    try:
        pipe.__class__ = stock
        if guider_on:
            pipe.guider.enable()
        yield
    finally:
        pipe.__class__ = inside
        if guider_on:
            pipe.guider.disable()


@contextmanager
def unguided(pipe: Any, models: Sequence[Any]) -> Iterator[None]:
    """Inside the block, calls of ``pipe`` that do not ask for classifier-free guidance have none.

    The class of the instance is swapped: a pipeline is called through its class.
    """
    guider: Any = getattr(pipe, "guider", None)
    was_on = getattr(guider, "_enabled", False)
    stock = type(pipe)
    off = models[0]._flowmap.spec.guidance_off
    stock_call: Any = stock.__call__
    parameters = list(inspect.signature(stock_call).parameters)[1:]

    @wraps(stock_call)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {*parameters[: len(args)], *kwargs}
        asked = not given.isdisjoint(off)
        neutral = {} if asked else {name: scale for name, scale in off.items() if name in parameters}
        return stock_call(self, *args, **kwargs, **neutral)

    try:
        if was_on:
            guider.disable()
        namespace = {"__module__": stock.__module__, "__call__": call, "_anyflow_stock": (stock, was_on)}
        pipe.__class__ = type(stock.__name__, (stock,), namespace)
        yield
    finally:
        pipe.__class__ = stock
        if was_on:
            guider.enable()
