"""Loads the compiled extension where it fits; says why where it does not."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ENVIRONMENT_VARIABLE = "ANYFLOW_KERNELS_BACKEND"
_RUNS = {"AVX2": ("DEFAULT", "AVX2"), "AVX512": ("DEFAULT", "AVX2", "AVX512")}  # what runs where
# A digest of all operators' schemas. A library whose kernels have other signatures would raise when the operators are
# defined, and once loaded it stays. setup.py reads this line; tests/kernels/test_native.py knows what it has to be.
SCHEMAS = "074f7c58"
_STAMP = re.compile(rb"anyflow_kernels built for torch ([^ \0]+) on ([^ \0]+) with schemas ([^ \0]+)\0")


def load() -> tuple[ModuleType | None, str]:
    """The extension, whose kernels are then registered, and what it is; or None, and why there is none."""
    if os.environ.get(ENVIRONMENT_VARIABLE) == "reference":
        return None, f"{ENVIRONMENT_VARIABLE}=reference"
    name = f"{__package__}._C"
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None or Path(found.origin).parent != Path(__file__).parent:
        return None, _with_word("not built")  # another copy of the package is not asked for its own
    reason = _unfit(Path(found.origin))
    if reason is not None:
        return None, reason
    try:
        extension = importlib.import_module(name)
    except Exception as error:  # a library that was cut short, or misses a symbol
        return None, f"cannot be loaded ({type(error).__name__}: {error})"
    cuda = ", ".join(extension.cuda_architectures)
    built = f"{extension.compiler}, {extension.instruction_set}, torch {extension.torch}"
    return extension, f"{built}, {f'CUDA for {cuda}' if cuda else _with_word('no CUDA kernels')}"


def _with_word(what: str) -> str:
    """``what``, with the reason where that is what setup.py has left word of."""
    path = Path(__file__).with_name("_C.txt")
    word = path.read_text().strip() if path.exists() else ""
    return word if word.startswith(what) else what


def _unfit(path: Path) -> str | None:
    """Judged by the stamp in the file, before it is loaded: made for another torch it may crash, not raise."""
    content = path.read_bytes()
    stamp = _STAMP.search(content)
    if stamp is None:
        return f"{path.name} is broken: it does not say what it was built for"
    if _cut_short(content):
        return f"{path.name} is broken: it was cut short"
    version, instructions, schemas = (part.decode() for part in stamp.groups())
    if schemas != SCHEMAS:
        return f"built for operators {schemas}, but these are {SCHEMAS}: build it again"
    if version != torch.__version__:
        return f"built for torch {version}, but this is torch {torch.__version__}: build it again"
    available = torch.backends.cpu.get_cpu_capability()
    if instructions not in _RUNS.get(available, ("DEFAULT",)):
        return (
            f"built for {instructions}, but this processor (or ATEN_CPU_CAPABILITY) gives {available}: build it again"
        )
    return None


def _cut_short(content: bytes) -> bool:
    """Whether an ELF library (of 64 bits, little-endian) ends before its last segment: to touch what is missing would
    kill the process. Other formats are left to their loaders."""
    if not content.startswith(b"\x7fELF\x02\x01"):
        return False
    (table,) = struct.unpack_from("<Q", content, 32)
    size, count = struct.unpack_from("<HH", content, 54)
    for entry in range(table, table + size * count, size):
        offset, _, _, length = struct.unpack_from("<4Q", content, entry + 8)
        if offset + length > len(content):
            return True
    return False


def why_not_on_this_gpu() -> str | None:
    """Why the CUDA kernels cannot run on the GPUs of this machine; None when they can."""
    if not torch.cuda.is_available():
        return "no GPU"
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not any(_fits(architecture, capability) for architecture in extension.cuda_architectures):
            compiled = ", ".join(extension.cuda_architectures)
            return f"compiled for {compiled}, but GPU {index} has compute capability {capability[0]}.{capability[1]}"
    return None


def _fits(architecture: str, capability: tuple[int, int]) -> bool:
    """Machine code ("sm_80") runs on its generation from that member on, PTX ("compute_90") on all that are not older,
    either with a letter ("sm_90a") on that very one."""
    kind, number = architecture.split("_")
    digits = number.rstrip("abcdefghijklmnopqrstuvwxyz")
    made_for = (int(digits[:-1]), int(digits[-1]))
    if digits != number:
        return capability == made_for
    return capability >= made_for and (kind == "compute" or capability[0] == made_for[0])


extension: Any
extension, about = load()
