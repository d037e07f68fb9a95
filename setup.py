"""Builds the C++ kernels where torch and a compiler are at hand; without them the package is pure Python.

torch is imported when the extension is built and not before: metadata, sdist and the pure package never need it.
ANYFLOW_BUILD_EXT=auto (default) builds what the machine can and goes on without what fails; 0 builds nothing; 1 fails
when it cannot build.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

NAME = "anyflow_kernels._C"
SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))
CUDA_SOURCES = sorted(str(path) for kind in ("*.cpp", "*.cu") for path in Path("csrc/cuda").glob(kind))
CUDA_HEADERS = sorted(str(path) for kind in ("*.h", "*.cuh") for path in Path("csrc/cuda").glob(kind))
CUDA_ARCHITECTURES = ("8.0", "9.0", "10.0")  # those of them that nvcc knows, unless TORCH_CUDA_ARCH_LIST is set


OPTIONS = {
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma", "-mf16c"),
}


def build_mode() -> str:
    mode = os.environ.get("ANYFLOW_BUILD_EXT", "auto")
    if mode not in ("auto", "0", "1"):
        sys.exit(f"ANYFLOW_BUILD_EXT={mode!r}: allowed are auto, 0 and 1")
    return mode


def missing() -> str | None:
    """What the build lacks, as far as can be seen without importing torch."""
    if importlib.util.find_spec("torch") is None:
        return "the build saw no torch (pip install --no-build-isolation shows it that of the environment)"
    compiler = os.environ.get("CXX", "c++" if os.name == "posix" else "cl").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler})"
    return None


def leave_word(command: build_py | build_ext, reason: str | None) -> None:
    """Of what was not built and why, where it would be: pip shows nothing of a build that succeeds, describe() does."""
    in_place = command.editable_mode or getattr(command, "inplace", False)
    note = Path("" if in_place else command.build_lib, "anyflow_kernels", "_C.txt")
    note.unlink(missing_ok=True)
    if reason is not None:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(reason + "\n")


class Python(build_py):
    def run(self) -> None:
        super().run()
        leave_word(self, NOT_REQUESTED and f"not built: {NOT_REQUESTED}")


class Build(build_ext):
    """Hands over to torch's own command, which is found only now."""

    tried_cuda = False

    def run(self) -> None:
        try:
            try:
                lacking = self._build(cuda=True)
            except (Exception, SystemExit) as error:
                if build_mode() == "1" or not self.tried_cuda:
                    raise
                print(f"anyflow_kernels: the CUDA kernels were not built: {error}", file=sys.stderr)
                self._build(cuda=False)
                lacking = "their build failed, pip install -v shows how"
            leave_word(self, lacking and f"no CUDA kernels: {lacking}")
        except (Exception, SystemExit) as error:
            if build_mode() == "1":
                raise
            reason = f"{type(error).__name__}: {error}"
            print(f"anyflow_kernels: the C++ kernels were not built: {reason}", file=sys.stderr)
            leave_word(self, f"not built: the build failed, pip install -v shows how ({reason.splitlines()[0]})")
            self.extensions = self.distribution.ext_modules = []

    def _build(self, cuda: bool) -> str | None:
        """Returns why there are no CUDA kernels, None where there are or where torch has no use for them."""
        import torch
        from torch.utils.cpp_extension import BuildExtension

        self.tried_cuda = cuda and torch.version.cuda is not None
        flags, lacking = cuda_flags(torch) if self.tried_cuda else ([], None)
        self.distribution.ext_modules = [extension(torch, flags)]
        command = BuildExtension(self.distribution)
        for option in ("inplace", "editable_mode", "build_lib", "build_temp", "debug", "parallel", "plat_name"):
            setattr(command, option, getattr(self, option))
        command.force = True  # flags are no files: without ninja, a library from before would be left
        command.ensure_finalized()
        command.run()
        return lacking


