"""The distiller's configuration."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_CHOICES = {
    "target_mode": ("online_teacher", "linear"),
    "r_timestep_sampler": ("uniform", "zero"),
    "deltatime_type": ("r", "t-r"),
}


@dataclass(frozen=True)
class AnyFlowConfig:
    """Every key of the distiller; checked at construction.

    target_mode: "online_teacher" = the teacher's average velocity over [r, t]; "linear" = noise - x0.
    teacher_rollout_steps: Euler steps of the teacher from t to r, >= 1. One step cannot see r; use 4 or more.
    teacher_guidance_scale: classifier-free guidance of the teacher, >= 0; 1 = off.
    r_timestep_sampler: "uniform" = r uniform below t; "zero" = r = 0.
    min_interval_ratio: smallest (t - r) / t, in [0, 1).
    gate_value: weight of the delta embedding, in [0, 1].
    deltatime_type: what the delta embedder sees: "r", or "t-r".
    loss_weight: factor of the loss, >= 0.
    timestep_scale: the model's time argument is this times sigma; None = as the model's family says.
    seed: seed of the private generator that draws r.

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

    def _require(self, key: str, allowed: str, of_type: Any, in_range: Any) -> None:
        value = getattr(self, key)
        if not (of_type(value) and in_range(value)):
            raise ValueError(f"{key}={value!r}: must be {allowed}")

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


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
