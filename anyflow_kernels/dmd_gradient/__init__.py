"""``dmd_gradient``: the gradient and the loss of distribution matching distillation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _library
from . import reference

__all__ = ["dmd_gradient"]


def dmd_gradient(
    x: Tensor,
    sigma: Tensor,
    x_sigma: Tensor,
    real_velocity: Tensor,
    fake_velocity: Tensor,
    *,
    uncond_real_velocity: Tensor | None = None,
    guidance_scale: float = 1.0,
    sign: int = 1,
) -> tuple[Tensor, Tensor]:
    """gradient_b = (x0_fake - x0_real) / mean|x - x0_real|,  loss_b = mean (x - stopgrad(x - gradient))^2 / 2,
    x0 = x_sigma - sigma sign v,  v_real = v_u + guidance_scale (v_c - v_u)

    Distribution matching (DMD2, arXiv 2405.14867; on flow maps AnyFlow, arXiv 2605.13724): both scores' estimates of
    the clean sample, from ``x_sigma``, the student's sample ``x`` noised; their difference in units of the real
    estimate's mean distance, per sample; and the loss whose derivative in x is gradient / elements of a sample. A
    sample has zero gradient and zero loss where the normaliser is zero, or where it or a score is not finite; the
    others do not notice.

    Shapes: ``x``, ``x_sigma``, ``real_velocity`` (v_c), ``fake_velocity`` and ``uncond_real_velocity`` (v_u) alike,
        [B, ...], any strides; ``sigma``: one element, [B], or anything of x's rank that broadcasts to x.
    Returns (loss [B], gradient in the shape of x, which takes no gradient itself).
    Dtypes: any floating point. Computed and returned in float32 (float64 when x, x_sigma or the real velocity is
        float64); the derivative comes back in the dtype of ``x``.
    Units: sigma in [0, 1], 1 = noise; velocities are noiseward after ``sign`` (+1 or -1; -1 for a model that predicts
        x0 - noise). ``guidance_scale`` is that of the real score; 1 needs no ``uncond_real_velocity``.
    Saved for backward: the gradient. Differentiable in ``x`` only, through the loss.
    Deterministic. Results are contiguous and alias no input. Differences whose squares are beyond the accumulator's
        range count as not finite.

    Raises ValueError for unequal or non-broadcastable shapes, mixed devices, non-floating dtypes, a guidance_scale
    without ``uncond_real_velocity``, a sign other than +1 or -1, or a tensor other than ``x`` that requires a gradient;
    NotImplementedError under forward-mode differentiation.
    """
    _library.guidance("dmd_gradient", guidance_scale, "uncond_real_velocity", uncond_real_velocity)
    if sign not in (1, -1):
        raise ValueError(f"dmd_gradient: sign must be 1 or -1, got {sign!r}")
    if x.ndim == 0:
        raise ValueError("dmd_gradient: x has no batch dimension")
    constants = {
        "x_sigma": x_sigma,
        "real_velocity": real_velocity,
        "fake_velocity": fake_velocity,
        "uncond_real_velocity": uncond_real_velocity,
    }
    _library.same_shape("dmd_gradient", x=x, **constants)
    _library.floating_on_one_device("dmd_gradient", x=x, sigma=sigma, **constants)
    _library.constant("dmd_gradient", sigma=sigma, **constants)
    _library.broadcasts("dmd_gradient", x, sigma=sigma)
    _library.refuse_forward_ad("dmd_gradient", x, sigma, *constants.values())
    return torch.ops.anyflow_kernels.dmd_gradient.default(x, sigma, *constants.values(), float(guidance_scale), sign)


def _fake(
    x: Tensor,
    sigma: Tensor,
    x_sigma: Tensor,
    real_velocity: Tensor,
    fake_velocity: Tensor,
    uncond_real_velocity: Tensor | None,
    guidance_scale: float,
    sign: int,
) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {
        "dtype": _library.accumulation_dtype(x, x_sigma, real_velocity),
        "device": x.device,
    }
    return torch.empty(x.shape[0], **options), torch.empty(x.shape, **options)


def _backward_fake(grad_loss: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * 8
    (gradient,) = ctx.saved_tensors
    return torch.ops.anyflow_kernels.dmd_gradient_backward.default(grad_loss, gradient, ctx.dtype), *(None,) * 7


_library.define(
    "dmd_gradient",
    "(Tensor x, Tensor sigma, Tensor x_sigma, Tensor real_velocity, Tensor fake_velocity, "
    "Tensor? uncond_real_velocity, float guidance_scale, int sign) -> (Tensor, Tensor)",
    fake=_fake,
    implementations={"reference": reference.dmd_gradient, "triton": f"{__name__}.kernels:dmd_gradient"},
    autograd=(_setup_context, _backward),
)
_library.define(
    "dmd_gradient_backward",
    "(Tensor grad_loss, Tensor gradient, ScalarType dtype) -> Tensor",
    fake=_backward_fake,
    implementations={
        "reference": reference.dmd_gradient_backward,
        "triton": f"{__name__}.kernels:dmd_gradient_backward",
    },
)
