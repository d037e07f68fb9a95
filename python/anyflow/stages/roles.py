"""The networks that take part in a distillation, and how each is called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import AnyFlowConfig
from ..denoiser import Batch, Denoiser, DiffusersDenoiser
from ..patching.unwrap import unwrap
from ..sampling import AnyStepScheduler
from ..streams import RandomStreams


@dataclass
class Roles:
    """``teacher`` and ``student`` are one denoiser where the teacher is the student with its adapter off.

    ``trainer``: the trainer's object with ``model_predict``, or None. ``lycoris``: the student's LyCORIS network, or
    None. ``noise_scheduler``: the scheduler of the pipeline, or None. ``critic``: a whole network as the
    fake score, or None.
    """

    config: AnyFlowConfig
    streams: RandomStreams
    teacher: Denoiser
    student: Denoiser
    trainer: Any = None
    lycoris: nn.Module | None = None
    noise_scheduler: Any = None
    critic: Denoiser | None = None

    def student_through(self, model: nn.Module | None) -> Denoiser:
        """The student, through the trainer's wrapper ``model`` of it."""
        if model is None or self.trainer is not None:
            return self.student
        if unwrap(model) is not self.student.bare:
            raise ValueError(f"model is another {type(unwrap(model)).__name__} than the one that is distilled")
        return DiffusersDenoiser(model, self.student.spec)

    def teacher_through(self, model: nn.Module | None) -> Denoiser:
        return self.student_through(model) if self.student is self.teacher else self.teacher

    def called(self, denoiser: Denoiser) -> nn.Module | None:
        """The module that is called for ``denoiser``, wrappers included."""
        if isinstance(denoiser, DiffusersDenoiser):
            return denoiser.module
        return None if self.trainer is None else self.trainer.get_trained_component()

    def scheduler(self) -> Any:
        """The scheduler that the model is sampled with, or None."""
        if self.noise_scheduler is not None:
            return self.noise_scheduler
        return getattr(getattr(self.trainer, "pipeline", None), "scheduler", None)

    def schedule_shift(self) -> float:
        """The shift of the times that are drawn: the configuration's, or the scheduler's.

        ValueError where neither tells: without a scheduler, or with one whose shift depends on the resolution.
        """
        if self.config.schedule_shift is not None:
            return self.config.schedule_shift
        source = self.scheduler()
        if source is None:
            raise ValueError(
                f"target_mode={self.config.target_mode!r} needs schedule_shift, or a distiller with noise_scheduler="
            )
        scheduler = AnyStepScheduler.like(source)
        if scheduler.config.get("use_dynamic_shifting"):
            raise ValueError(
                f"the shift of this {type(source).__name__} depends on the resolution (use_dynamic_shifting): give "
                "schedule_shift, which is exp(mu) of its pipeline at yours"
            )
        return float(scheduler.shift)

    def to_flow(self, prediction: Tensor) -> Tensor:
        """The velocity in a prediction: noiseward times ``flow_sign``."""
        convert = getattr(self.trainer, "prediction_to_noiseward_flow", None)
        return prediction if convert is None else convert(prediction)

    def guidance(self, key: str, batch: Batch) -> float:
        """The guidance scale of the configuration; ValueError where the batch lacks what it needs."""
        scale: float = getattr(self.config, key)
        if scale != 1.0 and batch.get("negative_conditioning") is None:
            raise ValueError(f"{key}={scale} needs negative_conditioning in the batch")
        return scale

    def velocities(
        self, denoiser: Denoiser, batch: Batch, x: Tensor, sigma: Tensor, guidance: float
    ) -> tuple[Tensor, Tensor | None]:
        """The instantaneous velocity, and the unconditional one where ``guidance`` is not 1."""
        conditional = self.to_flow(denoiser(batch, x, sigma, None))
        if guidance == 1.0:
            return conditional, None
        return conditional, self.to_flow(denoiser(batch, x, sigma, None, negative=True))

    def flow_sign(self, denoiser: Denoiser) -> int:
        """+1 where what ``to_flow`` gives is noiseward, -1 where it points to the data."""
        convert = getattr(self.trainer, "prediction_to_noiseward_flow", None)
        return denoiser.spec.prediction_sign if convert is None else 1

    def to_prediction(self, flow: Tensor) -> Tensor:
        """From noiseward to what the student predicts."""
        convert = getattr(self.trainer, "noiseward_flow_to_prediction", None)
        if convert is not None:
            return convert(flow)
        return flow if self.student.spec.prediction_sign == 1 else -flow


def model_dtype(bare: Any) -> torch.dtype:
    """The dtype in which the model takes latents."""
    dtype = getattr(bare, "dtype", torch.float32)
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float32
