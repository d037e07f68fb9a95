"""Which ranks draw the same, which do not, and that nothing outside changes it."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from anyflow.streams import RandomStreams


def drawn(streams: RandomStreams, kinds: str = "oso") -> list[list[float]]:
    return [torch.rand(3, generator=streams.own() if kind == "o" else streams.shared()).tolist() for kind in kinds]


def test_own_differs_between_ranks_and_shared_does_not() -> None:
    ranks = [drawn(RandomStreams(3, dp_rank=rank, dp_size=4)) for rank in range(4)]
    for draw in (0, 2):
        assert len({tuple(rank[draw]) for rank in ranks}) == 4
    assert len({tuple(rank[1]) for rank in ranks}) == 1
    assert ranks[0][1] not in [rank[draw] for rank in ranks for draw in (0, 2)]


def test_draws_and_seeds_differ_and_the_count_is_the_state() -> None:
    streams = RandomStreams(3)
    first = drawn(streams, "osos")
    assert streams.draws == 4
    flat = [tuple(value) for value in [*first, *drawn(RandomStreams(4), "osos")]]
    assert len(set(flat)) == 8
    resumed = RandomStreams(3)
    resumed.draws = 2
    torch.rand(7)  # somebody else's
    assert drawn(resumed, "os") == first[2:]


def test_the_stream_of_earlier_checkpoints() -> None:
    """Draws of r, saved as a count, go on where they were: the seed of (seed, rank, draw), written out."""
    streams = RandomStreams(5, dp_rank=2, dp_size=3)
    streams.draws = 7
    seed = 5 * 0x9E3779B97F4A7C15 + 2 * 0xBF58476D1CE4E5B9 + 7 * 0x94D049BB133111EB
    expected = torch.rand(4, generator=torch.Generator().manual_seed(seed % 2**63))
    assert torch.equal(torch.rand(4, generator=streams.own()), expected)


@pytest.fixture
def worlds() -> Any:
    """A process group of any size, of which this process is one rank."""
    import torch.distributed as dist

    def start(rank: int, size: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


def test_by_default_the_world(worlds: Any) -> None:
    streams = RandomStreams(0)
    assert (streams.dp_rank, streams.dp_size) == (0, 1)
    worlds(2, 3)  # also where the group is made after the streams
    assert (streams.dp_rank, streams.dp_size) == (2, 3)


@pytest.mark.parametrize(
    ("shape", "names", "data_parallel"),
    [
        ((2, 2), ("dp", "cp"), (0,)),
        ((2, 2), ("tp", "dp"), (1,)),
        ((2, 3, 2), ("dp_replicate", "dp_shard", "tp"), (0, 1)),
        ((2, 3), ("replicate", "shard"), (0, 1)),
        ((4,), None, (0,)),
    ],
)
def test_ranks_of_a_mesh(shape: tuple[int, ...], names: Any, data_parallel: tuple[int, ...], worlds: Any) -> None:
    """Ranks that differ in a context or tensor parallel coordinate only draw the same."""
    found: dict[tuple[int, ...], set[Any]] = {}
    size = torch.Size(shape).numel()
    for rank, coordinate in enumerate(product(*map(range, shape))):
        worlds(rank, size)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        streams = RandomStreams(0, mesh=mesh)
        assert streams.dp_size == torch.Size([shape[dim] for dim in data_parallel]).numel()
        own = tuple(coordinate[dim] for dim in data_parallel)
        found.setdefault(own, set()).add((streams.dp_rank, tuple(drawn(streams, "o")[0])))
    assert all(len(values) == 1 for values in found.values())
    ranks = [next(iter(values))[0] for _, values in sorted(found.items())]
    assert ranks == list(range(len(found)))


def test_refusals(worlds: Any) -> None:
    for wrong in ({"dp_rank": 1}, {"dp_size": 2}, {"dp_rank": 2, "dp_size": 2}, {"dp_rank": -1, "dp_size": 2}):
        with pytest.raises(ValueError, match="dp_rank"):
            RandomStreams(0, **wrong)
    worlds(0, 4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    assert isinstance(mesh, DeviceMesh)
    with pytest.raises(ValueError, match=r"cp.*tp.*pass dp_rank"):
        RandomStreams(0, mesh=mesh)
    with pytest.raises(ValueError, match="either a mesh"):
        RandomStreams(0, mesh=mesh, dp_rank=0, dp_size=1)
