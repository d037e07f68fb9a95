"""Calling a denoiser: the one place where sigma becomes the model's own time, and layouts are converted.

A ``Denoiser`` predicts in the model's own sign from latents and sigma. Two kinds: a bare diffusers model, whose
conditioning stands in the batch under ``conditioning``, and a trainer's object with ``model_predict``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .families import FamilySpec, find_spec
from .patching import is_patched
from .patching.unwrap import unwrap

Batch = Mapping[str, Any]


class Denoiser(Protocol):
    spec: FamilySpec
    bare: nn.Module  # the diffusers model, whatever wraps it

    def __call__(self, batch: Batch, x: Tensor, sigma: Tensor, r: Tensor | None, *, negative: bool = False) -> Tensor:
        """The prediction at latents ``x`` and ``sigma`` ([B] or [B, S] tokens), conditioned on ``r`` unless None."""
        ...


def spec_of(bare: Any) -> FamilySpec:
    """The spec a patched model carries, or that of the class."""
    return bare._flowmap.spec if is_patched(bare) else find_spec(type(bare).__name__)


class DiffusersDenoiser:
    def __init__(self, module: nn.Module, spec: FamilySpec) -> None:
        self.module, self.bare, self.spec = module, unwrap(module), spec

    def __call__(self, batch: Batch, x: Tensor, sigma: Tensor, r: Tensor | None, *, negative: bool = False) -> Tensor:
        arguments = dict(batch["negative_conditioning" if negative else "conditioning"] or {})
        arguments[self.spec.sample_arg] = list(x.unsqueeze(2).unbind(0)) if self.spec.sample_layout == "list" else x
        arguments[self.spec.timestep_arg] = self.spec.model_time(sigma)
        if r is not None:
            arguments["r_timestep"] = self.spec.model_time(r)
        return prediction_of(self.module(**arguments, return_dict=False))


def prediction_of(output: Any) -> Tensor:
    """The prediction [B, ...] in what a model or a trainer returns: a tensor, a dict with ``model_prediction``, a
    diffusers output, a tuple; a list of [C, 1, H, W] is stacked to [B, C, H, W]."""
    if isinstance(output, Mapping) and "model_prediction" in output:
        output = output["model_prediction"]
    elif hasattr(output, "sample"):
        output = output.sample
    elif isinstance(output, tuple):
        output = output[0]
    return torch.stack(output).squeeze(2) if isinstance(output, list) else output


class TrainerDenoiser:
    """``trainer.model_predict(batch)`` with the latents, sigmas and timesteps of the batch replaced.

    r goes in as ``flowmap_r_timesteps``, which the trainer hands to its model as ``r_timestep``; without r the key is
    absent. ``negative`` lays ``batch["negative_conditioning"]`` over the batch. Sigmas keep the shape that they have
    in the batch.
    """

    def __init__(self, trainer: Any, bare: nn.Module, spec: FamilySpec) -> None:
        self.trainer, self.bare, self.spec = trainer, bare, spec

    def __call__(self, batch: Batch, x: Tensor, sigma: Tensor, r: Tensor | None, *, negative: bool = False) -> Tensor:
        changed = {key: value for key, value in batch.items() if key != "flowmap_r_timesteps"}
        if negative:
            changed |= batch["negative_conditioning"]
        given = batch["sigmas"]
        changed["sigmas"] = sigma.reshape(given.shape) if given.numel() == sigma.numel() else sigma
        changed |= {"noisy_latents": x, "timesteps": self.spec.model_time(sigma)}
        if r is not None:
            changed["flowmap_r_timesteps"] = self.spec.model_time(r)
        return prediction_of(self.trainer.model_predict(changed))


class TimeLayout:
    """The shapes in which times come: one per sample, per frame, or per token; laid out for the model and the latents.

    sigma of shape [B] or [B, 1, ..., 1] is one time per sample. Families with ``token_times`` (Wan) also take [B, F],
    one per latent frame, and [B, S], one per patch, frame by frame, for latents [B, C, F, H, W].
    """

    def __init__(self, spec: FamilySpec, bare: Any, latents: Tensor) -> None:
        self.latents_shape = latents.shape
        self.grid: tuple[int, int, int] | None = None
        self.patch = (1, 1, 1)
        if spec.token_times and latents.ndim == 5:
            self.patch = tuple(bare.config.patch_size)
            _, _, *space = latents.shape
            self.grid = tuple(n // p for n, p in zip(space, self.patch, strict=True))  # type: ignore[assignment]

    def for_model(self, sigma: Tensor) -> Tensor:
        """[B] or [B, S] from any accepted shape. Raises ValueError that names the shape and what is accepted."""
        batch = self.latents_shape[0]
        accepted = [f"[{batch}]"]
        if sigma.shape[:1] == (batch,) and sigma.numel() == batch:
            return sigma.reshape(batch)
        if self.grid is not None:
            frames, height, width = self.grid
            accepted += [f"[{batch}, {frames}] (frames)", f"[{batch}, {frames * height * width}] (tokens)"]
            if sigma.shape == (batch, frames):
                return sigma.repeat_interleave(height * width, dim=1)
            if sigma.shape == (batch, frames * height * width):
                return sigma
        raise ValueError(
            f"sigmas of shape {list(sigma.shape)} do not fit latents of shape {list(self.latents_shape)}: "
            f"accepted are {', '.join(accepted)}"
        )

    def for_latents(self, sigma: Tensor) -> Tensor:
        """From [B] or [B, S] to a shape that broadcasts to the latents."""
        if sigma.ndim == 1:
            return sigma.reshape(-1, *(1,) * (len(self.latents_shape) - 1))
        assert self.grid is not None
        tokens = sigma.reshape(sigma.shape[0], 1, *self.grid)
        for dim, repeats in enumerate(self.patch, start=2):
            tokens = tokens.repeat_interleave(repeats, dim=dim)
        return tokens