def extension(torch: Any, cuda: list[str]) -> Extension:
    """``cuda``: the architectures, as flags of nvcc; empty: without the CUDA kernels."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    instructions = instruction_set(torch)
    defines = [
        ("AT_PER_OPERATOR_HEADERS", None),
        ("CPU_CAPABILITY", instructions),
        (f"CPU_CAPABILITY_{instructions}", None),
        ("ANYFLOW_CPU", f'"{instructions}"'),
        ("ANYFLOW_TORCH", f'"{torch.__version__}"'),
        ("ANYFLOW_SCHEMAS", f'"{schemas()}"'),
    ]
    if os.name == "nt":
        options = ["/O2", "/openmp"] + ([f"/arch:{instructions}"] if instructions in OPTIONS else [])
        return CppExtension(NAME, SOURCES, define_macros=defines, extra_compile_args=options, depends=HEADERS)
    # GCC 12 takes the operand that AVX-512's intrinsics leave undefined for one that was forgotten.
    warnings = ["-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    options = ["-O3", *warnings, "-fvisibility=hidden", *OPTIONS.get(instructions, ())]
    linked = [] if sys.platform == "darwin" else ["-fopenmp"]  # of the same runtime as torch, whose threads it shares
    if os.environ.get("ANYFLOW_SANITIZE") == "1":  # csrc/sanitize.sh
        options += ["-O1", "-g", "-Werror"]
        linked += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    if cuda:
        names = re.findall(r",code=(\w+)", " ".join(cuda))
        defines.append(("ANYFLOW_CUDA", f'"{" ".join(names)}"'))
    built = (CUDAExtension if cuda else CppExtension)(
        NAME,
        SOURCES + (CUDA_SOURCES if cuda else []),
        define_macros=defines,
        extra_compile_args={"cxx": options + linked, "nvcc": ["-O3", *cuda]},
        extra_link_args=linked,
        depends=HEADERS + (CUDA_HEADERS if cuda else []),
    )
    # torch's headers do not meet -Wextra: system headers are not warned about.
    built.extra_compile_args["cxx"] += [f"-isystem{path}" for path in built.include_dirs]
    built.extra_compile_args["nvcc"] += [f"-I{path}" for path in built.include_dirs]
    built.include_dirs = []
    return built


def cuda_flags(torch: Any) -> tuple[list[str], str | None]:
    """Flags of nvcc; or none, and why: there is no toolkit that fits torch's CUDA."""
    if os.name == "nt":
        return [], "they are built on Linux only"
    from torch.utils.cpp_extension import CUDA_HOME, _get_cuda_arch_flags

    nvcc = shutil.which("nvcc", path=os.path.join(CUDA_HOME or "", "bin"))
    lacking = f"torch is built for CUDA {torch.version.cuda}"
    if nvcc is None:
        lacking += ", but there is no toolkit of it (nvcc; CUDA_HOME says where)"
    else:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        version = ".".join(re.findall(r"release (\d+)\.(\d+)", said)[0])
        if version.split(".")[0] == torch.version.cuda.split(".")[0]:
            known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
            listed = [a for a in CUDA_ARCHITECTURES if f"compute_{a.replace('.', '')}" in known]
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(listed) + "+PTX")
            return _get_cuda_arch_flags(), None
        lacking += f", but nvcc is of CUDA {version}"
    print(f"anyflow_kernels: no CUDA kernels, only those for the CPU: {lacking}", file=sys.stderr)
    return [], lacking


def instruction_set(torch: Any) -> str:
    """That of this processor, or a lesser one: ATEN_CPU_CAPABILITY=avx2, which torch obeys as well."""
    capability = torch.backends.cpu.get_cpu_capability() if platform.machine().lower() in ("x86_64", "amd64") else ""
    return capability if capability in OPTIONS else "DEFAULT"


def schemas() -> str:
    """What anyflow_kernels/_native.py calls the schemas for which its kernels are written."""
    (found,) = re.findall(r'^SCHEMAS = "(\w+)"$', Path("anyflow_kernels/_native.py").read_text(), flags=re.MULTILINE)
    return str(found)


def not_requested() -> str | None:
    """Why no extension is to be built; None when one is."""
    if build_mode() == "0":
        return "ANYFLOW_BUILD_EXT=0"
    lacking = missing()
    if lacking is not None:
        if build_mode() == "1":
            sys.exit(f"ANYFLOW_BUILD_EXT=1: {lacking}")
        print(f"anyflow_kernels: the C++ kernels are not built: {lacking}", file=sys.stderr)
    return lacking


NOT_REQUESTED = not_requested()

setup(
    ext_modules=[] if NOT_REQUESTED else [Extension(NAME, SOURCES, depends=HEADERS)],
    cmdclass={"build_py": Python, "build_ext": Build},
)
