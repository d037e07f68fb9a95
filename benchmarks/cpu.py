"""The C++ kernels on this CPU against plain PyTorch and torch.compile: ``python benchmarks/cpu.py [--json FILE]``.

All three run in one process and take turns, so that what disturbs one disturbs all; a figure is the median of the
ratios of neighbouring runs, with their quartiles. A case whose results are not as near to float64 as plain PyTorch's,
up to twice its error and a rounding, is not timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import anyflow_kernels
from anyflow_kernels import _library

SIZES = {"SDXL": (1, 4, 128, 128), "Wan": (1, 16, 21, 60, 104), "Wan x 4": (4, 16, 21, 60, 104)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GUIDANCE = 3.5


def eager_rollout_step(x, average, velocity, uncond, sigma, sigma_next, weight):
    v = velocity.float()
    u = uncond.float()
    v = u + GUIDANCE * (v - u)
    new_average = average + weight * v
    new_x = x + (sigma_next - sigma) * v
    return new_x, new_average, new_x.to(velocity.dtype), 1000.0 * sigma_next


def eager_gate_blend(base, delta, gate):
    e, d = base.float(), delta.float()
    return ((e + gate * (d - e)).to(base.dtype),)


def rollout_step(x, average, velocity, uncond, sigma, sigma_next, weight):
    return anyflow_kernels.rollout_step(
        x,
        average,
        velocity,
        sigma,
        sigma_next,
        weight,
        uncond_velocity=uncond,
        guidance_scale=GUIDANCE,
        time_scale=1000.0,
    )


def gate_blend(base, delta, gate):
    return (anyflow_kernels.gate_blend(base, delta, gate),)


def inputs(operator: str, size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    if operator == "gate_blend":
        return torch.randn(size).to(dtype), torch.randn(size).to(dtype), torch.tensor([0.25])
    rows = (size[0],) + (1,) * (len(size) - 1)
    times = (torch.rand(rows) for _ in range(3))
    return torch.randn(size), torch.randn(size), torch.randn(size).to(dtype), torch.randn(size).to(dtype), *times


def with_backward(function: Callable[..., tuple[Tensor, ...]], grads: list[Tensor]) -> Callable[..., Any]:
    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = [o for o in function(*tensors) if o.requires_grad][: len(grads)]
        return torch.autograd.grad(outputs, [t for t in tensors if t.requires_grad], grads)

    return run


def correct(ours: Any, eager: Any, exact: Any) -> bool:
    for found, plain, true in zip(ours, eager, exact, strict=True):
        error, allowed = ((other.double() - true).abs().max().item() for other in (found, plain))
        wide = torch.promote_types(found.dtype, torch.float32)
        terms = true.numel() if true.numel() > 1 else 1e6
        rounding = torch.finfo(found.dtype).eps / 2 + 4 * terms**0.5 * torch.finfo(wide).eps * (true.numel() == 1)
        if not error <= 2 * allowed + rounding * max(true.abs().max().item(), 1.0):
            return False
    return True


def seconds(function: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def interleaved(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    for function in candidates.values():
        seconds(function, 2)
    once = max(seconds(function, 1) for function in candidates.values())
    repeats = max(1, int(0.01 / once))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, function in candidates.items():
            times[name].append(seconds(function, repeats))
    return times


def quartiles(values: list[float]) -> list[float]:
    return [round(q, 3) for q in statistics.quantiles(values, n=4)]


def moved(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors if t is not None}.values())


def double(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.detach().double().requires_grad_(t.requires_grad) for t in tensors)


def exact_form(function: Callable[..., Any]) -> Callable[..., Any]:
    """The plain function in float64: its own casts to float32 left out."""

    def run(*tensors: Tensor) -> Any:
        original = Tensor.float
        Tensor.float = Tensor.double  # type: ignore[method-assign]
        try:
            return function(*tensors)
        finally:
            Tensor.float = original  # type: ignore[method-assign]

    return run


def measure(operator: str, size_name: str, dtype_name: str, backward: bool, rounds: int) -> dict[str, Any]:
    eager, ours = globals()[f"eager_{operator}"], globals()[operator]
    tensors = inputs(operator, SIZES[size_name], DTYPES[dtype_name])
    case = {"operator": operator, "size": size_name, "dtype": dtype_name, "pass": "both" if backward else "forward"}
    if backward:
        differentiable = {"gate_blend": 3, "rollout_step": 4}[operator]
        for tensor in tensors[:differentiable]:
            tensor.requires_grad_()
        wanted = [o for o in eager(*tensors) if o.requires_grad]
        grads = [torch.randn_like(o) for o in (wanted if dtype_name == "bf16" else wanted[:2])]
        eager, ours = with_backward(eager, grads), with_backward(ours, grads)
        exact = with_backward(globals()[f"eager_{operator}"], [g.double() for g in grads])
    else:
        exact = eager
    torch._dynamo.reset()
    compiled_function = torch.compile(globals()[f"eager_{operator}"], fullgraph=True)
    compiled = with_backward(compiled_function, grads) if backward else compiled_function
    if not correct(ours(*tensors), eager(*tensors), exact_form(exact)(*double(tensors))):
        return {**case, "error": "results are wrong: not timed"}
    copy_from = torch.ones(max(1, moved((*tensors, *ours(*tensors))) // 2), dtype=torch.uint8)
    copy_to = torch.empty_like(copy_from)
    times = interleaved(
        {
            "ours": lambda: ours(*tensors),
            "eager": lambda: eager(*tensors),
            "compile": lambda: compiled(*tensors),
            "copy": lambda: copy_to.copy_(copy_from),
        },
        rounds,
    )
    ratios = {
        f"over {name}": quartiles([a / b for a, b in zip(times[name], times["ours"], strict=True)])
        for name in ("eager", "compile", "copy")
    }
    return {**case, "microseconds": round(statistics.median(times["ours"]) * 1e6, 1), **ratios}


def overhead(rounds: int) -> dict[str, Any]:
    """Microseconds of a call on eight elements, less those of the plain function that the operator is defined by."""
    from anyflow_kernels.gate_blend.reference import gate_blend as plain

    base, delta, gate = inputs("gate_blend", (8,), torch.float32)
    learnt = [t.clone().requires_grad_() for t in (base, delta, gate)]
    grad = torch.ones(8)

    def step(function: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(*learnt), learnt, grad)

    raw = torch.ops.anyflow_kernels.gate_blend.default
    times = interleaved(
        {
            "operator": lambda: raw(base, delta, gate),
            "public": lambda: anyflow_kernels.gate_blend(base, delta, gate),
            "plain": lambda: plain(base, delta, gate),
            "public, forward and backward": step(anyflow_kernels.gate_blend),
            "plain, forward and backward": step(plain),
        },
        rounds,
    )
    return {name: quartiles([t * 1e6 for t in values]) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--only", default="", help="cases whose name contains this, e.g. 'rollout_step Wan bf16'")
    options = parser.parse_args()
    print(anyflow_kernels.describe().splitlines()[-1], f"; {torch.get_num_threads()} threads", sep="")
    if _library._native.extension is None:
        sys.exit("nothing to measure")
    report: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cases": []}
    print(f"{'':<42}{'us':>9}  {'over eager':<22}{'over compile':<22}{'over a copy of as many bytes'}")
    cases = itertools.product(("rollout_step", "gate_blend"), SIZES, DTYPES, (False, True))
    for operator, size, dtype, backward in cases:
        name = f"{operator} {size} {dtype} {'both' if backward else 'forward'}"
        if options.only not in name:
            continue
        result = measure(operator, size, dtype, backward, options.rounds)
        report["cases"].append(result)
        if "error" in result:
            print(f"{name:<42}{result['error']}")
            continue
        columns = [result[f"over {other}"] for other in ("eager", "compile", "copy")]
        shown = [f"{middle:.2f} ({low:.2f}-{high:.2f})" for low, middle, high in columns]
        print(f"{name:<42}{result['microseconds']:>9}  {shown[0]:<22}{shown[1]:<22}{shown[2]}", flush=True)
    report["overhead"] = overhead(options.rounds)
    print("microseconds of gate_blend on 8 elements:", json.dumps(report["overhead"]))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)
    if any("error" in case for case in report["cases"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
