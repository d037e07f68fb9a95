"""Forward flow-map training: the MeanFlow identity with the derivative of the network itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from anyflow_kernels import flowmap_loss, interval_inputs

from ..time import at_least_float32, central_points

FlowMapFunction = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, sigma_t, sigma_r) -> u, in the model's own sign
ToLatents = Callable[[Tensor], Tensor]


class PathDerivative(NamedTuple):
    """A point of the straight path, and dU/dsigma there: (u_plus - u_minus) / gap, in the model's own sign."""

    x: Tensor  # x_t in the model's dtype
    velocity: Tensor  # noise - x0, float32
    u_plus: Tensor
    u_minus: Tensor
    gap: Tensor  # float32, laid out to broadcast to x


def central_difference(
    u: FlowMapFunction,
    x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    r: Tensor,
    *,
    epsilon: float = 0.005,
    boundary: str = "extrapolate",
    model_dtype: torch.dtype | None = None,
    to_latents: ToLatents = lambda sigma: sigma,
) -> PathDerivative:
    """dU/dsigma = (u(x_{t+eps}, t + eps, r) - u(x_{t-eps}, t - eps, r)) / gap,  x_s = (1 - s) x0 + s noise

    The total derivative of the flow map along the straight path, where x_{t +- eps} = x_t +- eps v with v = noise - x0
    (AnyFlow, arXiv 2605.13724). ``gap`` is the distance of the two sigmas that are fed, which at a ``boundary`` that
    clamps is less than 2 eps. The error is of order eps^2, plus the network's own rounding divided by gap.

    ``u``: the network, deterministic and without gradient: whatever differs between its two calls by chance, as
        dropout does, is divided by gap.
    Shapes: ``x0`` and ``noise`` [B, ...]; ``sigma`` (t) and ``r`` alike, as ``u`` takes them; ``to_latents`` lays them
        out so that they broadcast to x0. Times are float32 or float64; ``u`` is given x in ``model_dtype``.
    """
    plus, minus, gap = central_points(sigma, epsilon, boundary)
    inputs = interval_inputs(x0, noise, *map(to_latents, (sigma, plus, minus)), model_dtype=model_dtype)
    x, x_plus, x_minus, velocity = inputs
    assert x_plus is not None
    assert x_minus is not None
    return PathDerivative(x, velocity, u(x_plus, plus, r), u(x_minus, minus, r), to_latents(gap))


def exact_derivative(
    u: FlowMapFunction,
    x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    r: Tensor,
    *,
    model_dtype: torch.dtype | None = None,
    to_latents: ToLatents = lambda sigma: sigma,
) -> PathDerivative:
    """dU/dsigma = du(x_t, t, r) . (v, 1, 0): the same by forward-mode differentiation (MeanFlow, arXiv 2505.13447).

    As ``central_difference``; ``u`` has to be differentiable in forward mode. The derivative is given as
    u_plus - u_minus with u_minus = 0 and a gap of 1. A clean entry (sigma = 0) has the tangent 0.
    """
    inputs = interval_inputs(x0, noise, to_latents(sigma), model_dtype=model_dtype)
    dt = (sigma > 0).to(sigma.dtype)
    dx = (to_latents(dt) * inputs.velocity).to(inputs.x.dtype)
    _, du, *_ = torch.func.jvp(lambda x, s: u(x, s, r), (inputs.x, sigma), (dx, dt))
    return PathDerivative(inputs.x, inputs.velocity, du, torch.zeros_like(du), to_latents(torch.ones_like(sigma)))


def flowmap_target(
    velocity: Tensor, derivative: PathDerivative, interval: Tensor, *, guidance_scale: float = 1.0, sign: int = 1
) -> Tensor:
    """u_target = v - (sigma_t - sigma_r) dU/dsigma / g, and v where the interval is 0.

    The MeanFlow identity, with v the raw, unguided ``velocity`` [B, ...]; of the prediction (u_c + (g - 1) u_u) / g
    that it is for, u_c / g is differentiated (AnyFlow, arXiv 2605.13724). ``interval`` and the gap broadcast to v.
    Noiseward, float32; ``meanflow_loss`` compares with it without storing it.
    """
    difference = at_least_float32(derivative.u_plus) - at_least_float32(derivative.u_minus)
    correction = sign * interval * difference / (derivative.gap * guidance_scale)
    return velocity - torch.where(interval == 0, 0.0, correction)


def meanflow_loss(
    prediction: Tensor,
    velocity: Tensor,
    derivative: PathDerivative,
    interval: Tensor,
    weight: Tensor,
    *,
    uncond_prediction: Tensor | None = None,
    guidance_scale: float = 1.0,
    sign: int = 1,
) -> Tensor:
    """L_b = mean w ((u_c + (g - 1) sg(u_u)) / g - sg(u_target))^2, the mean over the elements of sample b.

    The guidance g is fused on the side of the prediction: u_c = ``prediction`` learns v_u + g (v_c - v_u), while the
    target, ``flowmap_target``, keeps the raw velocity. u_u = ``uncond_prediction`` is needed unless g = 1, which is the
    plain MeanFlow loss to the bit. Both are in the model's own ``sign``.
    Shapes: as ``flowmap_target``; ``weight`` [B] or anything that broadcasts to v. Returns [B], float32.
    """
    loss, _ = flowmap_loss(
        prediction,
        velocity,
        weight=weight,
        uncond_prediction=uncond_prediction,
        u_plus=derivative.u_plus,
        u_minus=derivative.u_minus,
        interval=interval,
        gap=derivative.gap,
        guidance_scale=guidance_scale,
        sign=sign,
    )
    return loss


def adaptive_balance(loss: Tensor, diffusion: Tensor, diffusion_sum: Tensor, diffusion_count: Tensor) -> Tensor:
    """mean diffusion loss / (loss_b + 1e-5) for a sample that is not of the diffusion bucket, 1 for one that is.

    With it, a sample of a long interval, whose target is noisy, pulls no harder than one of r = t. The mean,
    ``diffusion_sum / diffusion_count`` (both 0-d), is over the global batch; with no diffusion sample the factor is 1.
    Shapes: ``loss`` and ``diffusion`` (bool) [B]; the factors are detached.
    """
    mean = diffusion_sum / diffusion_count.clamp_min(1)
    return torch.where(diffusion | (diffusion_count == 0), 1.0, mean / (loss.detach() + 1e-5))
