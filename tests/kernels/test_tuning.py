"""Tuned launch configurations: how a table is made, what of it reaches a launch, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import check_against_oracle, sample_inputs

pytest.importorskip("triton")

import anyflow_kernels
from anyflow_kernels import _library, _triton, _tuning
from anyflow_kernels.gate_blend import kernels
from benchmarks import tune
from benchmarks.operators import cases

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
DEFAULT = kernels.LaunchConfig()
(BLEND,) = (case for case in cases("smallest") if case.operator_name == "gate_blend")

REASON = _library.why_not("triton", "cpu", _library._operators["gate_blend"])
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"Triton does not run on the CPU: {REASON}")


@pytest.fixture(autouse=True)
def _nothing_is_remembered() -> Iterator[None]:
    yield
    _tuning.tuned.cache_clear()
    _tuning._table.cache_clear()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A device with a name, and a folder for its table. Every question for the name is added to the list."""
    asked: list[str] = []

    def name(device: torch.device) -> str:
        asked.append("NVIDIA Test 80GB/PCIe")
        return asked[-1]

    monkeypatch.setattr(_tuning, "FOLDER", tmp_path / "tuned")
    monkeypatch.setattr(_tuning, "device_name", name)
    _tuning.tuned.cache_clear()
    _tuning._table.cache_clear()
    return asked


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(block, warps) of every launch of gate_blend's forward kernel."""
    found: list[tuple[int, int]] = []
    kernel = kernels._gate_blend_fwd_kernel

    class Watched:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*arguments: Any, **options: Any) -> None:
                found.append((options["BLOCK"], options["num_warps"]))
                kernel[grid](*arguments, **options)

            return launch

    monkeypatch.setattr(kernels, "_gate_blend_fwd_kernel", Watched())
    return found


def blend(elements: int = 3000) -> None:
    base = torch.randn(elements)
    with anyflow_kernels.use_backend("triton"):
        assert torch.equal(anyflow_kernels.gate_blend(base, base, torch.tensor(0.5)), base)


def test_without_a_table_the_default_is_launched(device: list[str], launches: list[tuple[int, int]]) -> None:
    blend()
    assert launches == [(DEFAULT.block, DEFAULT.num_warps)]


def test_a_table_reaches_the_launches_of_its_size(device: list[str], launches: list[tuple[int, int]]) -> None:
    path = _tuning.write("NVIDIA Test 80GB/PCIe", {("gate_blend", "small"): {"block": 512}})
    assert path.name == "NVIDIA-Test-80GB-PCIe.json"
    for _ in range(3):
        blend()
    assert launches == [(512, DEFAULT.num_warps)] * 3
    assert len(device) == 1  # the name is asked for once
    assert _tuning.tuned("gate_blend", "medium", DEFAULT, CPU) is DEFAULT


def test_the_name_of_a_cpu_is_not_asked_for() -> None:
    assert _tuning.device_name(CPU) is None and _tuning.device_name(torch.device("meta")) is None


def test_sizes() -> None:
    edges = [1, (1 << 18) - 1, 1 << 18, (1 << 23) - 1, 1 << 23, 1 << 33]
    assert [_tuning.size_of(n) for n in edges] == ["small", "small", "medium", "medium", "large", "large"]


REFUSED = {
    "operator": ({"gate_blnd": {"small": {"block": 512}}}, "unknown operator 'gate_blnd'; allowed are .*'gate_blend'"),
    "size": (
        {"gate_blend": {"tiny": {"block": 512}}},
        "gate_blend: unknown size 'tiny'; allowed are 'small', 'medium'",
    ),
    "field": (
        {"gate_blend": {"small": {"blok": 512}}},
        "gate_blend, small: 'blok' is no field; allowed are 'block', 'num_warps'",
    ),
    "value": ({"gate_blend": {"small": {"block": "512"}}}, "gate_blend, small: 'block' must be a int, got '512'"),
    "power": (
        {"gate_blend": {"small": {"block": 1000}}},
        "gate_blend, small: 'block' must be a power of two, got 1000",
    ),
    "flag": ({"gate_blend": {"small": {"block": True}}}, "gate_blend, small: 'block' must be a int, got True"),
    "shape": ({"gate_blend": {"small": 512}}, "gate_blend, small: must be fields and their values, got 512"),
    "shape of all": ({"gate_blend": 512}, "no attribute 'items'"),
}


