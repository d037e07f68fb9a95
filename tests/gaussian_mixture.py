"""A 2-D Gaussian mixture, whose flow is known: velocity in closed form, flow map by an ODE solver in float64."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from anyflow.families import find_spec
from anyflow.time import sigma_grid

WEIGHTS = torch.tensor([0.3, 0.1, 0.2, 0.25, 0.15], dtype=torch.float64)
ANGLES = 2 * math.pi / 5 * torch.arange(5, dtype=torch.float64)
MEANS = 1.5 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
WIDTH = 0.25


def data(count: int, generator: torch.Generator) -> Tensor:
    """Samples x0, float64."""
    component = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)
    return MEANS[component] + WIDTH * torch.randn(count, 2, generator=generator, dtype=torch.float64)


def velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """E[noise - x0 | x_sigma = x] of x_sigma = (1 - sigma) x0 + sigma noise: x [B, 2], sigma [B]."""
    means, weights, s = MEANS.to(x), WEIGHTS.to(x), sigma.to(x).view(-1, 1)
    variance = ((1 - s) * WIDTH) ** 2 + s**2  # of x_sigma in each component
    distance = x[:, None] - (1 - s)[..., None] * means
    posterior = (weights.log() - distance.square().sum(-1) / (2 * variance)).softmax(1)[..., None]
    x0 = means + ((1 - s) * WIDTH**2 / variance)[..., None] * distance
    noise = (s / variance)[..., None] * distance
    return (posterior * (noise - x0)).sum(1)


def flow_map(x: Tensor, t: float, r: float, steps: int = 200) -> Tensor:
    """x_r from x_t: Runge-Kutta 4 in float64."""
    x, h = x.double(), (r - t) / steps

    def v(x: Tensor, s: float) -> Tensor:
        return velocity(x, torch.full((len(x),), s, dtype=torch.float64))

    for k in range(steps):
        s = t + k * h
        k1 = v(x, s)
        k2 = v(x + h / 2 * k1, s + h / 2)
        k3 = v(x + h / 2 * k2, s + h / 2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + v(x + h * k3, s + h))
    return x


class Network(nn.Module):
    """A small network of x and ``times`` times. ``around``: what it corrects, and at first is."""

    dtype = torch.float32

    def __init__(self, times: int, around: Any = None, width: int = 96) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(2 + 5 * times, width), nn.SiLU()]
        for _ in range(2):
            layers += [nn.Linear(width, width), nn.SiLU()]
        self.layers, self.around = nn.Sequential(*layers, nn.Linear(width, 2)), around
        if around is not None:
            nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
            nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, *times: Tensor) -> Tensor:
        features = [x]
        for time in times:
            t = math.pi * time.to(x).view(-1, 1)
            features += [t, t.cos(), t.sin(), (2 * t).cos(), (2 * t).sin()]
        correction = self.layers(torch.cat(features, 1))
        return correction if self.around is None else self.around(x, *times) + correction


class Exact(nn.Module):
    """The mixture's own velocity as a network."""

    dtype = torch.float32

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return velocity(x, sigma)


class MixtureDenoiser:
    """A ``Denoiser``: of a flow map with its r, of a velocity without."""

    def __init__(self, bare: nn.Module) -> None:
        self.bare, self.spec = bare, find_spec("SD3Transformer2DModel")

    def __call__(self, batch: Any, x: Tensor, sigma: Tensor, r: Tensor | None, *, negative: bool = False) -> Tensor:
        return self.bare(x, sigma) if r is None else self.bare(x, sigma, r)


@torch.no_grad()
def sample(network: nn.Module, noise: Tensor, steps: int) -> Tensor:
    x, grid = noise, sigma_grid(steps)
    for t, r in pairwise(grid):
        x = x - (t - r) * network(x, t.expand(len(x)), r.expand(len(x)))
    return x


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'|: 0 for one distribution."""
    a, b = a.double(), b.double()
    return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()
