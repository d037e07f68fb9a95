"""What differs between the target modes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..layout import TimeLayout

State = tuple[dict[str, Tensor], dict[str, str]]  # tensors and strings, as safetensors holds them


class Stage(Protocol):
    """One stage of training: which times a batch has, what the student is asked for there, and the loss."""

    needs: tuple[str, ...]  # keys that a batch must have

    def times(self, batch: Mapping[str, Any], layout: TimeLayout) -> tuple[Tensor, Tensor]:
        """sigma_t and sigma_r, each laid out for the model and checked; the draws, where they are drawn."""
        ...

    def prepare(
        self, batch: Mapping[str, Any], layout: TimeLayout, sigma: Tensor, r: Tensor, model: nn.Module | None
    ) -> dict[str, Any]:
        """What is added to the batch, or replaced in it: at least ``noisy_latents`` and ``target``.

        ``target`` is float32 and in the student's own sign. ``model``: the trainer's wrapper of the network, or None.
        """
        ...

    def loss(self, prepared: Mapping[str, Any], prediction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a 0-d float32 tensor, and what the stage logs of its own: detached 0-d tensors.

        ``prediction`` has the shape of ``prepared["target"]``.
        """
        ...

    def state(self) -> State:
        """What a checkpoint has to hold beyond the student and the count of draws."""
        ...

    def plan_load(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Callable[[], None]:
        """The inverse of ``state``: checked here, with a ValueError where it does not fit, and done by what it
        returns."""
        ...


def check_devices(tensors: Mapping[str, Tensor]) -> None:
    devices = {name: str(tensor.device) for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f"the batch is on several devices: {devices}")


def check_times(sigma: Tensor, r: Tensor, instantaneous: bool = False) -> None:
    """One read of the device for all that can be wrong. Clean tokens (t = r = 0) are allowed beside noisy ones; so is
    r = t everywhere where ``instantaneous``."""
    tokens = sigma.ndim > 1
    zero = (sigma == 0).flatten(1).all(1) if tokens else sigma == 0
    clean = (sigma == 0) & (r == 0) & tokens
    not_below = r > sigma if instantaneous else (r >= sigma) & ~clean
    found = torch.stack(
        [
            (~torch.isfinite(sigma)).any(),
            ((sigma < 0) | (sigma > 1)).any(),
            zero.any(),
            (~(r >= 0)).any(),
            not_below.any(),
        ]
    ).tolist()
    if not any(found):
        return
    not_finite, outside, at_zero, bad_r, order = found
    values = f"sigmas {sigma.flatten().tolist()[:8]}, r {r.flatten().tolist()[:8]}"
    if not_finite:
        raise ValueError(f"sigmas must be finite, got {values}")
    if outside:
        raise ValueError(f"sigmas must be in [0, 1], got {values}")
    if at_zero:
        raise ValueError(f"time 0 has no interval below it, got {values}")
    if bad_r:
        raise ValueError(f"r must be in [0, t{']' if instantaneous else ')'}, got {values}")
    if order:
        raise ValueError(f"r must be {'at most' if instantaneous else 'below'} t, got {values}")
