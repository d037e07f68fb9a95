"""Compiles every Triton kernel for NVIDIA GPUs, on a machine without one, and prints what it uses as JSON.

    python benchmarks/inspect_kernels.py [--targets 80 90 100] [--only SUBSTRING]

The launchers run on tensors of the meta device at the sizes of real models; what they would launch is recorded, with
the specialisations that Triton would derive, and compiled. For each kernel and target: registers a thread, bytes of
spilled registers (local) and of stack, of shared memory, and its global loads and stores by width in bytes.
"""

import argparse
import collections
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))

from anyflow_kernels.flowmap_embedding import kernels as flowmap_embedding
from anyflow_kernels.gate_blend import kernels as gate_blend
from anyflow_kernels.rollout_step import kernels as rollout_step

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default until triton 3.9, which warns that it will change
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
POINTERS = {BF16: "*bf16", FP32: "*fp32", FP64: "*fp64", torch.float16: "*fp16", torch.int32: "*i32"}
WAN_LATENTS = (1, 16, 21, 60, 104)


def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def blend(dtype: torch.dtype) -> None:
    base, delta, gate = empty(21, 1536, dtype=dtype), empty(21, 1536, dtype=dtype), empty(1)
    gate_blend.gate_blend(base, delta, gate)
    gate_blend.gate_blend_backward(base, base, delta, gate, True)


def rollout(dtype: torch.dtype, times: tuple[int, ...], guided: bool, last: bool = False) -> None:
    x, v, sigma = empty(*WAN_LATENTS), empty(*WAN_LATENTS, dtype=dtype), empty(*times)
    u = v if guided else None
    rollout_step.rollout_step(x, x, v, u, sigma, sigma, sigma, 3.0, 1, 1000.0, 0.0, dtype, last)
    model_grad = None if last else v
    rollout_step.rollout_step_backward(None, x, model_grad, v, u, sigma, sigma, sigma, 3.0, 1, FP32)


def embedding(
    rows: int, width: int, base: torch.dtype, delta: torch.dtype, times: torch.dtype = FP32, backward: bool = False
) -> None:
    def mlp(dtype: torch.dtype) -> list[torch.Tensor]:
        shapes = ((width, 256), (width,), (width, width), (width,))
        return [empty(*shape, dtype=dtype) for shape in shapes]

    t, gate, grad = empty(rows, dtype=times), empty(1), empty(rows, width, dtype=base)
    weights, options = (*mlp(base), *mlp(delta)), (256, True, 0.0, 1.0, 10000.0, 1.0, "r")
    flowmap_embedding.flowmap_embedding(t, t, *weights, gate, *options, True)
    if backward:
        flowmap_embedding.flowmap_embedding_backward(grad, grad, t, t, *weights, gate, *options, True, True, True)


CASES: dict[str, Callable[[], None]] = {
    "gate_blend bf16": lambda: blend(BF16),
    "gate_blend fp32": lambda: blend(FP32),
    "rollout_step bf16": lambda: rollout(BF16, (1, 1, 1, 1, 1), guided=True),
    "rollout_step bf16 frames": lambda: rollout(BF16, (1, 1, 21, 1, 1), guided=False),
    "rollout_step bf16 last": lambda: rollout(BF16, (1, 1, 1, 1, 1), guided=True, last=True),
    "rollout_step fp32": lambda: rollout(FP32, (1, 1, 1, 1, 1), guided=True),
    "flowmap_embedding bf16 D1536 M1": lambda: embedding(1, 1536, BF16, BF16),
    "flowmap_embedding bf16 D1536 M21": lambda: embedding(21, 1536, BF16, BF16, backward=True),
    "flowmap_embedding fp32+bf16 D5120 M2": lambda: embedding(2, 5120, FP32, BF16),
    "flowmap_embedding fp32+bf16 D5120 M4": lambda: embedding(4, 5120, FP32, BF16, backward=True),
    "flowmap_embedding fp64 D1536 M1": lambda: embedding(1, 1536, FP64, FP64, FP64),
    "flowmap_embedding fp64 D1536 M4": lambda: embedding(4, 1536, FP64, FP64, FP64, backward=True),
}


def launches(case: Callable[[], None]) -> list[tuple[Any, ASTSource, dict[str, Any]]]:
    """(kernel, source, options) of every launch of a case, not launched."""
    recorded = []

    def record(kernel: Any, *positional: Any, grid: Any, warmup: bool, **named: Any) -> None:
        parameters = inspect.signature(kernel.fn).parameters
        options = {name: named.pop(name) for name in list(named) if name not in parameters}
        recorded.append((kernel, source(kernel, inspect.signature(kernel.fn).bind(*positional, **named)), options))

    launch, triton.JITFunction.run = triton.JITFunction.run, record
    try:
        case()
    finally:
        triton.JITFunction.run = launch
    return recorded


def source(kernel: Any, bound: inspect.BoundArguments) -> ASTSource:
    """What Triton's launcher specialises on: types, None, 1, and divisibility by 16."""
    signature, constants, attributes = {}, {}, {}
    for position, (parameter, value) in enumerate(zip(kernel.params, bound.arguments.values(), strict=True)):
        divisible = False
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
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
    widths = collections.Counter()
    for vector, bits in re.findall(rf"{instruction}\.global(?:\.[A-Za-z0-9_:]+?)*?(?:\.v(\d))?\.[bfsu](\d+)\s", ptx):
        widths[int(vector or 1) * int(bits) // 8] += 1
    if instruction == "ld":
        widths.update(int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+)", ptx))
    return dict(sorted(widths.items()))


def report(targets: list[int], only: str = "") -> Iterator[dict[str, Any]]:
    seen = set()
    for case, run in CASES.items():
        if only not in case:
            continue
        for kernel, kernel_source, options in launches(run):
            for capability in targets:
                key = (kernel_source.hash(), str(options), capability)
                if key in seen:
                    continue
                seen.add(key)
                target = GPUTarget("cuda", capability, 32)
                compiled = triton.compile(kernel_source, target=target, options=options)
                used = resources(compiled.asm["cubin"])
                yield {
                    "case": case,
                    "kernel": kernel.fn.__name__,
                    "target": f"sm_{capability}",
                    "registers": used["REG"],
                    "local": used["LOCAL"],
                    "stack": used["STACK"],
                    "shared": compiled.metadata.shared,
                    "loads": accesses(compiled.asm["ptx"], "ld"),
                    "stores": accesses(compiled.asm["ptx"], "st"),
                }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    arguments = parser.parse_args()
    print(json.dumps(list(report(arguments.targets, arguments.only)), indent=1))
