"""The compiled extension: that it runs, that threads change nothing, and what happens where it does not fit."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from needs import needs_extension
from samples import OPERATORS, Sample, allocated_by_the_loss, outputs_and_gradients, sample_inputs

import anyflow_kernels
from anyflow_kernels import _library, _native
from benchmarks import measure

ROOT = Path(__file__).parents[2]
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
SEVERAL_CHUNKS: dict[str, dict[str, Any]] = {
    "gate_blend": {"size": (3, 40009)},
    "rollout_step": {"size": (3, 2, 7, 3001), "times": (3, 1, 7, 1)},
    "flowmap_embedding": {"rows": (35,), "channels": 130, "hidden": (260, 390), "width": 267},
    "interval_inputs": {"size": (3, 2, 7, 3001), "times": (3, 1, 7, 1)},
    "flowmap_loss": {"size": (3, 2, 7, 3001), "times": (3, 1, 7, 1)},
    "dmd_gradient": {"size": (3, 2, 7, 3001), "times": (3, 1, 7, 1)},
}


@needs_extension
def test_the_extension_says_how_it_was_built() -> None:
    extension = _native.extension
    assert extension.torch == torch.__version__
    assert extension.instruction_set in ("AVX512", "AVX2", "DEFAULT")
    last = anyflow_kernels.describe().splitlines()[-1]
    assert last == f"native extension: {_native.about}"
    assert extension.compiler in last
    assert ("CUDA for" if extension.cuda_architectures else "no CUDA kernels") in last
    for name in _library._operators:
        (line,) = (x for x in anyflow_kernels.describe().splitlines() if x.split()[:2] == [name, "cpu"])
        assert line.split()[2] == "native"


@needs_extension
def test_the_dispatcher_holds_the_compiled_kernels() -> None:
    for name in _library._operators:
        table = torch._C._dispatch_dump(f"anyflow_kernels::{name}")
        (line,) = (x for x in table.splitlines() if x.startswith("CPU:"))
        assert ".cpp" in line, line


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_extension
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F32, BF16), (F64, F64)], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_threads_change_nothing(operator: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    results = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        sample = sample_inputs(operator, "cpu", dtypes[0], True, second_dtype=dtypes[1], **SEVERAL_CHUNKS[operator])
        with anyflow_kernels.use_backend("native"):
            outputs, gradients = outputs_and_gradients(sample, sample.run)
        results.append([*outputs, *gradients.values()])
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            assert torch.equal(found, expected)


@needs_extension
def test_differences_in_float32_cost_no_copy() -> None:
    with anyflow_kernels.use_backend("native"):
        assert allocated_by_the_loss() < 1024


def _rowwise(sample: Sample) -> list[torch.Tensor]:
    """Results and gradients that have a part for each row of the inputs."""
    with anyflow_kernels.use_backend("native"):
        grads = [torch.ones_like(o) for o in sample.run(**sample.tensors) if o.requires_grad]
        outputs, gradients = outputs_and_gradients(sample, sample.run, grads)
    return [*outputs, *(gradient for name, gradient in gradients.items() if name != "gate")]


@pytest.fixture
def kept_pages() -> Iterator[None]:
    measure.keep_pages()
    yield
    measure.keep_pages(False)


@needs_extension
@pytest.mark.usefixtures("kept_pages")
@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "flowmap_embedding"])
@pytest.mark.parametrize("width", [300_000, 300_003])
def test_results_written_past_the_caches_are_the_same(operator: str, width: int) -> None:
    """More than 12 MiB of traffic, into pages that are there: those of the results before. At aligned and at unaligned
    rows."""
    shape: dict[str, Any] = {"size": (9, width)} | ({} if operator == "gate_blend" else {"times": (9,)})
    large = sample_inputs(operator, "cpu", F32, True, second_dtype=BF16, **shape)
    for _ in range(5):  # until every result finds a place among what was freed
        found = _rowwise(large)
    for i in (0, 8):
        row = large.replaced(**{n: t[i : i + 1] for n, t in large.tensors.items() if t.shape[0] == 9})
        for whole, part in zip(found, _rowwise(row), strict=True):
            assert torch.equal(whole[i : i + 1], part)


def test_word_of_a_build_stands_where_it_belongs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a library from before, the word of a later build that made none is not why it has no CUDA kernels."""
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native.py"))
    assert _native._with_word("not built") == "not built"
    (tmp_path / "_C.txt").write_text("not built: no C++ compiler (c++)\n")
    assert _native._with_word("not built") == "not built: no C++ compiler (c++)"
    assert _native._with_word("no CUDA kernels") == "no CUDA kernels"


