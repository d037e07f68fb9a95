"""Whether everything that is trained gets a gradient."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Names of the factors of adapters whose product starts at zero.
_FACTORS = ("lora_", "hada_", "lokr_", "vera_", "randlora_", "scalar")


class GradientCheck:
    """Follows the first backward and warns, once, of trained parameters that it did not reach or left at zero.

    A factor whose partner in the same adapter layer is still all zero (LoRA's A, as B starts at 0) has a gradient of
    zero by construction, and is not counted. Nothing is read from the device before ``report``. Where gradients are
    not kept in the parameters themselves (FSDP), nothing is seen and nothing said.
    """

    def __init__(self) -> None:
        self._watched: list[tuple[str, nn.Parameter]] | None = None
        self._started = False
        self._seen: dict[str, Tensor] = {}  # name -> [is the gradient not all zero, is the parameter not all zero]
        self._handles: list[Any] = []

    def watch(self, loss: Tensor, parameters: Callable[[], list[tuple[str, nn.Parameter]]]) -> None:
        """Follow the backward of ``loss``, unless one is followed already. ``parameters``: gives (name, parameter)."""
        if self._watched is not None or not loss.requires_grad:
            return
        self._watched = [(name, p) for name, p in parameters() if type(p) is nn.Parameter]
        self._handles = [loss.register_hook(self._start)]
        for name, parameter in self._watched:
            self._handles.append(parameter.register_post_accumulate_grad_hook(partial(self._note, name)))

    def report(self) -> None:
        """Warn of what the backward left out, if one has run."""
        if not self._started or not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        names = self.suspicious()
        if names:
            warnings.warn(
                f"{names[0]} and {len(names) - 1} more of {len(self._watched or ())} trained tensors got no gradient "
                "in the first backward. Re-entrant gradient checkpointing (use_reentrant=True) gives none where all "
                "inputs of a block are frozen; layers whose output the prediction does not depend on need no adapter. "
                f"All: {', '.join(names)}",
                stacklevel=4,
            )

    def _start(self, grad: Tensor) -> None:
        self._started = True

    def _note(self, name: str, parameter: Tensor) -> None:
        if self._started and parameter.grad is not None:
            self._seen[name] = torch.stack([parameter.grad.any(), parameter.detach().any()])

    def suspicious(self) -> list[str]:
        """The names of what got no gradient, or one of zero that nothing explains."""
        if not self._seen:
            return []
        values = torch.stack([value.cpu() for value in self._seen.values()]).tolist()
        moved = {name for name, (gradient, _) in zip(self._seen, values, strict=True) if gradient}
        starts_at_zero: dict[str | None, set[str]] = defaultdict(set)
        for name, (_, value) in zip(self._seen, values, strict=True):
            if not value:
                starts_at_zero[_adapter(name)].add(name)
        starts_at_zero.pop(None, None)
        names = [name for name, _ in self._watched or () if name not in moved]
        return [name for name in names if not starts_at_zero[_adapter(name)] - {name}]


def _adapter(name: str) -> str | None:
    """What the factors of one adapter have in common: ``to_q`` of ``to_q.lora_A.default.weight``."""
    parts = name.split(".")
    factor = next((index for index, part in enumerate(parts) if part.startswith(_FACTORS)), None)
    return None if factor is None else ".".join(parts[:factor])
