"""Private random streams, equal or different between ranks on purpose."""

from __future__ import annotations

import math
from typing import Any

import torch

# A dimension of a device mesh along which the samples differ, by the names that torch, accelerate and torchtitan use.
# Ranks along any other one (context, sequence, tensor, pipeline parallel) share their samples.
DATA_PARALLEL = ("dp", "dp_replicate", "dp_shard", "replicate", "shard")
_EVERY_RANK = -1


class RandomStreams:
    """Generators that depend on (seed, data-parallel rank, number of the draw) and on nothing else.

    ``seed``: integer >= 0.
    ``dp_rank``, ``dp_size``: this rank's number among those whose samples differ, and how many of these there are; by
        default the rank and the size of the world, read at each draw.
    ``mesh``: a torch ``DeviceMesh`` to take both from: its dimension "dp", or "dp_replicate" and "dp_shard" together
        ("replicate", "shard"); a mesh of one dimension without names is data parallel.

    Each draw has a generator of its own, so the count ``draws``, equal on all ranks, is the whole state: all ranks must
    draw equally often. Generators are on the CPU, so that a run does not depend on the device.

    Raises ValueError for a rank outside of its size, one of the two alone, both beside a mesh, or a mesh that has no
    such dimension.
    """

    def __init__(self, seed: int, *, dp_rank: int | None = None, dp_size: int | None = None, mesh: Any = None) -> None:
        if mesh is not None:
            if dp_rank is not None or dp_size is not None:
                raise ValueError("give either a mesh, or dp_rank and dp_size")
            dp_rank, dp_size = _of_mesh(mesh)
        if (dp_rank is None) != (dp_size is None):
            raise ValueError(f"dp_rank and dp_size go together, got dp_rank={dp_rank}, dp_size={dp_size}")
        if dp_rank is not None and dp_size is not None and not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank={dp_rank} must be in [0, dp_size={dp_size})")
        self.seed, self.draws = seed, 0
        self._place = None if dp_rank is None or dp_size is None else (dp_rank, dp_size)

    @property
    def dp_rank(self) -> int:
        return self._placed()[0]

    @property
    def dp_size(self) -> int:
        return self._placed()[1]

    def own(self) -> torch.Generator:
        """The next draw's generator: another one on each data-parallel rank, one on the ranks that share a sample."""
        return self._next(self.dp_rank)

    def shared(self) -> torch.Generator:
        """The next draw's generator: the same on every rank."""
        return self._next(_EVERY_RANK)

    def _placed(self) -> tuple[int, int]:
        if self._place is not None:
            return self._place
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def _next(self, rank: int) -> torch.Generator:
        # Odd 64-bit constants keep neighbouring seeds, ranks and draws apart.
        mixed = self.seed * 0x9E3779B97F4A7C15 + rank * 0xBF58476D1CE4E5B9 + self.draws * 0x94D049BB133111EB
        self.draws += 1
        return torch.Generator().manual_seed(mixed % 2**63)


def _of_mesh(mesh: Any) -> tuple[int, int]:
    names = mesh.mesh_dim_names
    if names is None and mesh.ndim == 1:
        dims = [0]
    else:
        dims = [dim for dim, name in enumerate(names or ()) if name in DATA_PARALLEL]
    if not dims:
        raise ValueError(
            f"the mesh has no dimension among {', '.join(DATA_PARALLEL)}: {names}; pass dp_rank and dp_size"
        )
    rank = 0
    for dim in dims:
        rank = rank * mesh.size(dim) + mesh.get_local_rank(dim)
    return rank, math.prod(mesh.size(dim) for dim in dims)