def _copy_of_the_package(folder: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__", "_C.txt")
    shutil.copytree(ROOT / "anyflow_kernels", folder / "anyflow_kernels", ignore=ignored)
    found = [*(folder / "anyflow_kernels").glob("_C.*")]
    return found[0] if found else folder / "anyflow_kernels" / "_C.so"


def _stamp(instructions: str) -> bytes:
    stamp = f"anyflow_kernels built for torch {torch.__version__} on {instructions} with schemas {_native.SCHEMAS}\0"
    return stamp.encode()


def _import(folder: Path, **environment: str) -> str:
    """What describe() ends in, in a fresh process that imports the package from ``folder`` and uses it."""
    script = """
        import torch
        import anyflow_kernels
        assert anyflow_kernels.gate_blend(torch.ones(2), torch.zeros(2), torch.tensor(0.25)).tolist() == [0.75, 0.75]
        lines = anyflow_kernels.describe().splitlines()
        assert {line.split()[2] for line in lines if line.split()[1] == "cpu"} == {"reference"}, lines
        assert all("native: not loaded" in line for line in lines[1:-1])
        try:
            anyflow_kernels.use_backend("native").__enter__()
        except RuntimeError as error:
            assert lines[-1].removeprefix("native extension: ") in str(error), error
        else:
            raise AssertionError("use_backend did not refuse")
        print(lines[-1])
    """
    environment = {**os.environ, "PYTHONPATH": str(folder), **environment}
    command = [sys.executable, "-W", "error::Warning:anyflow_kernels", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().removeprefix("native extension: ")


def test_no_extension(tmp_path: Path) -> None:
    _copy_of_the_package(tmp_path).unlink(missing_ok=True)
    assert _import(tmp_path) == "not built"


@needs_extension
def test_an_extension_for_another_torch_is_not_loaded(tmp_path: Path) -> None:
    library = _copy_of_the_package(tmp_path)
    ours = torch.__version__.encode()
    other = b"1" + ours[1:]
    content = library.read_bytes()
    library.write_bytes(content.replace(b"built for torch " + ours, b"built for torch " + other))
    expected = f"built for torch {other.decode()}, but this is torch {torch.__version__}: build it again"
    assert _import(tmp_path) == expected


@needs_extension
def test_an_extension_for_other_operators_is_not_loaded(tmp_path: Path) -> None:
    """Its kernels have other signatures: to define the operators would raise."""
    library = _copy_of_the_package(tmp_path)
    ours, other = b"with schemas " + _native.SCHEMAS.encode(), b"with schemas 0ddba11"
    library.write_bytes(library.read_bytes().replace(ours, other.ljust(len(ours), b"0")))
    assert _import(tmp_path) == f"built for operators 0ddba110, but these are {_native.SCHEMAS}: build it again"


def test_the_digest_is_that_of_the_schemas() -> None:
    schemas = sorted(str(getattr(torch.ops.anyflow_kernels, name).default._schema) for name in _library._operators)
    digest = hashlib.sha256("\n".join(schemas).encode()).hexdigest()[:8]
    assert digest == _native.SCHEMAS, "the schemas have changed: write the new digest into anyflow_kernels/_native.py"


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="an ELF library is cut")
def test_an_extension_that_was_cut_short_is_not_loaded(tmp_path: Path) -> None:
    """What remains has its stamp; loading it touches what is missing, which kills the process."""
    library = _copy_of_the_package(tmp_path)
    content = library.read_bytes()
    library.write_bytes(content[: _native._STAMP.search(content).end()])
    assert _import(tmp_path) == f"{library.name} is broken: it was cut short"


def test_where_an_elf_library_ends() -> None:
    """At the end of its last segment: sections, which stripped libraries lack, are not loaded."""
    header = struct.pack("<16s2HI3QI6H", b"\x7fELF\x02\x01\x01", 3, 62, 1, 0, 64, 5000, 0, 64, 56, 3, 64, 9, 8)
    segments = [(0, 176), (4096, 904), (300, 100)]  # from, bytes in the file
    table = b"".join(
        struct.pack("<2I6Q", 1, 4, start, start, start, size, size + 999, 4096) for start, size in segments
    )
    library = (header + table).ljust(5000, b"\0")
    assert not _native._cut_short(library)
    assert _native._cut_short(library[:4999])
    assert not _native._cut_short(library[:4999].replace(b"\x7fELF\x02", b"\x7fELF\x01"))  # of 32 bits


def test_a_library_that_cannot_be_loaded(tmp_path: Path) -> None:
    library = _copy_of_the_package(tmp_path)
    library.unlink(missing_ok=True)  # never write to a library that this process has mapped
    library.write_bytes(b"no library")
    assert _import(tmp_path) == f"{library.name} is broken: it does not say what it was built for"
    library.write_bytes(b"no library" + _stamp("DEFAULT"))
    assert _import(tmp_path).startswith("cannot be loaded (ImportError: ")


def test_the_environment_keeps_the_extension_out(tmp_path: Path) -> None:
    _copy_of_the_package(tmp_path)
    name = _library.ENVIRONMENT_VARIABLE
    assert _import(tmp_path, **{name: "reference"}) == f"{name}=reference"


def test_an_extension_for_instructions_that_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "_C.so"
    library.write_bytes(b".." + _stamp("AVX2") + b"..")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert _native._unfit(library) is None
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert _native._unfit(library).startswith("built for AVX2, but this processor")


@needs_extension
@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "flowmap_embedding"])
def test_autograd_is_compiled_as_well(operator: str) -> None:
    sample = sample_inputs(operator, "cpu", requires_grad=True)
    name = sample.run(**sample.tensors)[0].grad_fn.name()
    assert operator.replace("_", "") in name.lower() and "CppNode" in name


