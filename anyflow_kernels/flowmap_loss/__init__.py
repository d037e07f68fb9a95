"""``flowmap_loss``: the loss of forward flow-map training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _library
from . import reference

__all__ = ["flowmap_loss"]


def flowmap_loss(
    prediction: Tensor,
    target_velocity: Tensor,
    *,
    weight: Tensor,
    uncond_prediction: Tensor | None = None,
    u_plus: Tensor | None = None,
    u_minus: Tensor | None = None,
    interval: Tensor | None = None,
    gap: Tensor | None = None,
    guidance_scale: float = 1.0,
    sign: int = 1,
) -> tuple[Tensor, Tensor]:
    """loss_b = mean weight (p - target)^2,  p = sign (u_c + (g - 1) u_u) / g,
    target = v - interval sign (u_plus - u_minus) / gap / g

    The loss of forward flow-map training (AnyFlow, arXiv 2605.13724) with its central-difference target, the mean over
    the elements of each sample. The guidance g is fused on the side of the prediction; v stays the raw velocity of the
    path. Neither p nor the target is ever stored. Without ``u_plus``, ``u_minus``, ``interval`` and ``gap``, which go
    together, the target is v; so it is where the interval is 0 (r = t), whatever stands in the other three there, not
    finite included.

    Shapes: ``prediction`` (u_c), ``target_velocity`` (v), ``uncond_prediction`` (u_u), ``u_plus`` and ``u_minus``
        alike, [B, ...], any strides. ``weight``, ``interval`` and ``gap``: one element, [B], or anything of the
        prediction's rank that broadcasts to it.
    Returns (loss, the same without the weight), [B] each.
    Dtypes: any floating point. Computed and returned in float32 (float64 when the prediction or v is float64); the
        gradient comes back in the dtype of ``prediction``.
    Units: ``target_velocity`` is noiseward, v = noise - x0; the predictions are in the model's own ``sign`` (+1 or -1;
        -1 for a model that predicts x0 - noise). ``interval`` is sigma_t - sigma_r, ``gap`` the distance in sigma at
        which u_plus and u_minus were really taken. ``guidance_scale`` g > 0; 1 needs no ``uncond_prediction``.
    Saved for backward: p - target, and the weight. Differentiable in ``prediction`` only, through both results.
    Deterministic. No result aliases an input. A sample without elements has loss 0.

    Raises ValueError for unequal or non-broadcastable shapes, mixed devices, non-floating dtypes, some but not all of
    the four, a guidance_scale that is not positive or lacks ``uncond_prediction``, a sign other than +1 or -1, or a
    tensor other than ``prediction`` that requires a gradient; NotImplementedError under forward-mode differentiation.
    """
    differences = {"u_plus": u_plus, "u_minus": u_minus}
    constants = {"target_velocity": target_velocity, "uncond_prediction": uncond_prediction, **differences}
    times = {"weight": weight, "interval": interval, "gap": gap}
    absent = [name for name, value in (*differences.items(), *times.items()) if value is None]
    if len(absent) not in (0, 4):
        raise ValueError(
            f"flowmap_loss: u_plus, u_minus, interval and gap go together, but {', '.join(absent)} is missing"
        )
    if not guidance_scale > 0:
        raise ValueError(f"flowmap_loss: guidance_scale must be positive, got {guidance_scale}")
    _library.guidance("flowmap_loss", guidance_scale, "uncond_prediction", uncond_prediction)
    if sign not in (1, -1):
        raise ValueError(f"flowmap_loss: sign must be 1 or -1, got {sign!r}")
    if prediction.ndim == 0:
        raise ValueError("flowmap_loss: prediction has no batch dimension")
    _library.same_shape("flowmap_loss", prediction=prediction, **constants)
    _library.floating_on_one_device("flowmap_loss", prediction=prediction, **constants, **times)
    _library.constant("flowmap_loss", **constants, **times)
    _library.broadcasts("flowmap_loss", prediction, **times)
    _library.refuse_forward_ad("flowmap_loss", prediction, *constants.values(), *times.values())
    loss, unweighted, _ = torch.ops.anyflow_kernels.flowmap_loss.default(
        prediction,
        *constants.values(),
        interval,
        gap,
        weight,
        float(guidance_scale),
        sign,
        prediction.requires_grad and torch.is_grad_enabled(),
    )
    return loss, unweighted


def _fake(
    prediction: Tensor,
    target_velocity: Tensor,
    uncond_prediction: Tensor | None,
    u_plus: Tensor | None,
    u_minus: Tensor | None,
    interval: Tensor | None,
    gap: Tensor | None,
    weight: Tensor,
    guidance_scale: float,
    sign: int,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options: dict[str, Any] = {
        "dtype": _library.accumulation_dtype(prediction, target_velocity),
        "device": prediction.device,
    }
    loss, unweighted = (torch.empty(prediction.shape[0], **options) for _ in range(2))
    return loss, unweighted, torch.empty(prediction.shape if need_residual else (0,), **options)


def _backward_fake(
    grad_loss: Tensor | None,
    grad_unweighted: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    guidance_scale: float,
    sign: int,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty_like(residual, dtype=dtype, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    prediction, *_, weight, guidance_scale, sign, _ = inputs
    ctx.save_for_backward(output[2], weight)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.guidance_scale, ctx.sign, ctx.dtype = guidance_scale, sign, prediction.dtype


def _backward(ctx: Any, grad_loss: Tensor | None, grad_unweighted: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad_loss is None and grad_unweighted is None:
        return (None,) * 11
    residual, weight = ctx.saved_tensors
    grad = torch.ops.anyflow_kernels.flowmap_loss_backward.default(
        grad_loss, grad_unweighted, residual, weight, ctx.guidance_scale, ctx.sign, ctx.dtype
    )
    return grad, *(None,) * 10


_library.define(
    "flowmap_loss",
    "(Tensor prediction, Tensor target_velocity, Tensor? uncond_prediction, Tensor? u_plus, Tensor? u_minus, "
    "Tensor? interval, Tensor? gap, Tensor weight, float guidance_scale, int sign, bool need_residual) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake,
    implementations={"reference": reference.flowmap_loss, "triton": f"{__name__}.kernels:flowmap_loss"},
    autograd=(_setup_context, _backward),
)
_library.define(
    "flowmap_loss_backward",
    "(Tensor? grad_loss, Tensor? grad_unweighted, Tensor residual, Tensor weight, float guidance_scale, int sign, "
    "ScalarType dtype) -> Tensor",
    fake=_backward_fake,
    implementations={
        "reference": reference.flowmap_loss_backward,
        "triton": f"{__name__}.kernels:flowmap_loss_backward",
    },
)
