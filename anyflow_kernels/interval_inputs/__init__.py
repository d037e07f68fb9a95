"""``interval_inputs``: the points of the straight path where a flow map's derivative is taken."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _library
from . import reference

__all__ = ["IntervalInputs", "interval_inputs"]


class IntervalInputs(NamedTuple):
    """The model's inputs, in its dtype, and the velocity of the path, float32 (float64 stays float64)."""

    x: Tensor  # at sigma
    x_plus: Tensor | None  # at sigma_plus; None without it
    x_minus: Tensor | None  # at sigma_minus; None without it
    velocity: Tensor  # noise - x0


def interval_inputs(
    x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    sigma_plus: Tensor | None = None,
    sigma_minus: Tensor | None = None,
    *,
    model_dtype: torch.dtype | None = None,
) -> IntervalInputs:
    """x_s = (1 - s) x0 + s noise at s = sigma, sigma_plus and sigma_minus,  velocity = noise - x0

    The inputs of flow-map training (AnyFlow, arXiv 2605.13724): at sigma for the prediction, at sigma + eps and
    sigma - eps for the central difference along the path, of which x_{sigma +- eps} = x_sigma +- eps velocity holds.

    Shapes: ``x0`` and ``noise`` alike, [B, ...], any strides. The sigmas: one element, [B], or anything of x0's rank
        that broadcasts to x0.
    Dtypes: any floating point. Computed in float32 (float64 when x0 or the noise is float64), which the velocity keeps;
        the inputs are rounded once, to ``model_dtype`` (default: the dtype of ``x0``).
    Units: sigma in [0, 1], 1 = noise, not checked: a central difference may reach over an end. Exact at 0 and 1.
    Saved for backward: the sigmas. Differentiable in ``x0`` and ``noise``, not in the sigmas.
    Deterministic. Results are contiguous and alias no input and not each other.

    Raises ValueError for unequal or non-broadcastable shapes, mixed devices, non-floating dtypes, one of sigma_plus and
    sigma_minus without the other, or sigmas that require gradients; NotImplementedError under forward-mode
    differentiation.
    """
    if (sigma_plus is None) != (sigma_minus is None):
        raise ValueError("interval_inputs: sigma_plus and sigma_minus go together, one of them is None")
    sigmas = {"sigma": sigma, "sigma_plus": sigma_plus, "sigma_minus": sigma_minus}
    _library.same_shape("interval_inputs", x0=x0, noise=noise)
    _library.floating_on_one_device("interval_inputs", x0=x0, noise=noise, **sigmas)
    _library.floating_dtype("interval_inputs", model_dtype=model_dtype)
    _library.constant("interval_inputs", **sigmas)
    _library.broadcasts("interval_inputs", x0, **sigmas)
    _library.refuse_forward_ad("interval_inputs", x0, noise, *sigmas.values())
    x, x_plus, x_minus, velocity = torch.ops.anyflow_kernels.interval_inputs.default(
        x0, noise, sigma, sigma_plus, sigma_minus, x0.dtype if model_dtype is None else model_dtype
    )
    if sigma_plus is None:
        return IntervalInputs(x, None, None, velocity)
    return IntervalInputs(x, x_plus, x_minus, velocity)


def _fake(
    x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    sigma_plus: Tensor | None,
    sigma_minus: Tensor | None,
    model_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def at(s: Tensor | None) -> Tensor:
        return torch.empty((0,) if s is None else x0.shape, dtype=model_dtype, device=x0.device)

    velocity = torch.empty(x0.shape, dtype=_library.accumulation_dtype(x0, noise), device=x0.device)
    return at(sigma), at(sigma_plus), at(sigma_minus), velocity


def _backward_fake(
    grad_x: Tensor | None,
    grad_plus: Tensor | None,
    grad_minus: Tensor | None,
    grad_velocity: Tensor | None,
    sigma: Tensor,
    sigma_plus: Tensor | None,
    sigma_minus: Tensor | None,
    x0_dtype: torch.dtype,
    noise_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    like = next(grad for grad in (grad_x, grad_plus, grad_minus, grad_velocity) if grad is not None)
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(like, dtype=x0_dtype, memory_format=contiguous),
        torch.empty_like(like, dtype=noise_dtype, memory_format=contiguous),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x0, noise, sigma, sigma_plus, sigma_minus, _ = inputs
    ctx.save_for_backward(sigma, sigma_plus, sigma_minus)
    ctx.dtypes = x0.dtype, noise.dtype
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    grad_x: Tensor | None,
    grad_plus: Tensor | None,
    grad_minus: Tensor | None,
    grad_velocity: Tensor | None,
) -> tuple[Any, ...]:
    if grad_x is None and grad_plus is None and grad_minus is None and grad_velocity is None:
        return (None,) * 6
    sigma, sigma_plus, sigma_minus = ctx.saved_tensors
    grads = torch.ops.anyflow_kernels.interval_inputs_backward.default(
        grad_x,
        None if sigma_plus is None else grad_plus,
        None if sigma_minus is None else grad_minus,
        grad_velocity,
        sigma,
        sigma_plus,
        sigma_minus,
        *ctx.dtypes,
    )
    return (*(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[:2], strict=True)), *(None,) * 4)


_library.define(
    "interval_inputs",
    "(Tensor x0, Tensor noise, Tensor sigma, Tensor? sigma_plus, Tensor? sigma_minus, ScalarType model_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    implementations={"reference": reference.interval_inputs, "triton": f"{__name__}.kernels:interval_inputs"},
    autograd=(_setup_context, _backward),
)
_library.define(
    "interval_inputs_backward",
    "(Tensor? grad_x, Tensor? grad_plus, Tensor? grad_minus, Tensor? grad_velocity, Tensor sigma, Tensor? sigma_plus, "
    "Tensor? sigma_minus, ScalarType x0_dtype, ScalarType noise_dtype) -> (Tensor, Tensor)",
    fake=_backward_fake,
    implementations={
        "reference": reference.interval_inputs_backward,
        "triton": f"{__name__}.kernels:interval_inputs_backward",
    },
)
