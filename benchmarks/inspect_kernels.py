"""Compiles every Triton kernel, and where there is nvcc every CUDA kernel, for NVIDIA GPUs, on a machine without one,
and reports what it uses.

    python benchmarks/inspect_kernels.py [--targets 80 90 100] [--kernels triton cuda] [--only SUBSTRING] [--out FOLDER]

The launchers run on tensors of the meta device at the sizes of real models; what they would launch is recorded, with
the specialisations that Triton would derive, and compiled. For each kernel and target: registers a thread, bytes of
spilled registers (local) and of stack, of shared memory, and its global loads and stores by width in bytes.

Modelled: the occupancy, from the limits of a multiprocessor; and the bytes that all launches of an operator move over
its floor (each input read and each result written once), when a launch moves every tensor that it is given once.

Prints JSON, or with --out writes kernels.json and kernels.md.
"""

import argparse
import collections
import inspect
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))

from anyflow_kernels.dmd_gradient import kernels as dmd_gradient
from anyflow_kernels.flowmap_embedding import kernels as flowmap_embedding
from anyflow_kernels.flowmap_loss import kernels as flowmap_loss
from anyflow_kernels.gate_blend import kernels as gate_blend
from anyflow_kernels.interval_inputs import kernels as interval_inputs
from anyflow_kernels.rollout_step import kernels as rollout_step
from benchmarks import inspect_cuda

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default until triton 3.9, which warns that it will change
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
POINTERS = {BF16: "*bf16", FP32: "*fp32", FP64: "*fp64", torch.float16: "*fp16", torch.int32: "*i32"}
WAN_LATENTS = (1, 16, 21, 60, 104)


def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass
class Launch:
    kernel: Any
    source: ASTSource
    options: dict[str, Any]
    programs: int
    tensors: list[Tensor]


@dataclass
class Call:
    """An operator's launcher, run: its floor, and what it would launch."""

    floor: int
    own: list[Tensor]  # inputs and results: the rest that its launches are given is scratch
    launches: list[Launch] = field(default_factory=list)

    @property
    def moved(self) -> int:
        """Scratch that one launch alone is given is written and read by it, or read by PyTorch after it."""
        kept = {_storage(tensor) for tensor in self.own}
        given = collections.Counter(place for launch in self.launches for place in _bytes(launch.tensors))
        total = 0
        for launch in self.launches:
            for place, size in _bytes(launch.tensors).items():
                total += 2 * size if place not in kept and given[place] == 1 else size
        return total


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensors: Sequence[Tensor]) -> dict[int, int]:
    return {_storage(tensor): tensor.nbytes for tensor in tensors}


def operator(launcher: Callable[..., Any], *arguments: Any, unread: Sequence[Tensor | None] = ()) -> Call:
    """``unread``: the inputs of which only the shape and dtype count."""
    launched: list[Launch] = []

    def record(kernel: Any, *positional: Any, grid: Any, warmup: bool, **named: Any) -> None:
        parameters = inspect.signature(kernel.fn).parameters
        options = {name: named.pop(name) for name in list(named) if name not in parameters}
        bound = inspect.signature(kernel.fn).bind(*positional, **named)
        tensors = [value for value in bound.arguments.values() if isinstance(value, Tensor)]
        launched.append(Launch(kernel, source(kernel, bound), options, math.prod(grid), tensors))

    run, triton.JITFunction.run = triton.JITFunction.run, record
    try:
        results = launcher(*arguments)
    finally:
        triton.JITFunction.run = run
    given = [value for value in arguments if isinstance(value, Tensor)]
    results = [value for value in (results if isinstance(results, tuple) else (results,)) if value.numel()]
    needed = _bytes([value for value in given if not any(value is other for other in unread)])
    return Call(sum(needed.values()) + sum(_bytes(results).values()), [*given, *results], launched)


