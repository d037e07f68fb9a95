"""The stages of training: what differs between the target modes."""

from .roles import Roles, model_dtype
from .stage import Stage
from .teacher import TeacherStage

__all__ = ["Roles", "Stage", "TeacherStage", "make_stage", "model_dtype"]


def make_stage(roles: Roles) -> Stage:
    """The stage of ``roles.config.target_mode``."""
    return TeacherStage(roles)
