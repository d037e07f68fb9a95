"""A small network trained by the on-policy stage on a mixture of Gaussians, against its exact flow map."""

from __future__ import annotations

import copy
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

SAMPLING = (1, 2, 4, 8)
WIDTH, BATCH, STEPS, RATE, BETAS = 64, 256, 600, 1e-3, (0.0, 0.999)
CONFIG: dict[str, Any] = {
    "schedule_shift": 1.0,
    "onpolicy_forward": "online_teacher",
    "teacher_rollout_steps": 4,
    "critic_learning_rate": 1e-3,
    "critic_max_grad_norm": None,
    "simulation_steps": SAMPLING,
}


class Net(nn.Module):
    """Of x and one or two times. ``around``: what it corrects, and is at first."""

    dtype = torch.float32

    def __init__(self, times: int, around: Any = None) -> None:
        super().__init__()
        sizes = (2 + 3 * times, WIDTH, WIDTH, WIDTH)
        layers = [layer for size in pairwise(sizes) for layer in (nn.Linear(*size), nn.SiLU())]
        self.layers, self.last, self.around = nn.Sequential(*layers), nn.Linear(WIDTH, 2), around
        if around is not None:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, *times: Tensor) -> Tensor:
        features = [x, *(f for t in times for f in (t[:, None], (math.pi * t[:, None]).cos(), t[:, None].square()))]
        correction = self.last(self.layers(torch.cat(features, dim=1)))
        return correction if self.around is None else self.around(x, *times) + correction


class Exact(nn.Module):
    dtype = torch.float32

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return mixture.velocity(x, s)


class NetDenoiser:
    """A flow map is asked with its r, a velocity without."""

    spec = find_spec("SD3Transformer2DModel")

    def __init__(self, bare: nn.Module) -> None:
        self.bare = bare

    def __call__(self, batch: Any, x: Tensor, sigma: Tensor, r: Tensor | None, *, negative: bool = False) -> Tensor:
        return self.bare(x, sigma) if r is None else self.bare(x, sigma, r)


def stage_for(mode: str, network: nn.Module) -> Any:
    """The real score is the mixture's own velocity; the critic is it as well, until it has learned a correction."""
    config = AnyFlowConfig(target_mode=mode, **CONFIG)
    critic = NetDenoiser(Net(1, mixture.velocity)) if mode == "onpolicy" else None
    return make_stage(Roles(config, RandomStreams(0), NetDenoiser(Exact()), NetDenoiser(network), critic=critic))


def train(mode: str, network: nn.Module, rate: float, seed: int) -> None:
    stage, generator = stage_for(mode, network), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), rate, betas=BETAS)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / STEPS)
        noise = torch.randn(BATCH, 2, generator=generator)
        sigmas = 1 - torch.rand(BATCH, generator=generator)
        batch: dict[str, Any] = {"latents": mixture.sample(BATCH, generator), "noise": noise, "sigmas": sigmas}
        layout = TimeLayout(NetDenoiser.spec, network, noise)
        sigma, r = stage.times(batch, layout)
        batch |= {**stage.prepare(batch, layout, sigma, r, None), "anyflow_sigmas": sigma}
        loss, _ = stage.loss(batch, network(batch["noisy_latents"], sigma, r))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'|: 0 for one distribution."""
    a, b = a.double(), b.double()
    return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()


@torch.no_grad()
def errors(network: nn.Module, noise: Tensor, exact: Tensor, data: Tensor) -> dict[int, tuple[float, float]]:
    """steps -> (rmse to the exact flow map from the same noise, energy distance to the data)."""
    found = {}
    for steps in SAMPLING:
        x = noise
        for t, r in pairwise(torch.linspace(1, 0, steps + 1)):
            x = x - (t - r) * network(x, t.expand(len(x)), r.expand(len(x)))
        found[steps] = (x - exact).square().sum(1).mean().sqrt().item(), energy_distance(x, data)
    return found


@pytest.mark.slow
def test_closer_in_map_and_in_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    """After a short forward stage: as many steps again with distribution matching, against as many without."""
    torch.manual_seed(0)
    network = Net(2)
    train("online_teacher", network, 2 * RATE, 0)
    alone = copy.deepcopy(network)
    train("online_teacher", alone, RATE, 1)
    train("onpolicy", network, RATE, 1)

    generator = torch.Generator().manual_seed(5)
    noise, data, one = torch.randn(2000, 2, generator=generator), mixture.sample(2000, generator), torch.ones(2000)
    exact = mixture.flow_map(noise, one, 0 * one, 64)
    before, after = errors(alone, noise, exact, data), errors(network, noise, exact, data)
    floor = energy_distance(exact, data)  # what two sets of samples of one distribution differ by
    with capsys.disabled():
        print(f"\nenergy distance of exact samples: {floor:.4f}", end="")
        for what, found in (("forward alone", before), ("with on-policy", after)):
            for steps, (rmse, energy) in found.items():
                print(f"\n{what}, {steps} steps: rmse {rmse:.3f}, energy distance {energy:.4f}", end="")
    for steps in (1, 2):
        assert after[steps][0] < 0.85 * before[steps][0]
        assert after[steps][1] - floor < (before[steps][1] - floor) / 2
    for steps in (4, 8):  # where the map was good already: it stays, and the distribution is better
        assert after[steps][0] < 1.25 * before[steps][0] and after[steps][1] < before[steps][1]
