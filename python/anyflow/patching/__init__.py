"""Giving a stock diffusers model its second time, and taking it away again."""

from .patch import (
    FlowMapPatch,
    delta_parameters,
    is_patched,
    patch,
    trainable_parameters,
    unpatch,
)

__all__ = ["FlowMapPatch", "delta_parameters", "is_patched", "patch", "trainable_parameters", "unpatch"]
