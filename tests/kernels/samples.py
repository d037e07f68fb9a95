"""Inputs of every operator, its formula in plain PyTorch, and the rule that results are held to."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import anyflow_kernels
from anyflow_kernels import EmbedderWeights
from benchmarks import measure

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATORS = (
    "gate_blend",
    "rollout_step",
    "flowmap_embedding",
    "interval_inputs",
    "flowmap_loss",
    "dmd_gradient",
)


TIMES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {  # shapes of a tensor and of its times
    "scalar": ((2, 3, 4, 9), ()),
    "one": ((2, 3, 4, 9), (1,)),
    "per sample": ((2, 3, 4, 9), (2,)),
    "per frame": ((2, 3, 4, 3, 3), (2, 1, 4, 1, 1)),
    "per frame, shared": ((2, 3, 4, 3, 3), (1, 1, 4, 1, 1)),
    "per token": ((2, 7, 63), (2, 7, 1)),
    "per channel": ((2, 7, 5), (1, 7, 1)),
    "per element": ((2, 7, 5), (2, 7, 5)),
    "last dimension": ((2, 7, 5), (1, 1, 5)),
    "no pattern": ((2, 3, 2, 2, 3, 2), (2, 1, 2, 1, 3, 1)),
    "two tiles": ((1, 3, 500), (1,)),
    "many rows": ((40, 5, 9), (40, 5, 1)),
    "empty": ((0, 3), (0,)),
    "empty samples": ((2, 0), (2,)),
    "zero dimensions": ((), ()),
}


@dataclass(frozen=True)
class Sample:
    tensors: dict[str, Tensor]
    run: Callable[..., tuple[Tensor, ...]]  # the public operator on such tensors
    formula: Callable[..., tuple[Tensor, ...]]  # in plain PyTorch, in the dtypes of the tensors; exact: unrounded
    raw: Callable[..., tuple[Any, ...]]  # what the public function hands to the dispatcher
    terms: int  # of the longest sum

    @property
    def differentiable(self) -> list[str]:
        return [name for name, tensor in self.tensors.items() if tensor.requires_grad]

    def replaced(self, **tensors: Tensor) -> Sample:
        """With other tensors under the same names, which keep whether a gradient is asked of them."""
        ready = {n: t.detach().requires_grad_(self.tensors[n].requires_grad) for n, t in tensors.items()}
        return replace(self, tensors={**self.tensors, **ready})


def sample_inputs(
    operator: str,
    device: str = DEVICE,
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = False,
    *,
    second_dtype: torch.dtype | None = None,
    **shape: Any,
) -> Sample:
    """``dtype`` is that of base, of x, of x0, of the target velocity, or of the base embedder's weights;
    ``second_dtype`` that of delta, of the velocities, of the noise, of the predictions, or of the delta embedder's
    weights."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = dtype, spread: float = 1.0, learnt: bool = True) -> Tensor:
        values = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu") * spread
        return values.to(device, dtype).requires_grad_(requires_grad and learnt)

    def uniform(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)

    builder = globals()[f"_{operator}"]
    return builder(normal, uniform, dtype, second_dtype or dtype, **shape)


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _gate_blend(normal, uniform, dtype, second_dtype, size=(3, 63), gate=0.25) -> Sample:
    tensors = {"base": normal(*size), "delta": normal(*size, dtype=second_dtype)}
    tensors["gate"] = normal(1, dtype=_wide(dtype, second_dtype))
    tensors["gate"].data.fill_(gate)

    def formula(base: Tensor, delta: Tensor, gate: Tensor, exact: bool = False) -> tuple[Tensor]:
        return ((base + gate.to(base.dtype).reshape(()) * (delta - base)).to(base.dtype),)

    return Sample(
        tensors,
        lambda base, delta, gate: (anyflow_kernels.gate_blend(base, delta, gate),),
        formula,
        lambda base, delta, gate: (base, delta, gate),
        terms=math.prod(size),
    )


