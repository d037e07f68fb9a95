"""What ranks tell each other. Every rank of the world calls each function equally often, in the same order; without a
process group a function answers for this process alone."""

from __future__ import annotations

import torch
from torch import Tensor


def _alone() -> bool:
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def world_size() -> int:
    return 1 if _alone() else torch.distributed.get_world_size()


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of ``value``, of one shape and dtype on all ranks; detached."""
    total = value.detach().clone()
    if not _alone():
        torch.distributed.all_reduce(total)
    return total


def sizes_of_ranks(size: int, dp_rank: int, dp_size: int, device: torch.device) -> list[int]:
    """The batch size of each data-parallel rank. Ranks that share a ``dp_rank`` have equal batches.

    ``device``: one that the backend of the process group works on.
    """
    if _alone():
        return [size] * dp_size
    sizes = torch.zeros(dp_size, dtype=torch.int64, device=device)
    sizes[dp_rank] = size
    torch.distributed.all_reduce(sizes, torch.distributed.ReduceOp.MAX)
    return sizes.tolist()
