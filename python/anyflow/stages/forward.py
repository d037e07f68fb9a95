"""``target_mode`` "meanflow": forward flow-map training, from data alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..adapters import frozen, teacher_mode
from ..denoiser import Batch, Denoiser
from ..distributed import sizes_of_ranks, sum_over_ranks, world_size
from ..layout import TimeLayout
from ..objectives import (
    PathDerivative,
    adaptive_balance,
    central_difference,
    exact_derivative,
    flowmap_target,
    meanflow_loss,
)
from ..precision import float32_forward
from ..time import at_least_float32, phase_of_draw, sample_intervals, timestep_weight
from .roles import Roles, model_dtype
from .stage import State, check_devices, check_times

TERMS = "anyflow_meanflow"  # key of the prepared batch


class Terms(NamedTuple):
    """What the loss of a prepared batch is made of, beside the prediction. Predictions are in the model's own sign."""

    velocity: Tensor  # noiseward; of samples with r = t, what ``diffusion_target`` says
    derivative: PathDerivative
    uncond_prediction: Tensor | None
    interval: Tensor  # sigma_t - sigma_r; as the gap and the weight, laid out for the latents
    weight: Tensor
    diffusion: Tensor  # bool [B]: samples with r = t
    floor: Tensor | None  # [B]: a sample's least part in the mean diffusion loss


