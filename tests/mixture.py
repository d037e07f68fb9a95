"""A flow whose velocity is known in closed form: data from a mixture of three Gaussians in the plane."""

from __future__ import annotations

import torch
from torch import Tensor

MEANS = ((2.0, 0.0), (-1.0, 1.5), (-1.0, -1.5))
DEVIATION = 0.5


def sample(count: int, generator: torch.Generator) -> Tensor:
    means = torch.tensor(MEANS)[torch.randint(3, (count,), generator=generator)]
    return means + DEVIATION * torch.randn(count, 2, generator=generator)


def velocity(x: Tensor, s: Tensor) -> Tensor:
    """E[noise - x0 | x_s = x], for x [B, 2] and s [B]: a mean over the components, each a linear regression."""
    s = s[:, None]
    variance = (1 - s) ** 2 * DEVIATION**2 + s**2
    means = torch.tensor(MEANS, dtype=x.dtype)
    offset = x[:, None] - (1 - s)[:, :, None] * means
    share = torch.softmax(-offset.square().sum(-1) / (2 * variance), dim=-1)[..., None]
    offset, mean = (share * offset).sum(1), (share * means).sum(1)
    return s * offset / variance - (mean + (1 - s) * DEVIATION**2 * offset / variance)


def flow_map(x: Tensor, t: Tensor, r: Tensor, steps: int) -> Tensor:
    """x_r from x_t along the flow: the classical Runge-Kutta method, in float64."""
    x, s, h = x.double(), t.double(), (r.double() - t.double()) / steps
    column = h[:, None]
    for _ in range(steps):
        a = velocity(x, s)
        b = velocity(x + column / 2 * a, s + h / 2)
        c = velocity(x + column / 2 * b, s + h / 2)
        d = velocity(x + column * c, s + h)
        x, s = x + column / 6 * (a + 2 * b + 2 * c + d), s + h
    return x
