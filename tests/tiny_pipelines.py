"""Tiny stock diffusers pipelines, built from configs and in-memory vocabularies: nothing is downloaded.

A name is a pipeline class, or ``class:variant``. The components are real ones with random weights; their widths fit the
models of ``tiny_models``, so `build_pipeline` takes any of those as its denoiser.
"""

from __future__ import annotations

import string
from typing import Any

import diffusers
import tiny_models
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn

LETTERS = string.ascii_lowercase
CLIP_LENGTH = 16
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)

# denoiser: a name of tiny_models. scheduler: class and arguments. text: kind, hidden size and projection size of each
# encoder. vae: latent channels (spatial factor 2; Wan 8, and 4 in time). call: arguments of the pipeline; plain and
# guided: the ones without and with classifier-free guidance. options: further arguments of the pipeline's class.
STOCK: dict[str, dict[str, Any]] = {
    "WanPipeline": {
        "denoiser": "WanTransformer3DModel",
        "scheduler": (
            UniPCMultistepScheduler,
            {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
        ),
        "text": [("umt5", 16, 0)],
        "vae": 4,
        "call": {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 5.0, "negative_prompt": "a bad dog"},
    },
    "FluxPipeline": {
        "denoiser": "FluxTransformer2DModel",
        "scheduler": (FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True, "shift": 3.0}),
        "text": [("clip", 32, 0), ("t5", 32, 0)],
        "vae": 1,
        "call": {"height": 16, "width": 16, "max_sequence_length": 16},
        "plain": {"guidance_scale": 3.5},  # the embedded guidance: read by a guidance-distilled denoiser only
        "guided": {"guidance_scale": 3.5, "true_cfg_scale": 4.0, "negative_prompt": "a bad dog"},
    },
    "StableDiffusion3Pipeline": {
        "denoiser": "SD3Transformer2DModel",
        "scheduler": (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
        "text": [("clip", 16, 32), ("clip", 16, 32), ("t5", 32, 0)],
        "vae": 4,
        "call": {"height": 16, "width": 16, "max_sequence_length": 16},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 7.0, "negative_prompt": "a bad dog"},
    },
    "ZImagePipeline": {
        "denoiser": "ZImageTransformer2DModel",
        "scheduler": (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
        "text": [("qwen3", 16, 0)],
        "vae": 16,
        "call": {"height": 16, "width": 16, "max_sequence_length": 48},
        "plain": {"guidance_scale": 0.0},
        "guided": {"guidance_scale": 4.0, "negative_prompt": "a bad dog"},
    },
    "StableDiffusionXLPipeline:epsilon": {
        "denoiser": "UNet2DConditionModel:sdxl",
        "scheduler": (
            EulerDiscreteScheduler,
            {
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "timestep_spacing": "leading",
                "steps_offset": 1,
            },
        ),
        "text": [("clip", 4, 0), ("clip", 4, 16)],
        "vae": 4,
        "call": {"height": 16, "width": 16},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 5.0, "negative_prompt": "a bad dog"},
        "options": {"add_watermarker": False},
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "WanPipeline:tokenwise": {**STOCK["WanPipeline"], "options": {"expand_timesteps": True}},
    "FluxPipeline:guidance": {**STOCK["FluxPipeline"], "denoiser": "FluxTransformer2DModel:guidance"},
    # A flow-trained SDXL. It does not run as it is: the pipeline reads `init_noise_sigma` of its scheduler, then calls
    # `scale_model_input`, and FlowMatchEulerDiscreteScheduler has neither. With both added (1.0; identity) it runs.
    "StableDiffusionXLPipeline": {
        **STOCK["StableDiffusionXLPipeline:epsilon"],
        "scheduler": (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    },
}
PIPELINES = {**STOCK, **VARIANTS}
RUNNABLE = tuple(name for name in PIPELINES if name != "StableDiffusionXLPipeline")  # with their own scheduler


def tokenizer(kind: str) -> Any:
    """A tokenizer of letters (bytes for Qwen); UMT5 and T5 share one."""
    if kind == "clip":
        words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(letter + "</w>" for letter in LETTERS)]
        vocabulary = {word: index for index, word in enumerate(words)}
        return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=CLIP_LENGTH)
    if kind == "qwen3":
        words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
        return transformers.Qwen2Tokenizer(
            vocab={word: index for index, word in enumerate(words)},
            merges=[],
            additional_special_tokens=words[1:3],
            chat_template=CHAT_TEMPLATE,
        )
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0)


def text_encoder(kind: str, hidden: int, projection: int, vocabulary: int) -> nn.Module:
    """A two-layer text encoder; a CLIP with a projection size is the one with the projection head."""
    if kind in ("t5", "umt5"):
        sizes = {"d_model": hidden, "d_kv": 8, "d_ff": 2 * hidden, "num_layers": 2, "num_heads": 2}
        if kind == "t5":
            return transformers.T5EncoderModel(transformers.T5Config(vocab_size=vocabulary, **sizes))
        return transformers.UMT5EncoderModel(transformers.UMT5Config(vocab_size=vocabulary, **sizes))
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "qwen3":
        config = transformers.Qwen3Config(vocab_size=vocabulary, num_key_value_heads=1, head_dim=8, **sizes)
        return transformers.Qwen3Model(config)
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary,
        max_position_embeddings=CLIP_LENGTH,
        projection_dim=projection or hidden,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **sizes,
    )
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def autoencoder(name: str, channels: int) -> nn.Module:
    """A VAE with the given latent channels."""
    if name.startswith("Wan"):
        return AutoencoderKLWan(
            base_dim=4,
            z_dim=channels,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1] * channels,
            latents_std=[1.5] * channels,
        )
    return AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=channels,
        scaling_factor=1.5,
        shift_factor=0.1,
    )


def build_pipeline(name: str, transformer: Any = None, seed: int = 0, **components: Any) -> Any:
    """The pipeline with ``transformer`` (or a fresh tiny one) as its denoiser; ``components`` replace its own."""
    facts = PIPELINES[name]
    denoiser = tiny_models.build(facts["denoiser"], seed=seed) if transformer is None else transformer
    scheduler, arguments = facts["scheduler"]
    parts: dict[str, Any] = {
        "unet" if facts["denoiser"].startswith("UNet") else "transformer": denoiser,
        "scheduler": scheduler(**arguments),
        **facts.get("options", {}),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts["vae"] = autoencoder(name, facts["vae"]).eval()
        for suffix, (kind, hidden, projection) in zip(("", "_2", "_3"), facts["text"], strict=False):
            parts["tokenizer" + suffix] = tokenizer(kind)
            size = len(parts["tokenizer" + suffix])
            parts["text_encoder" + suffix] = text_encoder(kind, hidden, projection, size).eval()
    pipe = getattr(diffusers, name.partition(":")[0])(**{**parts, **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_kwargs(name: str, guidance: bool = False) -> dict[str, Any]:
    """Arguments of a call at a tiny resolution that returns latents, with classifier-free guidance or without."""
    facts = PIPELINES[name]
    extra = facts["guided" if guidance else "plain"]
    return {"prompt": "a red fox", "output_type": "latent", **facts["call"], **extra}


def sample(pipe: Any, name: str, steps: int = 2, seed: int = 0, guidance: bool = False, **overrides: Any) -> Tensor:
    """The latents of one seeded call."""
    arguments = {**call_kwargs(name, guidance), "num_inference_steps": steps, **overrides}
    return pipe(**arguments, generator=torch.Generator().manual_seed(seed))[0]
