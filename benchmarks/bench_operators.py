"""Every operator, backend and direction against plain PyTorch and its compiled form. Run by ``make bench``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from . import measure
from .conftest import Session
from .measure import Samples, Variant
from .operators import Case, Tensors, cases

MODES = ("forward", "backward", "both")
PLAIN = ("eager", "torch.compile")


class Bench:
    """The variants of one case on one device, and their calls."""

    def __init__(self, case: Case, device: str) -> None:
        torch.compiler.reset()
        self.case, self.device = case, device
        self.tensors = case.make(device)
        backends, self.skipped = measure.backends(case.operator_name, device)
        compiled = torch.compile(case.eager, dynamic=False, fullgraph=True)
        self.variants = [Variant("eager", case.eager), Variant("torch.compile", compiled)]
        self.variants += [Variant(name, case.operator, backend=name) for name in backends]
        # Once, to count what is compiled and to draw the gradients that come in.
        with measure.inductor_counts() as forward:
            outputs = compiled(self.tensors)
        generator = torch.Generator().manual_seed(1)
        self.gradients = [
            torch.randn(output.shape, generator=generator).to(output) for output in outputs if output.requires_grad
        ]
        with measure.inductor_counts() as backward:
            self.backward(outputs, self.tensors)
        both = {key: forward[key] + backward[key] for key in forward}
        self.compiled = {"forward": forward, "backward": backward, "both": both}
        self.floors = {mode: case.floor(self.tensors, outputs, mode) for mode in MODES}
        largest = max(self.floors.values()) // 2
        self.source, self.target = (torch.zeros(largest, dtype=torch.int8, device=device) for _ in range(2))

    def backward(self, outputs: tuple[Tensor, ...], tensors: Tensors) -> tuple[Tensor, ...]:
        leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
        results = [output for output in outputs if output.requires_grad]
        gradients = [gradient.to(result.dtype) for gradient, result in zip(self.gradients, results, strict=True)]
        return torch.autograd.grad(results, leaves, gradients)

    def prepare(self, variant: Variant, mode: str) -> Callable[[], Any]:
        """Does what is not timed, and returns what is."""
        function, tensors = variant.function, self.tensors
        if mode == "forward":
            return lambda: function(tensors)
        if mode == "both":
            return lambda: self.backward(function(tensors), tensors)
        outputs = function(tensors)
        return lambda: self.backward(outputs, tensors)

    def results(self, variant: Variant, tensors: Tensors, mode: str) -> dict[str, Tensor]:
        with variant.active():
            outputs = variant.function(tensors)
            gradients = () if mode == "forward" else self.backward(outputs, tensors)
        named = {f"result {index}": output.detach() for index, output in enumerate(outputs)}
        return {**named, **{f"gradient {index}": gradient for index, gradient in enumerate(gradients)}}

    def gate(self, mode: str) -> dict[str, float]:
        double = {
            name: tensor.detach().double().requires_grad_(tensor.requires_grad) for name, tensor in self.tensors.items()
        }
        exact = self.results(Variant("exact", self.case.eager), double, mode)
        results = {variant.name: self.results(variant, self.tensors, mode) for variant in self.variants}
        return measure.gate(results, exact, PLAIN)

    def launches_and_bytes(self, variant: Variant, mode: str) -> tuple[int, int]:
        with variant.active():
            run = self.prepare(variant, mode)
            run()
            run = self.prepare(variant, mode)
            if variant.name == "torch.compile":
                counts = self.compiled[mode]
                launches, moved = counts["launches"] + measure.library_products(run), counts["moved"]
            else:
                launches, moved = measure.traffic(run, expand=variant.backend == "reference")
            if self.device == "cuda":
                launches = measure.cuda_launches(self.prepare(variant, mode))
            return launches, moved

    def copy(self, mode: str) -> Tensor:
        """Moves as many bytes as the floor: what the ratio to a copy is taken against, in the same rounds."""
        half = self.floors[mode] // 2
        return self.target[:half].copy_(self.source[:half])

    def peak(self, variant: Variant, mode: str) -> int:
        with variant.active():
            return measure.peak_bytes(self.prepare(variant, mode), self.device)

    def record(self, mode: str, samples: Samples, errors: dict[str, float], copy: float) -> dict[str, Any]:
        floor = self.floors[mode]
        variants = {}
        for variant in self.variants:
            launches, moved = self.launches_and_bytes(variant, mode)
            milliseconds = {key: 1e3 * value for key, value in measure.quartiles(samples.seconds[variant.name]).items()}
            speed = floor / milliseconds["median"] / 1e6
            variants[variant.name] = {
                "ratio_to_eager": samples.ratio("eager", variant.name),
                "ratio_to_compile": samples.ratio("torch.compile", variant.name),
                "ratio_to_copy": samples.ratio("copy", variant.name),
                "ms": milliseconds,
                "host_ms": 1e3 * measure.quartiles(samples.host_seconds[variant.name])["median"],
                "gb_per_s": speed,
                "share_of_copy_bandwidth": speed / copy,
                "gflop_per_s": self.case.operations(mode) / milliseconds["median"] / 1e6,
                "bytes_over_floor": moved / floor,
                "peak_bytes": self.peak(variant, mode),
                "launches": launches,
                "error": errors[variant.name],
            }
        return {
            "kind": "operator",
            "operator": self.case.operator_name,
            "model": self.case.model,
            "mode": mode,
            "floor_bytes": floor,
            "flops": self.case.operations(mode),
            "variants": variants,
            "skipped": self.skipped,
        }


@functools.lru_cache(maxsize=1)
def bench(case: Case, device: str) -> Bench:
    return Bench(case, device)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = [(case, mode) for case in cases(metafunc.config.getoption("--level")) for mode in MODES]
    metafunc.parametrize(("case", "mode"), chosen, ids=[f"{case.name}, {mode}" for case, mode in chosen])


def test_operator(case: Case, mode: str, benchmark: Any, session: Session) -> None:
    ready = bench(case, session.device)
    with session.refused_when_red(case.name, mode):
        errors = ready.gate(mode)
    pairs: list[tuple[Variant, Callable[[], Callable[[], Any]]]] = [
        (variant, functools.partial(ready.prepare, variant, mode)) for variant in ready.variants
    ]
    pairs.append((Variant("copy", ready.copy), lambda: functools.partial(ready.copy, mode)))
    round_, samples = measure.interleaved(session.clock, pairs), Samples()
    benchmark.pedantic(round_, args=(samples,), rounds=session.rounds(round_()), iterations=1)
    session.report(benchmark, **ready.record(mode, samples, errors, session.roofs["copy_gb_per_s"]))