@needs_extension
def test_autograd_in_python(tmp_path: Path) -> None:
    """What a build without the extension has: the tests of the operators, run without it."""
    names = [name for name in OPERATORS if name != "flowmap_embedding"]
    files = [ROOT / "tests" / "kernels" / f"test_{name}.py" for name in (*names, "promises")]
    choice = "reference and not flowmap_embedding"
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "-k", choice, *map(str, files)],
        env={**kept, _library.ENVIRONMENT_VARIABLE: "reference"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-4000:]
    assert "passed" in finished.stdout


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The project with one small C++ file: how it is built does not depend on how much is built."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("anyflow_kernels", "python"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("_C.*", "*.safetensors", "*.egg*"))
    (tmp_path / "csrc").mkdir()
    shutil.copy(ROOT / "csrc" / "module.cpp", tmp_path / "csrc")
    return tmp_path


def _setup(source: Path, *command: str, prelude: str = "pass", **environment: str) -> subprocess.CompletedProcess[str]:
    script = f"import sys, runpy; {prelude}; sys.argv = ['setup.py', *{list(command)}]; runpy.run_path('setup.py')"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, **environment}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=300)


def _built(source: Path) -> list[Path]:
    return [*source.rglob("_C.*.so"), *source.rglob("_C.*.pyd")]


def test_mode_0_builds_nothing(source: Path) -> None:
    done = _setup(source, "build", ANYFLOW_BUILD_EXT="0")
    assert done.returncode == 0, done.stderr
    assert _built(source) == []
    assert (source / "build" / "lib" / "anyflow_kernels" / "_library.py").exists()  # not of one platform


