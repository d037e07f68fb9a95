"""MiniMax-H3 takes its steps on two grids at once, one for the video and one for the sound."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..patching.times import next_on_grid


@contextmanager
def two_grids(pipe: Any, model: nn.Module) -> Iterator[None]:
    """Inside the block, the model is told r: the next sigma on the grid of each modality.

    The schedulers of the family are kept, as they are Euler already and end in 0. The stock table of times has one row
    for each level, whichever modality is at it: as the same level can have two ends, the rows of the sound become rows
    of their own. Levels on no grid (clean and noised conditions, which are not stepped) keep r = t.
    """

    def tell(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        timestep, indices = kwargs["timestep"], kwargs["timestep_indices"].clone()
        indices[kwargs["audio_indices"]] += timestep.shape[0]
        grids = (pipe.scheduler.sigmas, pipe.audio_scheduler.sigmas)
        pairs = [next_on_grid(1 - timestep.float(), grid.to(timestep.device)) for grid in grids]
        t, r = (1 - torch.cat(sigmas) for sigmas in zip(*pairs, strict=True))
        return args, {**kwargs, "timestep": t, "timestep_indices": indices, "r_timestep": r}

    handle = model.register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
