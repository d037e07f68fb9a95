"""Ranks of the on-policy stage train as one process does on all of their samples, and go on where they were stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onpolicy_ranks
import pytest
import torch
from two_ranks import launch

MODES = ("ddp", "late ddp", "fsdp2", "accelerate")
STEPS, LONG, STOP = 3, 20, 9
SCRIPT = Path(onpolicy_ranks.__file__)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    launch(SCRIPT, folder, *(f"{mode}:{STEPS}:0" for mode in MODES), f"ddp:{LONG}:0", f"fsdp2:{LONG}:0")
    return folder


def ranks(folder: Path, name: str) -> list[Any]:
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(2)]


def test_critic_gradients_are_averaged(folder: Path) -> None:
    """3 and 5 give 4 on both; one that is missing on a rank counts as zero, and changes no collective."""
    for result in ranks(folder, "average"):
        assert result["gradients"]["weight"].tolist() == [[4.0, 4.0]] and result["gradients"]["bias"].tolist() == [0.5]
        assert result["seen"] == [("all_reduce", 3), ("all_reduce", 3)]


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_with_unequal_batches_are_one_process(mode: str, folder: Path, tmp_path: Path) -> None:
    """The one process is given the draws of both ranks, one after the other."""
    found = ranks(folder, f"{mode}-{STEPS}")
    draws = [rank["drawn"] for rank in found]
    expected = onpolicy_ranks.train("one", 0, [4], tmp_path, STEPS, 0, draws)
    for rank in found:
        # The same sums in another order, in float32.
        for key in ("losses", "dmd", "critic"):
            assert rank[key] == pytest.approx(expected[key], rel=1e-6), key
        for key in ("gradients", "critic_gradients", "weights"):
            assert rank[key].keys() == expected[key].keys()
            norm = torch.stack([value.norm() for value in expected[key].values()]).norm()
            for name, value in expected[key].items():
                assert (rank[key][name] - value).norm() <= 1e-6 * norm, (key, name)
    for key in ("gradients", "critic_gradients", "weights"):
        assert all(torch.equal(value, found[1][key][name]) for name, value in found[0][key].items())


@pytest.mark.parametrize("mode", MODES)
def test_what_is_equal_on_all_ranks_and_what_is_not(mode: str, folder: Path) -> None:
    """Steps, place, collectives and forwards are; noise and sigma are not."""
    first, second = ranks(folder, f"{mode}-{STEPS}")
    assert first["paths"] == second["paths"] and len(first["paths"]) == 2 * STEPS
    assert len({path[:2] for path in first["paths"]}) > 1
    assert first["seen"] == second["seen"]
    assert len([name for name, _ in first["seen"] if name == "all_reduce"]) >= 3 * STEPS
    assert len(first["drawn"]) == len(second["drawn"]) == 6 * STEPS
    for a, b in zip(first["drawn"], second["drawn"], strict=True):
        assert a.shape[1:] == b.shape[1:] and not torch.equal(a[:1], b[:1])


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_a_killed_run_continues_bit_for_bit(mode: str, folder: Path, tmp_path: Path) -> None:
    whole = ranks(folder, f"{mode}-{LONG}")
    (tmp_path / "resumed").mkdir()
    launch(SCRIPT, tmp_path, f"{mode}:{LONG}:{STOP}:resumed")
    launch(SCRIPT, tmp_path, f"{mode}:{LONG}:0:resumed")
    for expected, resumed in zip(whole, ranks(tmp_path, f"{mode}-{LONG}"), strict=True):
        assert len(resumed["losses"]) == LONG - STOP and resumed["losses"] == expected["losses"][STOP:]
        for name, weight in expected["weights"].items():
            assert torch.equal(resumed["weights"][name], weight), name


def test_a_rank_of_a_group_that_shares_samples_draws_as_the_group_does() -> None:
    """Two data-parallel ranks, each a pair of context-parallel ones."""
    from anyflow import AnyFlowDistiller

    drawn = []
    for rank in (0, 0, 1, 1):
        model = onpolicy_ranks.onpolicy.protocol.student(onpolicy_ranks.onpolicy.SD3)
        distiller = AnyFlowDistiller(model, config=onpolicy_ranks.CONFIG, dp_rank=rank, dp_size=2)
        with onpolicy_ranks.Recorder() as recorder:
            distiller.training_step(onpolicy_ranks.rows_of(0, 0, 2))
        drawn.append(recorder.drawn)
    for first, twin, other, other_twin in zip(*drawn, strict=True):
        assert torch.equal(first, twin) and torch.equal(other, other_twin) and not torch.equal(first, other)
