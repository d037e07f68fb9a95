"""``target_mode`` "onpolicy": distribution matching on the student's own samples, beside a forward loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import frozen, teacher_mode
from ..critic import Critic
from ..denoiser import Denoiser
from ..distributed import sum_over_ranks, world_size
from ..layout import TimeLayout
from ..objectives import backward_simulation, distribution_matching, fake_score_loss, simulation_path
from ..time import at_least_float32, sample_logit_normal, sample_uniform
from .roles import Roles, model_dtype
from .stage import Stage, State


class OnPolicyStage:
    """L = L_forward + dmd_weight L_DMD, after the critic's own steps (AnyFlow, arXiv 2605.13724, on-policy stage).

    ``prepare`` trains the critic on samples that the student makes without gradient, then prepares the forward loss;
    ``loss`` makes samples with gradient and scores them. The student is asked with its r; both scores, the base and
    the critic, are instantaneous velocities: r=None, the delta embedder takes no part.

    What ranks share: the sampler's steps N, its step k, and so the number of forwards. What is each rank's own: the
    noise that samples start from and are noised with, and its sigma.
    """

    def __init__(self, roles: Roles, forward: Stage, critic: Critic) -> None:
        self.roles, self.forward, self.critic = roles, forward, critic
        self.needs = forward.needs
        self.shift = roles.schedule_shift()

    def times(self, batch: Mapping[str, Any], layout: TimeLayout) -> tuple[Tensor, Tensor]:
        return self.forward.times(batch, layout)

    def prepare(
        self, batch: Mapping[str, Any], layout: TimeLayout, sigma: Tensor, r: Tensor, model: nn.Module | None
    ) -> dict[str, Any]:
        self.roles.guidance("real_guidance_scale", batch)
        batch = _with_sigmas(batch, sigma)
        logs: dict[str, Tensor] = {}
        for _ in range(self.roles.config.critic_steps_per_generator_step):
            logs = self._critic_step(batch, layout, _levels(sigma), model)
        added = self.forward.prepare(batch, layout, sigma, r, model)
        return {**added, "anyflow_model": model, "anyflow_critic_logs": logs}

    def loss(self, prepared: Mapping[str, Any], prediction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.roles.config
        forward, logs = self.forward.loss(prepared, prediction)
        layout = TimeLayout(self.roles.student.spec, self.roles.student.bare, prepared["latents"])
        sigma, model = prepared["anyflow_sigmas"], prepared["anyflow_model"]
        matching, steps = self._matching_loss(_with_sigmas(prepared, sigma), layout, _levels(sigma), model)
        loss = forward + config.loss_weight * config.dmd_weight * matching
        logs = {
            **logs,
            **prepared["anyflow_critic_logs"],
            "anyflow_forward_loss": forward.detach(),
            "anyflow_dmd_loss": matching.detach(),
            "anyflow_simulation_steps": matching.detach().new_full((), float(steps)),
        }
        return loss, logs

    def state(self) -> State:
        tensors, metadata = self.forward.state()
        return {**tensors, **self.critic.state()}, metadata

    def plan_load(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Callable[[], None]:
        loads = (self.forward.plan_load(tensors, metadata), self.critic.plan_load(tensors))

        def load() -> None:
            for part in loads:
                part()

        return load

    def _matching_loss(
        self, batch: Mapping[str, Any], layout: TimeLayout, levels: Tensor, model: nn.Module | None
    ) -> tuple[Tensor, int]:
        roles, config = self.roles, self.roles.config
        x, steps = self._samples(batch, layout, levels, roles.student_through(model))
        generator = roles.streams.own()
        noise = _noise(batch, generator)
        sigma = _at(levels, layout, sample_uniform(_count(layout), self.shift, generator))
        base = roles.teacher_through(model)

        def real(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor | None]:
            with teacher_mode(*{roles.teacher.bare, roles.student.bare}, lycoris=roles.lycoris):
                return roles.velocities(base, batch, x, s, config.real_guidance_scale)

        def fake(x: Tensor, s: Tensor) -> Tensor:
            with self.critic.scored():
                return self._fake_velocity(batch, x, s, base)

        loss = distribution_matching(
            x,
            noise,
            sigma,
            real,
            fake,
            guidance_scale=config.real_guidance_scale,
            sign=roles.flow_sign(base),
            model_dtype=model_dtype(base.bare),
            to_latents=layout.for_latents,
        )
        return _mean(loss), steps

    def _critic_step(
        self, batch: Mapping[str, Any], layout: TimeLayout, levels: Tensor, model: nn.Module | None
    ) -> dict[str, Tensor]:
        roles, config = self.roles, self.roles.config
        with frozen(roles.student.bare, lycoris=roles.lycoris):
            x, _ = self._samples(batch, layout, levels, roles.student_through(model))
        generator = roles.streams.own()
        noise = _noise(batch, generator)
        mean, std = config.critic_logit_mean, config.critic_logit_std
        sigma = _at(levels, layout, sample_logit_normal(_count(layout), self.shift, mean, std, generator))
        base = roles.teacher_through(model)
        with self.critic.trained(roles.called(base)):
            losses = fake_score_loss(
                x,
                noise,
                sigma,
                lambda x, s: self._fake_velocity(batch, x, s, base),
                sign=roles.flow_sign(base),
                model_dtype=model_dtype(base.bare),
                to_latents=layout.for_latents,
            )
            loss = _mean(losses)
            norm = self.critic.step(loss)
        return {"anyflow_critic_loss": loss.detach(), "anyflow_critic_gradient": norm}

    def _fake_velocity(self, batch: Mapping[str, Any], x: Tensor, sigma: Tensor, base: Denoiser) -> Tensor:
        """The fake score, in the sign of the real one, which ``base`` is."""
        roles = self.roles
        if roles.critic is None:
            return roles.to_flow(base(batch, x, sigma, None))
        velocity = roles.critic(batch, x, sigma, None)
        return velocity if roles.critic.spec.prediction_sign == roles.flow_sign(base) else -velocity

    def _samples(
        self, batch: Mapping[str, Any], layout: TimeLayout, levels: Tensor, student: Denoiser
    ) -> tuple[Tensor, int]:
        """The student's samples, and N: steps and place drawn for all ranks, the noise for each."""
        shared = self.roles.streams.shared()
        budgets = self.roles.config.simulation_steps
        steps = budgets[_below(len(budgets), shared)]
        path = simulation_path(steps, _below(steps, shared), self.shift)
        noise = _noise(batch, self.roles.streams.own())
        x = backward_simulation(
            lambda x, t, r: self.roles.to_flow(student(batch, x, t, r)),
            torch.where(layout.for_latents(levels) > 0, noise, batch["latents"]),
            [levels * s for s in path],
            sign=self.roles.flow_sign(student),
            model_dtype=model_dtype(student.bare),
            to_latents=layout.for_latents,
        )
        return x, steps


