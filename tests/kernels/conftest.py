"""Fixtures of the kernel tests."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator

import cuda_on_host
import pytest
import torch

import anyflow_kernels
from anyflow_kernels import _library

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AVAILABLE = [b for b in _library.BACKENDS if _library.why_not(b, DEVICE, _library._operators["gate_blend"]) is None]
CUDA_ON_HOST = "cuda on host"  # the CUDA kernels, compiled for the CPU
SIMULATED = [CUDA_ON_HOST] if DEVICE == "cpu" and cuda_on_host.COMPILER else []


@pytest.fixture(params=AVAILABLE + SIMULATED)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that runs on this machine's GPU, or on its CPU where it has none, one after the other."""
    name = request.param
    chosen = cuda_on_host.installed() if name == CUDA_ON_HOST else anyflow_kernels.use_backend(name)
    with torch.device(DEVICE), chosen, _poisoned(name):
        yield name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On the CUDA kernels of the operators that have them; the others would run on their default."""

    def simulates_nothing(item: pytest.Item) -> bool:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        operator = values.get("operator", item.path.stem.removeprefix("test_"))
        return values.get("backend") == CUDA_ON_HOST and operator not in cuda_on_host.OPERATORS

    items[:] = [item for item in items if not simulates_nothing(item)]


@contextlib.contextmanager
def _poisoned(backend: str) -> Iterator[None]:
    """Memory that the C++ kernels allocate is NaN until they write it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or backend in ("native", CUDA_ON_HOST))
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def reference_arithmetic() -> None:
    """Here the operators run on the backend that is tested."""


class _Poisoning:
    """The torch module, whose uninitialised memory is NaN."""

    def __getattr__(self, name: str):
        return getattr(torch, name)

    def empty(self, *arguments, **options) -> torch.Tensor:
        return torch.full_like(torch.empty(*arguments, **options), torch.nan)

    def empty_like(self, *arguments, **options) -> torch.Tensor:
        return torch.full_like(torch.empty_like(*arguments, **options), torch.nan)


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    if "triton" in AVAILABLE:
        for operator in anyflow_kernels.__all__:
            try:
                kernels = importlib.import_module(f"anyflow_kernels.{operator}.kernels")
            except ModuleNotFoundError:
                continue
            monkeypatch.setattr(kernels, "torch", _Poisoning())