@pytest.mark.parametrize(("operators", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(operators: Any, message: str, device: list[str]) -> None:
    path = _tuning.write("NVIDIA Test 80GB/PCIe", {})
    path.write_text(json.dumps({"device": "NVIDIA Test 80GB/PCIe", "operators": operators}))
    with pytest.raises(ValueError, match=message):
        blend()


@pytest.mark.parametrize(
    "text", ["no json", '{"operators": {}}', '{"device": "another", "operators": {}}'], ids=lambda text: text[:12]
)
def test_a_file_that_is_no_table_is_named(text: str, device: list[str]) -> None:
    path = _tuning.write("NVIDIA Test 80GB/PCIe", {})
    path.write_text(text)
    with pytest.raises(ValueError, match=r"NVIDIA-Test-80GB-PCIe\.json: "):
        blend()


class Clock:
    """Says that a launch takes as long as its block and warps are said to take, in seconds."""

    def __init__(self, launches: list[tuple[int, int]], seconds: dict[tuple[int, int], float]) -> None:
        self.launches, self.seconds, self.timed = launches, seconds, 0

    def time(self, run: Any) -> tuple[float, float]:
        self.launches.clear()
        run()
        (launched,) = self.launches
        self.timed += 1
        return self.seconds.get(launched, 1.0), 0.0


def test_the_fastest_candidate_is_kept(device: list[str], launches: list[tuple[int, int]]) -> None:
    clock = Clock(launches, {(2048, 8): 0.8, (512, 4): 0.9})
    table = tune.tune([BLEND], clock, "cpu", rounds=3)
    assert table == {("gate_blend", "small"): {"block": 2048, "num_warps": 8}}
    assert clock.timed == 3 * (1 + len(tune.grid(("gate_blend", "small"))))
    _tuning.write("NVIDIA Test 80GB/PCIe", table)
    assert _tuning.read("NVIDIA Test 80GB/PCIe") == table
    _tuning._table.cache_clear()
    launches.clear()
    blend()
    assert launches == [(2048, 8)]


def test_a_narrow_win_is_none(device: list[str], launches: list[tuple[int, int]]) -> None:
    assert tune.tune([BLEND], Clock(launches, {(2048, 8): 0.96}), "cpu", rounds=1) == {}


def test_a_win_must_not_be_a_loss_elsewhere() -> None:
    assert tune.winner([{"a": 3.0, "b": 1.2}, {"a": 0.9, "b": 1.1}]) == "b"
    assert tune.winner([{"a": 3.0}, {"a": 0.0}]) is None  # where it did not fit
    assert tune.winner([{"a": 1.0}, {"a": 1.2}]) == "a"


def test_a_wrong_candidate_is_not_timed(
    device: list[str], launches: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = kernels.gate_blend

    def wrong_with_small_blocks(*arguments: Any) -> Any:
        return right(*arguments) * (1.01 if kernels._config(arguments[0]).block == 512 else 1.0)

    operator = anyflow_kernels._library._operators["gate_blend"]
    monkeypatch.setitem(operator.implementations, "triton", wrong_with_small_blocks)
    with pytest.raises(tune.measure.RedGate, match="'block': 512"):
        tune.tune([BLEND], Clock(launches, {}), "cpu", rounds=1)


def test_every_operator_has_candidates() -> None:
    """For every size that its cases ask for; with fields that there are."""
    written = {path.parent.name for path in (ROOT / "anyflow_kernels").glob("*/kernels.py")}
    assert {operator for operator, _ in tune.GRIDS} == written
    for (operator, _), fields in tune.GRIDS.items():
        module = importlib.import_module(f"anyflow_kernels.{operator}.kernels")
        config = getattr(module, "LaunchConfig", _triton.LaunchConfig)
        assert fields.keys() <= {field.name for field in dataclasses.fields(config)}
    with anyflow_kernels.use_backend("triton"):
        for case in cases("smallest"):
            places = tune.Job(case, "cpu").places()
            assert {operator for operator, _ in places} == {case.operator_name}
            assert all(tune.grid(place) for place in places)


CONFIGS = [{"block": 512, "num_warps": 8}, {"block": 2048, "num_warps": 4}]


@pytest.mark.parametrize("changes", CONFIGS, ids=lambda changes: f"block {changes['block']}")
@pytest.mark.parametrize("operator", tune.OVER_ELEMENTS)
def test_results_do_not_depend_on_the_block(operator: str, changes: dict[str, int]) -> None:
    """Samples of several programs, and of less than one."""
    samples = 3 if operator in ("dmd_gradient", "flowmap_loss") else 2  # as they have times
    for size in ((samples, 3001), (samples, 63)):
        sample = sample_inputs(operator, "cpu", torch.float32, True, size=size)
        with anyflow_kernels.use_backend("triton"), _tuning.trial({(operator, "small"): changes}):
            check_against_oracle(sample)


@pytest.mark.parametrize("operator", tune.OVER_ELEMENTS)
def test_a_table_reaches_the_tiles(operator: str) -> None:
    sigma = torch.rand(64, 1)
    with _tuning.trial({(operator, "medium"): CONFIGS[0]}):
        tilings = [f(operator, torch.Size([64, 4096]), sigma)[0] for f in (_triton.rows_of, _triton.rows_of_samples)]
    for tiling in tilings:
        assert tiling.tile_rows * tiling.tile_columns == 512 and tiling.options["num_warps"] == 8


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_results_do_not_depend_on_the_blocks_of_the_embedding(rows: int) -> None:
    sample = sample_inputs("flowmap_embedding", "cpu", torch.float32, True, rows=(rows,), hidden=(70, 40), width=70)
    products = {"block_hidden": 64, "block_out": 64, "num_warps": 8}
    table = {("flowmap_embedding", size): products for size in ("medium", "large")}
    table["flowmap_embedding", "small"] = {"tiles": 1, "num_warps": 8}
    with anyflow_kernels.use_backend("triton"), _tuning.trial(table):
        check_against_oracle(sample)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would tune")
def test_without_a_gpu_nothing_is_tuned() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tune"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "PyTorch sees no GPU" in done.stderr


def test_the_tables_that_are_there_can_be_read() -> None:
    for path in (ROOT / "anyflow_kernels").glob("tuned/*.json"):
        assert _tuning.read(json.loads(path.read_text())["device"]), path
