"""The Triton kernels as compiled for GPUs, and their arithmetic beyond 32 bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import numpy as np
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "inspect_kernels.py"
REGISTERS = 168  # with 128 threads: three blocks on a multiprocessor of 65536 registers
ELEMENTWISE = 64  # registers with which a multiprocessor runs 1024 threads


@pytest.fixture(scope="module")
def report() -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--kernels", "triton", "--only", " bf16"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_is_compiled_for_every_target(report: list[dict[str, Any]]) -> None:
    found = {(entry["kernel"], entry["target"]) for entry in report}
    kernels = {kernel for kernel, _ in found}
    written = set()
    for path in (SCRIPT.parents[1] / "anyflow_kernels").glob("*/kernels.py"):
        written |= {line[4:].split("(")[0] for line in path.read_text().splitlines() if line.startswith("def _")}
    assert kernels == {name for name in written if name.endswith("_kernel")}
    assert found == {(kernel, f"sm_{capability}") for kernel in kernels for capability in (80, 90, 100)}


def test_nothing_is_spilled(report: list[dict[str, Any]]) -> None:
    for entry in report:
        assert entry["local"] == 0, entry
        # The sine's slow path for huge arguments keeps its digits on the stack.
        assert entry["stack"] <= (40 if "hidden" in entry["kernel"] or "weight_1" in entry["kernel"] else 0), entry


def test_registers_and_shared_memory(report: list[dict[str, Any]]) -> None:
    for entry in report:
        limit = REGISTERS if "embedding" in entry["kernel"] else ELEMENTWISE
        assert entry["registers"] <= limit, entry
        assert entry["shared"] <= 99 * 1024, entry


BULK_LOADS = {  # (loads, stores) of 16 bytes that 8 elements a thread need
    "gate_blend bf16 _gate_blend_fwd_kernel": (2, 1),
    "gate_blend bf16 _gate_blend_bwd_kernel": (3, 2),
    "rollout_step bf16 _rollout_step_fwd_kernel": (
        2 + 2 * 2,
        2 * 2 + 1,
    ),  # v_c and v_u; x and average, read and written
    "rollout_step bf16 _rollout_step_bwd_kernel": (1 + 2, 2 + 1 + 1),
    "rollout_step bf16 frames _rollout_step_fwd_kernel": (1 + 2 * 2, 2 * 2 + 1),
    "rollout_step bf16 last _rollout_step_fwd_kernel": (2 + 2, 2),
    "interval_inputs bf16 _interval_inputs_fwd_kernel": (2 + 2, 3 + 2),  # three inputs and the velocity
    "interval_inputs bf16 _interval_inputs_bwd_kernel": (3 + 2, 2 + 2),
    "interval_inputs bf16 frames _interval_inputs_fwd_kernel": (2 + 2, 3 + 2),
    "flowmap_loss bf16 _flowmap_loss_fwd_kernel": (4 + 2, 2),  # four predictions and the velocity; the residual
    "flowmap_loss bf16 _flowmap_loss_bwd_kernel": (2, 1),
    "flowmap_loss bf16 frames _flowmap_loss_fwd_kernel": (4 + 2, 2),
    "flowmap_loss bf16 plain _flowmap_loss_fwd_kernel": (1 + 2, 2),
    "dmd_gradient bf16 _dmd_gradient_sums_kernel": (4 + 2, 0),  # three scores, x_sigma and x
    "dmd_gradient bf16 _dmd_gradient_fwd_kernel": (3, 2),
    "dmd_gradient bf16 _dmd_gradient_bwd_kernel": (2, 2),
    "dmd_gradient bf16 frames _dmd_gradient_sums_kernel": (4 + 2, 0),
}
SUMS = ("_flowmap_loss_fwd_kernel", "_dmd_gradient_sums_kernel")  # whose last arriver adds two blocks of partial sums


@pytest.mark.parametrize("kernel", BULK_LOADS)
def test_bulk_accesses_are_16_bytes_wide(report: list[dict[str, Any]], kernel: str) -> None:
    entries = [entry for entry in report if f"{entry['case']} {entry['kernel']}" == kernel]
    assert len(entries) == 3
    for entry in entries:
        assert (entry["loads"]["16"], entry["stores"].get("16", 0)) == BULK_LOADS[kernel], entry
        # The rest are single values: the gate, times, a partial sum. The first program's times come 8 to a thread, so
        # do partial sums, of which two are written, with two results and the counter.
        times = 8 if "rollout_step_fwd" in kernel and "last" not in kernel else 0
        loads, stores = (16, 4) if kernel.endswith(SUMS) else (times, times)
        assert sum(entry["loads"].values()) - entry["loads"]["16"] <= 3 + loads, entry
        assert sum(entry["stores"].values()) - entry["stores"].get("16", 0) <= 1 + stores, entry


def test_weights_are_read_16_bytes_at_a_time(report: list[dict[str, Any]]) -> None:
    for entry in report:
        if entry["kernel"].endswith(("one_launch_kernel", "_output_kernel", "_hidden_kernel", "_blend_kernel")):
            piecewise = sum(count for width, count in entry["loads"].items() if width in "28")  # 4: the sine's table
            assert piecewise <= 4, entry  # biases and gradients: a block of them each, not of each row of weights
            assert entry["loads"]["16"] >= 16, entry


class _FarAway:
    """Runs one program of a kernel as if it were number ``program``, on tensors that hold its 1024 elements only and on
    whole ones: times, the gate."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, program: int, near: list[Tensor], whole: list[Tensor]) -> None:
        self.first = program * 1024
        self.near = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in near]
        self.whole = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in whole]
        builder = interpreter.InterpreterBuilder
        load, store = builder.create_masked_load, builder.create_masked_store

        def program_id(_: Any, axis: int) -> interpreter.TensorHandle:
            return interpreter.TensorHandle(np.array([program if axis == 0 else 0], dtype=np.int32), tl.int32)

        monkeypatch.setattr(builder, "create_get_program_id", program_id)
        monkeypatch.setattr(builder, "create_masked_load", lambda b, p, *rest: load(b, self.moved(p), *rest))
        monkeypatch.setattr(builder, "create_masked_store", lambda b, p, *rest: store(b, self.moved(p), *rest))

    def moved(self, pointers: interpreter.TensorHandle) -> interpreter.TensorHandle:
        low, high = int(pointers.data.min()), int(pointers.data.max())
        if any(start <= low and high < end for start, end in self.whole):
            return pointers
        shift = self.first * pointers.get_element_ty().primitive_bitwidth // 8
        assert any(start <= low - shift and high - shift < end for start, end in self.near), "outside of every tensor"
        return interpreter.TensorHandle(pointers.data - np.uint64(shift), pointers.dtype)


