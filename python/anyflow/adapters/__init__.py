"""Adapters: the teacher is the model with its adapter off; what an adapter is put on; whether it trains."""

from .critic import add_critic, critic_parameters
from .gradients import GradientCheck
from .lycoris import lycoris_layers, random_parameters
from .targets import lora_targets
from .teacher import base_mode, check_base, frozen, has_adapter, teacher_mode

__all__ = [
    "GradientCheck",
    "add_critic",
    "base_mode",
    "check_base",
    "critic_parameters",
    "frozen",
    "has_adapter",
    "lora_targets",
    "lycoris_layers",
    "random_parameters",
    "teacher_mode",
]
