"""Any-step flow maps from the flow-matching models of diffusers."""

from .adapters import add_critic, lora_targets
from .checkpoints import convert, export_lora, export_pipeline, load_student, save_student
from .config import AnyFlowConfig
from .distiller import AnyFlowDistiller
from .families import EmbedderSite, FamilySpec, families, register_family
from .patching import FlowMapPatch, delta_parameters, is_patched, patch, trainable_parameters, unpatch
from .sampling import AnyStepScheduler, any_step

__all__ = [
    "AnyFlowConfig",
    "AnyFlowDistiller",
    "AnyStepScheduler",
    "EmbedderSite",
    "FamilySpec",
    "FlowMapPatch",
    "add_critic",
    "any_step",
    "convert",
    "delta_parameters",
    "export_lora",
    "export_pipeline",
    "families",
    "is_patched",
    "load_student",
    "lora_targets",
    "patch",
    "register_family",
    "save_student",
    "trainable_parameters",
    "unpatch",
]
