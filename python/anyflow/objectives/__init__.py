"""What the student is asked to predict: pure functions on tensors, in sigma and noiseward velocity."""

from .linear import linear_velocity
from .meanflow import (
    PathDerivative,
    adaptive_balance,
    central_difference,
    exact_derivative,
    flowmap_target,
    meanflow_loss,
)
from .online_teacher import average_velocity

__all__ = [
    "PathDerivative",
    "adaptive_balance",
    "average_velocity",
    "central_difference",
    "exact_derivative",
    "flowmap_target",
    "linear_velocity",
    "meanflow_loss",
]
