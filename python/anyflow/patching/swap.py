"""Swapping the class of an instance: a generated subclass that keeps the name of its stock class.

A subclass is visible in ``inspect.signature(model.forward)`` and holds no reference to the instance, so deep copies and
pickles run their own weights; hooks and closures on the instance give neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_generated: dict[tuple[type, type], type] = {}


class Swapped:
    """Mixin of every generated class."""

    _flowmap_stock: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(protocol)
        mixin = type(self).__mro__[1]
        return (_rebuild, (mixin, self._flowmap_stock), *reduced[2:])


def _rebuild(mixin: type[Swapped], stock: type[nn.Module]) -> nn.Module:
    return object.__new__(generate(mixin, stock))


def generate(mixin: type[Swapped], stock: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``mixin`` and ``stock``, which ``mixin._namespace(stock)`` fills; made once for each pair."""
    if (mixin, stock) not in _generated:
        namespace: Callable[[type], dict[str, Any]] = mixin._namespace  # type: ignore[attr-defined]
        _generated[mixin, stock] = type(
            stock.__name__,
            (mixin, stock),
            {
                "__module__": stock.__module__,
                "__qualname__": stock.__qualname__,
                "__doc__": stock.__doc__,
                "_flowmap_stock": stock,
                # Building one anew (type(model).from_config) gives a stock model: only instances are patched.
                "__new__": lambda cls, *args, **kwargs: stock(*args, **kwargs),
                **namespace(stock),
            },
        )
    return _generated[mixin, stock]


def swap(module: nn.Module, mixin: type[Swapped]) -> None:
    module.__class__ = generate(mixin, type(module))


def is_wrapped(module: nn.Module) -> bool:
    """Whether the instance has another forward than its class. Hooks that are taken off may leave its own behind."""
    forward = module.__dict__.get("forward")
    if getattr(forward, "__self__", None) is module and forward.__func__ is type(module).forward:  # type: ignore[union-attr]
        del module.forward
        return False
    return forward is not None


def check_restorable(module: nn.Module) -> None:
    """Raises ValueError when the module has been wrapped, or another wrapper has swapped its class, since."""
    if is_wrapped(module):
        raise ValueError(
            f"the forward of this {type(module).__name__} is wrapped (by offloading?): remove the hooks first"
        )
    if type(module) not in _generated.values():
        raise ValueError(
            f"{type(module).__name__} was wrapped after it was patched (for example by fully_shard): undo that first"
        )


def restore(module: nn.Module) -> None:
    """Give the stock class back."""
    module.__class__ = type(module)._flowmap_stock  # type: ignore[attr-defined]
