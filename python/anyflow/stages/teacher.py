"""``target_mode`` "online_teacher" and "linear": a target from the batch's own times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..adapters import teacher_mode
from ..layout import TimeLayout
from ..objectives import average_velocity, linear_velocity
from ..time import at_least_float32, sample_r
from .roles import Roles, model_dtype
from .stage import State, check_devices, check_times


class TeacherStage:
    """L = loss_weight mean (u_theta(x_t, t, r) - u)^2, with u the teacher's average velocity over [r, t], or the linear
    one. t comes with the batch; r too, or it is drawn below t."""

    needs: tuple[str, ...] = ("latents", "noise", "sigmas")

    def __init__(self, roles: Roles) -> None:
        self.roles = roles

    def times(self, batch: Mapping[str, Any], layout: TimeLayout) -> tuple[Tensor, Tensor]:
        config = self.roles.config
        sigma = layout.for_model(at_least_float32(batch["sigmas"]))
        if batch.get("r_sigmas") is None:
            r = sample_r(sigma, config.r_timestep_sampler, config.min_interval_ratio, self.roles.streams.own())
        else:
            r = layout.for_model(at_least_float32(batch["r_sigmas"]))
        check_devices({"latents": batch["latents"], "noise": batch["noise"], "sigmas": sigma, "r_sigmas": r})
        check_times(sigma, r)
        return sigma, r

    def prepare(
        self, batch: Mapping[str, Any], layout: TimeLayout, sigma: Tensor, r: Tensor, model: nn.Module | None
    ) -> dict[str, Any]:
        x = batch.get("noisy_latents")
        if x is None:
            s, latents = layout.for_latents(sigma), batch["latents"]
            x = ((1 - s) * latents + s * batch["noise"]).to(latents.dtype)
        return {"noisy_latents": x, "target": self._target({**batch, "noisy_latents": x}, layout, sigma, r, model)}

    def _target(
        self, batch: Mapping[str, Any], layout: TimeLayout, sigma: Tensor, r: Tensor, model: nn.Module | None
    ) -> Tensor:
        roles = self.roles
        if roles.config.target_mode == "linear":
            given = getattr(roles.trainer, "get_flow_matching_target", None)
            if given is not None:
                return at_least_float32(given(batch))
            return roles.to_prediction(linear_velocity(batch["latents"], batch["noise"]))
        guidance = roles.guidance("teacher_guidance_scale", batch)
        teacher = roles.teacher_through(model)
        with teacher_mode(*{roles.teacher.bare, roles.student.bare}, lycoris=roles.lycoris):
            average = average_velocity(
                lambda x, s: roles.velocities(teacher, batch, x, s, guidance),
                batch["noisy_latents"],
                sigma,
                r,
                roles.config.teacher_rollout_steps,
                guidance_scale=guidance,
                sign=roles.flow_sign(teacher),
                model_dtype=model_dtype(roles.teacher.bare),
                to_latents=layout.for_latents,
            )
        return roles.to_prediction(average)

    def loss(self, prepared: Mapping[str, Any], prediction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        error = at_least_float32(prediction) - prepared["target"]
        return self.roles.config.loss_weight * error.square().mean(), {}

    def state(self) -> State:
        return {}, {}

    def plan_load(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Callable[[], None]:
        return lambda: None
