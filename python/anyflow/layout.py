"""The layouts in which families want their times and their latents; in between, times are sigmas, latents a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .families import FamilySpec


class TimeLayout:
    """Sigma laid out for the model, as the ``times`` of its spec say, and for the latents, so that it broadcasts.

    sigma of shape [B] or [B, 1, ..., 1] is one time for each sample. Families with framewise times take [B, F], one for
    each latent frame; those with times of tokens [B, S], one for each token of [B, S, C] or each patch of
    [B, C, F, H, W], frame by frame. A packed family takes one sigma for its one sequence.
    """

    def __init__(self, spec: FamilySpec, bare: Any, latents: Tensor) -> None:
        self.spec = spec
        self.latents_shape = latents.shape
        self.patches: tuple[int, ...] = ()  # sizes of the grid of patches: frames, height, width
        if spec.times == "patches" and latents.ndim == 5:
            self.patch_size = tuple(bare.config.patch_size)
            self.patches = tuple(n // p for n, p in zip(latents.shape[2:], self.patch_size, strict=True))

    def for_model(self, sigma: Tensor) -> Tensor:
        """From any accepted shape. Raises ValueError that names the shape and what is accepted."""
        accepted = self._accepted()
        for name, shape in accepted.items():
            if sigma.shape == shape or (name == "sample" and _is_per_sample(sigma, shape)):
                return self._laid_out(name, sigma.reshape(shape))
        shapes = ", ".join(f"{list(shape)} ({name})" for name, shape in accepted.items())
        raise ValueError(
            f"sigmas of shape {list(sigma.shape)} do not fit latents of shape {list(self.latents_shape)}: "
            f"accepted are {shapes}"
        )

    def _accepted(self) -> dict[str, tuple[int, ...]]:
        batch, *rest = self.latents_shape
        accepted: dict[str, tuple[int, ...]] = {"sample": (1 if self.spec.times == "packed" else batch,)}
        if self.patches:
            accepted["frame"] = (batch, self.patches[0])
            accepted["token"] = (batch, torch.Size(self.patches).numel())
        elif self.spec.times == "tokens" and len(rest) == 2:
            accepted["token"] = (batch, rest[0])
        elif self.spec.times == "frames" and len(rest) == 4:
            accepted["frame"] = (batch, self.latents_shape[self.spec.frame_dim])
            accepted["model"] = self._frames_shape()
        return accepted

    def _frames_shape(self) -> tuple[int, ...]:
        sizes = {"B": self.latents_shape[0], "F": self.latents_shape[self.spec.frame_dim], "1": 1}
        return tuple(sizes[name] for name in self.spec.frames.split())

    def _laid_out(self, name: str, sigma: Tensor) -> Tensor:
        if name == "frame" and self.patches:
            return sigma.repeat_interleave(self.patches[1] * self.patches[2], dim=1)
        if name == "frame":
            return sigma.reshape(self._frames_shape())
        if name == "sample" and not self.spec.per_sample:
            shape = self._frames_shape() if self.spec.times == "frames" else tuple(self.latents_shape[:2])
            return sigma.reshape(-1, *(1,) * (len(shape) - 1)).expand(shape).contiguous()
        return sigma

    def for_latents(self, sigma: Tensor) -> Tensor:
        """From what ``for_model`` returns to a shape that broadcasts to the latents."""
        ones = (1,) * (len(self.latents_shape) - 1)
        if sigma.ndim == 1:
            return sigma.reshape(-1, *ones)
        if self.patches:
            tokens = sigma.reshape(sigma.shape[0], 1, *self.patches)
            for dim, repeats in enumerate(self.patch_size, start=2):
                tokens = tokens.repeat_interleave(repeats, dim=dim)
            return tokens
        if self.spec.times == "tokens":
            return sigma.reshape(*self.latents_shape[:2], 1)
        shape = [self.latents_shape[0], *ones]
        shape[self.spec.frame_dim] = self.latents_shape[self.spec.frame_dim]
        return sigma.reshape(shape)


def _is_per_sample(sigma: Tensor, shape: tuple[int, ...]) -> bool:
    return sigma.shape[:1] == shape and sigma.numel() == shape[0]


def latents_for(spec: FamilySpec, x: Tensor, beside: Tensor | None = None) -> Any:
    """The latents [B, ...] as forward takes them; ``beside``: channels that the family's pipeline sets beside them."""
    if beside is not None:
        x = torch.cat([x, beside.to(x)], dim=channel_dim(spec, x))
    if spec.sample_layout == "list":
        return list(x.unsqueeze(2).unbind(0))
    if spec.sample_layout == "videos":
        return list(x.unbind(0))
    return list(x.split(1)) if spec.sample_layout == "batches" else x


def channel_dim(spec: FamilySpec, x: Tensor) -> int:
    return -1 if x.ndim == 3 or spec.channels_last else 1


def prediction_of(output: Any, spec: FamilySpec) -> Tensor:
    """The prediction [B, ...] in what a model or a trainer returns: a tensor, a dict with ``model_prediction``, a
    diffusers output, a tuple (whose further modalities are left out); a list of samples is stacked."""
    if isinstance(output, Mapping) and "model_prediction" in output:
        output = output["model_prediction"]
    elif hasattr(output, "sample"):
        output = output.sample
    elif isinstance(output, tuple):
        output = output[0]
    if not isinstance(output, list):
        return output
    if spec.sample_layout == "batches":
        return torch.cat(output)
    stacked = torch.stack(output)
    return stacked.squeeze(2) if spec.sample_layout == "list" else stacked


def velocity_part(spec: FamilySpec, prediction: Tensor, x: Tensor) -> Tensor:
    """Of a prediction that says more than the velocity of ``x``: without its variance, without tokens ahead of x's."""
    if spec.learned_sigma and prediction.shape[1] == 2 * x.shape[1]:
        return prediction.chunk(2, dim=1)[0]
    if spec.predicts_text and prediction.ndim == x.ndim:
        return prediction[:, -x.shape[1] :]
    return prediction
