"""Every key, its default, and every way of getting it wrong."""

from __future__ import annotations

from typing import Any

import pytest

from anyflow import AnyFlowConfig

DEFAULTS = {
    "target_mode": "online_teacher",
    "teacher_rollout_steps": 1,
    "teacher_guidance_scale": 1.0,
    "r_timestep_sampler": "uniform",
    "min_interval_ratio": 0.02,
    "gate_value": 0.25,
    "deltatime_type": "r",
    "loss_weight": 1.0,
    "timestep_scale": None,
    "seed": 0,
}


def test_defaults_and_round_trip() -> None:
    assert AnyFlowConfig().to_dict() == DEFAULTS
    changed = {**DEFAULTS, "target_mode": "linear", "teacher_rollout_steps": 8, "timestep_scale": 1000.0}
    assert AnyFlowConfig.from_dict(changed).to_dict() == changed


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_mode", "teacher"),
        ("teacher_rollout_steps", 0),
        ("teacher_rollout_steps", 2.0),
        ("teacher_rollout_steps", True),
        ("teacher_guidance_scale", -1.0),
        ("teacher_guidance_scale", float("inf")),
        ("r_timestep_sampler", "normal"),
        ("min_interval_ratio", 1.0),
        ("min_interval_ratio", -0.1),
        ("gate_value", 1.01),
        ("gate_value", float("nan")),
        ("gate_value", "0.25"),
        ("deltatime_type", "t"),
        ("loss_weight", -1),
        ("timestep_scale", 0),
        ("seed", -1),
    ],
)
def test_out_of_range_names_key_and_value(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key) as error:
        AnyFlowConfig(**{key: value})
    assert repr(value) in str(error.value)


def test_unknown_key_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"rollout_steps=4.*teacher_rollout_steps"):
        AnyFlowConfig.from_dict({"rollout_steps": 4})
