"""``pip install .`` on machines that lack something: it works, and describe() ends with what is missing.

Nothing is compiled for long here: tests/kernels/test_native.py does that once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from needs import needs_extension

from anyflow_kernels import _native

ROOT = Path(__file__).parent.parent
pytest.importorskip("pip")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="PATH is emptied and compilers are replaced by scripts")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler to find the error")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The project, as from a clean checkout. The weights of the demo play no part."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    unwanted = shutil.ignore_patterns("_C.*", "*.safetensors", "*.egg*", "__pycache__")
    for name in ("anyflow_kernels", "python", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    return folder


def pip_install(source: Path, path: Path | str = os.defpath, **environment: str) -> subprocess.CompletedProcess[str]:
    """Into a folder beside ``source``, for the torch that is here. ``path``: where programs are looked for."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("CXX", "CUDA_HOME", "ANYFLOW_BUILD_EXT")}
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--target", str(source.parent / "installed")]
    return subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "."],
        cwd=source,
        env={**inherited, "PATH": str(path), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def last_line(source: Path, runs: str = "reference") -> str:
    """What describe() ends in, where the package was installed, after an operator has run on the CPU."""
    script = """
        import sys
        import torch
        import anyflow_kernels
        assert anyflow_kernels.gate_blend(torch.ones(2), torch.zeros(2), torch.tensor(0.25)).tolist() == [0.75, 0.75]
        lines = anyflow_kernels.describe().splitlines()
        assert {line.split()[2] for line in lines if line.split()[1] == "cpu"} == {sys.argv[1]}, lines
        print(anyflow_kernels.__file__, lines[-1], sep="\\n")
    """
    installed = source.parent / "installed"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), runs],
        cwd=source.parent,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    file, line = done.stdout.splitlines()
    assert Path(file).is_relative_to(installed)
    return line.removeprefix("native extension: ")


def customised(folder: Path, code: str) -> str:
    """A PYTHONPATH with which every Python process starts with ``code``."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(textwrap.dedent(code))
    return str(folder)


def test_without_a_compiler(source: Path, tmp_path: Path) -> None:
    done = pip_install(source, tmp_path / "no programs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert last_line(source) == "not built: no C++ compiler (c++)"


def test_without_torch_in_the_build(source: Path, tmp_path: Path) -> None:
    path = customised(tmp_path / "site", "import sys; sys.modules['torch'] = None")
    done = pip_install(source, PYTHONPATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    word = "the build saw no torch (pip install --no-build-isolation shows it that of the environment)"
    assert last_line(source) == f"not built: {word}"


def test_nothing_is_built_where_nothing_is_asked_for(source: Path) -> None:
    """Tables of launch configurations, where there are any, come along."""
    table = Path("anyflow_kernels", "tuned", "GPU.json")
    (source / table).parent.mkdir(exist_ok=True)
    (source / table).write_text("{}")
    done = pip_install(source, ANYFLOW_BUILD_EXT="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert last_line(source) == "not built: ANYFLOW_BUILD_EXT=0"
    assert (source.parent / "installed" / table).read_text() == "{}"


def break_the_code(source: Path) -> None:
    shutil.rmtree(source / "csrc")
    (source / "csrc").mkdir()
    (source / "csrc" / "broken.cpp").write_text("#error as broken as this\n")


@needs_compiler
def test_an_error_of_the_compiler(source: Path) -> None:
    break_the_code(source)
    done = pip_install(source)
    assert done.returncode == 0, done.stdout + done.stderr
    assert last_line(source).startswith("not built: the build failed, pip install -v shows how (")


@needs_compiler
def test_mode_1_fails_with_the_words_of_the_compiler(source: Path) -> None:
    break_the_code(source)
    done = pip_install(source, ANYFLOW_BUILD_EXT="1")
    assert done.returncode != 0 and "as broken as this" in done.stdout + done.stderr
    assert not (source.parent / "installed" / "anyflow_kernels").exists()


def test_mode_1_fails_with_what_is_missing(source: Path, tmp_path: Path) -> None:
    done = pip_install(source, tmp_path / "no programs", ANYFLOW_BUILD_EXT="1")
    assert done.returncode != 0 and "ANYFLOW_BUILD_EXT=1: no C++ compiler (c++)" in done.stdout + done.stderr
    assert not (source.parent / "installed" / "anyflow_kernels").exists()


CUDA_TORCH = """
    import importlib.util, pathlib, sys

    class Version:
        def find_spec(self, name, path=None, target=None):
            if name == "torch.version":
                return importlib.util.spec_from_file_location(name, pathlib.Path(__file__).with_name("version.py"))

    sys.meta_path.insert(0, Version())
"""


@needs_extension
@pytest.mark.skipif(torch.version.cuda is not None, reason="a torch without CUDA plays both")
@pytest.mark.parametrize("torch_for", ["CPU", "CUDA"])
def test_without_nvcc(torch_for: str, source: Path, tmp_path: Path) -> None:
    """The kernels for the CPU are built. The compiler is a script that hands out the library of this environment."""
    programs = tmp_path / "programs"
    programs.mkdir()
    words = tmp_path / "words"
    for name in ("c++", "g++", "gcc", "cc"):  # which of them links depends on how Python was built
        compiler = programs / name
        compiler.write_text(
            f"#!/bin/sh\necho \"$@\" >> '{words}'\n"
            f'while [ $# -gt 0 ]; do [ "$1" = -o ] && cp \'{_native.extension.__file__}\' "$2"; shift; done\n'
        )
        compiler.chmod(0o755)
    for name in ("sh", "cp", "which", "ninja"):
        if found := shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])):
            (programs / name).symlink_to(found)
    environment = {"TORCH_DONT_CHECK_COMPILER_ABI": "1"}
    if torch_for == "CUDA":
        environment["PYTHONPATH"] = customised(tmp_path / "site", CUDA_TORCH)
        version = Path(torch.__file__).with_name("version.py").read_text()
        (tmp_path / "site" / "version.py").write_text(f"{version}\ncuda = '13.0'\n")
    done = pip_install(source, programs, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "module.cpp" in words.read_text() and "cuda" not in words.read_text()
    lacking = ": torch is built for CUDA 13.0, but there is no toolkit of it (nvcc; CUDA_HOME says where)"
    line = last_line(source, runs="native")
    assert line.endswith(", no CUDA kernels" + (lacking if torch_for == "CUDA" else ""))
