"""The CUDA kernels of csrc/cuda, compiled for the CPU: where there is no GPU, this is how their results are seen.

The sources are compiled as they are, but for ``launch.cuh``, in whose place the one of this folder runs each CUDA
thread as a fiber, and for the dispatch key. The undefined behaviour sanitizer is on: it ends the process on an access
of 16 bytes that is not aligned.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

from anyflow_kernels import _library

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
BUILD = ROOT / "build" / "cuda_on_host"
COMPILER = shutil.which("g++") if sys.platform == "linux" else None
KEY = "PrivateUse1"  # a dispatch key that nothing else uses here
OPERATORS = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))


IMPL = "TORCH_LIBRARY_IMPL(anyflow_kernels, {}, m)"
FLAGS = [
    *("-x", "c++", "-std=c++20", "-O1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    *("-fsanitize=undefined", "-fno-sanitize-recover=undefined", "-DAT_PER_OPERATOR_HEADERS"),
]


def _sources() -> dict[str, str]:
    """File name below the build folder -> text."""
    found = {f"cuda/{path.name}": path.read_text() for path in sorted((ROOT / "csrc" / "cuda").iterdir())}
    found |= {f"cuda/{name}": (HERE / name).read_text() for name in ("launch.cuh", "fibers.cpp")}
    found |= {path.name: path.read_text() for path in sorted((ROOT / "csrc").glob("*.h"))}
    return {name: text.replace(IMPL.format("CUDA"), IMPL.format(KEY)) for name, text in found.items()}


def build() -> Path:
    """The library, which is built again when a source, a flag or torch has changed."""
    import fcntl

    sources = _sources()
    torch_folder = Path(torch.__file__).parent
    digest = hashlib.sha256(repr((sources, FLAGS, torch.__version__)).encode()).hexdigest()[:16]
    folder = BUILD / digest
    library = folder / "cuda_on_host.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:  # two workers of a test run
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return library
        for name, text in sources.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]

        def compile_one(name: str) -> Path:
            target = folder / f"{Path(name).name}.o"
            _run(COMPILER, *FLAGS, *includes, "-c", folder / name, "-o", target)
            return target

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, (name for name in sources if name.endswith((".cpp", ".cu")))))
        libraries = torch_folder / "lib"
        unfinished = library.with_suffix(".part")
        _run(
            *(COMPILER, "-shared", "-fsanitize=undefined", *objects, "-o", unfinished),
            *(f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-lc10"),
        )
        unfinished.rename(library)
    return library


def _run(*command: Any) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")


@functools.cache
def kernels() -> dict[str, Callable[..., Any]]:
    """Operator -> its CUDA kernel on the CPU."""
    torch.ops.load_library(build())
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    found = {}
    for name in _library._operators:
        qualified = f"{_library.NAMESPACE}::{name}"
        if torch._C._dispatch_has_kernel_for_dispatch_key(qualified, KEY):
            found[name] = functools.partial(torch.library.get_kernel(qualified, KEY).call_boxed, keys)
    return found


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """The operators run on these kernels, on tensors of the CPU."""
    overlay = torch.library.Library(_library.NAMESPACE, "IMPL")
    for name, kernel in kernels().items():
        _library._lay(overlay, name, kernel, "CPU")
    try:
        yield
    finally:
        overlay._destroy()
