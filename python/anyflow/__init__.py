"""Any-step flow maps from the flow-matching models of diffusers."""

from .families import EmbedderSite, FamilySpec, families, register_family
from .patching import FlowMapPatch, delta_parameters, is_patched, patch, trainable_parameters, unpatch

__all__ = [
    "EmbedderSite",
    "FamilySpec",
    "FlowMapPatch",
    "delta_parameters",
    "families",
    "is_patched",
    "patch",
    "register_family",
    "trainable_parameters",
    "unpatch",
]
