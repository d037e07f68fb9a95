"""The choice of a backend: forced, by default, after a failure, and without Triton."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import OPERATORS, sample_inputs

import anyflow_kernels
from anyflow_kernels import _library, _native, use_backend

ROOT = Path(__file__).parents[2]
needs_interpreter = pytest.mark.skipif(
    _library.why_not("triton", "cpu", _library._operators["gate_blend"]) is not None,
    reason="Triton runs on the CPU only in its interpreter",
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(operator, backend) of every call of an operator."""
    made: list[tuple[str, str]] = []

    def spy(operator: _library.Operator, backend: str) -> Any:
        function = operator.implementation(backend)

        def run(*arguments: Any) -> Any:
            made.append((operator.name, backend))
            return function(*arguments)

        return run

    for operator in _library._operators.values():
        for backend in ("reference", "triton"):
            if _library.why_not(backend, "cpu", operator) is None:
                monkeypatch.setitem(operator.implementations, backend, spy(operator, backend))
    # Without the extension the reference runs by default, and nothing would be laid over it when it is forced.
    monkeypatch.setattr(_library, "_runs_by_default", lambda *_: "native")
    return made


@needs_interpreter
def test_blocks_nest_and_are_undone_after_exceptions(calls: list[tuple[str, str]]) -> None:
    def ran() -> str | None:
        calls.clear()
        sample = sample_inputs("gate_blend", "cpu")
        sample.run(**sample.tensors)
        return calls[0][1] if calls else None  # the default is not spied on

    def fail() -> None:
        with use_backend("triton"):
            assert ran() == "triton"
            raise ZeroDivisionError

    assert ran() is None
    with use_backend("triton"):
        assert ran() == "triton"
        with use_backend("reference"):
            assert ran() == "reference"
            with pytest.raises(ZeroDivisionError):
                fail()
            assert ran() == "reference"
        assert ran() == "triton"
    assert ran() is None


@needs_interpreter
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_backward_pass_sees_the_choice(operator: str, calls: list[tuple[str, str]]) -> None:
    sample = sample_inputs(operator, "cpu", requires_grad=True)
    with use_backend("triton"):
        outputs = sample.run(**sample.tensors)
        outputs[0].sum().backward()
    assert calls == [(operator, "triton"), (f"{operator}_backward", "triton")]

    calls.clear()
    outputs = sample.run(**sample.tensors)
    with use_backend("reference"):
        outputs[0].sum().backward()
    assert calls == [(f"{operator}_backward", "reference")]


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown backend 'cuda'; allowed are 'reference', 'triton', 'native'"):
        use_backend("cuda").__enter__()


def test_a_backend_that_runs_nowhere_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "why_not", lambda *_: "the reason")
    with pytest.raises(RuntimeError, match=r"backend 'native' cannot run here \(cpu: the reason; cuda: the reason\)"):
        use_backend("native").__enter__()


def test_a_forced_backend_does_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    only_cuda = lambda backend, device_type, operator: None if device_type == "cuda" else "only on a GPU"  # noqa: E731
    monkeypatch.setattr(_library, "why_not", only_cuda)
    sample = sample_inputs("gate_blend", "cpu")
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match="'triton' is forced but cannot run on cpu: only on a GPU"),
    ):
        sample.run(**sample.tensors)
    sample.run(**sample.tensors)


def test_describe_names_every_operator_and_reason() -> None:
    lines = anyflow_kernels.describe().splitlines()
    for name in _library._operators:
        assert sum(line.split()[0] == name for line in lines) == len(_library.DEVICES), name
    if not torch.cuda.is_available():
        assert "triton: no GPU" in anyflow_kernels.describe()


def test_a_block_that_cannot_be_entered_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = _library._operators["gate_blend"]

    def missing(self: Any, backend: str, device_type: str = "") -> Any:
        raise ImportError("the kernels")

    with monkeypatch.context() as patch:
        patch.setattr(_library.Operator, "implementation", missing)
        patch.setattr(_library, "_runs_by_default", lambda *_: "another")
        patch.setattr(_library, "why_not", lambda *_: None)
        with pytest.raises(ImportError, match="the kernels"):
            use_backend("reference").__enter__()
    assert not _library._forced and operator.implementation("reference") is not None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a GPU that Triton supports were present."""
    monkeypatch.delenv(_library.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(_library, "_failures", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.version, "hip", None)


def _fake_operator(triton: Any) -> _library.Operator:
    return _library.Operator("fake", {"reference": lambda x: x + 1, "triton": triton})


@pytest.mark.usefixtures("gpu")
def test_a_failing_triton_is_given_up_once_with_a_warning() -> None:
    attempts = []

    def broken(x: torch.Tensor) -> torch.Tensor:
        attempts.append(x)
        raise OSError("no C compiler")

    operator = _fake_operator(broken)
    kernel, x = _library._default_kernel(operator, "cuda"), torch.ones(2)
    with pytest.warns(RuntimeWarning, match="kernel of fake failed, the reference takes over: no C compiler"):
        assert torch.equal(kernel(x), x + 1)
    assert torch.equal(kernel(x), x + 1)  # a second warning would be an error
    assert len(attempts) == 1
    assert "gave up after OSError: no C compiler" in _library.why_not("triton", "cuda", operator)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, _library.WrongTable])
def test_what_is_no_failure_of_triton(error: type[Exception]) -> None:
    """Running out of memory, and a table of launch configurations with a mistake, which would be hidden."""

    def failing(x: torch.Tensor) -> torch.Tensor:
        raise error

    operator = _fake_operator(failing)
    with pytest.raises(error):
        _library._default_kernel(operator, "cuda")(torch.ones(2))
    assert _library.why_not("triton", "cuda", operator) is None


@pytest.mark.usefixtures("gpu")
def test_an_old_gpu_gets_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    operator = _fake_operator(lambda x: pytest.fail("Triton ran"))
    assert torch.equal(_library._default_kernel(operator, "cuda")(torch.ones(2)), torch.full((2,), 2.0))
    assert "compute capability 7.5 is below 8.0" in anyflow_kernels.describe()


@pytest.mark.usefixtures("gpu")
def test_the_environment_asks_for_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_library.ENVIRONMENT_VARIABLE, "reference")
    operator = _fake_operator(lambda x: pytest.fail("Triton ran"))
    assert torch.equal(_library._default_kernel(operator, "cuda")(torch.ones(2)), torch.full((2,), 2.0))


@pytest.mark.parametrize("broken", ["sys.modules['triton'] = None", "sys.meta_path.insert(0, Broken())"])
def test_without_triton_the_reference_runs(broken: str) -> None:
    script = f"""
        import sys
        import torch

        class Broken:
            def find_spec(self, name, path=None, target=None):
                if name == "triton":
                    raise RuntimeError("broken installation")

        {broken}
        import anyflow_kernels
        x = torch.randn(2, 3, requires_grad=True)
        anyflow_kernels.gate_blend(x, 2 * x, torch.tensor(0.5)).sum().backward()
        assert torch.equal(x.grad, torch.full((2, 3), 1.5)), x.grad
        assert "triton cannot be imported" in anyflow_kernels.describe()
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", _library.ENVIRONMENT_VARIABLE)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env=environment, timeout=120)


