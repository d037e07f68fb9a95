"""One rank of a distributed forward stage, run by test_forward_ranks.py: ``python forward_ranks.py RANK SIZES FOLDER
JOB...``, SIZES being the ranks' batch sizes (3,1) and a job mode:variant:steps:stop."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import test_distiller as protocol
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from anyflow import AnyFlowDistiller

NAME = "SD3Transformer2DModel"
CONFIG: dict[str, Any] = {"target_mode": "meanflow", "schedule_shift": 3.0, "seed": 3}
VARIANTS = {
    "guided": {**CONFIG, "diffusion_ratio": 0.25},
    "base": {**CONFIG, "diffusion_target": "base_prediction", "fuse_guidance_scale": 1.0},
}


def rows_of(step: int, start: int, count: int) -> dict[str, Any]:
    """Rows of the global batch of a step: each row depends on its place alone."""
    latents, noise, text, pooled = [], [], [], []
    for row in range(start, start + count):
        generator = torch.Generator().manual_seed(1000 * step + row)
        latents.append(torch.randn(4, 8, 8, generator=generator))
        noise.append(torch.randn(4, 8, 8, generator=generator))
        text.append(torch.randn(12, 32, generator=generator))
        pooled.append(torch.randn(64, generator=generator))

    def conditioning(factor: float) -> dict[str, Tensor]:
        return {
            "encoder_hidden_states": factor * torch.stack(text),
            "pooled_projections": factor * torch.stack(pooled),
        }

    return {
        "latents": torch.stack(latents),
        "noise": torch.stack(noise),
        "conditioning": conditioning(1.0),
        "negative_conditioning": conditioning(0.0),
    }


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(mode: str, variant: str, rank: int, sizes: list[int], folder: Path, steps: int, stop: int) -> dict[str, Any]:
    """Losses, diffusion shares, last gradients and weights of a run; ``stop`` kills it after that many steps."""
    model: Any = protocol.student(NAME)
    wrapped, accelerator, mesh = model, None, None
    if mode == "fsdp2":
        distiller = AnyFlowDistiller(model, config=VARIANTS[variant])  # makes the delta embedder trainable
        mesh = init_device_mesh("cpu", (len(sizes),), mesh_dim_names=("dp",))
        for block in model.transformer_blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    start, count = sum(sizes[:rank]), sizes[rank]
    if mode == "context":  # the ranks share all samples, as those of one sequence do
        mesh = init_device_mesh("cpu", (1, len(sizes)), mesh_dim_names=("dp", "cp"))
        start, count = 0, sum(sizes)
    distiller = AnyFlowDistiller(model, config=VARIANTS[variant], mesh=mesh)
    named = distiller.trainable_parameters()
    optimizer: Any = torch.optim.AdamW([parameter for _, parameter in named], lr=1e-3)
    if mode in ("ddp", "context"):
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    elif mode == "accelerate":
        accelerator = Accelerator(cpu=True)
        wrapped, optimizer = accelerator.prepare(model, optimizer)
    first = 0
    if (folder / "optimizer.pt").exists():
        first = distiller.on_load_checkpoint(folder)
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    result: dict[str, Any] = {"losses": [], "shares": []}
    for step in range(first, steps):
        torch.rand(rank + 1)  # somebody else's draws, which move the global generator of each rank differently
        loss, logs = distiller.training_step(rows_of(step, start, count), wrapped)
        if accelerator is None:
            loss.backward()
        else:
            accelerator.backward(loss)
        mean = loss.detach() / len(sizes)
        if len(sizes) > 1:
            dist.all_reduce(mean)
        result["losses"].append(mean.item())
        result["shares"].append(logs["anyflow_diffusion_share"].item())
        result["gradients"] = {name: whole(parameter.grad) for name, parameter in named if parameter.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == stop:
            if rank == 0:
                distiller.on_save_checkpoint(stop, folder)
                torch.save(optimizer.state_dict(), folder / "optimizer.pt")
            dist.barrier()
            os._exit(0)  # killed: nothing is wound up
    return {**result, "weights": {name: whole(parameter).detach().clone() for name, parameter in named}}


def main(rank: int, sizes: list[int], folder: Path, *jobs: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(sizes))
    for job in jobs:
        mode, variant, steps, stop = job.split(":")
        result = train(mode, variant, rank, sizes, folder, int(steps), int(stop))
        if rank == 0:
            torch.save(result, folder / f"{mode}-{variant}-{steps}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(n) for n in sys.argv[2].split(",")], Path(sys.argv[3]), *sys.argv[4:])
