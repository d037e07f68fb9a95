"""A small network trained by the on-policy stage on a 2-D Gaussian mixture, against its exact flow map."""

from __future__ import annotations

import copy
from typing import Any

import gaussian_mixture as mixture
import pytest
import torch
from torch import Tensor, nn

from anyflow import AnyFlowConfig
from anyflow.layout import TimeLayout
from anyflow.stages import Roles, make_stage
from anyflow.streams import RandomStreams

STEPS = (1, 2, 4, 8)
BATCH = 256


def stage_for(mode: str, network: nn.Module, **config: Any) -> Any:
    """The real score is the mixture's own velocity; the critic is it as well, until it has learned a correction."""
    settings = AnyFlowConfig(target_mode=mode, schedule_shift=1.0, fuse_guidance_scale=1.0, **config)
    critic = mixture.MixtureDenoiser(mixture.Network(1, mixture.velocity)) if mode == "onpolicy" else None
    exact, student = mixture.MixtureDenoiser(mixture.Exact()), mixture.MixtureDenoiser(network)
    return make_stage(Roles(settings, RandomStreams(0), exact, student, critic=critic))


def train(stage: Any, network: nn.Module, steps: int, rate: float, betas: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(network.parameters(), rate, betas=betas)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        batch: dict[str, Any] = {
            "latents": mixture.data(BATCH, generator).float(),
            "noise": torch.randn(BATCH, 2, generator=generator),
        }
        layout = TimeLayout(stage.roles.student.spec, network, batch["latents"])
        sigma, r = stage.times(batch, layout)
        batch |= {**stage.prepare(batch, layout, sigma, r, None), "anyflow_sigmas": sigma}
        loss, _ = stage.loss(batch, stage.roles.student(batch, batch["noisy_latents"], sigma, r))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def errors(network: nn.Module, noise: Tensor, exact: Tensor, data: Tensor) -> dict[int, tuple[float, float]]:
    """steps -> (rmse to the exact flow map from the same noise, energy distance to the data)."""
    found = {}
    for steps in STEPS:
        x = mixture.sample(network, noise, steps).double()
        rmse = (x - exact).square().sum(1).mean().sqrt().item()
        found[steps] = rmse, mixture.energy_distance(x, data)
    return found


@pytest.mark.slow
def test_closer_in_map_and_in_distribution_at_every_budget(capsys: pytest.CaptureFixture[str]) -> None:
    """After a short forward stage: as many steps on-policy again, against as many of the forward stage alone."""
    torch.manual_seed(0)
    network = mixture.Network(2)
    train(stage_for("meanflow", network), network, 1200, 2e-3, (0.9, 0.99))
    alone, betas = copy.deepcopy(network), (0.0, 0.999)
    train(stage_for("meanflow", alone), alone, 800, 5e-4, betas)
    options = {"critic_learning_rate": 1e-3, "critic_max_grad_norm": None, "simulation_steps": STEPS}
    stage = stage_for("onpolicy", network, **options)
    train(stage, network, 800, 5e-4, betas)

    generator = torch.Generator().manual_seed(5)
    noise, data = torch.randn(2000, 2, generator=generator), mixture.data(2000, generator)
    exact = mixture.flow_map(noise, 1.0, 0.0)
    assert mixture.energy_distance(exact, data) < 0.005  # what 2000 samples of one distribution differ by
    before, after = errors(alone, noise, exact, data), errors(network, noise, exact, data)
    with capsys.disabled():
        for what, found in (("forward alone", before), ("with on-policy", after)):
            for steps, (rmse, energy) in found.items():
                print(f"\n{what}, {steps} steps: rmse {rmse:.3f}, energy distance {energy:.4f}", end="")
    for steps in STEPS:
        assert after[steps][0] < before[steps][0]
    for steps in (1, 2):
        assert after[steps][0] < before[steps][0] / 1.5 and after[steps][1] < before[steps][1] / 4