def blend(dtype: torch.dtype) -> list[Call]:
    base, delta, grad = (empty(21, 1536, dtype=dtype) for _ in range(3))
    gate = empty(1)
    return [
        operator(gate_blend.gate_blend, base, delta, gate),
        operator(gate_blend.gate_blend_backward, grad, base, delta, gate, True),
    ]


def rollout(dtype: torch.dtype, times: tuple[int, ...], guided: bool, last: bool = False) -> list[Call]:
    x, average, grad_average = (empty(*WAN_LATENTS) for _ in range(3))
    v, grad_input = empty(*WAN_LATENTS, dtype=dtype), empty(*WAN_LATENTS, dtype=dtype)
    u = empty(*WAN_LATENTS, dtype=dtype) if guided else None
    sigma, sigma_next, weight = (empty(*times) for _ in range(3))
    backward = (None, grad_average, None) if last else (None, grad_average, grad_input)
    return [
        operator(
            rollout_step.rollout_step,
            *(x, average, v, u, sigma, sigma_next, weight, 3.0, 1, 1000.0, 0.0, dtype, last),
            unread=(x, sigma, sigma_next) if last else (),
        ),
        operator(
            rollout_step.rollout_step_backward,
            *(*backward, v, u, sigma, sigma_next, weight, 3.0, 1, FP32),
            unread=(v, u),
        ),
    ]


def embedding(
    rows: int, width: int, base: torch.dtype, delta: torch.dtype, times: torch.dtype = FP32, backward: bool = False
) -> list[Call]:
    def mlp(dtype: torch.dtype) -> list[Tensor]:
        shapes = ((width, 256), (width,), (width, width), (width,))
        return [empty(*shape, dtype=dtype) for shape in shapes]

    t, r, gate = empty(rows, dtype=times), empty(rows, dtype=times), empty(1)
    grad, grad_silu = empty(rows, width, dtype=base), empty(rows, width, dtype=base)
    arguments = (t, r, *mlp(base), *mlp(delta), gate, 256, True, 0.0, 1.0, 10000.0, 1.0, "r")
    calls = [operator(flowmap_embedding.flowmap_embedding, *arguments, True)]
    if backward:
        launcher = flowmap_embedding.flowmap_embedding_backward
        calls.append(operator(launcher, grad, grad_silu, *arguments, True, True, True))
    return calls


def inputs(dtype: torch.dtype, times: tuple[int, ...]) -> list[Call]:
    x0, noise, grad_velocity = (empty(*WAN_LATENTS) for _ in range(3))
    sigmas, grads = [empty(*times) for _ in range(3)], [empty(*WAN_LATENTS, dtype=dtype) for _ in range(3)]
    return [
        operator(interval_inputs.interval_inputs, x0, noise, *sigmas, dtype),
        operator(interval_inputs.interval_inputs_backward, *grads, grad_velocity, *sigmas, FP32, FP32),
    ]


def loss(dtype: torch.dtype, times: tuple[int, ...], whole: bool) -> list[Call]:
    """``whole``: with guidance and the central difference."""
    batch = times[0]
    shape = (batch, *WAN_LATENTS[1:])
    prediction, *others = (empty(*shape, dtype=dtype) for _ in range(4))
    target, residual, grad = empty(*shape), empty(*shape), [empty(batch) for _ in range(2)]
    interval, gap, weight = (empty(*times) for _ in range(3))
    optional = (*others, interval, gap) if whole else (None,) * 5
    scale = 3.0 if whole else 1.0
    return [
        operator(flowmap_loss.flowmap_loss, prediction, target, *optional, weight, scale, 1, True),
        operator(flowmap_loss.flowmap_loss_backward, *grad, residual, weight, scale, 1, dtype),
    ]


def distribution_matching(dtype: torch.dtype, times: tuple[int, ...]) -> list[Call]:
    x, gradient, sigma, grad = empty(*WAN_LATENTS), empty(*WAN_LATENTS), empty(*times), empty(1)
    scores = [empty(*WAN_LATENTS, dtype=dtype) for _ in range(4)]
    return [
        operator(dmd_gradient.dmd_gradient, x, sigma, *scores, 3.0, 1),
        operator(dmd_gradient.dmd_gradient_backward, grad, gradient, FP32),
    ]


