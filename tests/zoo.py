"""Every denoiser class that has a spec, tiny: built from ``tiny_families.json``, with seeded weights and inputs.

A name is a class name, or ``class:variant``. Inputs have a fixed batch; times are ``scale * sigma + offset``.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import diffusers
import tiny_models
import torch
from torch import Tensor, nn

FACTS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "tiny_families.json").read_text())
CLASSES = tuple(FACTS)

SIGMAS = torch.tensor([0.7, 0.45, 0.9, 0.2])  # rows of t, and of r
LOWER = torch.tensor([0.25, 0.1, 0.6, 0.05])


def _history(inputs: dict[str, Any], _: Any) -> dict[str, Any]:
    """Helios with a clean history: its tokens come first, at time 0."""
    generator = torch.Generator().manual_seed(7)
    channels, _, height, width = inputs["hidden_states"].shape[1:]
    history = {f"latents_history_{size}": frames for size, frames in (("short", 2), ("mid", 2), ("long", 4))}
    made: dict[str, Any] = {"indices_hidden_states": torch.arange(8, 8 + inputs["hidden_states"].shape[2])[None]}
    first = 0
    for name, frames in history.items():
        made[name] = torch.randn(1, channels, frames, height, width, generator=generator)
        made[f"indices_{name}"] = torch.arange(first, first + frames)[None]
        first += frames
    return made


def _omni(inputs: dict[str, Any], _: Any) -> dict[str, Any]:
    """Z-Image with a clean condition image before the noisy one."""
    generator = torch.Generator().manual_seed(7)
    clean = torch.randn(inputs["x"][0].shape, generator=generator)
    captions = inputs["cap_feats"][0]
    return {
        "x": [[clean, inputs["x"][0]]],
        "cap_feats": [[captions[:8], captions[8:]]],
        "siglip_feats": [None],
        "image_noise_mask": [[0, 1]],
    }


def _sound_and_action(*_: Any) -> dict[str, Any]:
    """Cosmos 3 with two frames of sound and one action behind the vision: three calls of one embedder."""
    generator = torch.Generator().manual_seed(7)
    return {
        "sequence_length": 6,
        "position_ids": torch.zeros(3, 6, dtype=torch.int64),
        "sound_tokens": [torch.randn(3, 2, generator=generator)],
        "sound_token_shapes": [(2, 1, 1)],
        "sound_sequence_indexes": torch.tensor([3, 4]),
        "sound_mse_loss_indexes": torch.tensor([3, 4]),
        "sound_noisy_frame_indexes": [torch.tensor([0, 1])],
        "action_tokens": [torch.randn(1, 4, generator=generator)],
        "action_token_shapes": [(1, 1, 1)],
        "action_sequence_indexes": torch.tensor([5]),
        "action_mse_loss_indexes": torch.tensor([5]),
        "action_noisy_frame_indexes": [torch.tensor([0])],
        "action_domain_ids": [torch.tensor(0)],
    }


def _cached(inputs: dict[str, Any], model: Any) -> dict[str, Any]:
    """The denoising pass of Wan Animate 2, after the pass that fills the cache from the reference."""
    with torch.no_grad():
        model(**inputs, timestep=torch.ones(1))
    grid = torch.tensor([[2, 2, 2]])
    return {
        "kv_cache_mode": "cached",
        "reference_grid_sizes": grid,
        "offset_grid_sizes": None,
        "origin_len": 5,
        "origin_area": [32, 32],
    }


# config: differs from the class' tiny config; inputs: a function of its inputs and the model; time: the shape of the
# times, or "tokens", "frames" or "B 1 F 1 1" of its latents; levels: the shapes of the times of further arguments.
VARIANTS: dict[str, dict[str, Any]] = {
    "WanTransformer3DModel:tokenwise": {"time": "tokens"},
    "SkyReelsV2Transformer3DModel:framewise": {
        "time": "frames",
        "inputs": lambda *_: {"enable_diffusion_forcing": True},
    },
    "LTXVideoTransformer3DModel:tokenwise": {"time": "tokens"},
    "LTX2VideoTransformer3DModel:tokenwise": {"time": "tokens", "levels": {"audio_timestep": [2]}},
    "Ideogram4Transformer2DModel:tokenwise": {"time": [1, 8]},
    "SanaVideoTransformer3DModel:tokenwise": {"time": "tokens"},
    "CosmosTransformer3DModel:framewise": {"time": "B 1 F 1 1"},
    "HeliosTransformer3DModel:history": {"inputs": _history},
    "FluxTransformer2DModel:guidance": {
        "config": {"guidance_embeds": True},
        "inputs": lambda *_: {"guidance": torch.tensor([3.5])},
    },
    "HunyuanVideoTransformer3DModel:token_replace": {"config": {"image_condition_type": "token_replace"}},
    "ZImageTransformer2DModel:omni": {"inputs": _omni, "config": {"siglip_feat_dim": 16}},
    "QwenImageTransformer2DModel:zero_cond_t": {
        "config": {"zero_cond_t": True},
        "inputs": lambda *_: {"img_shapes": [[(1, 4, 2), (1, 4, 2)]]},
    },
    "QwenImage21Transformer2DModel:plain": {"config": {"causal_condition": False}},
    "SanaTransformer2DModel:guidance": {
        "config": {"guidance_embeds": True},
        "inputs": lambda *_: {"guidance": torch.tensor([4.5, 4.5])},
    },
    "SanaVideoTransformer3DModel:guidance": {
        "config": {"guidance_embeds": True},
        "inputs": lambda *_: {"guidance": torch.tensor([4.5])},
    },
    "Flux3Transformer2DModel:flow_map": {"config": {"flow_map": True}},
    "HunyuanImageTransformer2DModel:meanflow": {"config": {"use_meanflow": True}},
    "HunyuanVideo15Transformer3DModel:meanflow": {"config": {"use_meanflow": True}},
    "UNet2DConditionModel:scalar": {"time": []},
    "DreamLiteUNetModel:scalar": {"time": []},
    "WanAnimate2Transformer3DModel:cached": {"inputs": _cached},
    "HeliosTransformer3DModel:history_at_t": {"inputs": _history, "config": {"zero_history_timestep": False}},
    "Flux2Transformer2DModel:kv_extract": {"inputs": lambda *_: {"kv_cache_mode": "extract", "num_ref_tokens": 4}},
    "Cosmos3OmniTransformer:sound_and_action": {
        "config": {"sound_gen": True, "sound_dim": 3, "action_gen": True, "action_dim": 4},
        "inputs": _sound_and_action,
        "levels": {"sound_timesteps": [2], "action_timesteps": [1]},
    },
}
NAMES = (*CLASSES, *VARIANTS)


def class_of(name: str) -> str:
    return name.partition(":")[0]


def _variant(name: str) -> dict[str, Any]:
    return VARIANTS.get(name, {})


@torch.no_grad()
def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **config_overrides: Any) -> Any:
    """The tiny model in eval mode; parameters that start at zero are drawn normal(0, 0.05), else some ignore time."""
    config = {**FACTS[class_of(name)]["config"], **_variant(name).get("config", {}), **config_overrides}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(diffusers, class_of(name))(**config)
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05)
    return tiny_models.cast_like_loading(model, dtype).eval()


def inputs(name: str, model: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    """Forward keyword arguments without the times."""
    generator = torch.Generator().manual_seed(seed)

    def make(fact: Any) -> Any:
        if not isinstance(fact, dict):
            return fact
        if "randn" in fact:
            return torch.randn(fact["randn"], generator=generator).to(dtype)
        if "dict" in fact:
            return {int(key) if key.isdigit() else key: make(value) for key, value in fact["dict"].items()}
        if "list" in fact or "tuple" in fact:
            items = [make(item) for item in fact.get("list", fact.get("tuple"))]
            return items if "list" in fact else tuple(items)
        if "method" in fact:
            made = getattr(model, fact["method"])(**fact["kwargs"])
            return tuple(part.to(dtype) for part in made)
        if "object" in fact:
            module, _, cls = fact["object"].rpartition(".")
            return getattr(importlib.import_module(module), cls)(*fact["args"])
        if "is" in fact:
            return fact["is"]
        kind = getattr(torch, fact["dtype"])
        kind = dtype if kind == torch.float32 else kind
        if "full" in fact:
            return torch.full(fact["shape"], fact["full"], dtype=kind)
        if "arange" in fact:
            return torch.arange(torch.Size(fact["arange"]).numel()).reshape(fact["arange"]).to(kind)
        return torch.tensor(fact["values"]).reshape(fact["shape"]).to(kind)

    made = {key: make(value) for key, value in FACTS[class_of(name)]["inputs"].items()}
    extra = _variant(name).get("inputs")
    if extra is not None:
        more = extra(made, model)
        made |= {key: cast(value, dtype) for key, value in more.items()}
    return made


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [cast(item, dtype) for item in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def time_shape(name: str, inputs: dict[str, Any]) -> list[int]:
    kind = _variant(name).get("time", FACTS[class_of(name)]["time"]["shape"])
    if not isinstance(kind, str):
        return list(kind)
    latents = inputs["hidden_states"]
    if kind == "tokens" and latents.ndim == 3:
        return list(latents.shape[:2])
    batch, _, frames, height, width = latents.shape
    return {
        "tokens": [batch, frames * (height // 2) * (width // 2)],
        "frames": [batch, frames],
        "B 1 F 1 1": [batch, 1, frames, 1, 1],
    }[kind]


def times(name: str, inputs: dict[str, Any], sigmas: Tensor = SIGMAS) -> Tensor:
    """The float32 time argument: a sigma for each row; along further dimensions it falls to half of that."""
    facts = FACTS[class_of(name)]["time"]
    shape = time_shape(name, inputs)
    if not shape:
        return torch.tensor(float(facts["scale"] * sigmas[0] + facts["offset"]))
    rows = sigmas[: shape[0]] if shape[0] <= len(sigmas) else sigmas.repeat(shape[0])[: shape[0]]
    size = torch.Size(shape[1:]).numel()
    fall = torch.linspace(1.0, 0.5, size) if size > 1 else torch.ones(1)
    return facts["scale"] * (rows[:, None] * fall).reshape(shape) + facts["offset"]


def call(model: Any, name: str, inputs: dict[str, Any], t: Any, r: Any = None) -> Tensor:
    """Everything that the model predicts, in one flat tensor; r, if given, goes in as ``r_timestep``."""
    return flat(raw_call(model, name, inputs, t, r))


def raw_call(model: Any, name: str, inputs: dict[str, Any], t: Any, r: Any = None) -> Any:
    facts = FACTS[class_of(name)]["time"]
    arguments = {**inputs, facts["arg"]: t}
    for arg, shape in _variant(name).get("levels", {}).items():
        arguments[arg] = facts["scale"] * SIGMAS[: shape[0]] + facts["offset"]
        if r is not None:
            arguments[f"r_{arg}"] = facts["scale"] * LOWER[: shape[0]] + facts["offset"]
    if r is not None:
        arguments["r_timestep"] = r
    return model(**arguments, return_dict=False)


def flat(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output.reshape(-1)
    if not isinstance(output, (list, tuple)):  # None, or a cache
        return torch.zeros(0)
    parts = [flat(part) for part in output]
    return torch.cat([part.float() for part in parts]) if parts else torch.zeros(0)