def _rollout_step(
    normal,
    uniform,
    dtype,
    second_dtype,
    size=(2, 3, 4, 9),
    times=(2,),
    guidance: float | None = 3.5,
    sign: int = -1,
    average: bool = True,
    last: bool = False,
    model_dtype: torch.dtype | None = None,
) -> Sample:
    wide = _wide(dtype, second_dtype)
    model_dtype = model_dtype or second_dtype
    tensors = {"x": normal(*size), "velocity": normal(*size, dtype=second_dtype)}
    if average:
        tensors["average"] = normal(*size, dtype=wide)
    if guidance is not None:
        tensors["uncond_velocity"] = normal(*size, dtype=second_dtype)
    tensors |= {name: uniform(*times, dtype=wide) for name in ("sigma", "sigma_next", "weight")}
    options = {"guidance_scale": 1.0 if guidance is None else guidance, "sign": sign}
    options |= {"time_scale": 1000.0, "time_offset": 0.5}

    def run(
        x, velocity, sigma, sigma_next, weight, average=None, uncond_velocity=None, **changed
    ) -> tuple[Tensor, ...]:
        state = anyflow_kernels.rollout_step(
            x,
            average,
            velocity,
            sigma,
            sigma_next,
            weight,
            uncond_velocity=uncond_velocity,
            model_dtype=model_dtype,
            last=last,
            **(options | changed),
        )
        return (state.average,) if last else (state.average, state.x, state.model_input, state.model_time)

    def formula(
        x, velocity, sigma, sigma_next, weight, average=None, uncond_velocity=None, exact=False
    ) -> tuple[Tensor, ...]:
        v = velocity
        if guidance is not None:
            v = uncond_velocity + guidance * (velocity - uncond_velocity)
        v = (sign * v).to(x.dtype if exact else wide)
        new_average = _rows(weight, size) * v + (0 if average is None else average)
        if last:
            return (new_average,)
        new_x = x.to(v.dtype) + _rows(sigma_next - sigma, size) * v
        return new_average, new_x, new_x if exact else new_x.to(model_dtype), 1000.0 * sigma_next + 0.5

    def raw(x, velocity, sigma, sigma_next, weight, average=None, uncond_velocity=None) -> tuple[Any, ...]:
        scalars = (options["guidance_scale"], sign, 1000.0, 0.5, model_dtype, last)
        return (
            x,
            average,
            velocity,
            uncond_velocity,
            _rows(sigma, size),
            _rows(sigma_next, size),
            _rows(weight, size),
            *scalars,
        )

    return Sample(tensors, run, formula, raw, terms=2)


