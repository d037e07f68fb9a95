"""What the student is asked to predict: pure functions on tensors, in sigma and noiseward velocity."""

from .dmd import backward_simulation, distribution_matching, fake_score_loss, simulation_path
from .linear import linear_velocity
from .online_teacher import average_velocity

__all__ = [
    "average_velocity",
    "backward_simulation",
    "distribution_matching",
    "fake_score_loss",
    "linear_velocity",
    "simulation_path",
]