needs_interpreter = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="in Triton's interpreter only")
PROGRAM = 3_000_000  # of 1024 elements: its first is beyond 2^31


@needs_interpreter
def test_gate_blend_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyflow_kernels.gate_blend.kernels import _gate_blend_fwd_kernel

    base, delta, gate, y = torch.randn(1024), torch.randn(1024), torch.tensor([0.5]), torch.zeros(1024)
    _FarAway(monkeypatch, PROGRAM, [base, delta, y], [gate])
    numel = PROGRAM * 1024 + 1000
    _gate_blend_fwd_kernel[(1,)](y, base, delta, gate, numel, ACCUMULATE=tl.float32, BLOCK=1024)
    expected = torch.lerp(base, delta, gate)
    expected[1000:] = 0
    torch.testing.assert_close(y, expected)


@needs_interpreter
@pytest.mark.parametrize("times", [(1, 1), (PROGRAM + 1, 1), (1, 1024)], ids=["one", "per row", "per column"])
def test_rollout_step_beyond_32_bits(monkeypatch: pytest.MonkeyPatch, times: tuple[int, int]) -> None:
    from anyflow_kernels._triton import launch_config
    from anyflow_kernels.rollout_step.kernels import _rollout_step_fwd_kernel

    tiling = launch_config(torch.Size([PROGRAM + 1, 1024]), torch.Size(times))
    assert tiling.programs == PROGRAM + 1
    x, v, new_x, average = torch.randn(1024), torch.randn(1024), torch.zeros(1024), torch.zeros(1024)
    sigma, sigma_next, weight = torch.full(times, 0.75), torch.full(times, 0.5), torch.full(times, 0.25)
    _FarAway(monkeypatch, PROGRAM, [x, v, new_x, average], [sigma, sigma_next, weight])
    _rollout_step_fwd_kernel[(1,)](
        *(new_x, average, None, None, x, None, v, None, sigma, sigma_next, weight, sigma_next),
        *(0, 1.0, 1.0, 0.0, tiling.row_count, tiling.middle, tiling.frames, tiling.inner),
        SIGN=1,
        ACCUMULATE=tl.float32,
        ACCUMULATE_TIME=tl.float32,
        **{name: value for name, value in tiling.options.items() if name != "num_warps"},
    )
    torch.testing.assert_close(new_x, x - 0.25 * v)
    torch.testing.assert_close(average, 0.25 * v)


@needs_interpreter
@pytest.mark.parametrize("samples", [1, 3], ids=["in a large sample", "in a late sample"])
def test_flowmap_loss_beyond_32_bits(monkeypatch: pytest.MonkeyPatch, samples: int) -> None:
    """One program of many: its offsets, its partial sums, and that it is not the last to arrive."""
    from anyflow_kernels._triton import launch_config
    from anyflow_kernels.flowmap_loss.kernels import _flowmap_loss_fwd_kernel

    elements = (PROGRAM + 1) * 1024 // samples // 1024 * 1024
    tiling = launch_config(torch.Size([elements]), torch.Size([1]))
    program = samples * tiling.programs - 1
    prediction, target, residual = torch.randn(1024), torch.randn(1024), torch.zeros(1024)
    weight = torch.arange(1.0, samples + 1)
    loss, counter = torch.full((samples,), -1.0), torch.zeros(samples, dtype=torch.int32)
    partial = torch.zeros(program + 2)  # the unweighted sums follow num_programs, which is 1 here, behind
    _FarAway(monkeypatch, program, [prediction, target, residual], [weight, loss, counter, partial])
    _flowmap_loss_fwd_kernel[(1,)](
        *(loss, loss, residual, partial, counter, prediction, target, None, None, None, None, None, weight, 1.0, 0.0),
        *tiling.sizes,
        SIGN=1,
        ACCUMULATE=tl.float32,
        **{name: value for name, value in tiling.options.items() if name != "num_warps"},
    )
    torch.testing.assert_close(residual, prediction - target)
    torch.testing.assert_close(partial[-1], residual.square().sum())
    torch.testing.assert_close(partial[-2], samples * residual.square().sum())
    assert counter.tolist() == [0] * (samples - 1) + [1]
    assert loss.eq(-1).all()
