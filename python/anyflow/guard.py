"""Steps that would ruin the weights, skipped on all ranks and counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .distributed import is_sharded, sum_over_ranks


class FiniteSteps:
    """Keeps an optimizer from stepping along gradients that are not finite.

    ``skipped``: how many steps it has kept back; equal on all ranks.

    The gradients of such a step are dropped, and an optimizer passes over parameters that have none: no weight, moment
    or weight decay moves. A loss that is not finite gives a gradient that is not, so the gradients alone decide.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self.active = False

    def guard(self, optimizer: Any) -> None:
        self.active = True
        bare = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper holds it
        bare.register_step_pre_hook(self._before_step)

    def watch(self, loss: Tensor) -> None:
        """Have the backward of ``loss`` give NaN where it is not finite itself, as a float32 overflow of a mean may."""
        if self.active and loss.requires_grad:
            finite = loss.detach().isfinite()
            loss.register_hook(lambda gradient: torch.where(finite, gradient, torch.nan))

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if sum_over_ranks(_not_finite(parameters)).item():
            self.skipped += 1
            for parameter in parameters:
                parameter.grad = None


def _not_finite(parameters: list[nn.Parameter]) -> Tensor:
    """1 where a gradient, or this rank's shard of it, holds a NaN or an infinity, else 0; float32."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    local = [g.to_local() if is_sharded(g) else g for g in gradients]  # type: ignore[attr-defined]
    largest = torch.nn.utils.get_total_norm([g for g in local if g.numel()], torch.inf)
    return (~largest.isfinite()).to(parameters[0].device, torch.float32)
