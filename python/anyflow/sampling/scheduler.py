"""The scheduler of any-step sampling.

A flow-map step x_r = x_t - (sigma_t - sigma_r) u(x_t, t, r) is an Euler step, so a stock pipeline samples a flow map
once its scheduler is Euler on a grid that ends in 0, and the model is told r. ``AnyStepScheduler`` is that scheduler;
it lays (sigma_t, sigma_r) of the coming step on the models that it drives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import (
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
)
from torch import Tensor, nn

from ..patching.times import Schedule, no_step

FLOW_SCHEDULERS = (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    FlowMapEulerDiscreteScheduler,
)
# Not shift_terminal: it keeps a solver off the last step, and divides 0 by 0 on a grid of one.
_SHARED_KEYS = ("num_train_timesteps", "use_dynamic_shifting", "time_shift_type", "invert_sigmas")


class AnyStepScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler steps along the average velocity, on u uniform from 1 to 0, shifted once: N steps are N model calls.

    While a sampling loop runs (from ``set_timesteps`` to the last ``step``) the driven models take r from this
    schedule, in float32, whatever the pipeline has done to its timesteps. ``models`` are patched models. A schedule
    handed in by the pipeline (``sigmas=``, ``timesteps=``, ``mu=``) is used as it is, but for families whose spec says
    ``replace_grid``: of theirs, a few steps are wasted next to 0 or 1, so the grid is uniform.
    """

    # What pipelines for noise prediction (SDXL) ask of a scheduler, and those for multistep solvers (ChronoEdit).
    init_noise_sigma = 1.0
    num_inference_steps: int | None = None
    model_outputs: Sequence[Tensor] = ()
    last_sample: Tensor | None = None

    _models: Sequence[Any] = ()
    _grid: Sequence[float] | None = None  # instead of any other, before the shift
    _replaces_grid = False  # whether a grid that the pipeline hands in gives way to the uniform one
    _announced: int | None = None
    _holds = False  # whether the models keep to r = t between two runs of the loop, instead of being stock

    @classmethod
    def like(cls, scheduler: Any, models: Sequence[nn.Module] = ()) -> AnyStepScheduler:
        """A scheduler with the shift of ``scheduler``: flow-matching Euler, Heun or flow map, or a multistep solver
        with flow sigmas (UniPC, DPM++). Raises ValueError for one that is not flow-matching."""
        config = dict(scheduler.config)
        if isinstance(scheduler, FLOW_SCHEDULERS):
            # Where shift is a property it can have been set since construction.
            settable = isinstance(getattr(type(scheduler), "shift", None), property)
            shift = scheduler.shift if settable else config.get("shift", 1.0)
        elif config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction":
            shift = config.get("flow_shift", 1.0)
        else:
            raise ValueError(
                f"{type(scheduler).__name__} (prediction_type={config.get('prediction_type')!r}) is not a "
                "flow-matching scheduler. If the model is a flow model, give the pipeline a "
                "FlowMatchEulerDiscreteScheduler first."
            )
        kept = {key: config[key] for key in _SHARED_KEYS if config.get(key) is not None}
        kept |= {
            key: value for key, value in config.items() if key.endswith(("_shift", "_seq_len")) and "flow" not in key
        }
        made = cls(shift=1.0 if shift is None else float(shift), **kept)
        made._models = tuple(models)
        made._replaces_grid = any(model._flowmap.spec.replace_grid for model in made._models)
        return made

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself: flow models take x as it is."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_sigma = (1 - sigma) x0 + sigma noise, under the name that image-to-image pipelines of SDXL use."""
        return self.scale_noise(original_samples, timesteps, noise)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """As in the stock scheduler, but the default grid is uniform down to exactly 0 before the shift."""
        handed = timesteps if sigmas is None else sigmas
        if self._grid is not None:
            num_inference_steps, sigmas, timesteps = len(self._grid), list(self._grid), None
        elif handed is None or self._replaces_grid:
            num_inference_steps = num_inference_steps if handed is None else len(handed)
            if num_inference_steps is None or num_inference_steps < 1:
                raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps!r}")
            sigmas, timesteps = np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1], None
        super().set_timesteps(num_inference_steps, device=device, sigmas=sigmas, mu=mu, timesteps=timesteps)
        self._announce(0)

    def set_begin_index(self, begin_index: int = 0) -> None:
        super().set_begin_index(begin_index)
        self._announce(begin_index)

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x_r = x_t + (sigma_r - sigma_t) u. Raises RuntimeError when the model was given r of another step."""
        if isinstance(timestep, Tensor) and not timestep.is_floating_point():
            timestep = self._before_truncation(timestep)
        if self.step_index is None:
            self._init_step_index(timestep)
        if self._models and self._announced != self.step_index:
            raise RuntimeError(
                f"the pipeline steps at index {self.step_index}, but its model was told the interval of index "
                f"{self._announced}; call scheduler.set_begin_index before the loop"
            )
        result = super().step(model_output, timestep, sample, *args, **kwargs)
        if self.step_index < len(self.timesteps):
            self._announce(self.step_index)
        else:
            self.release()
        return result

    def r_timestep_for(self, timestep: Any) -> Tensor:
        """The next endpoint after ``timestep``, both in the scheduler's units, float32, in the shape of ``timestep``.

        A timestep that went through int64 or bfloat16 finds its place again; on a grid so dense that rounding reaches a
        neighbour, it is taken for the step that is due. Raises ValueError for one that is not on the schedule or cannot
        be told from its neighbours, RuntimeError before ``set_timesteps``.
        """
        if self.num_inference_steps is None:
            raise RuntimeError("r_timestep_for needs a schedule: call set_timesteps first")
        given = torch.as_tensor(timestep)
        t = given.to(torch.float32)
        distance = (t.reshape(-1, 1) - self.timesteps.to(t.device)).abs()
        # Of 1000 steps, bfloat16 is off by at most 2 above 512, truncation to int64 by less than 1.
        unit = self.config.num_train_timesteps / 1000
        near = distance <= 2.0 * unit
        if not bool(near.any(1).all()):
            value = t.reshape(-1)[~near.any(1)][0].item()
            raise ValueError(f"timestep {value} is not on the schedule {self.timesteps.tolist()}")
        index = distance.argmin(1)
        doubtful = near.sum(1) > 1
        if given.dtype in (torch.float32, torch.float64):
            doubtful &= distance.min(1).values > 1e-3 * unit
        if bool(doubtful.any()):
            # Rounding may have moved it past a neighbour: only the step that is being taken can tell.
            current = self._announced
            if current is None or not bool(near[doubtful, current].all()):
                value = t.reshape(-1)[doubtful][0].item()
                raise ValueError(f"timestep {value} has been rounded between several steps of the schedule")
            index = torch.where(doubtful, current, index)
        ends = self.sigmas.to(t.device)[1:] * self.config.num_train_timesteps
        return ends[index].reshape(t.shape)

    def _before_truncation(self, timestep: Tensor) -> Tensor:
        """The due step's own timestep; without one, the lowest of the schedule that truncates to what is given."""
        if self.step_index is not None:
            return self.timesteps[self.step_index]
        above = self.timesteps - timestep.to(self.timesteps.device)
        return self.timesteps[torch.where(above >= 0, above, torch.inf).argmin()]

    def _announce(self, index: int) -> None:
        self._announced = index
        if index >= len(self.timesteps):  # an image-to-image start past the last step: there is none to take
            self.release()
            return
        # Inverted, the schedule counts upwards to data; the models are told sigma.
        grid = 1 - self.sigmas if self.config.invert_sigmas else self.sigmas.clone()
        self._lay(Schedule(grid[index : index + 1], grid[index + 1 : index + 2], grid, self._holds))

    def _lay(self, schedule: Schedule | None) -> None:
        for model in self._models:
            if hasattr(model, "_flowmap"):  # not unpatched since
                model._flowmap_schedule = schedule

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Inside the block, a model call outside of the steps (one that fills a cache) has r = t."""
        entry = [model._flowmap_schedule for model in self._models]
        self._holds = True
        self.release()
        try:
            yield
        finally:
            self._holds = False
            for model, schedule in zip(self._models, entry, strict=True):
                if hasattr(model, "_flowmap"):
                    model._flowmap_schedule = schedule

    def release(self) -> None:
        """No step is due: without r the models are stock again, or held at r = t."""
        self._lay(no_step(held=True) if self._holds else None)

    def __getstate__(self) -> dict[str, Any]:
        """Copies step on their own (one for each frame, or for the sound) and drive no model."""
        return {**self.__dict__, "_models": ()}
