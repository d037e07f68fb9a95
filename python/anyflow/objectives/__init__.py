"""What the student is asked to predict: pure functions on tensors, in sigma and noiseward velocity."""

from .linear import linear_velocity
from .online_teacher import average_velocity

__all__ = ["average_velocity", "linear_velocity"]
