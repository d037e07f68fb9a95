"""Plain PyTorch: the specification of ``interval_inputs`` and its CPU path."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import accumulation_dtype, over


def interval_inputs(
    x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    sigma_plus: Tensor | None,
    sigma_minus: Tensor | None,
    model_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    accumulate = accumulation_dtype(x0, noise)
    x0, noise = x0.to(accumulate), noise.to(accumulate)

    def at(s: Tensor | None) -> Tensor:
        if s is None:
            return x0.new_empty(0, dtype=model_dtype)
        (s,) = over(x0.shape, s.to(accumulate))
        return ((1 - s) * x0 + s * noise).to(model_dtype).contiguous()

    return at(sigma), at(sigma_plus), at(sigma_minus), (noise - x0).contiguous()


def interval_inputs_backward(
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
    accumulate = torch.float64 if torch.float64 in (x0_dtype, noise_dtype) else torch.float32
    zero = sigma.new_zeros((), dtype=accumulate)
    grad_noise = zero if grad_velocity is None else grad_velocity.to(accumulate)
    grad_x0 = -grad_noise
    for grad, s in ((grad_x, sigma), (grad_plus, sigma_plus), (grad_minus, sigma_minus)):
        if grad is not None and s is not None:
            g, (s,) = grad.to(accumulate), over(grad.shape, s.to(accumulate))
            grad_x0 = grad_x0 + (1 - s) * g
            grad_noise = grad_noise + s * g
    return grad_x0.to(x0_dtype).contiguous(), (grad_noise + zero).to(noise_dtype).contiguous()
