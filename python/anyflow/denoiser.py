"""Calling a denoiser: the one place where sigma becomes the model's own time.

A ``Denoiser`` predicts in the model's own sign from latents and sigma. Two kinds: a bare diffusers model, whose
conditioning stands in the batch under ``conditioning``, and a trainer's object with ``model_predict``.

Of a bare model's conditioning, two kinds of keys are not passed as they are. Under the name of the latents stand the
channels that the family's pipeline sets beside them (the image of image-to-video). Under the names of packed times and
of further time arguments (``audio_timestep``) stands 1 for each entry at the sample's sigma, 0 for a clean one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from .families import FamilySpec, families, find_spec
from .families.resolve import resolve
from .layout import latents_for, prediction_of, velocity_part
from .patching import is_patched
from .patching.times import second_time
from .patching.unwrap import unwrap

Batch = Mapping[str, Any]


class Denoiser(Protocol):
    spec: FamilySpec
    bare: nn.Module  # the diffusers model, whatever wraps it

    def __call__(self, batch: Batch, x: Tensor, sigma: Tensor, r: Tensor | None, *, negative: bool = False) -> Tensor:
        """The prediction at latents ``x`` and ``sigma`` ([B] or [B, S] tokens), conditioned on ``r`` unless None."""
        ...


def spec_of(bare: Any, student: Any = None) -> FamilySpec:
    """The spec a patched model carries, or that of its class; for a class that has none, that of its ``student``."""
    if type(bare).__name__ not in families() and isinstance(student, type(bare)):
        bare = student
    return bare._flowmap.spec if is_patched(bare) else resolve(find_spec(type(bare).__name__), bare)


class DiffusersDenoiser:
    def __init__(self, module: nn.Module, spec: FamilySpec) -> None:
        self.module, self.bare, self.spec = module, unwrap(module), spec

    def __call__(self, batch: Batch, x: Tensor, sigma: Tensor, r: Tensor | None, *, negative: bool = False) -> Tensor:
        spec = self.spec
        arguments = dict(batch["negative_conditioning" if negative else "conditioning"] or {})
        own = {spec.native.arg} if spec.native is not None else set()
        own |= {second_time(spec, arg) for arg in spec.time_args}
        own |= set() if spec.times == "packed" else {spec.timestep_arg}
        if not own.isdisjoint(arguments):
            raise ValueError(
                f"the times of a batch are its sigmas, not {sorted(own & arguments.keys())} in conditioning"
            )
        times = {arg: arguments.pop(arg, None) for arg in spec.time_args}
        if spec.times == "packed" and times[spec.timestep_arg] is None:
            raise ValueError(
                f"the conditioning of {spec.class_name} needs {spec.timestep_arg}: for each entry of its packed times "
                "1, or 0 where it stays clean"
            )
        arguments[spec.sample_arg] = latents_for(spec, x, beside=arguments.get(spec.sample_arg))
        for arg, levels in times.items():
            if arg == spec.timestep_arg or levels is not None:
                arguments[arg] = spec.model_time(_at_levels(sigma, levels))
                if r is not None:
                    arguments[second_time(spec, arg)] = spec.model_time(_at_levels(r, levels))
        if r is None and spec.native is not None and spec.native.required:  # the instantaneous velocity
            arguments[spec.native.arg] = arguments[spec.timestep_arg]
        return velocity_part(spec, prediction_of(self.module(**arguments, return_dict=False), spec), x)


def _at_levels(sigma: Tensor, levels: Tensor | None) -> Tensor:
    """The sample's sigma (of several, the highest) where ``levels`` is 1."""
    if levels is None:
        return sigma
    highest = sigma.flatten(1).amax(1) if sigma.ndim > 1 else sigma
    return highest.reshape(-1, *(1,) * (levels.ndim - 1)) * levels


# Names under which trainers keep what was made of a prompt.
_PROMPT = re.compile(r"(?!image_)(?:.*_)?(?:prompt|texts?(?:_|$)|caption|pooled|encoder|attention_mask)")


def _without_prompt(batch: Batch, negative: Mapping[str, Any]) -> dict[str, Any]:
    """``batch`` without the tensors of its prompt: those that ``negative`` replaces, and masks that it does not need.

    Raises ValueError for others: they would make the unconditional prediction a conditional one.
    """
    kept: dict[str, Any] = {}
    for key, value in batch.items():
        if key in negative or key == "conditioning":  # that is a bare model's
            continue
        if isinstance(value, Mapping) and key != "negative_conditioning":
            kept[key] = _without_prompt(value, {})
        elif not _is_of_prompt(key, value):
            kept[key] = value
        elif not key.endswith("mask"):
            raise ValueError(f"{key} of the batch is the positive prompt's: negative_conditioning must give its own")
    return kept


def _is_of_prompt(key: str, value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return bool(_PROMPT.match(key)) and any(isinstance(one, Tensor) for one in values)


class TrainerDenoiser:
    """``trainer.model_predict(batch)`` with the latents, sigmas and timesteps of the batch replaced.

    r goes in as ``flowmap_r_timesteps``, which the trainer hands to its model as ``r_timestep``; without r the key is
    absent. ``negative`` lays ``batch["negative_conditioning"]`` over the batch, in which no tensor of the positive
    prompt is left. Sigmas keep the shape that they have in the batch.
    """

    def __init__(self, trainer: Any, bare: nn.Module, spec: FamilySpec) -> None:
        self.trainer, self.bare, self.spec = trainer, bare, spec

    def __call__(self, batch: Batch, x: Tensor, sigma: Tensor, r: Tensor | None, *, negative: bool = False) -> Tensor:
        changed = {key: value for key, value in batch.items() if key != "flowmap_r_timesteps"}
        if negative:
            changed = _without_prompt(changed, batch["negative_conditioning"]) | batch["negative_conditioning"]
        given = batch["sigmas"]
        changed["sigmas"] = sigma.reshape(given.shape) if given.numel() == sigma.numel() else sigma
        changed |= {"noisy_latents": x, "timesteps": self.spec.model_time(sigma)}
        if r is not None:
            changed["flowmap_r_timesteps"] = self.spec.model_time(r)
        return prediction_of(self.trainer.model_predict(changed), self.spec)
