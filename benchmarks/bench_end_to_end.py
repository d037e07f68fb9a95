"""A whole distillation step with AnyFlow against the same step in plain PyTorch. Run by ``make bench``."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from . import measure
from .conftest import Session
from .end_to_end import MODELS, TOLERANCE, Model, with_anyflow, with_plain_pytorch
from .measure import RedGate, Samples, Variant
from .operators import LEVELS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    level = LEVELS.index(metafunc.config.getoption("--level"))
    chosen = [model for model in MODELS if LEVELS.index(model.level) <= level]
    metafunc.parametrize("model", chosen, ids=[model.name for model in chosen])


def test_distillation_step(model: Model, benchmark: Any, session: Session) -> None:
    device, full = session.device, session.level == "full"
    dtype = torch.bfloat16 if device == "cuda" and model.name.startswith("small") else torch.float32
    torch.compiler.reset()
    variants = [
        Variant("eager", with_plain_pytorch(model, device, dtype)),
        Variant("AnyFlow", with_anyflow(model, device, dtype)),
    ]
    if full:
        variants.append(Variant("torch.compile", with_plain_pytorch(model, device, dtype, compiled=True)))
    losses = {variant.name: [float(variant.function())] for variant in variants}  # the gate: the first step of each
    with session.refused_when_red("distillation step", model.name):
        for name, (loss,) in losses.items():
            expected = losses["eager"][0]
            if not abs(loss - expected) <= TOLERANCE[dtype] * abs(expected):
                raise RedGate(f"{name}: the loss is {loss}, plain PyTorch's {expected}")

    pairs = [(variant, functools.partial(getattr, variant, "function")) for variant in variants]
    round_, samples = measure.interleaved(session.clock, pairs, warm=False), Samples()
    benchmark.pedantic(round_, args=(samples,), rounds=session.rounds(round_()), iterations=1)
    results = {}
    for variant in variants:
        milliseconds = {key: 1e3 * value for key, value in measure.quartiles(samples.seconds[variant.name]).items()}
        results[variant.name] = {
            "ratio_to_eager": samples.ratio("eager", variant.name),
            "ratio_to_compile": samples.ratio("torch.compile", variant.name) if full else None,
            "ms": milliseconds,
            "host_ms": 1e3 * measure.quartiles(samples.host_seconds[variant.name])["median"],
            "peak_bytes": measure.peak_bytes(variant.function, device),
            "loss": losses[variant.name][0],
        }
    session.report(
        benchmark,
        kind="end to end",
        model=model.name,
        mode="step",
        dtype=str(dtype).removeprefix("torch."),
        loss_tolerance=TOLERANCE[dtype],
        variants=results,
        skipped={} if full else {"torch.compile": "only with --full: it compiles for minutes"},
    )
