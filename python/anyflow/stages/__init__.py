"""The stages of training: what differs between the target modes."""

import dataclasses

from ..critic import Critic
from .onpolicy import OnPolicyStage
from .roles import Roles, model_dtype
from .stage import Stage
from .teacher import TeacherStage

__all__ = ["OnPolicyStage", "Roles", "Stage", "TeacherStage", "make_stage", "model_dtype"]


def make_stage(roles: Roles) -> Stage:
    """The stage of ``roles.config.target_mode``."""
    if roles.config.target_mode == "onpolicy":
        config = dataclasses.replace(roles.config, target_mode=roles.config.onpolicy_forward)
        forward = make_stage(dataclasses.replace(roles, config=config))
        separate = None if roles.critic is None else roles.critic.bare
        critic = Critic(roles.teacher.bare, roles.student.bare, roles.config, separate=separate, lycoris=roles.lycoris)
        return OnPolicyStage(roles, forward, critic)
    return TeacherStage(roles)
