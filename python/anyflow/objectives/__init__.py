"""What the student is asked to predict: pure functions on tensors, in sigma and noiseward velocity."""

from .dmd import backward_simulation, distribution_matching, fake_score_loss, simulation_path
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
    "backward_simulation",
    "central_difference",
    "distribution_matching",
    "exact_derivative",
    "fake_score_loss",
    "flowmap_target",
    "linear_velocity",
    "meanflow_loss",
    "simulation_path",
]
