"""One rank of a run that is spoilt in its second step: ``python guard_ranks.py RANK SIZES FOLDER MODE...``"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import test_distiller as protocol
import torch
import torch.distributed as dist
from accelerate import Accelerator
from forward_ranks import CONFIG, NAME, rows_of, whole
from onpolicy_ranks import Counter
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import anyflow

STEPS, SPOILT = 4, 1  # the second of four steps, on the second rank alone


def train(mode: str, rank: int, sizes: list[int]) -> dict[str, Any]:
    torch.manual_seed(0)
    model: Any = protocol.student(NAME)
    wrapped: Any = model
    anyflow.trainable_parameters(model)
    if mode == "fsdp2":
        mesh = init_device_mesh("cpu", (len(sizes),), mesh_dim_names=("dp",))
        for block in model.transformer_blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    distiller = anyflow.AnyFlowDistiller(model, config={**CONFIG, "target_mode": "linear"})
    named = distiller.trainable_parameters()
    optimizer: Any = torch.optim.AdamW([parameter for _, parameter in named], lr=1e-3, weight_decay=0.1)
    if mode == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    elif mode == "accelerate":
        wrapped, optimizer = Accelerator(cpu=True).prepare(model, optimizer)
    distiller.skip_nonfinite_steps(optimizer)
    result: dict[str, Any] = {"weights": [], "skipped": [], "seen": []}
    for step in range(STEPS):
        batch = {**rows_of(step, sum(sizes[:rank]), sizes[rank]), "sigmas": torch.full((sizes[rank],), 0.5)}
        loss, logs = distiller.training_step(batch, wrapped)
        loss.backward()
        if step == SPOILT and rank == 1:
            gradient = named[-1][1].grad
            assert gradient is not None
            (gradient.to_local() if mode == "fsdp2" else gradient).fill_(torch.inf)  # type: ignore[attr-defined]
        with Counter(model) as counter:
            optimizer.step()
        optimizer.zero_grad()
        result["seen"].append(counter.seen)
        result["skipped"].append((int(logs["anyflow_skipped_steps"]), distiller.skipped_steps))
        result["weights"].append({name: whole(parameter).detach().clone() for name, parameter in named})
    return result


def main(rank: int, sizes: list[int], folder: Path, *modes: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(sizes))
    for mode in modes:
        torch.save(train(mode, rank, sizes), folder / f"{mode}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(n) for n in sys.argv[2].split(",")], Path(sys.argv[3]), *sys.argv[4:])