def _flowmap_embedding(
    normal,
    uniform,
    dtype,
    second_dtype,
    rows=(3,),
    channels=36,
    hidden=(24, 20),
    width=20,
    bias: bool = True,
    with_silu: bool = True,
    deltatime_type: str = "r",
    flip: bool = True,
    shift: float = 0.0,
    span: float | None = None,
    time_dtype: torch.dtype | None = None,
) -> Sample:
    time_dtype = time_dtype or _wide(dtype, second_dtype)
    # In float64 the formula is its own oracle: at phases of 1000 the rounding of the frequencies alone would show.
    span = span or (1.0 if time_dtype == torch.float64 else 1000.0)
    tensors = {}
    for name, kind, units in (("base", dtype, hidden[0]), ("delta", second_dtype, hidden[1])):
        tensors[f"{name}_weight_1"] = normal(units, channels, dtype=kind, spread=channels**-0.5)
        tensors[f"{name}_weight_2"] = normal(width, units, dtype=kind, spread=units**-0.5)
        if bias:
            tensors[f"{name}_bias_1"] = normal(units, dtype=kind, spread=0.1)
            tensors[f"{name}_bias_2"] = normal(width, dtype=kind, spread=0.1)
    tensors["gate"] = normal(1, dtype=_wide(dtype, second_dtype))
    tensors["gate"].data.fill_(0.25)
    tensors["t"] = uniform(*rows, dtype=time_dtype) * span
    tensors["r"] = tensors["t"] * uniform(*rows, dtype=time_dtype)
    names = ("weight_1", "bias_1", "weight_2", "bias_2")
    options = {"num_channels": channels, "flip_sin_to_cos": flip, "downscale_freq_shift": shift}

    def embedders(weights: dict[str, Tensor]) -> list[EmbedderWeights]:
        return [EmbedderWeights(*(weights.get(f"{e}_{name}") for name in names)) for e in ("base", "delta")]

    def run(t: Tensor, r: Tensor, gate: Tensor, **weights: Tensor) -> tuple[Tensor, ...]:
        out = anyflow_kernels.flowmap_embedding(
            t, r, *embedders(weights), gate, deltatime_type=deltatime_type, with_silu=with_silu, **options
        )
        return out if with_silu else (out,)

    def features(time: Tensor) -> Tensor:
        half = channels // 2
        index = torch.arange(half, dtype=time.dtype, device=time.device)
        phase = time[..., None] * torch.exp(-math.log(10000.0) * index / (half - shift))
        sin, cos = phase.sin(), phase.cos()
        return F.pad(torch.cat([cos, sin] if flip else [sin, cos], -1), (0, channels % 2))

    def formula(t: Tensor, r: Tensor, gate: Tensor, exact: bool = False, **weights: Tensor) -> tuple[Tensor, ...]:
        out = []
        tau = {"r": r, "t-r": t - r, "r-t": r - t}[deltatime_type]
        for time, (w1, b1, w2, b2) in zip((t, tau), embedders(weights), strict=True):
            out.append(F.linear(F.silu(F.linear(features(time).to(w1.dtype), w1, b1)), w2, b2))
        e, d = out
        y = (e + gate.to(e.dtype) * (d - e)).to(e.dtype)
        return (y, F.silu(y)) if with_silu else (y,)

    def raw(t: Tensor, r: Tensor, gate: Tensor, **weights: Tensor) -> tuple[Any, ...]:
        base, delta = embedders(weights)
        scalars = (*options.values(), 1.0, 10000.0, 1.0, deltatime_type, with_silu)
        return (t.reshape(-1), r.reshape(-1), *base, *delta, gate, *scalars)

    return Sample(tensors, run, formula, raw, terms=max(channels, *hidden))


def _interval_inputs(
    normal,
    uniform,
    dtype,
    second_dtype,
    size=(2, 3, 4, 9),
    times=(2,),
    difference: bool = True,
    model_dtype: torch.dtype | None = None,
) -> Sample:
    wide = _wide(dtype, second_dtype)
    model_dtype = model_dtype or dtype
    tensors = {"x0": normal(*size), "noise": normal(*size, dtype=second_dtype)}
    names = ("sigma", "sigma_plus", "sigma_minus")[: 3 if difference else 1]
    tensors |= {name: uniform(*times, dtype=wide) for name in names}

    def run(x0, noise, **sigmas) -> tuple[Tensor, ...]:
        found = anyflow_kernels.interval_inputs(x0, noise, **sigmas, model_dtype=model_dtype)
        return tuple(part for part in found if part is not None)

    def formula(x0, noise, exact=False, **sigmas) -> tuple[Tensor, ...]:
        computed = x0.dtype if exact else wide
        x0, noise = x0.to(computed), noise.to(computed)
        inputs = [(1 - s) * x0 + s * noise for s in (_rows(sigma, size) for sigma in sigmas.values())]
        return *(x if exact else x.to(model_dtype) for x in inputs), noise - x0

    def raw(x0, noise, sigma, sigma_plus=None, sigma_minus=None) -> tuple[Any, ...]:
        return (x0, noise, sigma, sigma_plus, sigma_minus, model_dtype)

    return Sample(tensors, run, formula, raw, terms=4)


