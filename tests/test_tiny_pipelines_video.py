"""The tiny video and audio pipelines run, and run the same way twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_pipelines_video import PIPELINES, build_pipeline, denoiser_calls, sample


def count_calls(pipe: Any) -> list[Any]:
    """Grows by one with each call of a denoiser."""
    seen: list[Any] = []
    for part in ("transformer", "transformer_2"):
        if isinstance(model := getattr(pipe, part, None), torch.nn.Module):
            model.register_forward_pre_hook(lambda module, _: seen.append(module))
    return seen


@pytest.mark.parametrize("name", PIPELINES)
def test_a_stock_sample_is_finite_and_reproducible(name: str) -> None:
    pipe = build_pipeline(name)
    seen = count_calls(pipe)
    first = sample(pipe, name)
    assert torch.isfinite(first).all() and first.std() > 0
    assert len(seen) == denoiser_calls(name)
    assert torch.equal(sample(pipe, name), first)
    if PIPELINES[name]["guided"] is not None:
        seen.clear()
        guided = sample(pipe, name, guidance=True)
        assert torch.isfinite(guided).all() and not torch.equal(guided, first)
        assert len(seen) == denoiser_calls(name, guidance=True)
    if PIPELINES[name].get("experts"):
        assert {id(model) for model in seen} == {id(pipe.transformer), id(pipe.transformer_2)}


def test_a_build_is_reproducible() -> None:
    name = "WanImageToVideoPipeline"
    one, two = (build_pipeline(name, seed=3) for _ in range(2))
    assert torch.equal(sample(one, name), sample(two, name))
    assert not torch.equal(sample(one, name), sample(build_pipeline(name, seed=4), name))
