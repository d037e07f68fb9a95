"""The teacher's average velocity, by rolling its ODE out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from anyflow_kernels import RolloutState, rollout_step

VelocityFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


def average_velocity(
    velocity: VelocityFunction,
    x: Tensor,
    sigma: Tensor,
    r: Tensor,
    steps: int,
    *,
    guidance_scale: float = 1.0,
    sign: int = 1,
    model_dtype: torch.dtype | None = None,
    to_latents: Callable[[Tensor], Tensor] = lambda sigma: sigma,
) -> Tensor:
    """u(x_t, t, r) = 1 / (t - r) int_r^t v(x_s, s) ds,  dx/ds = v  (AnyFlow, arXiv 2605.13724)

    by N Euler steps from t down to r:  s_k = t + k/N (r - t),  u = 1/N sum_k v(x_k, s_k),
    x_{k+1} = x_k + (s_{k+1} - s_k) v(x_k, s_k). The mean is accumulated, never taken as (x_N - x_0) / (r - t), and
    needs no division where r = t. With one step it is v(x_t, t), whatever r is.

    ``velocity(x_k, s_k)`` gives the prediction, and the unconditional one or None; both in the model's own ``sign``
    (+1: noise - x0). With ``guidance_scale`` g: v = v_u + g (v_c - v_u).
    Shapes: ``x`` [B, ...]; ``sigma`` (t) and ``r`` alike, as ``velocity`` takes them; ``to_latents`` lays them out so
        that they broadcast to x.
    Dtypes: x and the mean are float32 (float64 stays float64); ``velocity`` is given x in ``model_dtype``.
    Returns the noiseward mean, [B, ...].
    """
    grid = [torch.lerp(sigma, r, k / steps) for k in range(steps + 1)]
    weight = to_latents(torch.full_like(sigma, 1 / steps))
    model_input = x if model_dtype is None else x.to(model_dtype)
    state: RolloutState | None = None
    for k in range(steps):
        v, v_uncond = velocity(model_input, grid[k])
        state = rollout_step(
            x,
            None if state is None else state.average,
            v,
            to_latents(grid[k]),
            to_latents(grid[k + 1]),
            weight,
            uncond_velocity=v_uncond,
            guidance_scale=guidance_scale,
            sign=sign,
            model_dtype=model_dtype,
            last=k == steps - 1,
        )
        if state.x is not None and state.model_input is not None:
            x, model_input = state.x, state.model_input
    assert state is not None
    return state.average
