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
    "diffusion_ratio": 0.5,
    "consistency_ratio": 0.25,
    "schedule_shift": None,
    "derivative": "central_difference",
    "central_difference_epsilon": 0.005,
    "boundary_mode": "extrapolate",
    "difference_precision": "model",
    "fuse_guidance_scale": 3.0,
    "meanflow_weight_type": "beta08",
    "meanflow_adaptive_weighting": True,
    "diffusion_target": "flow",
    "onpolicy_forward": "meanflow",
    "simulation_steps": (2, 4, 8, 16, 50),
    "dmd_weight": 1.0,
    "real_guidance_scale": 1.0,
    "critic_steps_per_generator_step": 1,
    "critic_learning_rate": 2e-6,
    "critic_betas": (0.0, 0.999),
    "critic_weight_decay": 0.0,
    "critic_max_grad_norm": 1.0,
    "critic_logit_mean": 0.0,
    "critic_logit_std": 1.0,
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
        ("onpolicy_forward", "onpolicy"),
        ("simulation_steps", ()),
        ("simulation_steps", (2, 0)),
        ("simulation_steps", 4),
        ("simulation_steps", (2, 4.0)),
        ("dmd_weight", -1.0),
        ("real_guidance_scale", float("nan")),
        ("critic_steps_per_generator_step", -1),
        ("critic_steps_per_generator_step", 1.0),
        ("critic_learning_rate", -1e-6),
        ("critic_betas", (0.0, 1.0)),
        ("critic_betas", (0.9,)),
        ("critic_weight_decay", -0.1),
        ("critic_max_grad_norm", 0.0),
        ("critic_logit_mean", float("inf")),
        ("critic_logit_std", 0.0),
        ("diffusion_ratio", 1.5),
        ("consistency_ratio", -0.1),
        ("consistency_ratio", 0.75),
        ("schedule_shift", 0.0),
        ("derivative", "forward"),
        ("central_difference_epsilon", 0.0),
        ("central_difference_epsilon", 5),
        ("boundary_mode", "reflect"),
        ("difference_precision", "bfloat16"),
        ("fuse_guidance_scale", 0.0),
        ("meanflow_weight_type", "beta"),
        ("meanflow_adaptive_weighting", 1),
        ("diffusion_target", "base"),
    ],
)
def test_out_of_range_names_key_and_value(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key) as error:
        AnyFlowConfig(**{key: value})
    assert repr(value) in str(error.value)


def test_base_prediction_has_its_own_guidance() -> None:
    with pytest.raises(ValueError, match=r"fuse_guidance_scale=3\.0.*base_prediction"):
        AnyFlowConfig(diffusion_target="base_prediction")
    AnyFlowConfig(diffusion_target="base_prediction", fuse_guidance_scale=1.0)


def test_unknown_key_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"rollout_steps=4.*teacher_rollout_steps"):
        AnyFlowConfig.from_dict({"rollout_steps": 4})


def test_lists_are_tuples() -> None:
    """JSON and YAML have no tuples."""
    config = AnyFlowConfig.from_dict({"simulation_steps": [1, 2], "critic_betas": [0, 0.9]})
    assert config.simulation_steps == (1, 2) and config.critic_betas == (0, 0.9)


def test_the_forward_loss_of_each_mode() -> None:
    assert AnyFlowConfig(target_mode="linear").forward_mode == "linear"
    assert AnyFlowConfig(target_mode="onpolicy").forward_mode == "meanflow"
    assert AnyFlowConfig(target_mode="onpolicy", onpolicy_forward="online_teacher").forward_mode == "online_teacher"
