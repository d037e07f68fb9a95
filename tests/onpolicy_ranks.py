"""One rank of a distributed on-policy stage, run by test_onpolicy_ranks.py: ``python onpolicy_ranks.py RANK SIZES
FOLDER JOB...``, SIZES being the ranks' batch sizes (3,1) and a job mode:steps:stop[:where its checkpoint is]."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import test_onpolicy as onpolicy
import tiny_models
import torch
import torch.distributed as dist
from accelerate import Accelerator
from forward_ranks import rows_of, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import anyflow
from anyflow import AnyFlowConfig, AnyFlowDistiller
from anyflow.critic import Critic
from anyflow.distributed import average_gradients
from anyflow.stages import onpolicy as stage

CONFIG: dict[str, Any] = {
    "target_mode": "onpolicy",
    "schedule_shift": 3.0,
    "seed": 3,
    "real_guidance_scale": 2.0,
    "simulation_steps": (2, 4, 8),
    "dmd_weight": 1000.0,  # more than the forward loss
}
DRAWS = ("_noise", "sample_uniform", "sample_logit_normal")
COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")


class Recorder:
    """What a run draws for its own samples; and, given other ranks' records, their draws in the place of its own."""

    def __init__(self, others: list[list[Tensor]] | None = None) -> None:
        self.drawn: list[Tensor] = []
        self.paths: list[tuple[float, ...]] = []
        self._others = others
        self._kept = {name: getattr(stage, name) for name in (*DRAWS, "simulation_path")}

    def __enter__(self) -> Recorder:
        for name in DRAWS:
            setattr(stage, name, self._recording(self._kept[name]))

        def path(*arguments: Any) -> tuple[float, ...]:
            self.paths.append((*arguments[:2], *self._kept["simulation_path"](*arguments)))
            return self.paths[-1][2:]

        stage.simulation_path = path  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        for name, kept in self._kept.items():
            setattr(stage, name, kept)

    def _recording(self, draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def record(*arguments: Any) -> Tensor:
            value = draw(*arguments)
            if self._others is not None:
                value = torch.cat([rank[len(self.drawn)] for rank in self._others])
            self.drawn.append(value)
            return value

        return record


class Counter:
    """The collectives of this rank that Python makes, with their sizes, and its forwards."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[tuple[str, int]] = []
        self._kept = {name: getattr(dist, name) for name in COLLECTIVES}
        self._handle = model.register_forward_pre_hook(lambda *_: self.seen.append(("forward", 0)))

    def __enter__(self) -> Counter:
        for name, function in self._kept.items():
            setattr(dist, name, self._counting(name, function))
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
        for name, function in self._kept.items():
            setattr(dist, name, function)

    def _counting(self, name: str, function: Any) -> Any:
        def count(*arguments: Any, **options: Any) -> Any:
            self.seen.append((name, next(a for a in arguments if isinstance(a, Tensor)).numel()))
            return function(*arguments, **options)

        return count


def train(
    mode: str, rank: int, sizes: list[int], folder: Path, steps: int, stop: int, others: Any = None
) -> dict[str, Any]:
    """A run from ``folder``'s checkpoint, if there is one; ``stop`` kills it after that many steps."""
    torch.manual_seed(rank)
    model: Any = onpolicy.protocol.student(onpolicy.SD3)
    wrapped, accelerator, mesh = model, None, None
    if mode == "late ddp":  # the critic comes when DDP is there already
        anyflow.trainable_parameters(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
    anyflow.trainable_parameters(model)
    anyflow.add_critic(model, seed=CONFIG["seed"])
    tiny_models.move_critic(model)
    if mode == "fsdp2":
        mesh = init_device_mesh("cpu", (len(sizes),), mesh_dim_names=("dp",))
        for block in model.transformer_blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    distiller = AnyFlowDistiller(wrapped, config=CONFIG, mesh=mesh)
    named = distiller.trainable_parameters()
    optimizer: Any = torch.optim.AdamW([parameter for _, parameter in named], lr=1e-3)
    if mode == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    elif mode == "accelerate":
        accelerator = Accelerator(cpu=True)
        wrapped, optimizer = accelerator.prepare(model, optimizer)
    first = 0
    if (folder / "anyflow_distiller.safetensors").exists():
        first = distiller.on_load_checkpoint(folder)
        optimizer.load_state_dict(torch.load(folder / f"optimizer-{rank}.pt", weights_only=False))
    critic = distiller.critic
    assert critic is not None
    result: dict[str, Any] = {"losses": [], "dmd": [], "critic": []}

    def note(*_: Any) -> None:
        result["critic_gradients"] = {n: whole(p.grad).clone() for n, p in critic.named_parameters()}  # type: ignore[arg-type]

    critic.optimizer.register_step_pre_hook(note)
    with Recorder(others) as recorder, Counter(model) as counter:
        for step in range(first, steps):
            torch.rand(rank + 1)  # somebody else's draws, which move the global generator of each rank differently
            loss, logs = distiller.training_step(rows_of(step, sum(sizes[:rank]), sizes[rank]), wrapped)
            if accelerator is None:
                loss.backward()
            else:
                accelerator.backward(loss)
            mean = torch.stack([loss.detach(), logs["anyflow_dmd_loss"], logs["anyflow_critic_loss"]]) / len(sizes)
            if len(sizes) > 1:
                dist.all_reduce(mean)
            for key, value in zip(("losses", "dmd", "critic"), mean.tolist(), strict=True):
                result[key].append(value)
            result["gradients"] = {n: whole(p.grad) for n, p in named if p.grad is not None}
            assert all(p.grad is None for _, p in critic.named_parameters())
            optimizer.step()
            optimizer.zero_grad()
            if step + 1 == stop:
                distiller.on_save_checkpoint(stop, folder)
                torch.save(optimizer.state_dict(), folder / f"optimizer-{rank}.pt")
                dist.barrier()
                os._exit(0)  # killed: nothing is wound up
    weights = {name: whole(parameter).detach().clone() for name, parameter in [*named, *critic.named_parameters()]}
    return {**result, "weights": weights, "drawn": recorder.drawn, "paths": recorder.paths, "seen": counter.seen}


def average(rank: int) -> dict[str, Any]:
    """Gradients 3 and 5, and one that the second rank does not have."""
    network = nn.Linear(2, 1)
    critic = Critic(nn.Identity(), nn.Identity(), AnyFlowConfig(critic_max_grad_norm=None), separate=network)
    gradients: dict[str, Tensor] = {}
    critic.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in network.named_parameters()})  # type: ignore[union-attr]
    )
    with Counter(network) as counter:
        critic.step(network.weight.sum() * (3.0, 5.0)[rank] + (network.bias.sum() if rank == 0 else 0.0))
        for parameter in network.parameters():
            parameter.grad = None
        average_gradients(list(network.parameters()))
    return {"gradients": gradients, "seen": counter.seen}


def main(rank: int, sizes: list[int], folder: Path, *jobs: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(sizes))
    torch.save(average(rank), folder / f"average-{rank}.pt")
    for job in jobs:
        mode, steps, stop, *place = job.split(":")
        result = train(mode, rank, sizes, folder / "".join(place), int(steps), int(stop))
        torch.save(result, folder / f"{mode}-{steps}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(n) for n in sys.argv[2].split(",")], Path(sys.argv[3]), *sys.argv[4:])
