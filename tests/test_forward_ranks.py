"""Ranks of the forward stage train as one process does on all of their samples, and go on where they were stopped."""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path

import forward_ranks
import pytest
import torch
from two_ranks import launch

MODES, VARIANTS = ("ddp", "fsdp2", "accelerate", "context"), ("guided", "base")
STEPS, LONG, STOP = 3, 20, 9
SCRIPT = Path(forward_ranks.__file__)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks leave: a run of every mode and variant, a long one, and one that was killed on the way."""
    folder = tmp_path_factory.mktemp("ranks")
    jobs = [f"{mode}:{variant}:{STEPS}:0" for mode, variant in product(MODES, VARIANTS)]
    launch(SCRIPT, folder, *jobs, f"ddp:guided:{LONG}:0", f"ddp:guided:{LONG + 1}:{STOP}")
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_with_unequal_batches_are_one_process(mode: str, variant: str, folder: Path, tmp_path: Path) -> None:
    """A rank with one sample has two empty buckets at every step, and nobody waits for it."""
    expected = forward_ranks.train("one", variant, 0, [4], tmp_path, STEPS, 0)
    found = torch.load(folder / f"{mode}-{variant}-{STEPS}.pt", weights_only=True)
    assert found["shares"] == expected["shares"] == [0.25 if variant == "guided" else 0.5] * STEPS
    # The same sums in another order, in float32.
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert found["gradients"].keys() == expected["gradients"].keys()
    norm = torch.stack([gradient.norm() for gradient in expected["gradients"].values()]).norm()
    for name, gradient in expected["gradients"].items():
        assert (found["gradients"][name] - gradient).norm() <= 1e-6 * norm, name


def test_a_killed_run_continues_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    whole = torch.load(folder / f"ddp-guided-{LONG}.pt", weights_only=True)
    resumed_in = shutil.copytree(folder, tmp_path / "resumed")
    launch(SCRIPT, resumed_in, f"ddp:guided:{LONG}:0")
    resumed = torch.load(resumed_in / f"ddp-guided-{LONG}.pt", weights_only=True)
    assert len(resumed["losses"]) == LONG - STOP and resumed["losses"] == whole["losses"][STOP:]
    for name, weight in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name
