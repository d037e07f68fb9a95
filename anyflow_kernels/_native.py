"""Loads the compiled extension where it fits; says why where it does not."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType

import torch

ENVIRONMENT_VARIABLE = "ANYFLOW_KERNELS_BACKEND"
_RUNS = {"AVX2": ("DEFAULT", "AVX2"), "AVX512": ("DEFAULT", "AVX2", "AVX512")}  # what runs where
_STAMP = re.compile(rb"anyflow_kernels built for torch ([^ \0]+) on ([^ \0]+)\0")


def load() -> tuple[ModuleType | None, str]:
    """The extension, whose kernels are then registered, and what it is; or None, and why there is none."""
    if os.environ.get(ENVIRONMENT_VARIABLE) == "reference":
        return None, f"{ENVIRONMENT_VARIABLE}=reference"
    name = f"{__package__}._C"
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None or Path(found.origin).parent != Path(__file__).parent:
        return None, "not built"  # another copy of the package is not asked for its own
    reason = _unfit(Path(found.origin))
    if reason is not None:
        return None, reason
    try:
        extension = importlib.import_module(name)
    except Exception as error:  # a library that was cut short, or misses a symbol
        return None, f"cannot be loaded ({type(error).__name__}: {error})"
    cuda = ", ".join(extension.cuda_architectures)
    built = f"{extension.compiler}, {extension.instruction_set}, torch {extension.torch}"
    return extension, f"{built}, {f'CUDA for {cuda}' if cuda else 'no CUDA kernels'}"


def _unfit(path: Path) -> str | None:
    """Judged by the stamp in the file, before it is loaded: made for another torch it may crash, not raise."""
    stamp = _STAMP.search(path.read_bytes())
    if stamp is None:
        return f"{path.name} is broken: it does not say what it was built for"
    version, instructions = (part.decode() for part in stamp.groups())
    if version != torch.__version__:
        return f"built for torch {version}, but this is torch {torch.__version__}: build it again"
    available = torch.backends.cpu.get_cpu_capability()
    if instructions not in _RUNS.get(available, ("DEFAULT",)):
        return (
            f"built for {instructions}, but this processor (or ATEN_CPU_CAPABILITY) gives {available}: build it again"
        )
    return None


extension, about = load()