@pytest.fixture
def with_cuda_kernels(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the extension had been built with CUDA kernels."""
    built = types.SimpleNamespace(cuda_architectures=("sm_80", "sm_90"))
    monkeypatch.setattr(_native, "extension", built)


@pytest.mark.usefixtures("with_cuda_kernels")
def test_the_cuda_kernels_come_after_triton_and_before_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    operator, x = _fake_operator(lambda x: x + 2), torch.ones(2)
    operator.compiled["cuda"] = lambda x: x + 3
    monkeypatch.setattr(_library, "_operators", {"fake": operator})
    assert _library._default_kernel(operator, "cuda")(x).tolist() == [3.0, 3.0]
    (line,) = (x for x in anyflow_kernels.describe().splitlines() if x.split()[1] == "cuda")
    assert line.split()[2] == "triton" and "native: available" in line
    assert _library._forced_kernel(operator, "native", "cuda")(x).tolist() == [4.0, 4.0]

    monkeypatch.setattr(torch.version, "hip", "7.0")  # which Triton's kernels were not verified on
    assert _library._default_kernel(operator, "cuda")(x).tolist() == [4.0, 4.0]
    del operator.compiled["cuda"]
    assert _library._default_kernel(operator, "cuda")(x).tolist() == [2.0, 2.0]


@pytest.mark.usefixtures("with_cuda_kernels")
def test_the_cuda_kernels_take_over_when_triton_fails() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise OSError("no C compiler")

    operator, x = _fake_operator(broken), torch.ones(2)
    operator.compiled["cuda"] = lambda x: x + 3
    kernel = _library._default_kernel(operator, "cuda")
    with pytest.warns(RuntimeWarning, match="kernel of fake failed, the native takes over: no C compiler"):
        assert kernel(x).tolist() == [4.0, 4.0]
    assert kernel(x).tolist() == [4.0, 4.0]


@pytest.mark.usefixtures("with_cuda_kernels")
def test_cuda_kernels_for_another_gpu_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = _fake_operator(None)
    operator.compiled["cuda"] = lambda x: x + 3
    assert _library.why_not("native", "cuda", operator) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    expected = "compiled for sm_80, sm_90, but GPU 0 has compute capability 7.5"
    assert _library.why_not("native", "cuda", operator) == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _library.why_not("native", "cuda", operator) == "no GPU"
    _native.extension.cuda_architectures = ()
    assert _library.why_not("native", "cuda", operator) == "no CUDA kernels were compiled"


@pytest.mark.parametrize(
    ("architecture", "runs_on", "not_on"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("sm_86", [(8, 6)], [(8, 0)]),
        ("sm_90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("sm_100", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("compute_90", [(9, 0), (10, 0), (12, 0)], [(8, 9)]),
    ],
)
def test_which_gpu_runs_what(architecture: str, runs_on: list[tuple[int, int]], not_on: list[tuple[int, int]]) -> None:
    assert all(_native._fits(architecture, capability) for capability in runs_on)
    assert not any(_native._fits(architecture, capability) for capability in not_on)


@pytest.mark.usefixtures("with_cuda_kernels")
def test_the_default_is_laid_over_a_compiled_cuda_kernel_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extension's kernels are under the CUDA key before Python defines the operator."""
    name, x = "defined_for_this_test", torch.ones(2)
    compiled = torch.library.Library(_library.NAMESPACE, "IMPL")
    compiled.impl(name, lambda x: x + 3, "CUDA")
    monkeypatch.setattr(_library, "_operators", {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _library.define(
            name,
            "(Tensor x) -> Tensor",
            fake=torch.empty_like,
            implementations={"reference": lambda x: x + 1, "triton": lambda x: x + 2},
        )
    default = torch.library.get_kernel(f"{_library.NAMESPACE}::{name}", "CUDA")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    assert default.call_boxed(keys, x).tolist() == [3.0, 3.0]
    assert _library._operators[name].compiled["cuda"](x).tolist() == [4.0, 4.0]
    assert "cpu" not in _library._operators[name].compiled
