"""Averaged weights: an ``EMAModel`` of diffusers over the trained parameters, or a deep copy of the student."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

COUNTERS = (
    "decay",
    "min_decay",
    "optimization_step",
    "update_after_step",
    "use_ema_warmup",
    "inv_gamma",
    "power",
    "cur_decay_value",
)


def is_list(ema: Any) -> bool:
    """Whether ``ema`` is a list of parameters, as diffusers' EMAModel, and not a model."""
    return hasattr(ema, "shadow_params")


def averaged(ema: Any, trained: list[tuple[str, nn.Parameter]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(name -> averaged tensor, metadata) of an EMAModel over ``trained``. ValueError when it is over another list."""
    names = [name for name, _ in trained]
    _check_list([tuple(parameter.shape) for _, parameter in trained], ema.shadow_params, names)
    counters = {key: getattr(ema, key) for key in COUNTERS if hasattr(ema, key)}
    return dict(zip(names, ema.shadow_params, strict=True)), {"ema": json.dumps({"names": names, **counters})}


def plan_list(where: str, ema: Any, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Callable[[], None]:
    """Check that an EMAModel is over the list that was saved; what is returned restores it, counters included."""
    if "ema" not in metadata:
        raise ValueError(f"{where} was saved from a model, not from an EMAModel: load it into one")
    saved = json.loads(metadata["ema"])
    names = saved.pop("names")
    if not tensors.keys() >= set(names):
        raise ValueError(f"{where} lacks {sorted(set(names) - tensors.keys())}; nothing was loaded")
    _check_list([tuple(tensors[name].shape) for name in names], ema.shadow_params, names)

    def put() -> None:
        for name, shadow in zip(names, ema.shadow_params, strict=True):
            shadow.data = tensors[name].to(shadow.device, copy=True)
        for key, value in saved.items():
            setattr(ema, key, value)

    return put


def _check_list(expected: list[tuple[int, ...]], shadows: list[Tensor], names: list[str]) -> None:
    if len(shadows) != len(expected):
        raise ValueError(
            f"the EMA averages {len(shadows)} tensors, the student trains {len(expected)}: make it from the values of "
            "trainable_parameters(), in their order"
        )
    unfit = [
        f"{name}: {list(shadow.shape)}, trained is {list(shape)}"
        for name, shadow, shape in zip(names, shadows, expected, strict=True)
        if tuple(shadow.shape) != shape
    ]
    if unfit:
        raise ValueError(f"the EMA is over another list of tensors than the student trains: {'; '.join(unfit)}")
