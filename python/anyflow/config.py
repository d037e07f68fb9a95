"""The distiller's configuration."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_CHOICES = {
    "target_mode": ("online_teacher", "linear", "meanflow", "onpolicy"),
    "r_timestep_sampler": ("uniform", "zero"),
    "deltatime_type": ("r", "t-r"),
    "derivative": ("central_difference", "jvp"),
    "boundary_mode": ("extrapolate", "clamp"),
    "difference_precision": ("model", "float32"),
    "meanflow_weight_type": ("beta08", "gaussian", "uniform"),
    "diffusion_target": ("flow", "base_prediction"),
    "onpolicy_forward": ("meanflow", "online_teacher", "linear"),
}


@dataclass(frozen=True)
class AnyFlowConfig:
    """Every key of the distiller; checked at construction.

    target_mode: "online_teacher" = the teacher's average velocity over [r, t]; "linear" = noise - x0; "meanflow" =
        forward flow-map training, from data alone; "onpolicy" = distribution matching on the student's own samples,
        with one of the others as the forward loss beside it.
    teacher_rollout_steps: Euler steps of the teacher from t to r, >= 1. One step cannot see r; use 4 or more.
    teacher_guidance_scale: classifier-free guidance of the teacher, >= 0; 1 = off.
    r_timestep_sampler: "uniform" = r uniform below t; "zero" = r = 0.
    min_interval_ratio: smallest (t - r) / t, in [0, 1).
    gate_value: weight of the delta embedding, in [0, 1].
    deltatime_type: what the delta embedder sees: "r", or "t-r".
    loss_weight: factor of the loss, >= 0.
    timestep_scale: the model's time argument is this times sigma; None = as the model's family says.
    seed: seed of the private generator that draws the times.

    Forward stage (target_mode "meanflow"):
    diffusion_ratio, consistency_ratio: shares of the global batch with r = t and with r = 0, each in [0, 1], at most 1
        together; the rest has any r in between.
    schedule_shift: shift of the uniform draws of t and r, > 0; None = the noise scheduler's.
    derivative: dU/dsigma by "central_difference", or exactly by "jvp" (torch.func.jvp, plain PyTorch only).
    central_difference_epsilon: half the distance of the two points in sigma, in [1e-4, 0.25].
    boundary_mode: a point beyond sigma 0 or 1 is taken ("extrapolate"), or moved to the end ("clamp").
    difference_precision: the two forwards run as the model does ("model"), or wholly in "float32", weights of lower
        precision included.
    fuse_guidance_scale: guidance g that the student learns, > 0; 1 = off, others need negative_conditioning.
    meanflow_weight_type: weight of a sample by its sigma_t, of mean 1: "beta08", "gaussian" or "uniform".
    meanflow_adaptive_weighting: whether samples with r < t weigh as the global batch's diffusion samples do.
    diffusion_target: of samples with r = t: the "flow" noise - x0, or "base_prediction", the velocity of the model with
        its adapter off, which needs fuse_guidance_scale 1.

    On-policy stage:
    onpolicy_forward: the target mode of the forward loss beside the distribution matching.
    simulation_steps: budgets N of the student's sampler in backward simulation, each >= 1; one is drawn for a step.
    dmd_weight: factor of the distribution matching loss beside the forward loss, >= 0.
    real_guidance_scale: classifier-free guidance of the real score, >= 0; 1 = off.
    critic_steps_per_generator_step: steps of the critic before each of the student, >= 0.
    critic_learning_rate, critic_betas, critic_weight_decay: of the critic's AdamW.
    critic_max_grad_norm: the norm to which its gradient is clipped, > 0; None = not clipped.
    critic_logit_mean, critic_logit_std: of the logit-normal draw of sigma that the critic is trained at, before the
        shift; the standard deviation > 0.

    Raises ValueError that names the key, the value and what is allowed.
    """

    target_mode: str = "online_teacher"
    teacher_rollout_steps: int = 1
    teacher_guidance_scale: float = 1.0
    r_timestep_sampler: str = "uniform"
    min_interval_ratio: float = 0.02
    gate_value: float = 0.25
    deltatime_type: str = "r"
    loss_weight: float = 1.0
    timestep_scale: float | None = None
    seed: int = 0

    diffusion_ratio: float = 0.5
    consistency_ratio: float = 0.25
    schedule_shift: float | None = None
    derivative: str = "central_difference"
    central_difference_epsilon: float = 0.005
    boundary_mode: str = "extrapolate"
    difference_precision: str = "model"
    fuse_guidance_scale: float = 3.0
    meanflow_weight_type: str = "beta08"
    meanflow_adaptive_weighting: bool = True
    diffusion_target: str = "flow"

    onpolicy_forward: str = "meanflow"
    simulation_steps: tuple[int, ...] = (2, 4, 8, 16, 50)
    dmd_weight: float = 1.0
    real_guidance_scale: float = 1.0
    critic_steps_per_generator_step: int = 1
    critic_learning_rate: float = 2e-6
    critic_betas: tuple[float, float] = (0.0, 0.999)
    critic_weight_decay: float = 0.0
    critic_max_grad_norm: float | None = 1.0
    critic_logit_mean: float = 0.0
    critic_logit_std: float = 1.0

    def __post_init__(self) -> None:
        for key, allowed in _CHOICES.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}={getattr(self, key)!r}: allowed are {', '.join(map(repr, allowed))}")
        self._require("teacher_rollout_steps", "an integer >= 1", _is_integer, lambda v: v >= 1)
        self._require("teacher_guidance_scale", "a finite number >= 0", _is_number, lambda v: v >= 0)
        self._require("min_interval_ratio", "a number in [0, 1)", _is_number, lambda v: 0 <= v < 1)
        self._require("gate_value", "a number in [0, 1]", _is_number, lambda v: 0 <= v <= 1)
        self._require("loss_weight", "a finite number >= 0", _is_number, lambda v: v >= 0)
        self._require("seed", "an integer >= 0", _is_integer, lambda v: v >= 0)
        if self.timestep_scale is not None:
            self._require("timestep_scale", "None or a finite number other than 0", _is_number, lambda v: v != 0)
        self._check_forward()
        self._check_onpolicy()

    def _check_forward(self) -> None:
        for key in ("diffusion_ratio", "consistency_ratio"):
            self._require(key, "a number in [0, 1]", _is_number, lambda v: 0 <= v <= 1)
        if self.diffusion_ratio + self.consistency_ratio > 1:
            raise ValueError(
                f"diffusion_ratio={self.diffusion_ratio!r}, consistency_ratio={self.consistency_ratio!r}: must be at "
                "most 1 together"
            )
        if self.schedule_shift is not None:
            self._require("schedule_shift", "None or a finite number > 0", _is_number, lambda v: v > 0)
        self._require("central_difference_epsilon", "a number in [1e-4, 0.25]", _is_number, lambda v: 1e-4 <= v <= 0.25)
        self._require("fuse_guidance_scale", "a finite number > 0", _is_number, lambda v: v > 0)
        self._require("meanflow_adaptive_weighting", "True or False", lambda v: isinstance(v, bool), lambda v: True)
        if self.diffusion_target == "base_prediction" and self.fuse_guidance_scale != 1:
            raise ValueError(
                f"fuse_guidance_scale={self.fuse_guidance_scale!r}: must be 1 with diffusion_target='base_prediction', "
                "whose velocity has its own guidance"
            )

    def _check_onpolicy(self) -> None:
        for key in ("simulation_steps", "critic_betas"):
            if isinstance(getattr(self, key), list):  # as JSON and YAML hold them
                object.__setattr__(self, key, tuple(getattr(self, key)))
        some = "integers >= 1, one or more"
        self._require("simulation_steps", some, _are(_is_integer), lambda v: len(v) and min(v) >= 1)
        in_range = "two numbers in [0, 1)"
        self._require("critic_betas", in_range, _are(_is_number), lambda v: len(v) == 2 and all(0 <= b < 1 for b in v))
        for key in ("dmd_weight", "real_guidance_scale", "critic_learning_rate", "critic_weight_decay"):
            self._require(key, "a finite number >= 0", _is_number, lambda v: v >= 0)
        self._require("critic_steps_per_generator_step", "an integer >= 0", _is_integer, lambda v: v >= 0)
        self._require("critic_logit_mean", "a finite number", _is_number, lambda v: True)
        self._require("critic_logit_std", "a finite number > 0", _is_number, lambda v: v > 0)
        if self.critic_max_grad_norm is not None:
            self._require("critic_max_grad_norm", "None or a finite number > 0", _is_number, lambda v: v > 0)

    def _require(self, key: str, allowed: str, of_type: Any, in_range: Any) -> None:
        value = getattr(self, key)
        if not (of_type(value) and in_range(value)):
            raise ValueError(f"{key}={value!r}: must be {allowed}")

    @property
    def forward_mode(self) -> str:
        """The target mode of the loss in which the student predicts a target."""
        return self.onpolicy_forward if self.target_mode == "onpolicy" else self.target_mode

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AnyFlowConfig:
        """Raises ValueError for a key that does not exist, listing those that do."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            listed = ", ".join(f"{key}={values[key]!r}" for key in unknown)
            raise ValueError(f"unknown configuration key {listed}; allowed are {', '.join(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are(of_type: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, tuple) and all(map(of_type, values))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
