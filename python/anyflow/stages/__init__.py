"""The stages of training: what differs between the target modes."""

import dataclasses

from ..critic import Critic
from .forward import ForwardStage
from .onpolicy import OnPolicyStage
from .roles import Roles, model_dtype
from .stage import Stage
from .teacher import TeacherStage

__all__ = ["ForwardStage", "OnPolicyStage", "Roles", "Stage", "TeacherStage", "make_stage", "model_dtype"]


def make_stage(roles: Roles) -> Stage:
    """The stage of ``roles.config.target_mode``."""
    if roles.config.target_mode == "onpolicy":
        return _onpolicy_stage(roles)
    return ForwardStage(roles) if roles.config.target_mode == "meanflow" else TeacherStage(roles)


def _onpolicy_stage(roles: Roles) -> Stage:
    config = dataclasses.replace(roles.config, target_mode=roles.config.forward_mode)
    forward = make_stage(dataclasses.replace(roles, config=config))
    separate = None if roles.critic is None else roles.critic.bare
    critic = Critic(roles.teacher.bare, roles.student.bare, roles.config, separate=separate, lycoris=roles.lycoris)
    return OnPolicyStage(roles, forward, critic)
