"""How things are measured: the clock, memory, launches and bytes, the roofs of the machine, and the correctness gate.

Times are medians of rounds in which every variant runs once, so that whatever slows the machine slows them alike, and
ratios are medians of the ratios within a round. Before each timed call of an operator it is called once untimed.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import anyflow_kernels
from anyflow_kernels import _library

THREADS = 2
FLUSH_BYTES = 256 << 20  # several times the second-level cache of any GPU
BACKLOG_CYCLES = 4_000_000  # the GPU is kept busy for two milliseconds, in which the host enqueues the timed work
NOT_LAUNCHED = ("empty", "new_empty")
READ_TWICE = {"dmd_gradient": ("real_velocity", "fake_velocity", "uncond_real_velocity")}  # its sums come first
MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


@dataclass(frozen=True)
class Variant:
    """One way of computing the same: a function, and the backend of the library under which it runs."""

    name: str
    function: Callable[..., Any]
    backend: str | None = None

    def active(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.backend is None else anyflow_kernels.use_backend(self.backend)


@dataclass
class Samples:
    """Seconds of each variant by round, on the device and, for a GPU, those the host took to enqueue."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    host_seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, seconds: float, host: float) -> None:
        self.seconds.setdefault(name, []).append(seconds)
        self.host_seconds.setdefault(name, []).append(host)

    def ratio(self, baseline: str, name: str) -> dict[str, float]:
        """How many times as fast as ``baseline``: above 1 is faster."""
        pairs = zip(self.seconds[baseline], self.seconds[name], strict=True)
        return quartiles([slow / fast for slow, fast in pairs])


def quartiles(values: Sequence[float]) -> dict[str, float]:
    if len(values) == 1:
        return dict.fromkeys(("median", "q1", "q3"), values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def keep_pages(keep: bool = True) -> bool:
    """Have the C library keep what is freed, or not any more; returns whether it obeys. glibc does.

    As it is usually set, nearly every array of 32 MiB or more comes in new pages, which the operating system zeroes at
    their first use. That takes several times as long as what is measured here.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    trim_threshold, most_mappings = (-1, -1 if keep else 128 << 10), (-4, 0 if keep else 65536)
    return mallopt is not None and bool(mallopt(*trim_threshold) and mallopt(*most_mappings))


class Clock:
    """Seconds of a call on one device. On a GPU by events, with the second-level cache flushed before."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.flush = torch.empty(FLUSH_BYTES if self.cuda else 0, dtype=torch.int8, device=device)

    def time(self, run: Callable[[], Any]) -> tuple[float, float]:
        if not self.cuda:
            start = time.perf_counter_ns()
            run()
            seconds = (time.perf_counter_ns() - start) / 1e9
            return seconds, seconds
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(BACKLOG_CYCLES)
        self.flush.zero_()
        first.record()
        start = time.perf_counter_ns()
        run()
        host = (time.perf_counter_ns() - start) / 1e9
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3, host


def interleaved(
    clock: Clock, variants: Sequence[tuple[Variant, Callable[[], Callable[[], Any]]]], warm: bool = True
) -> Callable[..., float]:
    """One round: each variant once; returns how long it took. ``prepare`` of a pair does what is not timed, and gives
    the call that is; ``warm`` makes it untimed before. The order rotates from round to round."""
    turn = 0

    def round_(samples: Samples | None = None) -> float:
        nonlocal turn
        start = time.perf_counter()
        turn += 1
        for variant, prepare in [*variants[turn % len(variants) :], *variants[: turn % len(variants)]]:
            with variant.active():
                if warm:
                    prepare()()
                timed = clock.time(prepare())
            if samples is not None:
                samples.add(variant.name, *timed)
        return time.perf_counter() - start

    return round_


def backends(operator_name: str, device: str) -> tuple[list[str], dict[str, str]]:
    """(the backends that run an operator and its backward here, why the others do not)."""
    chosen, skipped = [], {}
    for backend in _library.BACKENDS:
        reasons = [
            _library.why_not(backend, device, _library._operators[name])
            for name in (operator_name, f"{operator_name}_backward")
        ]
        reason = next((reason for reason in reasons if reason is not None), None)
        if backend == "triton" and device == "cpu" and reason is None:
            reason = "Triton's interpreter is no measurement"
        if reason is None:
            chosen.append(backend)
        else:
            skipped[backend] = reason
    return chosen, skipped


# Memory, launches and bytes: each in a run of its own, which is not timed.


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """The most that was allocated at once during ``run`` beyond what was before. On the CPU the profiler records every
    allocation and free of PyTorch's allocator, and they are summed up: exact, but without the scratch of libraries."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    del result
    assert profile.profiler is not None
    live: dict[int, int] = {}  # by address: what was allocated before may be freed here, and is not counted
    level = peak = 0
    tree = profile.profiler.kineto_results.experimental_event_tree()
    for event in sorted(_allocations(tree), key=lambda event: event.start_time_ns):
        size, address = event.extra_fields.alloc_size, event.extra_fields.ptr
        if size > 0:
            live[address] = size
            level += size
        else:
            level -= live.pop(address, 0)
        peak = max(peak, level)
    return peak


def _allocations(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        if event.tag == torch._C._profiler._EventType.Allocation:
            yield event
        yield from _allocations(event.children)


class Traffic(TorchDispatchMode):
    """Counts what eager execution launches (operators that write a tensor) and moves (each operand once a launch, or
    twice by READ_TWICE). With ``expand`` the library's are counted as the plain PyTorch of their reference."""

    def __init__(self, expand: bool) -> None:
        super().__init__()
        self.expand, self.launches, self.moved = expand, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.expand and func.namespace == _library.NAMESPACE:
            with self:
                return _library._operators[func._schema.name.partition("::")[2]].implementation("reference")(*args)
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.numel()]
        storages = {tensor.untyped_storage()._cdata for tensor in given}
        new = [tensor for tensor in results if tensor.untyped_storage()._cdata not in storages]
        name = func._schema.name.partition("::")[2]
        if name not in NOT_LAUNCHED and (new or func._schema.is_mutable):
            self.launches += 1
            given += _read_again(func, args)
            self.moved += sum(_touched(tensor) for tensor in (*given, *(results if func._schema.is_mutable else new)))
        return result