def _with_sigmas(batch: Mapping[str, Any], sigma: Tensor) -> dict[str, Any]:
    """A trainer's object is given sigmas in the shape that they have in its batch, where they are in it."""
    return {**batch, "sigmas": sigma} if batch.get("sigmas") is None else dict(batch)


def _mean(losses: Tensor) -> Tensor:
    """The rank's part in the mean over the global batch: the mean of all ranks' is that, as DDP and FSDP take it."""
    return losses.sum() * (world_size() / sum_over_ranks(losses.new_full((), float(losses.numel()))))


def _below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _noise(batch: Mapping[str, Any], generator: torch.Generator) -> Tensor:
    latents = at_least_float32(batch["latents"])
    return torch.randn(latents.shape, generator=generator, dtype=torch.float32).to(latents)


def _count(layout: TimeLayout) -> int:
    """One sigma for each sample; a packed family has one for its one sequence."""
    return 1 if layout.spec.times == "packed" else layout.latents_shape[0]


def _levels(sigma: Tensor) -> Tensor:
    """1 where sigma applies, 0 for clean frames or tokens."""
    return torch.ones_like(sigma) if sigma.ndim == 1 else (sigma > 0).to(sigma.dtype)


def _at(levels: Tensor, layout: TimeLayout, sigma: Tensor) -> Tensor:
    """A sigma of each sample where its levels are 1."""
    sigma = layout.for_model(sigma.to(levels))
    return levels * sigma.reshape(*sigma.shape, *(1,) * (levels.ndim - sigma.ndim))