CASES: dict[str, Callable[[], list[Call]]] = {
    "gate_blend bf16": lambda: blend(BF16),
    "gate_blend fp32": lambda: blend(FP32),
    "rollout_step bf16": lambda: rollout(BF16, (1, 1, 1, 1, 1), guided=True),
    "rollout_step bf16 frames": lambda: rollout(BF16, (1, 1, 21, 1, 1), guided=False),
    "rollout_step bf16 last": lambda: rollout(BF16, (1, 1, 1, 1, 1), guided=True, last=True),
    "rollout_step fp32": lambda: rollout(FP32, (1, 1, 1, 1, 1), guided=True),
    "interval_inputs bf16": lambda: inputs(BF16, (1, 1, 1, 1, 1)),
    "interval_inputs bf16 frames": lambda: inputs(BF16, (1, 1, 21, 1, 1)),
    "interval_inputs fp32": lambda: inputs(FP32, (1, 1, 1, 1, 1)),
    "flowmap_loss bf16": lambda: loss(BF16, (1, 1, 1, 1, 1), whole=True),
    "flowmap_loss bf16 frames": lambda: loss(BF16, (2, 1, 21, 1, 1), whole=True),
    "flowmap_loss bf16 plain": lambda: loss(BF16, (4, 1, 1, 1, 1), whole=False),
    "flowmap_loss fp32": lambda: loss(FP32, (1, 1, 1, 1, 1), whole=True),
    "dmd_gradient bf16": lambda: distribution_matching(BF16, (1, 1, 1, 1, 1)),
    "dmd_gradient bf16 frames": lambda: distribution_matching(BF16, (1, 1, 21, 1, 1)),
    "dmd_gradient fp32": lambda: distribution_matching(FP32, (1, 1, 1, 1, 1)),
    "flowmap_embedding bf16 D1536 M1": lambda: embedding(1, 1536, BF16, BF16),
    "flowmap_embedding bf16 D1536 M21": lambda: embedding(21, 1536, BF16, BF16, backward=True),
    "flowmap_embedding fp32+bf16 D5120 M2": lambda: embedding(2, 5120, FP32, BF16),
    "flowmap_embedding fp32+bf16 D5120 M4": lambda: embedding(4, 5120, FP32, BF16, backward=True),
    "flowmap_embedding fp64 D1536 M1": lambda: embedding(1, 1536, FP64, FP64, FP64),
    "flowmap_embedding fp64 D1536 M4": lambda: embedding(4, 1536, FP64, FP64, FP64, backward=True),
}


def source(kernel: Any, bound: inspect.BoundArguments) -> ASTSource:
    """What Triton's launcher specialises on: types, None, 1, and divisibility by 16."""
    signature, constants, attributes = {}, {}, {}
    for position, (parameter, value) in enumerate(zip(kernel.params, bound.arguments.values(), strict=True)):
        divisible = False
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name], divisible = POINTERS[value.dtype], True
        elif isinstance(value, float):
            signature[parameter.name] = parameter.annotation_type or "fp32"
        else:
            signature[parameter.name], divisible = "i32" if value < 2**31 else "i64", value % 16 == 0
        if divisible:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout)}


