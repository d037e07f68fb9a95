"""Launch configurations that were measured to be faster than the defaults: a table for each device, made by
benchmarks/tune.py, in tuned/<device>.json. Where there is none, the defaults of the kernels hold.

    {"device": "NVIDIA ...", "operators": {"gate_blend": {"large": {"block": 2048, "num_warps": 8}}}}

An operator has one frozen dataclass of what it may be launched with, of which a table changes fields, by operator and
size. A launcher asks with ``tuned`` at every launch; the answer depends on nothing but the arguments and the files.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from . import _library
from ._library import WrongTable

SIZES = ("small", "medium", "large")
FOLDER = Path(__file__).parent / "tuned"

Changes = dict[str, int]
Table = dict[tuple[str, str], Changes]  # by operator and size

_trial: Table | None = None


def size_of(elements: int) -> str:
    """For operators that go over elements: less than occupies a GPU, than fills its second-level cache, or more."""
    return "small" if elements < 1 << 18 else "medium" if elements < 1 << 23 else "large"


@functools.cache
def tuned(operator: str, size: str, default: Any, device: torch.device) -> Any:
    """``default``, a frozen dataclass, with the fields that the table of the device changes for this operator and size.

    Raises WrongTable, a ValueError, when the table is none, names an unknown operator, size or field, or has a value of
    another type, or for a block or a number of warps one that is no power of two.
    """
    changes = (_table(device) if _trial is None else _trial).get((operator, size))
    if changes is None:
        return default
    known = asdict(default)
    for field, value in changes.items():
        what = f"launch configuration of {operator}, {size}: {field!r}"
        if field not in known:
            raise WrongTable(f"{what} is no field; allowed are {', '.join(map(repr, known))}")
        if type(value) is not type(known[field]) or value < 0:
            raise WrongTable(f"{what} must be a {type(known[field]).__name__}, got {value!r}")
        if ("block" in field or field == "num_warps") and (value == 0 or value & (value - 1)):
            raise WrongTable(f"{what} must be a power of two, got {value}")
    return replace(default, **changes)


@contextmanager
def trial(table: Table) -> Iterator[None]:
    """Launch with ``table`` instead of that of the device."""
    global _trial
    before, _trial = _trial, table
    tuned.cache_clear()
    try:
        yield
    finally:
        _trial = before
        tuned.cache_clear()


@functools.cache
def _table(device: torch.device) -> Table:
    name = device_name(device)
    return {} if name is None else read(name)


def device_name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def path_of(name: str) -> Path:
    return FOLDER / (re.sub(r"[^\w.-]+", "-", name) + ".json")


def read(name: str) -> Table:
    """The table of the device of that name; empty where there is no file."""
    path = path_of(name)
    if not path.exists():
        return {}
    try:
        document = json.loads(path.read_text())
        if document.keys() != {"device", "operators"} or document["device"] != name:
            raise ValueError(f"must have the keys 'device', which is {name!r}, and 'operators'")
        table = {(o, s): changes for o, sizes in document["operators"].items() for s, changes in sizes.items()}
        for (operator, size), changes in table.items():
            if operator not in _library._operators:
                raise ValueError(
                    f"unknown operator {operator!r}; allowed are {', '.join(map(repr, _library._operators))}"
                )
            if size not in SIZES:
                raise ValueError(f"{operator}: unknown size {size!r}; allowed are {', '.join(map(repr, SIZES))}")
            if not isinstance(changes, dict):
                raise ValueError(f"{operator}, {size}: must be fields and their values, got {changes!r}")
    except (AttributeError, ValueError) as error:  # also what is no JSON, or JSON of another shape
        raise WrongTable(f"{path}: {error}") from error
    return table


def write(name: str, table: Table) -> Path:
    operators: dict[str, dict[str, Changes]] = {}
    for (operator, size), changes in sorted(table.items()):
        operators.setdefault(operator, {})[size] = changes
    path = path_of(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"device": name, "operators": operators}, indent=1) + "\n")
    return path