def _flowmap_loss(
    normal,
    uniform,
    dtype,
    second_dtype,
    size=(3, 2, 4, 9),
    times=(3,),
    weights: tuple[int, ...] | None = None,
    guidance: float | None = 3.0,
    sign: int = -1,
    difference: bool = True,
) -> Sample:
    wide = _wide(dtype, second_dtype)
    tensors = {"prediction": normal(*size, dtype=second_dtype), "target_velocity": normal(*size, learnt=False)}
    constant = {"dtype": second_dtype, "learnt": False}
    if guidance is not None:
        tensors["uncond_prediction"] = normal(*size, **constant)
    if difference:
        tensors |= {"u_plus": normal(*size, **constant), "u_minus": normal(*size, **constant)}
        tensors |= {"interval": uniform(*times, dtype=wide), "gap": 0.5 + uniform(*times, dtype=wide)}
    tensors["weight"] = uniform(*(times if weights is None else weights), dtype=wide)
    options = {"guidance_scale": 1.0 if guidance is None else guidance, "sign": sign}

    def run(prediction, target_velocity, **others) -> tuple[Tensor, ...]:
        return anyflow_kernels.flowmap_loss(prediction, target_velocity, **(options | others))

    def formula(
        prediction,
        target_velocity,
        weight,
        uncond_prediction=None,
        u_plus=None,
        u_minus=None,
        interval=None,
        gap=None,
        exact=False,
    ) -> tuple[Tensor, ...]:
        computed = prediction.dtype if exact else wide
        p, target = prediction.to(computed), target_velocity.to(computed)
        g = options["guidance_scale"]
        if guidance is not None:
            p = (p + (g - 1) * uncond_prediction.to(computed)) / g
        if difference:
            derivative = sign * (u_plus.to(computed) - u_minus.to(computed)) / _rows(gap, size)
            target = target - _rows(interval, size) * derivative / g
        square = (sign * p - target) ** 2
        samples = (size[0], math.prod(size[1:]))
        return (_rows(weight, size) * square).reshape(samples).mean(1), square.reshape(samples).mean(1)

    def raw(prediction, target_velocity, weight, **others) -> tuple[Any, ...]:
        names = ("uncond_prediction", "u_plus", "u_minus", "interval", "gap")
        optional = (others.get(name) for name in names)
        return (prediction, target_velocity, *optional, weight, *options.values(), prediction.requires_grad)

    return Sample(tensors, run, formula, raw, terms=math.prod(size[1:]))


def _dmd_gradient(
    normal,
    uniform,
    dtype,
    second_dtype,
    size=(3, 2, 4, 9),
    times=(3,),
    guidance: float | None = 3.5,
    sign: int = -1,
) -> Sample:
    wide = _wide(dtype, second_dtype)
    constant = {"dtype": second_dtype, "learnt": False}
    tensors = {"x": normal(*size), "x_sigma": normal(*size, **constant)}
    tensors |= {name: normal(*size, **constant) for name in ("real_velocity", "fake_velocity")}
    if guidance is not None:
        tensors["uncond_real_velocity"] = normal(*size, **constant)
    tensors["sigma"] = uniform(*times, dtype=wide)
    options = {"guidance_scale": 1.0 if guidance is None else guidance, "sign": sign}

    def run(x, sigma, x_sigma, real_velocity, fake_velocity, **others) -> tuple[Tensor, ...]:
        return anyflow_kernels.dmd_gradient(x, sigma, x_sigma, real_velocity, fake_velocity, **(options | others))

    def formula(
        x, sigma, x_sigma, real_velocity, fake_velocity, uncond_real_velocity=None, exact=False
    ) -> tuple[Tensor, ...]:
        computed = x.dtype if exact else wide
        x, x_sigma, real, fake = (t.to(computed) for t in (x, x_sigma, real_velocity, fake_velocity))
        if guidance is not None:
            uncond = uncond_real_velocity.to(computed)
            real = uncond + guidance * (real - uncond)
        x0_real, x0_fake = (x_sigma - _rows(sigma, size) * sign * v for v in (real, fake))
        samples = (size[0], math.prod(size[1:]))
        normaliser = (x - x0_real).abs().reshape(samples).mean(1)
        gradient = ((x0_fake - x0_real) / _rows(normaliser, size)).detach()
        return 0.5 * ((x - (x - gradient).detach()) ** 2).reshape(samples).mean(1), gradient

    def raw(x, sigma, x_sigma, real_velocity, fake_velocity, uncond_real_velocity=None) -> tuple[Any, ...]:
        constants = (x_sigma, real_velocity, fake_velocity, uncond_real_velocity)
        return (x, sigma, *constants, *options.values())

    return Sample(tensors, run, formula, raw, terms=math.prod(size[1:]))


