"""Fused operations for flow maps: torch custom ops with autograd. Needs torch; uses Triton on a GPU where it works."""

from ._library import describe, use_backend
from .flowmap_embedding import EmbedderWeights, flowmap_embedding
from .gate_blend import gate_blend
from .rollout_step import RolloutState, rollout_step

__all__ = [
    "EmbedderWeights",
    "RolloutState",
    "describe",
    "flowmap_embedding",
    "gate_blend",
    "rollout_step",
    "use_backend",
]
