"""A small network trained by the forward stage comes to the flow map that an ODE solver gives."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import mixture
import pytest
import torch
from torch import Tensor, nn

from anyflow import AnyFlowConfig
from anyflow.families import find_spec
from anyflow.layout import TimeLayout
from anyflow.stages import Roles, make_stage
from anyflow.streams import RandomStreams
from anyflow.time import phase_of_draw, sample_intervals

WIDTH, STEPS, BATCH, RATE = 16, 2000, 8192, 2e-2
SAMPLING = (1, 2, 4, 8)
# In two dimensions a single sample's loss says nothing of its kind's, so neither the balance nor a weight is used.
CONFIG = {
    "target_mode": "meanflow",
    "schedule_shift": 1.0,
    "fuse_guidance_scale": 1.0,
    "meanflow_weight_type": "uniform",
    "meanflow_adaptive_weighting": False,
}


class Net(nn.Module):
    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 2)
        )

    def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        times = (t, r, t - r, (math.pi * t).cos(), (math.pi * r).cos(), (t - r) ** 2)
        return self.layers(torch.cat([x, torch.stack(times, dim=-1)], dim=-1))


class NetDenoiser:
    spec = find_spec("SD3Transformer2DModel")

    def __init__(self, bare: Net) -> None:
        self.bare = bare

    def __call__(self, batch: Any, x: Tensor, sigma: Tensor, r: Tensor | None, *, negative: bool = False) -> Tensor:
        assert r is not None and not negative
        return self.bare(x, sigma, r)


def test_the_solver_is_good_enough() -> None:
    """Fourth order: with twice the steps the end moves by less than 1e-4, a thousandth of the errors below; and the
    velocity is what the least squares fit of noise - x0 at one place of the path finds."""
    generator = torch.Generator().manual_seed(0)
    z, one = torch.randn(500, 2, generator=generator), torch.ones(500)
    ends = [mixture.flow_map(z, one, 0 * one, steps) for steps in (32, 64)]
    assert (ends[0] - ends[1]).norm(dim=1).max() < 1e-4
    x0, noise = mixture.sample(2_000_000, generator), torch.randn(2_000_000, 2, generator=generator)
    x = 0.4 * x0 + 0.6 * noise
    near = (x - torch.tensor([0.3, 0.2])).norm(dim=1) < 0.05
    expected = mixture.velocity(torch.tensor([[0.3, 0.2]]), torch.tensor([0.6]))[0]
    found = (noise - x0)[near]
    assert ((found.mean(0) - expected).abs() <= 4 * found.std(0) / len(found) ** 0.5).all()


@pytest.fixture(scope="module")
def reference() -> tuple[Tensor, Tensor]:
    z, one = torch.randn(4000, 2, generator=torch.Generator().manual_seed(99)), torch.ones(4000)
    return z, mixture.flow_map(z, one, 0 * one, 64).float()


def errors(u: Any, reference: tuple[Tensor, Tensor]) -> list[float]:
    """Root mean square distance to the flow map's end, by steps of the any-step sampler."""
    found = []
    for steps in SAMPLING:
        x = reference[0]
        for t, r in pairwise(torch.linspace(1, 0, steps + 1)):
            x = x - (t - r) * u(x, t.expand(len(x)), r.expand(len(x)))
        found.append((x - reference[1]).square().sum(1).mean().sqrt().item())
    return found


def trained(loss_of: Any) -> Net:
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        optimizer.zero_grad()
        loss_of(net, generator, step).backward()
        optimizer.step()
    return net.requires_grad_(False)


@pytest.mark.slow
def test_the_forward_stage_finds_the_flow_map(reference: tuple[Tensor, Tensor]) -> None:
    stages: dict[int, Any] = {}

    def forward(net: Net, generator: torch.Generator, step: int) -> Tensor:
        if id(net) not in stages:
            config = AnyFlowConfig(**CONFIG)
            denoiser: Any = NetDenoiser(net)
            stages[id(net)] = make_stage(Roles(config, RandomStreams(0), denoiser, denoiser)), denoiser
        stage, denoiser = stages[id(net)]
        x0 = mixture.sample(BATCH, generator)
        batch = {"latents": x0, "noise": torch.randn(BATCH, 2, generator=generator)}
        layout = TimeLayout(denoiser.spec, net, x0)
        sigma, r = stage.times(batch, layout)
        prepared = stage.prepare(batch, layout, sigma, r, None)
        return stage.loss(prepared, net(prepared["noisy_latents"], sigma, r))[0]

    generator = torch.Generator().manual_seed(2)
    pool = 40_000
    t, r = (side.float() for side in sample_intervals(pool, 0.5, 0.25, 1.0, phase_of_draw(1), generator))
    x = (1 - t)[:, None] * mixture.sample(pool, generator) + t[:, None] * torch.randn(pool, 2, generator=generator)
    interval = (t - r)[:, None]
    mean = (x - mixture.flow_map(x, t, r, 32)) / interval
    average = torch.where(interval > 1e-3, mean, mixture.velocity(x, t)).float()

    def direct(net: Net, generator: torch.Generator, step: int) -> Tensor:
        index = torch.randint(pool, (BATCH,), generator=generator)
        return (net(x[index], t[index], r[index]) - average[index]).square().mean()

    found, best = errors(trained(forward), reference), errors(trained(direct), reference)
    euler = errors(lambda x, t, r: mixture.velocity(x, t), reference)
    print(f"steps {SAMPLING}: forward stage {found}, direct regression {best}, Euler {euler}")
    assert all(a <= 2 * b for a, b in zip(found, best, strict=True)), (found, best)
    assert all(a <= b / 2 for a, b in zip(found[:3], euler[:3], strict=True)), (found, euler)
