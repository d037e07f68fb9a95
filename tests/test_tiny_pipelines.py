"""The tiny stock pipelines run."""

from __future__ import annotations

import pytest
import tiny_pipelines
import torch


@pytest.mark.parametrize("guidance", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("name", tiny_pipelines.RUNNABLE)
def test_one_step_gives_finite_latents(name: str, guidance: bool) -> None:
    pipe = tiny_pipelines.build_pipeline(name)
    latents = tiny_pipelines.sample(pipe, name, steps=1, guidance=guidance)
    assert latents.isfinite().all()
    assert latents.std() > 0
    assert latents.dtype == torch.float32
