"""Fused operations for flow maps: torch custom ops with autograd. Needs torch; uses Triton on a GPU where it works."""

from ._library import describe, use_backend
from .dmd_gradient import dmd_gradient
from .flowmap_embedding import EmbedderWeights, flowmap_embedding
from .flowmap_loss import flowmap_loss
from .gate_blend import gate_blend
from .interval_inputs import IntervalInputs, interval_inputs
from .rollout_step import RolloutState, rollout_step

__all__ = [
    "EmbedderWeights",
    "IntervalInputs",
    "RolloutState",
    "describe",
    "dmd_gradient",
    "flowmap_embedding",
    "flowmap_loss",
    "gate_blend",
    "interval_inputs",
    "rollout_step",
    "use_backend",
]
