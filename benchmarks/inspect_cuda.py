"""Compiles the CUDA kernels of csrc/cuda for NVIDIA GPUs, on a machine without one, and reads what they use.

The resources are those of the compiled kernels. Modelled, at the sizes of real models: the bytes that all launches of
an operator move over its floor, when a launch moves every array that it is given once.
"""

from __future__ import annotations

import collections
import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

SOURCES = sorted((Path(__file__).parents[1] / "csrc" / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc")
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-D__CUDA_NO_HALF_CONVERSIONS__"]
GENERATED = "c10/cuda/impl/cuda_cmake_macros.h"  # by the build of a CUDA torch: the CPU's comes without
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # bytes, by the suffix of an access; none: 4

BLOCK, LAYER_BLOCK, ELEMENTS = 256, 128, 8  # threads, threads, elements of bfloat16 that a thread takes
BF16, FP32 = 2, 4
WAN_LATENTS = 16 * 21 * 60 * 104


@dataclass(frozen=True)
class Case:
    """One call of an operator: its launches, as (kernel, blocks, threads), and the bytes of its floor and of all of
    them."""

    launches: tuple[tuple[str, int, int], ...]
    floor: int
    moved: int


def _blocks(size: int, each: int) -> int:
    return -(-size // each)


def _gate_blend(rows: int = 21, width: int = 1536) -> list[Case]:
    size = rows * width
    blocks = _blocks(size, BLOCK * ELEMENTS)
    forward, backward = 3 * BF16 * size + FP32, 5 * BF16 * size + 2 * FP32
    types = "<BFloat16, BFloat16>"
    return [
        Case((("gate_blend_fwd_kernel" + types, blocks, BLOCK),), forward, forward),
        Case(
            (("gate_blend_bwd_kernel" + types, blocks, BLOCK), ("sum_partials_kernel<float>", 1, BLOCK)),
            backward,
            backward + 2 * FP32 * blocks,
        ),
    ]


def _rollout_step(size: int = WAN_LATENTS) -> list[Case]:
    """Guided, float32 state, bfloat16 velocities, one time."""
    blocks = _blocks(size, BLOCK * ELEMENTS)
    forward, backward = (4 * FP32 + 3 * BF16) * size, (3 * FP32 + 3 * BF16) * size
    types = "<float, BFloat16>"
    return [
        Case((("rollout_step_fwd_kernel" + types, blocks, BLOCK),), forward, forward),
        Case((("rollout_step_bwd_kernel" + types, blocks, BLOCK),), backward, backward),
    ]


def _interval_inputs(size: int = WAN_LATENTS) -> list[Case]:
    """Three points, everything in bfloat16 but the velocity; one time."""
    blocks = _blocks(size, BLOCK * ELEMENTS)
    moved = (5 * BF16 + FP32) * size + 3 * FP32  # what the forward pass reads the backward writes, and the reverse
    names = ("interval_inputs_fwd_kernel<BFloat16, BFloat16>", "interval_inputs_bwd_kernel<BFloat16, BFloat16>")
    return [Case(((name, blocks, BLOCK),), moved, moved) for name in names]


def _flowmap_loss(samples: int = 1, size: int = WAN_LATENTS) -> list[Case]:
    """With guidance and the central difference, bfloat16 predictions, float32 velocity; three times a sample."""
    parts = _blocks(size, BLOCK * ELEMENTS)
    forward = ((4 * BF16 + 2 * FP32) * size + 5 * FP32) * samples
    backward = ((BF16 + FP32) * size + 3 * FP32) * samples
    first = ("flowmap_loss_fwd_kernel<float, BFloat16, BFloat16>", samples * parts, BLOCK)
    means = ("flowmap_loss_means_kernel<float>", samples, BLOCK)
    last = ("flowmap_loss_bwd_kernel<BFloat16>", samples * parts, BLOCK)
    return [
        Case((first,), forward, forward)
        if parts == 1
        else Case((first, means), forward, forward + 4 * FP32 * samples * parts),
        Case((last,), backward, backward),
    ]


def _dmd_gradient(samples: int = 1, size: int = WAN_LATENTS) -> list[Case]:
    """Guided, float32 sample, bfloat16 scores; one time a sample. The scores are read twice, unless a block has a
    sample for itself."""
    parts = _blocks(size, BLOCK * ELEMENTS)
    forward = ((4 * BF16 + 2 * FP32) * size + 2 * FP32) * samples
    backward = (2 * FP32 * size + FP32) * samples
    sums = ("dmd_gradient_sums_kernel<float, BFloat16, BFloat16>", samples * parts, BLOCK)
    normalisers = ("dmd_gradient_normalisers_kernel<float>", samples, BLOCK)
    gradient = ("dmd_gradient_fwd_kernel<BFloat16>", samples * parts, BLOCK)
    again = 3 * BF16 * size * samples + 4 * FP32 * samples * parts + 3 * FP32 * samples
    return [
        Case((sums,), forward, forward)
        if parts == 1
        else Case((sums, normalisers, gradient), forward, forward + again),
        Case((("dmd_gradient_bwd_kernel<float>", samples * _blocks(size, BLOCK * 4), BLOCK),), backward, backward),
    ]


def _flowmap_embedding(rows: int, width: int, features: int = 256) -> list[Case]:
    """bfloat16 weights, with SiLU."""
    first, second = 2 * BF16 * width * (features + 1), 2 * BF16 * width * (width + 1)  # of both embedders
    rounded, wide = BF16 * rows * width, FP32 * rows * width
    kept = rows if rows <= 2 else 4 if rows <= 4 else 8
    units = LAYER_BLOCK // 32 * (1 if kept <= 2 else 2)
    types, groups = f"<float, {kept}>", _blocks(width, units)
    one = ("flowmap_embedding_one_launch_kernel" + types, 2 * groups, LAYER_BLOCK)
    two = (
        ("flowmap_embedding_hidden_kernel" + types, 2 * groups, LAYER_BLOCK),
        ("flowmap_embedding_output_kernel" + types, groups, LAYER_BLOCK),
    )
    floor = first + second + 2 * rounded
    weights = 4 * _blocks(_blocks(width, 8) * _blocks(width, 4), BLOCK)
    backward = (
        two[0],
        ("flowmap_embedding_bwd_blend_kernel" + types, groups, LAYER_BLOCK),
        ("sum_partials_kernel<float>", 1, BLOCK),
        (f"flowmap_embedding_bwd_hidden_kernel<float, {1 if rows == 1 else 4}>", 2 * _blocks(width, 64), BLOCK),
        ("flowmap_embedding_bwd_weight_kernel<float>", weights, BLOCK),
    )
    inputs = 2 * FP32 * rows * features
    moved = (
        (first + 4 * wide + inputs)  # activations, before and after the SiLU
        + (second + 2 * wide + 2 * rounded + wide + FP32 * groups)  # dy
        + FP32 * groups
        + (second + wide + 2 * wide + 2 * wide)  # the gradients of the hidden units
        + (2 * wide + wide + inputs + 2 * wide + first + second)
    )
    return [
        Case((one,) if rows <= 2 else two, floor, floor + 4 * wide),
        Case(backward, floor + first + second, moved),
    ]


CASES: dict[str, list[Case]] = {
    "gate_blend bf16": _gate_blend(),
    "rollout_step bf16": _rollout_step(),
    "interval_inputs bf16": _interval_inputs(),
    "flowmap_loss bf16": _flowmap_loss(),
    "flowmap_loss bf16 digits": _flowmap_loss(64, 64),
    "dmd_gradient bf16": _dmd_gradient(),
    "dmd_gradient bf16 digits": _dmd_gradient(64, 64),
    "flowmap_embedding bf16 D1536 M1": _flowmap_embedding(1, 1536),
    "flowmap_embedding bf16 D5120 M4": _flowmap_embedding(4, 5120),
    "flowmap_embedding bf16 D1536 M21": _flowmap_embedding(21, 1536),
}


def _tool(name: str) -> str:
    """cuobjdump, of the toolkit or of Triton."""
    found = shutil.which(name)
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name)
    if found is None:
        raise FileNotFoundError(f"{name}: neither in the CUDA toolkit nor in Triton")
    return found


def _run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def compile_for(capability: int, source: Path, folder: Path) -> Path:
    """The machine code of one source for one GPU."""
    includes = cpp_extension.include_paths()
    if not any((Path(path) / GENERATED).exists() for path in includes):
        (folder / GENERATED).parent.mkdir(parents=True, exist_ok=True)
        (folder / GENERATED).write_text("#pragma once\n")
        includes = [*includes, str(folder)]
    cubin = folder / f"{source.stem}.sm_{capability}.cubin"
    target = f"arch=compute_{capability},code=sm_{capability}"
    _run(NVCC, *FLAGS, *(f"-I{path}" for path in includes), "-gencode", target, "-cubin", "-o", cubin, source)
    return cubin


def _short(name: str) -> str:
    """A demangled kernel, without namespaces and parameters."""
    name = name.replace("(anonymous namespace)::", "").replace("anyflow::cuda::", "").replace("c10::", "")
    return re.sub(r"^void ", "", name.split("(")[0])


def _demangled(text: str) -> str:
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def used_by(cubin: Path, capability: int) -> dict[str, dict[str, Any]]:
    """Kernel -> registers of a thread, bytes of spilled registers (local) and of stack, of shared memory, and its
    global loads and stores by width in bytes."""
    cuobjdump = _tool("cuobjdump")
    usage = _demangled(_run(cuobjdump, "--dump-resource-usage", cubin))
    found: dict[str, dict[str, Any]] = {}
    for name, *numbers in re.findall(r"Function (.*):\n.*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage):
        registers, stack, shared, local = map(int, numbers)
        found[_short(name)] = {
            "registers": registers,
            "stack": stack,
            "shared": shared - 1024 if capability >= 90 and shared else shared,  # the rest is each block's own
            "local": local,
            "loads": collections.Counter(),
            "stores": collections.Counter(),
        }
    counts: dict[str, Any] = {}
    for line in _demangled(_run(cuobjdump, "-sass", cubin)).splitlines():
        if "Function : " in line:
            counts = found[_short(line.split("Function : ")[1])]
        elif access := re.search(r"\b(LDG|STG)\.E((?:\.\w+)*)", line):
            widths = [WIDTHS[suffix] for suffix in access[2].split(".") if suffix in WIDTHS]
            counts["loads" if access[1] == "LDG" else "stores"][widths[0] if widths else 4] += 1
    return found


@functools.cache
def inspect(targets: tuple[int, ...]) -> dict[int, dict[str, dict[str, Any]]]:
    """capability -> kernel -> what it uses."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:

        def one(job: tuple[int, Path]) -> dict[str, dict[str, Any]]:
            return used_by(compile_for(*job, Path(folder)), job[0])

        jobs = [(capability, source) for capability in targets for source in SOURCES]
        found: dict[int, dict[str, dict[str, Any]]] = {capability: {} for capability in targets}
        for (capability, _), kernels in zip(jobs, pool.map(one, jobs), strict=True):
            found[capability] |= kernels
    return found


def report(targets: Sequence[int], only: str = "") -> Iterator[dict[str, Any]]:
    """An entry for each case, kernel and target, as ``inspect_kernels`` makes them of the Triton kernels."""
    cases = {name: calls for name, calls in CASES.items() if only in name}
    if NVCC is None or not cases:
        return
    found = inspect(tuple(targets))
    for name, calls in cases.items():
        for call in calls:
            for kernel, blocks, threads in call.launches:
                for capability in targets:
                    used = found[capability][kernel]
                    yield {
                        "case": f"{name}, CUDA C++",
                        "kernel": kernel,
                        "target": f"sm_{capability}",
                        **used,
                        "loads": dict(sorted(used["loads"].items())),
                        "stores": dict(sorted(used["stores"].items())),
                        "programs": blocks,
                        "threads": threads,
                        "operator_launches": len(call.launches),
                        "operator_moved_over_floor": round(call.moved / call.floor, 3),
                    }


def versions() -> str:
    if NVCC is None:
        return "no nvcc"
    (release,) = re.findall(r"release (\S+),", _run(NVCC, "--version"))
    return f"nvcc {release}, torch {torch.__version__}"
