"""The compiled kernels on more than 2^31 elements. ``make large``: 16 GiB of memory that is free."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from needs import needs_extension
from torch import Tensor

import anyflow_kernels

ROWS, WIDTH = (1 << 15) + 1, (1 << 16) + 1  # a row of odd length: an offset that wraps around reads other values
NEEDED = 16 << 30

pytestmark = [
    pytest.mark.large,
    pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="how much memory is free is read from /proc"),
    needs_extension,
]


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    (line,) = (x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
    available = int(line.split()[1]) << 10
    if available < NEEDED:
        pytest.skip(f"{available >> 30} GiB of memory are available, {NEEDED >> 30} are needed")
    with anyflow_kernels.use_backend("native"):
        yield
    gc.collect()


def rows_of_one_kind(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """[ROWS, WIDTH], whose rows are equal, and that row."""
    row = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    values = torch.empty(ROWS, WIDTH, dtype=dtype)
    assert values.numel() > 1 << 31
    values[:] = row
    return values, row


def assert_rows(found: Tensor, expected: Tensor) -> None:
    """Every row, a few at a time."""
    assert found.shape == (ROWS, WIDTH) and found.dtype == expected.dtype
    for some in found.split(1024):
        assert torch.equal(some, expected.expand_as(some))


def test_gate_blend() -> None:
    """base = delta, so that one tensor is read twice; gate 0.25."""
    values, row = rows_of_one_kind()
    gate = torch.tensor(0.25)
    assert_rows(anyflow_kernels.gate_blend(values, values, gate), row)
    grads = torch.ops.anyflow_kernels.gate_blend_backward(values, values, values, gate, True)
    assert_rows(grads[0], (0.75 * row.float()).to(row.dtype))
    assert_rows(grads[1], (0.25 * row.float()).to(row.dtype))
    assert grads[2].item() == 0


def test_rollout_step() -> None:
    """The last step, which has the average alone; the first sample has another weight than the others."""
    values, row = rows_of_one_kind()
    sigma, weight = torch.full((ROWS,), 0.5), torch.full((ROWS,), 0.25)
    weight[0] = 2.0
    state = anyflow_kernels.rollout_step(values, None, values, sigma, sigma, weight, last=True)
    assert torch.equal(state.average[0], 2.0 * row.float())
    state.average[0] = state.average[1]
    assert_rows(state.average, 0.25 * row.float())


def test_rollout_step_backward() -> None:
    values, row = rows_of_one_kind()
    sigma, sigma_next, weight = torch.full((ROWS, 1), 0.75), torch.full((ROWS, 1), 0.5), torch.ones(ROWS, 1)
    grad_x, grad_velocity, _ = torch.ops.anyflow_kernels.rollout_step_backward(
        None, None, values, values, None, sigma, sigma_next, weight, 1.0, 1, torch.bfloat16
    )
    assert_rows(grad_x, row)
    assert_rows(grad_velocity, (-0.25 * row.float()).to(row.dtype))


def test_interval_inputs_backward() -> None:
    values, row = rows_of_one_kind()
    sigma = torch.full((ROWS, 1), 0.25)
    grad_x0, grad_noise = torch.ops.anyflow_kernels.interval_inputs_backward(
        values, None, None, None, sigma, None, None, torch.bfloat16, torch.bfloat16
    )
    assert_rows(grad_x0, (0.75 * row.float()).to(row.dtype))
    assert_rows(grad_noise, (0.25 * row.float()).to(row.dtype))


def test_flowmap_loss() -> None:
    """With sign -1 the residual of equal tensors is twice either; the first sample has another weight."""
    values, row = rows_of_one_kind()
    weight = torch.full((ROWS,), 0.25)
    weight[0] = 2.0
    loss, unweighted, residual = torch.ops.anyflow_kernels.flowmap_loss(
        values, values, None, None, None, None, None, weight, 1.0, -1, True
    )
    assert_rows(residual, -2 * row.float())
    torch.testing.assert_close(unweighted, (4 * row.double().square()).mean().float().expand(ROWS))
    torch.testing.assert_close(loss, weight * unweighted)


def test_dmd_gradient_backward() -> None:
    gradient, row = rows_of_one_kind(torch.float32)
    grad_loss = torch.full((ROWS,), 0.25 * WIDTH)
    grad_x = torch.ops.anyflow_kernels.dmd_gradient_backward(grad_loss, gradient, torch.bfloat16)
    assert_rows(grad_x, (0.25 * row).to(torch.bfloat16))
