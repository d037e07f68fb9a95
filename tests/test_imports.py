"""What importing needs, and which way the imports point."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each package of the library and what of the library it may import; one way only.
LAYERS = {
    "python/anyflow/time.py": set(),
    "python/anyflow/streams.py": set(),
    "python/anyflow/distributed.py": set(),
    "python/anyflow/precision.py": set(),
    "python/anyflow/families": {"families"},
    "python/anyflow/patching": {"families", "patching"},
    "python/anyflow/adapters": {"adapters", "distributed", "families", "patching"},
    "python/anyflow/config.py": set(),
    "python/anyflow/objectives": {"objectives", "time"},
    "python/anyflow/layout.py": {"families"},
    "python/anyflow/denoiser.py": {"families", "layout", "patching"},
    "python/anyflow/critic.py": {"adapters", "config", "distributed", "patching"},
    "python/anyflow/guard.py": {"distributed"},
    "python/anyflow/stages": {
        "adapters",
        "config",
        "critic",
        "denoiser",
        "distributed",
        "families",
        "layout",
        "objectives",
        "patching",
        "precision",
        "sampling",
        "stages",
        "streams",
        "time",
    },
    "python/anyflow/sampling": {"patching", "sampling"},
    "python/anyflow/checkpoints": {"adapters", "distributed", "families", "patching", "sampling"},
    "python/anyflow/cli": {"checkpoints"},
    "python/anyflow/distiller.py": {
        "adapters",
        "checkpoints",
        "config",
        "critic",
        "denoiser",
        "families",
        "guard",
        "layout",
        "patching",
        "sampling",
        "stages",
        "streams",
    },
}


def run(code: str, **environment: str) -> str:
    command = [sys.executable, "-W", "error::Warning:anyflow", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def imported(path: Path) -> set[str]:
    """The parts of anyflow that a file imports, by relative imports."""
    found = set()
    depth = len(path.relative_to(ROOT / "python/anyflow").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "anyflow":
            found.add(node.module)
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_arrows_point_one_way(layer: str) -> None:
    path = ROOT / layer
    for file in [path] if path.is_file() else sorted(path.glob("*.py")):
        assert imported(file) <= LAYERS[layer], file


def test_kernels_import_nothing_of_anyflow() -> None:
    for file in sorted((ROOT / "anyflow_kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in names:
                assert name.split(".")[0] not in ("anyflow", "diffusers", "peft", "transformers"), (file, name)


@pytest.mark.parametrize("fault", ["absent", "broken"])
def test_triton_absent_or_broken(fault: str, tmp_path: Path) -> None:
    """Both packages import, the reference runs, and describe() says why Triton does not."""
    (tmp_path / "triton").mkdir()
    reason = "No module named 'triton'" if fault == "absent" else "libtriton.so: undefined symbol"
    (tmp_path / "triton" / "__init__.py").write_text(f"raise ImportError({reason!r})")
    output = run(
        f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import anyflow, anyflow_kernels, torch
print(anyflow_kernels.gate_blend(torch.ones(2), torch.zeros(2), torch.tensor(0.25)).tolist())
print(anyflow_kernels.describe())
try:
    with anyflow_kernels.use_backend("triton"):
        pass
except RuntimeError as error:
    print("refused:", error)
""",
        TRITON_INTERPRET="0",
    )
    assert output.startswith("[0.75, 0.75]")
    assert f"triton cannot be imported (ImportError: {reason})" in output and "refused:" in output


def test_kernels_without_diffusers() -> None:
    output = run(
        """
import sys
for name in ("diffusers", "peft", "transformers"):
    sys.modules[name] = None
import anyflow_kernels, torch
print(anyflow_kernels.gate_blend(torch.ones(2), torch.zeros(2), torch.tensor(0.25)).tolist())
"""
    )
    assert output.startswith("[0.75, 0.75]")


def test_setup_does_not_need_torch() -> None:
    for file in ("setup.py",):
        tree = ast.parse((ROOT / file).read_text())
        tops = {a.name.split(".")[0] for n in tree.body if isinstance(n, ast.Import) for a in n.names}
        assert "torch" not in tops
    assert (
        "torch"
        not in (ROOT / "pyproject.toml")
        .read_text()
        .split("[build-system]")[1]
        .split("[project]")[0]
        .split("requires = ")[1]
    )


def test_every_package_is_shipped() -> None:
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join(init.parent.relative_to(base).parts)
        for base, top in ((ROOT / "python", "anyflow"), (ROOT, "anyflow_kernels"))
        for init in (base / top).rglob("__init__.py")
    }
    assert found == listed
