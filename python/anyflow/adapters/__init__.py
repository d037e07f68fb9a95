"""Adapters: the teacher is the model with its adapter off; what an adapter is put on; whether it trains."""

from .gradients import GradientCheck
from .lycoris import lycoris_layers, random_parameters
from .targets import lora_targets
from .teacher import check_base, frozen, has_adapter, teacher_mode

__all__ = [
    "GradientCheck",
    "check_base",
    "frozen",
    "has_adapter",
    "lora_targets",
    "lycoris_layers",
    "random_parameters",
    "teacher_mode",
]