def _rows(time: Tensor, size: tuple[int, ...]) -> Tensor:
    """In a shape that broadcasts to ``size``."""
    return time if time.ndim == len(size) else time.reshape(time.shape + (1,) * (len(size) - time.ndim))


def upstream(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients that arrive at the outputs, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(o.shape, generator=generator, dtype=torch.float64, device="cpu").to(o.device, o.dtype)
        for o in outputs
        if o.requires_grad
    ]


def outputs_and_gradients(
    sample: Sample, function: Callable[..., tuple[Tensor, ...]], grads: list[Tensor] | None = None
):
    """(outputs, gradients by name)"""
    outputs = function(**sample.tensors)
    names = sample.differentiable
    if not names:
        return outputs, {}
    differentiable = tuple(o for o in outputs if o.requires_grad)
    grads = upstream(outputs) if grads is None else grads
    inputs = [sample.tensors[n] for n in names]
    found = torch.autograd.grad(differentiable, inputs, grads, allow_unused=True, materialize_grads=True)
    return outputs, dict(zip(names, found, strict=True))


def check_against_oracle(sample: Sample) -> None:
    """Every output and gradient is at most twice as far from the float64 value as plain PyTorch in the same dtypes.

    To which is added half an ulp of the largest value, the rounding that nobody avoids and that plain PyTorch may
    escape by luck where there are few values; and the rounding errors of sums in another order, which grow with the
    root of the number of terms: four times that, in ulps of the accumulator.
    """
    outputs, gradients = outputs_and_gradients(sample, sample.run)
    grads = upstream(outputs)
    plain_outputs, plain_gradients = outputs_and_gradients(sample, sample.formula, grads)
    exact_sample = sample.replaced(**{n: t.detach().double() for n, t in sample.tensors.items()})
    formula = functools.partial(sample.formula, exact=True)
    exact_outputs, exact_gradients = outputs_and_gradients(exact_sample, formula, [g.double() for g in grads])

    for position, (actual, plain, exact) in enumerate(zip(outputs, plain_outputs, exact_outputs, strict=True)):
        assert actual.dtype == plain.dtype
        assert actual.is_contiguous()
        _close(f"output {position}", actual, plain, exact, sample.terms)
    # The gate's gradient is one sum over all outputs, whose errors meet by chance: plain PyTorch's own error is then
    # that of an output times the root of their number, not what the one draw shows.
    chance = _error(plain_outputs[0], exact_outputs[0]) * outputs[0].numel() ** 0.5
    for name, actual in gradients.items():
        assert actual.dtype == sample.tensors[name].dtype, name
        spread = chance if actual.numel() == 1 else 0.0
        _close(f"gradient of {name}", actual, plain_gradients[name], exact_gradients[name], sample.terms, spread)


def allocated_by_the_loss() -> int:
    """Bytes that flowmap_loss takes for bfloat16 predictions of 128 KiB and differences in float32."""
    sample = sample_inputs(
        "flowmap_loss", "cpu", torch.float32, second_dtype=torch.bfloat16, size=(1, 1 << 16), times=(1,)
    )
    u = {name: sample.tensors[name].float() for name in ("u_plus", "u_minus")}
    tensors = sample.replaced(**u).tensors
    return measure.peak_bytes(lambda: sample.run(**tensors), "cpu")


def _error(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact).abs().max().item() if exact.numel() else 0.0


def _close(name: str, actual: Tensor, plain: Tensor, exact: Tensor, terms: int, spread: float = 0.0) -> None:
    assert actual.shape == exact.shape, name
    if actual.numel() == 0:
        return
    wide = torch.promote_types(actual.dtype, torch.float32)
    magnitude = max(exact.abs().max().item(), terms**0.5 if exact.numel() == 1 else 0.0)
    floor = 0.5 * torch.finfo(actual.dtype).eps + 4 * terms**0.5 * torch.finfo(wide).eps
    allowed = 2 * max(_error(plain, exact), spread) + floor * magnitude
    error = _error(actual, exact)
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
