"""Tiny denoisers of five diffusers classes, with seeded weights and inputs.

A name is a class name, or ``class:variant``: every function here takes both. Configs, inputs and time arguments are
data (``TINY``, ``VARIANTS``); a time argument is ``scale * sigma + offset`` with sigma = 1 for noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import anyflow
from anyflow.adapters import critic_parameters

# config: what differs from the class' defaults. inputs: a tuple is the shape of one batch row, drawn normal; a list or
# a float is one row's value, repeated over the batch; a tensor has no batch axis. time: argument, scale, offset.
TINY: dict[str, dict[str, Any]] = {
    "WanTransformer3DModel": {
        "config": {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 256,
            "ffn_dim": 32,
            "num_layers": 2,
            "rope_max_seq_len": 32,
        },
        "inputs": {"hidden_states": (4, 2, 8, 8), "encoder_hidden_states": (12, 16)},
        "time": ("timestep", 1000.0, 0.0),
    },
    "FluxTransformer2DModel": {
        "config": {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 4, 8),
        },
        "inputs": {
            "hidden_states": (16, 4),
            "encoder_hidden_states": (12, 32),
            "pooled_projections": (32,),
            "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
            "txt_ids": torch.zeros(12, 3),
        },
        "time": ("timestep", 1.0, 0.0),
    },
    "SD3Transformer2DModel": {
        "config": {
            "sample_size": 32,
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_projection_dim": 32,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 64,
            "pos_embed_max_size": 32,
        },
        "inputs": {
            "hidden_states": (4, 8, 8),
            "encoder_hidden_states": (12, 32),
            "pooled_projections": (64,),
        },
        "time": ("timestep", 1000.0, 0.0),
    },
    "ZImageTransformer2DModel": {
        "config": {
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 16,
            "dim": 16,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 1,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": (8, 4, 4),
            "axes_lens": (256, 32, 32),
        },
        "inputs": {"x": (16, 1, 8, 8), "cap_feats": (16, 16)},
        "time": ("t", -1.0, 1.0),
    },
    "UNet2DConditionModel": {
        "config": {
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 8,
            "attention_head_dim": 2,
            "layers_per_block": 1,
            "sample_size": 16,
        },
        "inputs": {"sample": (4, 8, 8), "encoder_hidden_states": (4, 8)},
        "time": ("timestep", 1000.0, 0.0),
    },
}
CLASSES = tuple(TINY)

VARIANTS: dict[str, dict[str, Any]] = {
    "WanTransformer3DModel:tokenwise": {},  # times are [B, tokens]
    "FluxTransformer2DModel:guidance": {"config": {"guidance_embeds": True}, "inputs": {"guidance": 3.5}},
    "UNet2DConditionModel:sdxl": {
        "config": {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 16,
        },
        "inputs": {"added_cond_kwargs": {"text_embeds": (16,), "time_ids": [16.0, 16.0, 0.0, 0.0, 16.0, 16.0]}},
    },
}
NAMES = (*CLASSES, *VARIANTS)


def _facts(name: str, key: str) -> dict[str, Any]:
    return {**TINY[name.partition(":")[0]][key], **VARIANTS.get(name, {}).get(key, {})}


def cast_like_loading(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast in place as ``from_pretrained(torch_dtype=dtype)`` does: modules on the class' float32 list stay float32."""
    keep = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    tensors: Iterable[tuple[str, Tensor]] = chain(model.named_parameters(), model.named_buffers())
    for path, tensor in tensors:
        if tensor.is_floating_point() and not keep.intersection(path.split(".")):
            tensor.data = tensor.data.to(dtype)
    return model


@torch.no_grad()
def build(class_name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **config_overrides: Any) -> Any:
    """The tiny model in eval mode; parameters that start at zero are drawn normal(0, 0.05), else some ignore time."""
    config = {**_facts(class_name, "config"), **config_overrides}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(diffusers, class_name.partition(":")[0])(**config)
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05)
    return cast_like_loading(model, dtype).eval()


def inputs(class_name: str, batch: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    """Forward keyword arguments without the time. Row i depends on seed and i alone, not on the batch size."""
    generators = [torch.Generator().manual_seed(1000 * seed + row) for row in range(batch)]

    def make(fact: Any) -> Any:
        if isinstance(fact, dict):
            return {key: make(value) for key, value in fact.items()}
        if isinstance(fact, Tensor):
            return fact.to(dtype, copy=True)
        if isinstance(fact, tuple):
            rows = [torch.randn(fact, generator=generator) for generator in generators]
        else:
            rows = [torch.tensor(fact) for _ in generators]
        return torch.stack(rows).to(dtype)

    made = make(_facts(class_name, "inputs"))
    if class_name.startswith("ZImage"):  # takes lists, one tensor a row
        return {key: list(value.unbind()) for key, value in made.items()}
    return made


def wan_tokens(wan_inputs: dict[str, Any]) -> int:
    """S of a Wan input: the number of tokens, each of which may have its own time."""
    _, _, frames, height, width = wan_inputs["hidden_states"].shape
    return frames * (height // 2) * (width // 2)


def times(class_name: str, sigmas: Sequence[Any] | Tensor) -> Tensor:
    """The float32 time argument for sigmas of any shape; tokenwise, [B] becomes [B, S], falling to sigma / 2."""
    sigma = torch.as_tensor(sigmas, dtype=torch.float32)
    if class_name.endswith(":tokenwise") and sigma.ndim == 1:
        sigma = sigma[:, None] * torch.linspace(1.0, 0.5, wan_tokens(inputs(class_name, batch=1)))
    _, scale, offset = TINY[class_name.partition(":")[0]]["time"]
    return scale * sigma + offset


def call(model: Any, class_name: str, inputs: dict[str, Any], t: Tensor, r: Tensor | None = None) -> Tensor:
    """The prediction as one tensor [B, ...]; r, if given, goes in as ``r_timestep``."""
    time = {TINY[class_name.partition(":")[0]]["time"][0]: t}
    if r is not None:
        time["r_timestep"] = r
    prediction = model(**inputs, **time, return_dict=False)[0]
    return prediction if isinstance(prediction, Tensor) else torch.stack(prediction)


@torch.no_grad()
def perturb_delta(model: Any, scale: float = 0.5) -> None:
    """Move the delta embedders of a patched model away from the embedders that they were cloned from."""
    for index, (_, parameter) in enumerate(anyflow.delta_parameters(model)):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
        parameter += scale * parameter.std().nan_to_num(1.0) * noise.to(parameter.dtype)


@torch.no_grad()
def move_critic(model: nn.Module, scale: float = 0.1) -> None:
    """Move the critic's adapter off its first value, so that it says something of its own."""
    for index, (_, parameter) in enumerate(critic_parameters(model)):
        parameter.add_(scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
