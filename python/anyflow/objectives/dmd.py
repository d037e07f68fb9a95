"""Distribution matching on the student's own samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from anyflow_kernels import dmd_gradient, flowmap_loss, interval_inputs, rollout_step

from ..time import sigma_grid

FlowMap = Callable[[Tensor, Tensor, Tensor], Tensor]  # u(x_t, t, r)
Score = Callable[[Tensor, Tensor], Tensor]  # v(x_sigma, sigma)
GuidedScore = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]  # and the unconditional one
Layout = Callable[[Tensor], Tensor]


def simulation_path(steps: int, index: int, shift: float = 1.0) -> tuple[float, ...]:
    """1 > s_k > s_{k+1} > 0: where backward simulation stops on the shifted grid of a sampler of N = ``steps`` steps.

    ``index`` is k, in [0, N). At both ends of the grid, points that coincide are one: k = 0 starts with 1 > s_1, and
    k = N - 1 ends with s_k > 0.
    """
    grid = sigma_grid(steps, shift).tolist()
    return tuple(dict.fromkeys((1.0, grid[index], grid[index + 1], 0.0)))


def backward_simulation(
    flow_map: FlowMap,
    noise: Tensor,
    path: Sequence[Tensor],
    *,
    sign: int = 1,
    model_dtype: torch.dtype | None = None,
    to_latents: Layout = lambda sigma: sigma,
) -> Tensor:
    """x_r = x_t - (sigma_t - sigma_r) u(x_t, t, r) from each point of ``path`` to the next: the sample of a sampler of
    N steps, in three jumps (AnyFlow, arXiv 2605.13724, section 3.3: flow-map backward simulation).

    1 -> s_k and s_{k+1} -> 0 stand for all the steps of that sampler but one; s_k -> s_{k+1} is its step k itself.
    Differentiable in all jumps, through x as well.

    ``flow_map(x, t, r)``: the prediction in the model's own ``sign`` (+1: noise - x0), given x in ``model_dtype``.
    ``path``: sigmas, falling, laid out as ``flow_map`` takes them; ``to_latents`` lays them out to broadcast to x.
    Shapes: ``noise`` [B, ...], the state at the first sigma. Returns [B, ...], float32 (float64 stays float64).
    """
    x = noise
    model_input = x if model_dtype is None else x.to(model_dtype)
    for t, r in pairwise(path):
        at, to = to_latents(t), to_latents(r)
        u = flow_map(model_input, t, r)
        state = rollout_step(x, None, u, at, to, torch.ones_like(at), sign=sign, model_dtype=model_dtype)
        assert state.x is not None
        assert state.model_input is not None
        x, model_input = state.x, state.model_input
    return x


def distribution_matching(
    x: Tensor,
    noise: Tensor,
    sigma: Tensor,
    real: GuidedScore,
    fake: Score,
    *,
    guidance_scale: float = 1.0,
    sign: int = 1,
    model_dtype: torch.dtype | None = None,
    to_latents: Layout = lambda sigma: sigma,
) -> Tensor:
    """loss_b = mean (x - stopgrad(x - gradient))^2 / 2,  gradient = (x0_fake - x0_real) / mean|x - x0_real|,
    x0 = x_sigma - sigma v(x_sigma, sigma)  (DMD2, arXiv 2405.14867, eq. 2 and 3; AnyFlow, arXiv 2605.13724)

    ``x``: the student's samples [B, ...]; differentiable in x alone. ``noise`` [B, ...] and ``sigma``: what they are
    noised with. ``real`` and ``fake``: instantaneous velocities in the model's own ``sign``; ``real`` gives the
    unconditional one as well, or None: v_real = v_u + ``guidance_scale`` (v_c - v_u).
    Returns the loss of each sample, [B], float32; 0, with a zero gradient, where the normaliser is 0 or anything is not
    finite. Its derivative in x is gradient / elements of a sample.
    """
    s = to_latents(sigma)
    x_sigma = interval_inputs(x.detach(), noise, s, model_dtype=model_dtype).x
    v_real, v_uncond = real(x_sigma, sigma)
    loss, _ = dmd_gradient(
        x,
        s,
        x_sigma,
        v_real,
        fake(x_sigma, sigma),
        uncond_real_velocity=v_uncond,
        guidance_scale=guidance_scale,
        sign=sign,
    )
    return loss


def fake_score_loss(
    x: Tensor,
    noise: Tensor,
    sigma: Tensor,
    fake: Score,
    *,
    sign: int = 1,
    model_dtype: torch.dtype | None = None,
    to_latents: Layout = lambda sigma: sigma,
) -> Tensor:
    """loss_b = mean (v_fake(x_sigma, sigma) - (noise - x))^2: flow matching on the student's samples ``x``.

    Arguments as in ``distribution_matching``; nothing is differentiated but what ``fake`` does. Where sigma is 0 (clean
    frames) nothing can be learned and nothing is counted; a sample that is not finite counts as 0.
    Returns [B], float32.
    """
    rows = (-1, *(1,) * (x.ndim - 1))
    s = to_latents(sigma)
    s = s.view(rows) if s.ndim == 1 else s
    finite = x.isfinite().flatten(1).all(1).view(rows)
    inputs = interval_inputs(torch.where(finite, x.detach(), 0), noise, s, model_dtype=model_dtype)
    x_sigma = inputs.x.requires_grad_()  # or re-entrant checkpointing cuts the critic off: all else is frozen
    loss, _ = flowmap_loss(fake(x_sigma, sigma), inputs.velocity, weight=(finite & (s > 0)).to(s.dtype), sign=sign)
    return loss
