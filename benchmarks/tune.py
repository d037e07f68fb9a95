"""``python -m benchmarks.tune [--rounds N] [--level LEVEL]``: finds launch configurations for the GPU of this machine.

Runs every Triton kernel at the sizes of benchmarks/operators.py, forward and backward, with each candidate in turn, and
writes those that beat the default by a margin to anyflow_kernels/tuned/<device>.json, which the launchers read.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import anyflow_kernels
from anyflow_kernels import _tuning
from anyflow_kernels._tuning import SIZES, Changes, Table

from . import measure
from .measure import Samples, Variant
from .operators import LEVELS, Case, cases

MARGIN = 1.05  # by which the mean over the cases of a size must be faster; none of them may be slower
OVER_ELEMENTS = ("dmd_gradient", "flowmap_loss", "gate_blend", "interval_inputs", "rollout_step")
ELEMENTWISE: dict[str, Sequence[int]] = {"block": (512, 1024, 2048, 4096), "num_warps": (4, 8)}
PRODUCTS: dict[str, Sequence[int]] = {"block_hidden": (32, 64), "block_out": (16, 32, 64), "num_warps": (4, 8)}
GRIDS: dict[tuple[str, str], dict[str, Sequence[int]]] = {
    **{(operator, size): ELEMENTWISE for operator in OVER_ELEMENTS for size in SIZES},
    ("flowmap_embedding", "small"): {"tiles": (1, 2, 4, 8), "num_warps": (4, 8)},
    ("flowmap_embedding", "medium"): PRODUCTS,
    ("flowmap_embedding", "large"): PRODUCTS,
}


@dataclass(frozen=True)
class Candidate(Variant):
    """Runs under a table of its own; the default under an empty one."""

    table: Table = field(default_factory=dict)

    @contextmanager
    def active(self) -> Iterator[None]:
        with _tuning.trial(self.table):
            yield


class _Asked(dict[tuple[str, str], Changes]):
    """An empty table that remembers what it was asked for."""

    def get(self, place: Any, default: Any = None) -> Any:
        self[place] = {}
        return default


class Job:
    """One case, forward and backward."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.tensors = case, case.make(device)

    def run(self, function: Callable[..., tuple[Tensor, ...]] | None = None, tensors: Any = None) -> list[Tensor]:
        tensors = tensors or self.tensors
        outputs = (function or self.case.operator)(tensors)
        differentiable = [output for output in outputs if output.requires_grad]
        leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
        gradients = torch.autograd.grad(differentiable, leaves, [torch.ones_like(output) for output in differentiable])
        return [*(output.detach() for output in outputs), *gradients]

    def places(self) -> list[tuple[str, str]]:
        """Operator and size of every launch configuration that it asks for."""
        with _tuning.trial(asked := _Asked()):
            self.run()
        return list(asked)

    def gate(self, candidate: Candidate) -> None:
        """Raises RedGate where a candidate is further from float64 than twice the default."""
        doubles = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in self.tensors.items()}
        exact, default = self.run(self.case.eager, doubles), self._results(Candidate("default", self.run))
        results = {"eager": default, "reference": default, candidate.name: self._results(candidate)}
        measure.gate({name: _numbered(found) for name, found in results.items()}, _numbered(exact), plain=("eager",))

    def _results(self, candidate: Candidate) -> list[Tensor]:
        with candidate.active():
            return self.run()


def _numbered(results: list[Tensor]) -> dict[str, Tensor]:
    return {f"result {index}": result for index, result in enumerate(results)}


def grid(place: tuple[str, str]) -> dict[str, Changes]:
    """What is tried, by name."""
    names, values = GRIDS[place].keys(), itertools.product(*GRIDS[place].values())
    return {str(changes): changes for changes in (dict(zip(names, chosen, strict=True)) for chosen in values)}


def speed_ups(place: tuple[str, str], job: Job, clock: Any, rounds: int) -> dict[str, float]:
    """By candidate, how many times as fast as the default: 0 for those that the GPU has no room for."""
    variants = [Candidate("default", job.run)]
    for name, changes in grid(place).items():
        candidate = Candidate(name, job.run, table={place: changes})
        try:
            job.gate(candidate)
        except Exception as error:
            if type(error).__name__ != "OutOfResources":  # Triton's
                raise
        else:
            variants.append(candidate)
    round_, samples = measure.interleaved(clock, [(variant, lambda: job.run) for variant in variants]), Samples()
    for _ in range(rounds):
        round_(samples)
    measured = {variant.name: samples.ratio("default", variant.name)["median"] for variant in variants}
    return {name: measured.get(name, 0.0) for name in grid(place)}


def winner(ratios: Sequence[dict[str, float]]) -> str | None:
    """Of the candidates that make no case slower, the one that is fastest on average, if by the margin."""
    means = {
        name: statistics.geometric_mean(ratio[name] for ratio in ratios)
        for name in ratios[0]
        if min(ratio[name] for ratio in ratios) >= 1
    }
    best = max(means, key=lambda name: means[name], default=None)
    return best if best is not None and means[best] >= MARGIN else None


def tune(chosen: Sequence[Case], clock: Any, device: str, rounds: int) -> Table:
    """The table of what is clearly faster than the defaults."""
    table: Table = {}
    with anyflow_kernels.use_backend("triton"):
        jobs = [(place, job) for job in (Job(case, device) for case in chosen) for place in job.places()]
        for place in sorted({place for place, _ in jobs}):
            best = winner([speed_ups(place, job, clock, rounds) for where, job in jobs if where == place])
            print(f"{place}: {best or 'the default'}", flush=True)
            if best is not None:
                table[place] = grid(place)[best]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--level", choices=LEVELS, default="full")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU")
    name = torch.cuda.get_device_name()
    print(_tuning.write(name, tune(cases(options.level), measure.Clock("cuda"), "cuda", options.rounds)))


if __name__ == "__main__":
    main()
