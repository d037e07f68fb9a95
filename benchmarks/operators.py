"""Every operator at the sizes of real models: its inputs, its plain PyTorch, the bytes and the operations it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import anyflow_kernels

from .baselines import operators as eager

Tensors = Mapping[str, Tensor]
Operator = Callable[[Tensors], tuple[Tensor, ...]]
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    """``make`` gives the inputs on a device; those that require a gradient do so in training. ``operator`` is the
    library's public function on them, ``eager`` the plain PyTorch. ``backward_reads`` names the inputs without which
    no backward can be computed, ``flops`` are those of the formula, (forward, backward)."""

    operator_name: str
    model: str
    make: Callable[[str], Tensors]
    operator: Operator
    eager: Operator
    backward_reads: tuple[str, ...]
    flops: tuple[float, float]
    level: str = "full"  # the first of "smallest", "default" and "full" that runs it

    @property
    def name(self) -> str:
        return f"{self.operator_name}, {self.model}"

    def floor(self, tensors: Tensors, outputs: tuple[Tensor, ...], mode: str) -> int:
        """Bytes that any implementation moves: each input read once, each result written once."""
        written = {output.data_ptr(): output.nbytes for output in outputs}
        leaves = sum(tensor.nbytes for tensor in tensors.values() if tensor.requires_grad)
        gradients = sum({output.data_ptr(): output.nbytes for output in outputs if output.requires_grad}.values())
        forward = sum(tensor.nbytes for tensor in tensors.values()) + sum(written.values())
        backward = gradients + leaves + sum(tensors[name].nbytes for name in self.backward_reads)
        return {"forward": forward, "backward": backward, "both": forward + backward}[mode]

    def operations(self, mode: str) -> float:
        return {"forward": self.flops[0], "backward": self.flops[1], "both": sum(self.flops)}[mode]


class _Source:
    """Seeded tensors, drawn on the CPU so that every device has the same."""

    def __init__(self, device: str) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype, spread: float = 1.0, learnt: bool = False) -> Tensor:
        values = torch.randn(shape, generator=self.generator) * spread
        return values.to(self.device, dtype).requires_grad_(learnt)

    def times(self, rows: int, low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(rows, generator=self.generator)).to(self.device)


def embedding(
    model: str, rows: int, channels: int, hidden: int, width: int, dtype: torch.dtype, level: str = "full"
) -> Case:
    """Two embedders channels -> hidden -> width; the base frozen, the delta embedder trained."""

    def make(device: str) -> Tensors:
        source = _Source(device)
        tensors = {"t": source.times(rows, 500, 1000), "r": source.times(rows, 0, 500)}
        for name in ("base", "delta"):
            learnt = name == "delta"
            sizes = {
                "weight_1": (hidden, channels),
                "bias_1": (hidden,),
                "weight_2": (width, hidden),
                "bias_2": (width,),
            }
            for part, size in sizes.items():
                tensors[f"{name}.{part}"] = source.normal(*size, dtype=dtype, spread=size[-1] ** -0.5, learnt=learnt)
        return {**tensors, "gate": torch.tensor(0.25, device=device)}

    def arguments(tensors: Tensors) -> tuple[Tensor, Tensor, eager.Embedder, eager.Embedder, Tensor]:
        t, r, *weights, gate = tensors.values()
        (a, b, c, d), (e, f, g, h) = weights[:4], weights[4:]
        return t, r, (a, b, c, d), (e, f, g, h), gate

    def operator(tensors: Tensors) -> tuple[Tensor, ...]:
        t, r, base, delta, gate = arguments(tensors)
        weights = (anyflow_kernels.EmbedderWeights(*base), anyflow_kernels.EmbedderWeights(*delta))
        y = anyflow_kernels.flowmap_embedding(t, r, *weights, gate, num_channels=channels)
        assert isinstance(y, Tensor)
        return (y,)

    return Case(
        operator_name="flowmap_embedding",
        model=model,
        make=make,
        operator=operator,
        eager=lambda tensors: (eager.flowmap_embedding(*arguments(tensors)),),
        backward_reads=("delta.weight_2", "gate"),  # with the activations saved, which are small
        # Backward: the hidden layer again, two products with the second layer's weight, one with the features.
        flops=(4 * rows * hidden * (channels + width), 4 * rows * hidden * (channels + width)),
        level=level,
    )


def blend(model: str, rows: int, width: int, dtype: torch.dtype, level: str = "full") -> Case:
    def make(device: str) -> Tensors:
        source = _Source(device)
        named = {name: source.normal(rows, width, dtype=dtype, learnt=True) for name in ("base", "delta")}
        return {**named, "gate": torch.tensor(0.25, device=device)}

    return Case(
        operator_name="gate_blend",
        model=model,
        make=make,
        operator=lambda tensors: (anyflow_kernels.gate_blend(**tensors),),
        eager=lambda tensors: (eager.gate_blend(**tensors),),
        backward_reads=("gate",),
        flops=(3.0 * rows * width, 2.0 * rows * width),
        level=level,
    )


def rollout(
    model: str, shape: tuple[int, ...], dtype: torch.dtype, guidance_scale: float = 1.0, level: str = "full"
) -> Case:
    """A middle step: state and average come in and go out. ``guidance_scale`` 1 is no unconditional velocity."""
    guided = guidance_scale != 1.0

    def make(device: str) -> Tensors:
        source, batch = _Source(device), shape[0]
        tensors = {
            "x": source.normal(*shape, dtype=FP32, learnt=True),
            "average": source.normal(*shape, dtype=FP32),
            "velocity": source.normal(*shape, dtype=dtype, learnt=True),
        }
        if guided:
            tensors["uncond_velocity"] = source.normal(*shape, dtype=dtype, learnt=True)
        times = {"sigma": (0.7, 0.9), "sigma_next": (0.5, 0.7), "weight": (0.25, 0.25)}
        return {**tensors, **{name: source.times(batch, *ends) for name, ends in times.items()}}

    def operator(tensors: Tensors) -> tuple[Tensor, ...]:
        given: dict[str, Any] = dict(tensors)
        state = anyflow_kernels.rollout_step(**given, guidance_scale=guidance_scale, time_scale=1000.0)
        return tuple(part for part in state if part is not None)

    def plain(tensors: Tensors) -> tuple[Tensor, ...]:
        given: dict[str, Any] = {"uncond_velocity": None, **tensors}
        return eager.rollout_step(**given, guidance_scale=guidance_scale, time_scale=1000.0)

    elements = float(torch.Size(shape).numel())
    return Case(
        operator_name="rollout_step",
        model=model,
        make=make,
        operator=operator,
        eager=plain,
        backward_reads=("sigma", "sigma_next", "weight"),
        flops=((7 if guided else 4) * elements, (6 if guided else 4) * elements),
        level=level,
    )


def interval(model: str, shape: tuple[int, ...], dtype: torch.dtype, level: str = "full") -> Case:
    """Three points of the path. That the latents take a gradient is not what training has, but what can be timed."""

    def make(device: str) -> Tensors:
        source, batch = _Source(device), shape[0]
        named = {name: source.normal(*shape, dtype=dtype, learnt=True) for name in ("x0", "noise")}
        sigma = source.times(batch, 0.2, 0.8)
        return {**named, "sigma": sigma, "sigma_plus": sigma + 0.005, "sigma_minus": sigma - 0.005}

    def operator(tensors: Tensors) -> tuple[Tensor, ...]:
        given: dict[str, Any] = dict(tensors)
        return tuple(part for part in anyflow_kernels.interval_inputs(**given) if part is not None)

    elements = float(torch.Size(shape).numel())
    return Case(
        operator_name="interval_inputs",
        model=model,
        make=make,
        operator=operator,
        eager=lambda tensors: eager.interval_inputs(**tensors),
        backward_reads=("sigma", "sigma_plus", "sigma_minus"),
        flops=(10 * elements, 13 * elements),
        level=level,
    )


def loss(model: str, shape: tuple[int, ...], dtype: torch.dtype, level: str = "full") -> Case:
    """With guidance and a central difference."""
    guidance_scale = 3.0

    def make(device: str) -> Tensors:
        source, batch = _Source(device), shape[0]
        prediction = source.normal(*shape, dtype=dtype, learnt=True)
        tensors = {"prediction": prediction, "target_velocity": source.normal(*shape, dtype=FP32)}
        tensors |= {n: source.normal(*shape, dtype=dtype) for n in ("uncond_prediction", "u_plus", "u_minus")}
        times = {"interval": (0.1, 0.9), "gap": (0.1, 0.1), "weight": (0.5, 1.5)}
        return {**tensors, **{name: source.times(batch, *ends) for name, ends in times.items()}}

    def operator(tensors: Tensors) -> tuple[Tensor, ...]:
        given: dict[str, Any] = dict(tensors)
        return anyflow_kernels.flowmap_loss(**given, guidance_scale=guidance_scale)

    def plain(tensors: Tensors) -> tuple[Tensor, ...]:
        given: dict[str, Any] = dict(tensors)
        return eager.flowmap_loss(**given, guidance_scale=guidance_scale)

    elements = float(torch.Size(shape).numel())
    return Case(
        operator_name="flowmap_loss",
        model=model,
        make=make,
        operator=operator,
        eager=plain,
        backward_reads=("target_velocity", "weight"),  # instead of the residual, which is as large
        flops=(11 * elements, elements),
        level=level,
    )


def distribution_matching(model: str, shape: tuple[int, ...], dtype: torch.dtype, level: str = "full") -> Case:
    """With guidance of the real score."""
    guidance_scale = 3.0

    def make(device: str) -> Tensors:
        source, batch = _Source(device), shape[0]
        tensors = {"x": source.normal(*shape, dtype=FP32, learnt=True), "sigma": source.times(batch, 0.2, 0.8)}
        names = ("x_sigma", "real_velocity", "fake_velocity", "uncond_real_velocity")
        return {**tensors, **{name: source.normal(*shape, dtype=dtype) for name in names}}

    def operator(tensors: Tensors) -> tuple[Tensor, ...]:
        given: dict[str, Any] = dict(tensors)
        return anyflow_kernels.dmd_gradient(**given, guidance_scale=guidance_scale)

    def plain(tensors: Tensors) -> tuple[Tensor, ...]:
        given: dict[str, Any] = dict(tensors)
        return eager.dmd_gradient(**given, guidance_scale=guidance_scale)

    elements = float(torch.Size(shape).numel())
    return Case(
        operator_name="dmd_gradient",
        model=model,
        make=make,
        operator=operator,
        eager=plain,
        backward_reads=("x",),  # instead of the gradient, which is as large
        flops=(14 * elements, elements),
        level=level,
    )


WAN, WAN_14B, WAN_LATENTS = "Wan2.1 1.3B 480p 81 frames", "Wan2.1 14B 480p 81 frames", (1, 16, 21, 60, 104)
FLUX, SD3, SDXL, DIGITS = "FLUX 1024", "SD3 1024", "SDXL 1024", "digits demo"
WAN_TOKENS = 21 * 30 * 52

# Batches of one for Wan and FLUX, of four for SD3 and SDXL, of the demo for the digits. Wan's time embedder is loaded
# in float32, its latents are the same at both sizes.
CASES = (
    embedding(DIGITS, 64, 256, 96, 96, FP32, "smallest"),
    embedding(SD3, 4, 256, 1536, 1536, BF16, "default"),
    embedding(SDXL, 4, 320, 1280, 1280, BF16),
    embedding(FLUX, 1, 256, 3072, 3072, BF16),
    embedding(WAN, 1, 256, 1536, 1536, FP32, "default"),
    embedding(WAN_14B, 1, 256, 5120, 5120, FP32),
    blend(DIGITS, 64, 96, FP32, "smallest"),
    blend(SD3, 4, 1536, BF16, "default"),
    blend(SDXL, 4, 1280, BF16),
    blend(FLUX, 1, 3072, BF16),
    blend(WAN, 1, 1536, FP32),
    blend(f"{WAN}, a time for each frame", 21, 1536, FP32, "default"),
    blend(f"{WAN}, a time for each token", WAN_TOKENS, 1536, FP32),
    blend(f"{WAN}, a time for each token, bfloat16", WAN_TOKENS, 1536, BF16),
    blend(WAN_14B, 1, 5120, FP32),
    rollout(DIGITS, (64, 1, 8, 8), FP32, 1.5, "smallest"),
    rollout(SD3, (4, 16, 128, 128), BF16, 7.0, "default"),
    rollout(SDXL, (4, 4, 128, 128), BF16, 5.0),
    rollout(FLUX, (1, 4096, 64), BF16),
    rollout(f"{SDXL}, float32", (4, 4, 128, 128), FP32, 5.0),
    rollout(f"{WAN} (and 14B)", WAN_LATENTS, BF16, 5.0, "default"),
    rollout(f"{WAN} (and 14B), float32", WAN_LATENTS, FP32, 5.0),
    *(
        objective(*size)
        for objective in (interval, loss, distribution_matching)
        for size in (
            (DIGITS, (64, 1, 8, 8), FP32, "smallest"),
            (SD3, (4, 16, 128, 128), BF16),
            (SDXL, (4, 4, 128, 128), BF16, "default"),
            (FLUX, (1, 4096, 64), BF16),
            (f"{WAN} (and 14B)", WAN_LATENTS, BF16, "default"),
            (f"{SDXL}, float32", (4, 4, 128, 128), FP32),
            (f"{WAN} (and 14B), float32", WAN_LATENTS, FP32),
        )
    ),
)
LEVELS = ("smallest", "default", "full")


def cases(level: str) -> list[Case]:
    return [case for case in CASES if LEVELS.index(case.level) <= LEVELS.index(level)]