@needs_extension  # so there is a compiler
def test_mode_1_builds(source: Path) -> None:
    done = _setup(source, "build_ext", "--inplace", ANYFLOW_BUILD_EXT="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning:" not in done.stdout + done.stderr
    (library,) = (x for x in _built(source) if "build" not in x.parts[len(source.parts) :])
    assert library.parent == source / "anyflow_kernels"
    assert _native._unfit(library) is None


BROKEN = {
    "torch": ({"prelude": "sys.modules['torch'] = None"}, "the build saw no torch"),
    "compiler": ({"CXX": "no-such-compiler"}, "no C++ compiler (no-such-compiler)"),
    "build": ({"CXX": shutil.which("false") or "false"}, "the C++ kernels were not built"),
}


@pytest.mark.skipif(os.name != "posix", reason="the compiler is replaced by the command false")
@pytest.mark.parametrize(("how", "message"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_built(source: Path, how: dict[str, str], message: str) -> None:
    done = _setup(source, "build", ANYFLOW_BUILD_EXT="auto", **how)
    assert done.returncode == 0, done.stderr
    assert message in done.stderr
    assert _built(source) == []
    done = _setup(source, "build", ANYFLOW_BUILD_EXT="1", **how)
    assert done.returncode != 0


# As if this torch were built for CUDA 13: its own says "cpu" when there is no version.
CUDA_TORCH = (
    "import torch; torch.version.cuda = '13.0'; import torch.utils.cpp_extension as tools; tools.CUDA_HOME = {home!r}"
)


def _cuda_sources(source: Path) -> None:
    """One kernel, one file of C++, in the place of csrc/cuda."""
    (source / "csrc" / "cuda").mkdir()
    (source / "csrc" / "cuda" / "one.cu").write_text("__global__ void one(float* x) { x[threadIdx.x] = 1; }\n")
    (source / "csrc" / "cuda" / "one_operator.cpp").write_text("int one_operator() { return 1; }\n")


FAILED = ("the CUDA kernels were not built: ", "their build failed, pip install -v shows how")
NO_TOOLKIT = "torch is built for CUDA 13.0, but there is no toolkit of it (nvcc; CUDA_HOME says where)"
OTHER_TOOLKIT = "torch is built for CUDA 13.0, but nvcc is of CUDA 12.8"
TOOLKITS = {  # what the build says, and what it leaves for describe()
    "no toolkit": (None, NO_TOOLKIT, NO_TOOLKIT),
    "another toolkit": ("12.8", OTHER_TOOLKIT, OTHER_TOOLKIT),
    "a broken toolkit": ("13.0", *FAILED),
    "a broken nvcc": ("", *FAILED),
}


@needs_extension
@pytest.mark.skipif(os.name != "posix", reason="nvcc is replaced by a script")
@pytest.mark.parametrize(("version", "message", "word"), TOOLKITS.values(), ids=TOOLKITS)
def test_without_a_fitting_toolkit_the_cpu_kernels_are_built(
    source: Path, version: str | None, message: str, word: str
) -> None:
    _cuda_sources(source)
    nvcc = source / "toolkit" / "bin" / "nvcc"
    if version is not None:
        nvcc.parent.mkdir(parents=True)
        answers = (
            f"test $1 = --version && echo 'Cuda compilation tools, release {version}, V{version}.88' && exit\n"
            "test $1 = --list-gpu-arch && echo compute_80 && exit\n"
        )
        nvcc.write_text(f"#!/bin/sh\n{answers if version else ''}exit 1\n")
        nvcc.chmod(0o755)
    home = None if version is None else str(source / "toolkit")
    done = _setup(source, "build_ext", "--inplace", prelude=CUDA_TORCH.format(home=home), ANYFLOW_BUILD_EXT="auto")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("anyflow_kernels:")]
    assert len(lines) == 1 and message in lines[0], done.stderr
    assert (source / "anyflow_kernels" / "_C.txt").read_text() == f"no CUDA kernels: {word}\n"
    (library,) = (source / "anyflow_kernels").glob("_C.*.so")
    assert _native._unfit(library) is None


@needs_extension
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_with_a_toolkit_the_cuda_kernels_are_built(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the libraries of a CUDA torch, in whose place empty ones are linked."""
    _cuda_sources(source)
    stubs = source / "stubs"
    stubs.mkdir()
    for name in ("c10_cuda", "torch_cuda", "cudart"):
        (stubs / "empty.cpp").write_text("")
        subprocess.run(["c++", "-shared", stubs / "empty.cpp", "-o", stubs / f"lib{name}.so"], check=True)
    home = str(Path(os.path.realpath(shutil.which("nvcc"))).parents[1])
    release = re.search(
        r"release (\S+),", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    )[1]
    prelude = CUDA_TORCH.format(home=home).replace("13.0", release)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    for listed, expected in ((None, b"sm_80"), ("8.6", b"sm_86")):
        environment = {} if listed is None else {"TORCH_CUDA_ARCH_LIST": listed}
        done = _setup(
            source,
            "build_ext",
            "--inplace",
            "--force",
            prelude=prelude,
            ANYFLOW_BUILD_EXT="1",
            LIBRARY_PATH=str(stubs),
            **environment,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (library,) = (source / "anyflow_kernels").glob("_C.*")
        names = re.search(rb"\0((?:(?:sm|compute)_\d+ ?)+)\0", library.read_bytes())[1].split()
        assert expected in names
        assert (b"sm_90" in names) == (listed is None)
        assert b"one_operator" in library.read_bytes()


def test_a_wrong_mode_is_named(source: Path) -> None:
    done = _setup(source, "build", ANYFLOW_BUILD_EXT="yes")
    assert done.returncode != 0
    assert "ANYFLOW_BUILD_EXT='yes': allowed are auto, 0 and 1" in done.stderr


def test_metadata_needs_no_torch(source: Path) -> None:
    for command in (["egg_info"], ["sdist"]):
        done = _setup(source, *command, prelude="sys.modules['torch'] = None")
        assert done.returncode == 0, done.stderr