class ForwardStage:
    """L = loss_weight mean_b balance_b w_b mean ((u_c + (g - 1) u_u) / g - (v - (t - r) dU/dsigma / g))^2, the mean
    over the global batch (AnyFlow, arXiv 2605.13724).

    (t, r) are drawn for the whole global batch on every rank from one stream, and each rank takes its rows: N ranks
    train as one process on all of their samples does, whatever the rank's share of them. The mean of the ranks' losses
    is the loss, as DDP and FSDP take it. A batch may bring its own pair, ``sigmas`` and ``r_sigmas``, instead.

    Every rank makes the same forwards and the same two collective calls (one in ``times``, one in ``loss``), whatever
    is in its buckets.
    """

    needs: tuple[str, ...] = ("latents", "noise")

    def __init__(self, roles: Roles) -> None:
        self.roles = roles
        self.shift = roles.schedule_shift()
        self._batches = 0  # drawn so far
        if roles.config.derivative == "jvp":
            _check_jvp(roles)

    def times(self, batch: Batch, layout: TimeLayout) -> tuple[Tensor, Tensor]:
        config, streams, latents = self.roles.config, self.roles.streams, batch["latents"]
        count = 1 if layout.spec.times == "packed" else latents.shape[0]
        sizes = sizes_of_ranks(count, streams.dp_rank, streams.dp_size, latents.device)
        phase = phase_of_draw(self._batches)
        pairs = sample_intervals(
            sum(sizes), config.diffusion_ratio, config.consistency_ratio, self.shift, phase, streams.shared()
        )
        self._batches += 1
        given, own_r = batch.get("sigmas"), batch.get("r_sigmas")
        given = None if given is None else layout.for_model(at_least_float32(given))
        if own_r is not None and given is None:
            raise ValueError("the batch has r_sigmas without sigmas: a pair of its own has both")
        if given is not None and own_r is not None:
            sigma, r = given, layout.for_model(at_least_float32(own_r))
        else:
            start, dtype = sum(sizes[: streams.dp_rank]), torch.promote_types(latents.dtype, torch.float32)
            rows = slice(start, start + count)
            sigma, r = (layout.for_model(side[rows].to(latents.device, dtype)) for side in pairs)
        check_devices({"latents": latents, "noise": batch["noise"], "sigmas": sigma, "r_sigmas": r})
        if sigma is given:
            check_times(sigma, r, instantaneous=True)
        elif given is not None and given.ndim > 1:  # frames or tokens: what is clean in the batch stays clean
            check_times(given, torch.zeros_like(given), instantaneous=True)
            sigma, r = (_beside_clean(side, given) for side in (sigma, r))
        return sigma, r

    def prepare(
        self, batch: Batch, layout: TimeLayout, sigma: Tensor, r: Tensor, model: nn.Module | None
    ) -> dict[str, Any]:
        roles, config = self.roles, self.roles.config
        guidance = roles.guidance("fuse_guidance_scale", batch)
        given = batch.get("sigmas")
        replaced = sigma if given is None or given.numel() != sigma.numel() else sigma.reshape(given.shape)
        batch = {**batch, "sigmas": replaced}
        student = roles.student_through(model)
        with frozen(roles.student.bare, lycoris=roles.lycoris):
            derivative = self._derivative(batch, layout, sigma, r, student)
            x = derivative.x.to(model_dtype(roles.student.bare))
            uncond = roles.to_flow(student(batch, x, sigma, r, negative=True)) if guidance != 1.0 else None

        lay = layout.for_latents
        interval, diffusion = lay(sigma - r), _per_sample(sigma == r)
        weight = self._weight(sigma, layout)
        velocity, floor = derivative.velocity, None
        if config.diffusion_target == "base_prediction":
            base, floor = self._base(batch, x, sigma, derivative.velocity, weight, model)
            velocity = torch.where(diffusion.reshape(-1, *(1,) * (x.ndim - 1)), base, velocity)
        sign = roles.flow_sign(student)
        target = flowmap_target(velocity, derivative, interval, guidance_scale=guidance, sign=sign)
        return {
            "sigmas": replaced,
            "noisy_latents": derivative.x.to(batch["latents"].dtype),
            "target": roles.to_prediction(target),
            TERMS: Terms(velocity, derivative, uncond, interval, weight, diffusion, floor),
        }

    def _derivative(
        self, batch: Batch, layout: TimeLayout, sigma: Tensor, r: Tensor, student: Denoiser
    ) -> PathDerivative:
        config, x0 = self.roles.config, batch["latents"]
        wide = config.difference_precision == "float32"

        def u(x: Tensor, s: Tensor, r: Tensor) -> Tensor:
            return self.roles.to_flow(student(batch, x, s, r))

        common: dict[str, Any] = {
            "model_dtype": torch.promote_types(x0.dtype, torch.float32) if wide else model_dtype(student.bare),
            "to_latents": layout.for_latents,
        }
        with ExitStack() as stack:
            if wide:
                stack.enter_context(float32_forward(x0.device.type))
            if config.derivative == "jvp":
                stack.enter_context(_forward_mode(student))
                return exact_derivative(u, x0, batch["noise"], sigma, r, **common)
            common |= {"epsilon": config.central_difference_epsilon, "boundary": config.boundary_mode}
            return central_difference(u, x0, batch["noise"], sigma, r, **common)

    def _weight(self, sigma: Tensor, layout: TimeLayout) -> Tensor:
        """w(sigma_t) of each sample, laid out for the latents; what is clean in it has none, and the rest more."""
        whole = sigma if sigma.ndim == 1 else sigma.flatten(1).amax(1)
        weight = timestep_weight(whole, self.roles.config.meanflow_weight_type, self.shift)
        if sigma.ndim == 1:
            return layout.for_latents(weight)
        noisy = (layout.for_latents(sigma) > 0).to(weight.dtype)
        share = noisy.flatten(1).mean(1).clamp_min(1 / noisy[0].numel())
        return (weight / share).reshape(-1, *(1,) * (noisy.ndim - 1)) * noisy

    def _base(
        self, batch: Batch, x: Tensor, sigma: Tensor, velocity: Tensor, weight: Tensor, model: nn.Module | None
    ) -> tuple[Tensor, Tensor]:
        """The base's own velocity, noiseward, and its weighted distance [B] to that of the path."""
        roles = self.roles
        teacher = roles.teacher_through(model)
        with teacher_mode(*{roles.teacher.bare, roles.student.bare}, lycoris=roles.lycoris):
            base = roles.flow_sign(teacher) * at_least_float32(roles.to_flow(teacher(batch, x, sigma, None)))
        return base, (weight * (base - velocity).square()).flatten(1).mean(1)

    def loss(self, prepared: Mapping[str, Any], prediction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        roles, terms = self.roles, prepared[TERMS]
        prediction = roles.to_flow(prediction)
        loss = meanflow_loss(
            prediction,
            terms.velocity,
            terms.derivative,
            terms.interval,
            terms.weight,
            uncond_prediction=terms.uncond_prediction,
            guidance_scale=roles.config.fuse_guidance_scale,
            sign=roles.flow_sign(roles.student),
        )
        own = loss.detach() if terms.floor is None else torch.maximum(loss.detach(), terms.floor)
        diffusion = terms.diffusion.expand(loss.shape)
        parts = (torch.where(diffusion, own, 0.0).sum(), diffusion.sum(), torch.ones_like(own).sum())
        total, count, samples = sum_over_ranks(torch.stack([part.to(loss.dtype) for part in parts]))
        if roles.config.meanflow_adaptive_weighting:
            loss = loss * adaptive_balance(loss, diffusion, total, count)
        logs = {"anyflow_diffusion_loss": total / count.clamp_min(1), "anyflow_diffusion_share": count / samples}
        if roles.config.derivative == "central_difference" and roles.config.difference_precision == "model":
            difference, noise = difference_and_noise(prediction.detach(), terms)
            logs |= {"anyflow_difference": difference, "anyflow_difference_noise": noise}
        return roles.config.loss_weight * loss.sum() * (world_size() / samples), logs

    def state(self) -> State:
        return {}, {"forward_batches": str(self._batches)}

    def plan_load(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Callable[[], None]:
        batches = int(metadata["forward_batches"])
        return lambda: setattr(self, "_batches", batches)


def difference_and_noise(prediction: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """rms(u_plus - u_minus), and what of it is the network's own rounding; over the samples with r < t, 0 without one.

    Three neighbouring outputs with independent rounding errors e: the difference holds sqrt(2) e, and
    u_plus + u_minus - 2 u holds sqrt(6) e beside the curvature, which is small where the network is smooth over gap.
    Dropout, which acts on u alone, counts as noise.
    """
    used = terms.interval != 0
    plus, minus, u = (at_least_float32(x) for x in (terms.derivative.u_plus, terms.derivative.u_minus, prediction))
    elements = used.expand_as(u).sum().clamp_min(1)
    difference = (torch.where(used, plus - minus, 0.0).square().sum() / elements).sqrt()
    noise = (torch.where(used, plus + minus - 2 * u, 0.0).square().sum() / (3 * elements)).sqrt()
    return difference, noise


def _per_sample(entries: Tensor) -> Tensor:
    return entries.flatten(1).all(1) if entries.ndim > 1 else entries


def _beside_clean(drawn: Tensor, given: Tensor) -> Tensor:
    if drawn.ndim == 1:
        drawn = drawn.reshape(-1, *(1,) * (given.ndim - 1))
    return torch.where(given > 0, drawn, 0.0)


def _check_jvp(roles: Roles) -> None:
    spec = roles.student.spec
    if roles.trainer is not None:
        raise ValueError(
            "derivative='jvp' needs the bare model: what a trainer's model_predict does to its batch may drop the "
            "tangents without a word. Use derivative='central_difference'."
        )
    if any(site.whole_times for site in spec.sites):
        raise ValueError(
            f"derivative='jvp': {spec.class_name} truncates its times to integers and has no derivative in them; use "
            "derivative='central_difference'"
        )


@contextmanager
def _forward_mode(student: Denoiser) -> Iterator[None]:
    """Attention by plain products, which can be differentiated in forward mode."""
    try:
        with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):
            yield
    except (NotImplementedError, RuntimeError) as error:
        raise NotImplementedError(
            f"derivative='jvp': {type(student.bare).__name__} cannot be differentiated in forward mode ({error}); use "
            "derivative='central_difference'"
        ) from error
