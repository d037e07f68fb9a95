"""Running a network in float32, whatever the dtype of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_NARROW = (torch.bfloat16, torch.float16)
# Asked of a tensor, not computed from its values.
_QUESTIONS = frozenset(
    getattr(Tensor, name)
    for name in ("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "is_complex", "element_size")
)


@contextmanager
def float32_forward(device_type: str) -> Iterator[None]:
    """Inside the block every operation of PyTorch computes in float32: tensors of half precision are widened as they
    enter one, and casts to half precision are not made. Autocast is off and compiled functions run eagerly.

    A weight is widened where it is used, one at a time, so the memory that it takes is that of the largest weight.
    Operations that write into a tensor of half precision would write into a copy; models do not, outside of training.
    """
    with torch.compiler.set_stance("force_eager"), torch.autocast(device_type, enabled=False), _Widen():
        yield


class _Widen(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _QUESTIONS:
            return func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "__get__":  # an attribute: shape, device, dtype ...
            return _wide(func(*args, **(kwargs or {})), tensors=False)
        if func in (Tensor.bfloat16, Tensor.half):
            func = Tensor.float
        args, kwargs = tree_map(_wide, (args, kwargs or {}))
        return func(*args, **kwargs)


def _wide(value: Any, tensors: bool = True) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float32 if value in _NARROW else value
    if tensors and isinstance(value, Tensor) and value.dtype in _NARROW:
        return value.to(torch.float32)
    return value