def _read_again(func: Any, args: Any) -> list[Tensor]:
    """Of the arguments of an operator, the library's or another."""
    names = READ_TWICE.get(func._schema.name.removeprefix(f"{_library.NAMESPACE}::"), ())
    named = zip(func._schema.arguments, args, strict=False)  # an operator's defaults are not passed
    return [value for argument, value in named if argument.name in names and isinstance(value, Tensor)]


def _touched(tensor: Tensor) -> int:
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def traffic(run: Callable[[], Any], expand: bool) -> tuple[int, int]:
    """(launches, bytes) of an eager call."""
    with Traffic(expand) as counted:
        run()
    return counted.launches, counted.moved


@contextlib.contextmanager
def inductor_counts() -> Iterator[dict[str, int]]:
    """Fills in the kernels that Inductor generates inside the block, and the bytes that it says they access."""
    from torch._inductor import compile_fx, metrics

    logger = compile_fx.inductor_metrics_log  # at this level Inductor counts
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(silent := logging.NullHandler())
    metrics.reset()
    counts: dict[str, int] = {}
    try:
        yield counts
    finally:
        counts.update(launches=metrics.generated_kernel_count, moved=metrics.num_bytes_accessed)
        logger.setLevel(level)
        logger.propagate = propagate
        logger.removeHandler(silent)


def library_products(run: Callable[[], Any]) -> int:
    """The matrix products that a compiled call leaves to a library, as PyTorch's profiler sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(event.name in MATRIX_PRODUCTS for event in profile.events() or ())


def cuda_launches(run: Callable[[], Any]) -> int:
    """Kernels, copies and fills that a call puts on the GPU: measured."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == cuda for event in profile.events() or ())


def roofs(clock: Clock, device: str) -> dict[str, float]:
    """The measured copy bandwidth (bytes read and written) in GB/s, and the rate of a matrix product in GFLOP/s."""
    size, width, dtype = (1 << 30, 8192, torch.bfloat16) if device == "cuda" else (1 << 26, 1024, torch.float32)
    source, target = (
        torch.zeros(size, dtype=torch.int8, device=device),
        torch.ones(size, dtype=torch.int8, device=device),
    )
    matrix = torch.randn(width, width, dtype=dtype, device=device)
    runs = {"copy": lambda: target.copy_(source), "product": lambda: matrix @ matrix}
    round_ = interleaved(clock, [(Variant(name, run), lambda run=run: run) for name, run in runs.items()])  # type: ignore[misc]
    samples = Samples()
    for _ in range(7):
        round_(samples)
    medians = {name: statistics.median(values) for name, values in samples.seconds.items()}
    return {
        "copy_gb_per_s": 2 * size / medians["copy"] / 1e9,
        "product_gflop_per_s": 2 * width**3 / medians["product"] / 1e9,
    }


# The gate.


class RedGate(AssertionError):
    """A variant computes something else: nothing about it is reported."""


SANE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}  # of plain PyTorch: phases of 1000 in float32; sums in bfloat16


@dataclass(frozen=True)
class Error:
    """Of one result against float64: relative in the L2 norm, and the largest, relative to the largest entry."""

    norm: float
    largest: float

    @classmethod
    def of(cls, result: Tensor, exact: Tensor) -> Error:
        if result.shape != exact.shape:
            return cls(float("inf"), float("inf"))
        difference = result.double() - exact
        scales = exact.norm().clamp_min(1e-300), exact.abs().amax().clamp_min(1e-300)
        return cls(float(difference.norm() / scales[0]), float(difference.abs().amax() / scales[1]))


def gate(results: dict[str, dict[str, Tensor]], exact: dict[str, Tensor], plain: Sequence[str]) -> dict[str, float]:
    """Hold every variant to float64; returns the largest error of each.

    The variants in ``plain`` (eager, compiled) must be sane. The reference may be off by twice what eager is, the other
    backends by twice what the reference is: one rounding of the result, or 8 of float32 where sums have another order,
    come on top. Raises RedGate that names the variant and the result.
    """
    errors = {
        variant: {name: Error.of(tensors[name], exact[name]) for name in exact} for variant, tensors in results.items()
    }
    for variant, tensors in results.items():
        for name, tensor in tensors.items():
            error = errors[variant][name]
            if variant in plain:
                limit = Error(*(SANE[min((t.dtype for t in tensors.values()), key=lambda d: d.itemsize)],) * 2)
            else:
                other = errors["eager" if variant == "reference" else "reference"][name]
                rounding = max(torch.finfo(tensor.dtype).eps, 8 * torch.finfo(torch.float32).eps)
                limit = Error(2 * other.norm + rounding, 2 * other.largest + rounding)
            if not (error.norm <= limit.norm and error.largest <= limit.largest):  # not: NaN is no pass
                raise RedGate(f"{variant}: {name} is off by {error}, allowed is {limit}")
    return {variant: max(error.norm for error in named.values()) for variant, named in errors.items()}
