"""One distillation step in plain PyTorch, eager, as a trainer's script has it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DualTimeEmbedder(nn.Module):
    """A time embedder and a trainable copy of it for r, blended."""

    def __init__(self, base: nn.Module, projection: nn.Module, gate: float) -> None:
        super().__init__()
        self.base, self.delta = base, copy.deepcopy(base)
        self.projection, self.gate = projection, gate
        self.r: Tensor | None = None

    @property
    def linear_1(self) -> Any:  # of which the stock model asks the dtype
        return self.base.linear_1

    def forward(self, features: Tensor) -> Tensor:
        e = self.base(features)
        if self.r is None:
            return e
        d = self.delta(self.projection(self.r).to(features.dtype))
        return e + self.gate * (d - e)


def add_second_time(model: Any, embedder: str, projection: str, gate: float = 0.25) -> DualTimeEmbedder:
    """Put a dual-time embedder in the place of the stock one; paths within the model."""
    parent, _, name = embedder.rpartition(".")
    dual = DualTimeEmbedder(model.get_submodule(embedder), model.get_submodule(projection), gate)
    setattr(model.get_submodule(parent), name, dual)
    return dual


def training_step(
    model: Any, embedder: DualTimeEmbedder, batch: Mapping[str, Any], rollout_steps: int, guidance_scale: float
) -> Tensor:
    """The loss of a step; the teacher is the model with its LoRA off. ``r_sigmas`` are in the batch."""
    latents, noise, t, r = (batch[key] for key in ("latents", "noise", "sigmas", "r_sigmas"))
    dtype, rows = model.dtype, (-1, *(1,) * (latents.ndim - 1))
    sigma = t.view(rows)
    noisy = ((1 - sigma) * latents + sigma * noise).to(dtype)

    embedder.r = None
    model.disable_adapters()
    model.eval()
    with torch.no_grad():
        x, average = noisy.float(), torch.zeros_like(noisy, dtype=torch.float32)
        for k in range(rollout_steps):
            s, s_next = (t + (r - t) * i / rollout_steps for i in (k, k + 1))
            v = model(x.to(dtype), timestep=1000 * s, **batch["conditioning"], return_dict=False)[0]
            if guidance_scale != 1.0:
                uncond = batch["negative_conditioning"]
                v_u = model(x.to(dtype), timestep=1000 * s, **uncond, return_dict=False)[0]
                v = v_u + guidance_scale * (v - v_u)
            average = average + v.float() / rollout_steps
            x = x + (s_next - s).view(rows) * v.float()
    model.enable_adapters()
    model.train()

    embedder.r = 1000 * r
    prediction = model(noisy, timestep=1000 * t, **batch["conditioning"], return_dict=False)[0]
    embedder.r = None
    return F.mse_loss(prediction.float(), average)
