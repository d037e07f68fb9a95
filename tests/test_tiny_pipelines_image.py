"""The tiny stock image pipelines run."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_pipelines_image
import torch


@pytest.mark.parametrize("name", tiny_pipelines_image.PIPELINES)
def test_seeded_latents_and_denoiser_calls(name: str) -> None:
    facts = tiny_pipelines_image.PIPELINES[name]
    pipe = tiny_pipelines_image.build_pipeline(name)
    steps = 4 if "strength" in facts["call"] else 2
    calls: list[Any] = []
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    denoiser.register_forward_pre_hook(lambda *_: calls.append(None))
    samples = []
    for guidance in (False, True):
        if facts["guided" if guidance else "plain"] is None:
            continue
        calls.clear()
        latents = tiny_pipelines_image.sample(pipe, name, steps=steps, guidance=guidance)
        assert len(calls) == tiny_pipelines_image.denoiser_calls(name, steps, guidance)
        assert latents.dtype == torch.float32 and latents.isfinite().all() and latents.std() > 0
        assert torch.equal(tiny_pipelines_image.sample(pipe, name, steps=steps, guidance=guidance), latents)
        assert not torch.equal(tiny_pipelines_image.sample(pipe, name, steps=steps, seed=1, guidance=guidance), latents)
        samples.append(latents)
    assert len(samples) == 1 or not torch.equal(*samples)