def accesses(ptx: str, instruction: str) -> dict[int, int]:
    """How many global loads ("ld", asynchronous copies to shared memory included) or stores ("st") of each width a
    thread has, by bytes."""
    widths: collections.Counter[int] = collections.Counter()
    for vector, bits in re.findall(rf"{instruction}\.global(?:\.[A-Za-z0-9_:]+?)*?(?:\.v(\d))?\.[bfsu](\d+)\s", ptx):
        widths[int(vector or 1) * int(bits) // 8] += 1
    if instruction == "ld":
        widths.update(int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+)", ptx))
    return dict(sorted(widths.items()))


@dataclass(frozen=True)
class Multiprocessor:
    shared: int  # bytes, of which each block takes 1024 for itself
    warps: int = 64
    blocks: int = 32
    registers: int = 65536  # given to warps by 256


MULTIPROCESSORS = {80: Multiprocessor(164 << 10), 90: Multiprocessor(228 << 10), 100: Multiprocessor(228 << 10)}


def occupancy(capability: int, registers: int, shared: int, warps: int) -> float | None:
    """The share of a multiprocessor's warps that fit in it at once; None for a target whose limits are not listed."""
    limits = MULTIPROCESSORS.get(capability)
    if limits is None:
        return None
    by_registers = limits.registers // (-(-registers * 32 // 256) * 256) // warps
    blocks = min(limits.blocks, limits.warps // warps, by_registers, limits.shared // (shared + 1024))
    return blocks * warps / limits.warps


def report(targets: list[int], only: str = "") -> Iterator[dict[str, Any]]:
    seen = set()
    for case, run in CASES.items():
        for call in run() if only in case else ():
            for launch, capability in itertools.product(call.launches, targets):
                key = (launch.source.hash(), str(launch.options), capability)
                if key in seen:
                    continue
                seen.add(key)
                target = GPUTarget("cuda", capability, 32)
                compiled = triton.compile(launch.source, target=target, options=launch.options)
                used, shared, warps = (
                    resources(compiled.asm["cubin"]),
                    compiled.metadata.shared,
                    launch.options["num_warps"],
                )
                yield {
                    "case": case,
                    "kernel": launch.kernel.fn.__name__,
                    "target": f"sm_{capability}",
                    "registers": used["REG"],
                    "local": used["LOCAL"],
                    "stack": used["STACK"],
                    "shared": shared,
                    "loads": accesses(compiled.asm["ptx"], "ld"),
                    "stores": accesses(compiled.asm["ptx"], "st"),
                    "programs": launch.programs,
                    "threads": 32 * warps,
                    "occupancy": occupancy(capability, used["REG"], shared, warps),
                    "operator_launches": len(call.launches),
                    "operator_moved_over_floor": round(call.moved / call.floor, 3),
                }


def markdown(entries: list[dict[str, Any]]) -> str:
    def widths(counts: dict[int, int]) -> str:
        return ", ".join(f"{count} x {width}" for width, count in counts.items())

    lines = [
        f"triton {triton.__version__}, {inspect_cuda.versions()}. Measured: what the compiler made. Modelled: "
        "occupancy; bytes over the floor, of all launches of the operator's call.",
        "",
        "| case | kernel | target | registers | spilled | stack | shared | loads (bytes wide) | stores | programs | "
        "occupancy | launches | bytes / floor |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        share = entry["occupancy"]
        cells = [
            *(entry[key] for key in ("case", "kernel", "target", "registers", "local", "stack", "shared")),
            *(widths(entry["loads"]), widths(entry["stores"]), f"{entry['programs']} x {entry['threads']}"),
            "" if share is None else f"{100 * share:.0f} %",
            entry["operator_launches"],
            entry["operator_moved_over_floor"],
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--kernels", nargs="+", default=["triton", "cuda"], choices=["triton", "cuda"])
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--out", type=Path, help="write kernels.json and kernels.md there")
    arguments = parser.parse_args()
    entries = list(report(arguments.targets, arguments.only)) if "triton" in arguments.kernels else []
    if "cuda" in arguments.kernels:
        for entry in inspect_cuda.report(arguments.targets, arguments.only):
            capability, warps = int(entry["target"].removeprefix("sm_")), entry["threads"] // 32
            entries.append({**entry, "occupancy": occupancy(capability, entry["registers"], entry["shared"], warps)})
    if arguments.out is None:
        print(json.dumps(entries, indent=1))
    else:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "kernels.json").write_text(json.dumps(entries, indent=1) + "\n")
        (arguments.out / "kernels.md").write_text(markdown(entries))
