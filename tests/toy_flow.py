"""A closed-form flow map in the place of a network, in any dtype, for the stages of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from anyflow import AnyFlowConfig
from anyflow.families import find_spec
from anyflow.stages import Roles, make_stage
from anyflow.streams import RandomStreams


class Toy(nn.Module):
    """u_c = a sin(x) (1 + t) + b (t - r) x,  u_u = cos(x) (t + r),  base velocity = x t / 2; times ``sign``."""

    def __init__(self, dtype: torch.dtype, a: float = 0.7, b: float = -0.4) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=dtype))
        self.b = nn.Parameter(torch.tensor(b, dtype=dtype))

    @property
    def dtype(self) -> torch.dtype:
        return self.a.dtype

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None, negative: bool = False) -> Tensor:
        t = t.reshape(-1, *(1,) * (x.ndim - 1)).to(x.dtype)
        if r is None:
            return x * t / 2
        r = r.reshape(t.shape).to(x.dtype)
        if negative:
            return x.cos() * (t + r)
        return self.a * x.sin() * (1 + t) + self.b * (t - r) * x


class ToyDenoiser:
    """A ``Denoiser`` of one of the families' conventions."""

    def __init__(self, bare: Toy, family: str) -> None:
        self.bare, self.spec = bare, find_spec(family)
        self.calls: list[tuple[Tensor, Tensor, Tensor | None, bool]] = []

    def __call__(self, batch: Any, x: Tensor, sigma: Tensor, r: Tensor | None, *, negative: bool = False) -> Tensor:
        self.calls.append((x, sigma, r, negative))
        return self.spec.prediction_sign * self.bare(x, sigma, r, negative)


def toy_stage(dtype: torch.dtype, family: str = "SD3Transformer2DModel", streams: Any = None, **config: Any) -> Any:
    """(stage, denoiser) of target_mode "meanflow"."""
    settings = AnyFlowConfig(target_mode="meanflow", **{"schedule_shift": 3.0, **config})
    denoiser = ToyDenoiser(Toy(dtype), family)
    roles = Roles(settings, streams or RandomStreams(settings.seed), denoiser, denoiser)
    return make_stage(roles), denoiser
