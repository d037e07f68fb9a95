"""What ranks tell each other. Every rank of the world calls each function equally often, in the same order; without a
process group a function answers for this process alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_BUCKET = 2**25  # elements of one all-reduce of gradients


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


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """The mean of each gradient over all ranks, in place; a gradient that is None counts as zero and becomes one.

    The collectives, in number and order, depend on the parameters alone. Those of FSDP2 were averaged in the backward.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None and not is_sharded(p)]
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1).to(torch.float32) for gradient in bucket])
        torch.distributed.all_reduce(flat)
        flat /= world_size()
        for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(g.numel() for g in bucket) + gradient.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def is_sharded(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP2 has sharded: a collective. Others as they are."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined]


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, laid out as ``like``: its device, its shards."""
    if not is_sharded(like):
        return tensor.to(like.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(tensor.to(like.device), sharded.device_mesh, sharded.placements)
