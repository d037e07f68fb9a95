"""A step whose loss or gradient is not finite moves nothing, on no rank, and is counted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import guard_ranks
import pytest
import test_distiller as protocol
import torch
from accelerate import Accelerator
from two_ranks import launch

from anyflow import AnyFlowDistiller

CONFIG = {"target_mode": "linear"}
FAULTS = ("nan gradient", "inf gradient", "nan loss", "inf loss", "inf loss of finite gradients")


def made(guarded: bool = True, wrapped: bool = False, **config: Any) -> tuple[AnyFlowDistiller, Any]:
    distiller = AnyFlowDistiller(protocol.student(protocol.SD3), config={**CONFIG, **config})
    parameters = [parameter for _, parameter in distiller.trainable_parameters()]
    optimizer: Any = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)
    optimizer = Accelerator(cpu=True).prepare(optimizer) if wrapped else optimizer
    if guarded:
        distiller.skip_nonfinite_steps(optimizer)
    return distiller, optimizer


def step(distiller: AnyFlowDistiller, optimizer: Any, fault: str = "") -> dict[str, Any]:
    """A step, with one of the faults; its logs."""
    kind, _, where = fault.partition(" ")
    parameter = distiller.trainable_parameters()[0][1]
    batch = protocol.batch_for(protocol.SD3)
    if where == "loss":
        batch["noise"][1, 0, 0, 0] = float(kind)
    if where == "loss of finite gradients":
        prepared = distiller.prepare_batch(batch)
        # An error of 1e20: its square overflows, and its derivative does not.
        loss, logs = distiller.compute_distill_loss(prepared, prepared["target"] + (1e20 + parameter.mean()))
        assert loss.isinf()
    else:
        loss, logs = distiller.training_step(batch)
    loss.backward()
    if where == "gradient":
        assert parameter.grad is not None
        parameter.grad.view(-1)[-1] = float(kind)
    optimizer.step()
    optimizer.zero_grad()
    return logs


def everything(distiller: AnyFlowDistiller, optimizer: Any) -> Any:
    """Weights, moments and the optimizer's own counts."""
    weights = [parameter.detach().clone() for _, parameter in distiller.trainable_parameters()]
    return weights, copy.deepcopy(optimizer.state_dict())


def same(a: Any, b: Any) -> bool:
    weights, states = zip(a, b, strict=True)
    moments = [[value for of_one in s["state"].values() for value in of_one.values()] for s in states]
    return all(torch.equal(x, y) for x, y in [*zip(*weights, strict=True), *zip(*moments, strict=True)])


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "accelerate"])
@pytest.mark.parametrize("fault", FAULTS)
def test_moves_nothing_and_is_counted(fault: str, wrapped: bool) -> None:
    distiller, optimizer = made(wrapped=wrapped)
    assert step(distiller, optimizer)["anyflow_skipped_steps"] == 0
    before = everything(distiller, optimizer)
    step(distiller, optimizer, fault)
    assert same(everything(distiller, optimizer), before) and distiller.skipped_steps == 1
    assert step(distiller, optimizer)["anyflow_skipped_steps"] == 1
    after = everything(distiller, optimizer)
    assert not same(after, before) and all(weight.isfinite().all() for weight in after[0])


@pytest.mark.parametrize("mode", ["online_teacher", "meanflow", "onpolicy"])
def test_in_every_mode(mode: str) -> None:
    """One sample of the batch is NaN; the next batch trains on."""
    distiller, optimizer = made(
        target_mode=mode, schedule_shift=3.0, fuse_guidance_scale=1.0, teacher_rollout_steps=2, simulation_steps=(2,)
    )
    step(distiller, optimizer)
    before = everything(distiller, optimizer)
    step(distiller, optimizer, "nan loss")
    assert same(everything(distiller, optimizer), before) and distiller.skipped_steps == 1
    logs = step(distiller, optimizer)
    assert all(value.isfinite() for value in logs.values()) and distiller.skipped_steps == 1
    assert not same(everything(distiller, optimizer), before)
    assert all(parameter.isfinite().all() for parameter in distiller.student.bare.parameters())


def test_one_micro_batch_takes_the_others_with_it() -> None:
    distiller, optimizer = made()
    step(distiller, optimizer)
    before = everything(distiller, optimizer)
    bad = protocol.batch_for(protocol.SD3)
    bad["latents"][0] = torch.nan
    for batch in (bad, protocol.batch_for(protocol.SD3)):
        loss, _ = distiller.training_step(batch)
        (loss / 2).backward()
    optimizer.step()
    assert same(everything(distiller, optimizer), before) and distiller.skipped_steps == 1


def test_off_unless_asked_for() -> None:
    distiller, optimizer = made(guarded=False)
    logs = step(distiller, optimizer, "nan loss")
    assert "anyflow_skipped_steps" not in logs and distiller.skipped_steps == 0
    assert any(parameter.isnan().any() for _, parameter in distiller.trainable_parameters())


def test_the_count_is_saved_and_resumed(tmp_path: Path) -> None:
    distiller, optimizer = made()
    for fault in ("", "nan loss", "inf gradient"):
        step(distiller, optimizer, fault)
    distiller.on_save_checkpoint(3, tmp_path)
    resumed, optimizer = made()
    assert resumed.on_load_checkpoint(tmp_path) == 3 and resumed.skipped_steps == 2
    step(resumed, optimizer, "nan gradient")
    assert resumed.skipped_steps == 3


@pytest.mark.slow
def test_all_ranks_decide_alike(tmp_path: Path) -> None:
    """One element of one rank's gradient (under FSDP2 of its shard, which no other rank has) is infinite in step 2."""
    modes = ("none", "ddp", "fsdp2", "accelerate")
    launch(Path(guard_ranks.__file__), tmp_path, *modes)
    for mode in modes:
        ranks = [torch.load(tmp_path / f"{mode}-{rank}.pt", weights_only=False) for rank in range(2)]
        for rank in ranks:
            assert rank["skipped"] == [(0, 0), (0, 1), (1, 1), (1, 1)], mode
            assert rank["seen"] == [[("all_reduce", 1)]] * guard_ranks.STEPS, mode
            moved = [
                any(not torch.equal(before[name], after[name]) for name in before)
                for before, after in zip(rank["weights"], rank["weights"][1:], strict=False)
            ]
            assert moved == [False, True, True], mode
            assert all(weight.isfinite().all() for weight in rank["weights"][-1].values())
        if mode != "none":
            last = [rank["weights"][-1] for rank in ranks]
            assert all(torch.equal(last[0][name], last[1][name]) for name in last[0]), mode
