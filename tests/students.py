"""Students of every kind of adapter, trained for a few steps by the distiller."""

from __future__ import annotations

from typing import Any

import adapter_kinds
import tiny_models
import torch
from torch import Tensor

import anyflow

WAN, SD3 = "WanTransformer3DModel", "SD3Transformer2DModel"
FULL = "full rank"
CONFIG = {"teacher_rollout_steps": 2, "gate_value": 0.3}


def make(name: str, kind: str) -> tuple[Any, Any]:
    """A stock model, patched, with an adapter of one kind: (what the trainer holds, LyCORIS network or None)."""
    torch.manual_seed(0)
    model = tiny_models.build(name)
    anyflow.patch(model, gate_value=CONFIG["gate_value"])
    if kind == FULL:
        return model, None
    model.requires_grad_(False)
    return adapter_kinds.KINDS[kind](model)


def trained(name: str, kind: str, steps: int = 3, ema: Any = None) -> tuple[Any, Any, anyflow.AnyFlowDistiller]:
    """The same after ``steps`` steps, in evaluation mode. ``ema``: called with the trained parameters, then stepped."""
    held, network = make(name, kind)
    held.train()
    teacher = tiny_models.build(name) if kind == FULL else held
    student = held if kind == FULL else None
    distiller = anyflow.AnyFlowDistiller(teacher, student, config=CONFIG, lycoris=network)
    parameters = [parameter for _, parameter in distiller.trainable_parameters()]
    average = None if ema is None else ema(parameters)
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for step in range(steps):
        loss, _ = distiller.training_step(batch(name, step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.step(parameters)
    held.eval()
    if network is not None:
        network.eval()
    distiller.average = average  # type: ignore[attr-defined]
    return held, network, distiller


def batch(name: str, seed: int) -> dict[str, Any]:
    inputs = tiny_models.inputs(name, seed=seed)
    latents = inputs.pop("hidden_states")
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    return {"latents": latents, "noise": noise, "sigmas": torch.tensor([0.9, 0.4]), "conditioning": inputs}


@torch.no_grad()
def output(model: Any, name: str) -> Tensor:
    t, r = tiny_models.times(name, [0.9, 0.4]), tiny_models.times(name, [0.1, 0.05])
    return tiny_models.call(model, name, tiny_models.inputs(name), t, r)
