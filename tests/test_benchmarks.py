"""The benchmark suite: what it writes, what it refuses, and that both sides of a comparison compute the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import anyflow
import anyflow_kernels
from benchmarks import bench_overhead, derivative_precision, end_to_end, measure
from benchmarks.bench_operators import MODES, Bench
from benchmarks.operators import CASES, cases

ROOT = Path(__file__).parents[1]
SMALLEST = cases("smallest")
TIMES = {"median", "q1", "q3"}


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Without Triton's interpreter, which the other tests run in, and without the signs of a pytest worker, in which
    pytest-benchmark measures nothing."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("bench")
    done = run("-m", "benchmarks", "--level", "smallest", "--rounds", "1", "--device", "cpu", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    return out, json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_the_run_says_where_it_comes_from(suite: tuple[Path, dict[str, Any]]) -> None:
    out, document = suite
    assert document["device_type"] == "cpu" and document["device"] and document["threads"] == measure.THREADS
    assert document["versions"]["torch"] == torch.__version__
    assert document["copy_gb_per_s"] > 0 and document["product_gflop_per_s"] > 0
    assert {"commit", "dirty", "time", "load_average", "backends", "measured", "modelled"} <= document.keys()
    assert document["refused"] == []
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    header, first = (out / "summary.md").read_text().split("\n| what |")[1].split("\n|---")[0], "variant | x eager"
    assert header.strip().startswith(first)  # ratios first


@pytest.mark.slow
def test_every_operator_and_direction_is_reported(suite: tuple[Path, dict[str, Any]]) -> None:
    results = [result for result in suite[1]["results"] if result["kind"] == "operator"]
    assert [(r["operator"], r["model"], r["mode"]) for r in results] == [
        (case.operator_name, case.model, mode) for case in SMALLEST for mode in MODES
    ]
    for result in results:
        ran, skipped = set(result["variants"]) - {"eager", "torch.compile"}, set(result["skipped"])
        assert {"eager", "torch.compile", "reference"} <= set(result["variants"])
        assert ran | skipped == set(anyflow_kernels._library.BACKENDS) and not ran & skipped
        assert result["floor_bytes"] > 0 and result["flops"] > 0
        for name, found in result["variants"].items():
            assert found["ratio_to_eager"].keys() == found["ratio_to_compile"].keys() == found["ms"].keys() == TIMES
            assert found["ratio_to_copy"].keys() == TIMES
            assert found["ms"]["median"] > 0 and found["gb_per_s"] > 0 and found["share_of_copy_bandwidth"] > 0
            assert found["launches"] >= 1, name
            # A compiled backward may write into what the forward kept, and allocates nothing.
            assert found["peak_bytes"] > 0 or (name, result["mode"]) == ("torch.compile", "backward"), name
            # Inductor and the floor agree on what must be moved; nothing moves less.
            assert found["bytes_over_floor"] >= 0.99, (result["operator"], result["mode"], name)
        assert result["variants"]["eager"]["ratio_to_eager"]["median"] == 1.0


@pytest.mark.slow
def test_the_overhead_of_a_call_is_reported(suite: tuple[Path, dict[str, Any]]) -> None:
    out, document = suite
    operators = list(dict.fromkeys(case.operator_name for case in SMALLEST))
    found = {(record["operator"], record["mode"]): record["us"] for record in document["overhead"]}
    assert found.keys() == {(operator, mode) for operator in operators for mode in bench_overhead.MODES}
    for us in found.values():
        assert all(times.keys() == TIMES and times["median"] > 0 for times in us.values())
        assert us["operator"]["median"] > us["a function that does nothing"]["median"]
    assert "| gate_blend, no grad | " in (out / "summary.md").read_text()


def test_the_overhead_is_that_of_the_same_call() -> None:
    """With every argument that the operator gets."""
    case = next(case for case in bench_overhead.CASES if case.operator_name == "rollout_step")
    tensors, seen = case.make("cpu"), []
    bench_overhead.call_of(case, tensors)(lambda *arguments, **options: seen.append((arguments, options)))()
    ((arguments, options),) = seen
    assert not arguments and {name: options[name] for name in tensors} == dict(tensors)
    assert options["time_scale"] == 1000.0


@pytest.mark.slow
def test_the_step_is_reported(suite: tuple[Path, dict[str, Any]]) -> None:
    (result,) = (result for result in suite[1]["results"] if result["kind"] == "end to end")
    assert result["model"] == "tiny Wan" and set(result["variants"]) == {"eager", "AnyFlow"}
    losses = {name: found["loss"] for name, found in result["variants"].items()}
    assert losses["AnyFlow"] == pytest.approx(losses["eager"], rel=result["loss_tolerance"])
    assert all(found["peak_bytes"] > 0 for found in result["variants"].values())


def test_sizes_are_named_by_model() -> None:
    for operator in {case.operator_name for case in CASES}:
        models = " ".join(case.model for case in CASES if case.operator_name == operator)
        for name in ("Wan2.1 1.3B 480p 81 frames", "14B", "FLUX 1024", "SD3 1024", "SDXL 1024", "digits demo"):
            assert name in models, operator


WRONG: dict[str, tuple[str, Any]] = {  # by operator: what its public function does wrong, and the mode that must see it
    "gate_blend": ("forward", lambda right: lambda *a, **k: 1.0001 * right(*a, **k)),
    "flowmap_embedding": ("backward", lambda right: lambda *a, **k: _doubled_gradient(right(*a, **k))),
    "rollout_step": ("both", lambda right: lambda *a, **k: _one_nan(right(*a, **k))),
    "interval_inputs": ("forward", lambda right: lambda *a, **k: _swapped(right(*a, **k))),
    "flowmap_loss": ("backward", lambda right: lambda *a, **k: tuple(map(_doubled_gradient, right(*a, **k)))),
    "dmd_gradient": ("forward", lambda right: lambda *a, **k: tuple(1.0001 * y for y in right(*a, **k))),
}


def _doubled_gradient(y: Tensor) -> Tensor:
    return y.detach() + 2 * (y - y.detach())


def _swapped(inputs: Any) -> Any:
    return inputs._replace(x=inputs.x_plus, x_plus=inputs.x)


def _one_nan(state: Any) -> Any:
    average = state.average.clone()
    average.view(-1)[0] = float("nan")
    return state._replace(average=average)


@pytest.mark.parametrize("case", SMALLEST, ids=[case.operator_name for case in SMALLEST])
def test_the_gate_refuses_a_wrong_operator(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mode, spoil = WRONG[case.operator_name]
    ready = Bench(case, "cpu")
    assert set(ready.gate(mode)) >= {"eager", "torch.compile", "reference"}
    monkeypatch.setattr(anyflow_kernels, case.operator_name, spoil(getattr(anyflow_kernels, case.operator_name)))
    with pytest.raises(measure.RedGate, match=r"reference: (result|gradient) 0 is off|reference: result 1 is off"):
        ready.gate(mode)


@pytest.mark.slow
def test_nothing_is_reported_on_a_red_gate(tmp_path: Path) -> None:
    (tmp_path / "spoilt.py").write_text(
        "import anyflow_kernels\n"
        "right = anyflow_kernels.gate_blend\n"
        "anyflow_kernels.gate_blend = lambda *a, **k: 1.01 * right(*a, **k)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "python")])
    arguments = ("-p", "spoilt", "--level", "smallest", "--rounds", "1", "--device", "cpu", "-k", "gate_blend")
    done = run("-m", "benchmarks", *arguments, "--out", str(tmp_path), PYTHONPATH=path)
    assert done.returncode == 1, done.stdout + done.stderr
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["results"] == []
    assert [entry["mode"] for entry in document["refused"]] == [*MODES, *bench_overhead.MODES]
    assert "REFUSED gate_blend, digits demo, forward: reference: result 0" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize(
    "model", [model for model in end_to_end.MODELS if model.name.startswith("tiny")], ids=lambda model: model.name
)
def test_plain_pytorch_has_the_loss_of_anyflow(model: end_to_end.Model) -> None:
    """Over three steps of the optimizer: gradients agree as well. Tolerance: float32 sums in another order."""
    steps = [make(model, "cpu", torch.float32) for make in (end_to_end.with_plain_pytorch, end_to_end.with_anyflow)]
    plain, ours = ([float(step()) for _ in range(3)] for step in steps)
    assert ours == pytest.approx(plain, rel=end_to_end.TOLERANCE[torch.float32])
    assert len(set(plain)) == 3


def test_memory_is_counted_by_allocations() -> None:
    x = torch.zeros(1000)

    def three_at_once() -> Tensor:
        a = x + 1
        b = a + 1
        c = a * b
        del a, b
        return c + 1

    assert measure.peak_bytes(three_at_once, "cpu") == 3 * 4000


def test_traffic_counts_operands_once_and_no_views() -> None:
    x = torch.zeros(1000)
    assert measure.traffic(lambda: (x.view(10, 100).t() + 1, torch.empty(10)), expand=False) == (1, 8000)
    assert measure.traffic(lambda: x.mul_(2), expand=False) == (1, 8000)
    base, gate = torch.zeros(100), torch.tensor(0.5)
    assert measure.traffic(lambda: anyflow_kernels.gate_blend(base, base, gate), expand=False)[0] == 1
    assert measure.traffic(lambda: anyflow_kernels.gate_blend(base, base, gate), expand=True)[0] == 3


def test_scores_that_are_read_twice_are_counted_twice() -> None:
    """Of a float32 sample of n elements, its bfloat16 noised one and scores, and the gradient: 16 n are moved at least,
    and the 6 n of the scores once more."""
    n = 1 << 14
    x, sigma, scores = (
        torch.zeros(1, n),
        torch.tensor([0.5]),
        [torch.zeros(1, n, dtype=torch.bfloat16) for _ in range(4)],
    )

    def run() -> None:
        *given, uncond = scores
        anyflow_kernels.dmd_gradient(x, sigma, *given, uncond_real_velocity=uncond, guidance_scale=3.0)

    launches, moved = measure.traffic(run, expand=False)
    assert launches == 1 and moved == 22 * n + 8  # with sigma and the loss


@pytest.mark.slow
def test_inspection_writes_its_report(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    script = str(ROOT / "benchmarks" / "inspect_kernels.py")
    done = run(script, "--kernels", "triton", "--only", " bf16", "--targets", "80", "90", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    entries = json.loads((tmp_path / "kernels.json").read_text())
    assert len((tmp_path / "kernels.md").read_text().splitlines()) == 4 + len(entries)
    for entry in entries:
        assert 0 < entry["occupancy"] <= 1 and entry["programs"] > 0
        elementwise = "embedding" not in entry["kernel"]
        # One launch that moves nothing twice; the gate's partial sums are a thousandth. The embedding's forward reads
        # weights once, with a little scratch; its backward reads the second layers twice.
        limit = 1.002 if elementwise else 1.1 if "bwd" not in entry["kernel"] else 1.6
        if entry["case"].startswith("dmd_gradient"):  # the normaliser of a sample needs both scores before anything
            limit = 1.5
        assert 1 <= entry["operator_moved_over_floor"] <= limit, entry
        if elementwise:
            launches = 2 if entry["case"].startswith("dmd_gradient") and "bwd" not in entry["kernel"] else 1
            assert entry["operator_launches"] == launches and entry["occupancy"] >= 0.5


def test_the_precision_of_a_derivative() -> None:
    """docs/recipes.md: bfloat16 leaves little of a trained network's difference, float32 forwards all of it."""
    model, inputs = derivative_precision.digits()
    anyflow.patch(model)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = derivative_precision.rounded(tensor.data)
    exact, _ = derivative_precision.differences(model, inputs, "float64", 0.005)
    errors = {
        precision: (derivative_precision.differences(model, inputs, precision, 0.005)[0] - exact).norm() / exact.norm()
        for precision in ("bf16", "autocast", "float32")
    }
    assert errors["bf16"] > 0.5 and errors["autocast"] > 0.5 and errors["float32"] < 1e-3
