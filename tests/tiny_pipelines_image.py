"""Tiny stock diffusers *image* pipelines: one or more for each denoiser class that makes images.

Like ``tiny_pipelines``, whose helpers it uses: components are real ones with random weights, built from configs and
in-memory vocabularies, and a name is a pipeline class, or ``class:variant``. The denoisers are the tiny ones of
``zoo``, where need be with another config.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import diffusers
import tiny_pipelines
import torch
import transformers
import zoo
from diffusers import (
    AdaptiveProjectedMixGuidance,
    ClassifierFreeGuidance,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.joyimage.image_processor import JoyImageEditImageProcessor
from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
VISION_TOKENS = {
    "vision_start": "vision_start",
    "vision_end": "vision_end",
    "image": "image_pad",
    "video": "video_pad",
}
NEGATIVE = {"negative_prompt": "a bad dog"}

# Classes of the language models, and of their configs.
LANGUAGE_MODELS = {
    "gemma": ("GemmaModel", "GemmaConfig"),
    "gemma2": ("Gemma2Model", "Gemma2Config"),
    "glm": ("GlmModel", "GlmConfig"),
    "llama": ("LlamaForCausalLM", "LlamaConfig"),
    "mistral3": ("Mistral3ForConditionalGeneration", "Mistral3Config"),
    "mistral3_base": ("Mistral3Model", "Mistral3Config"),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig"),
    "qwen3_lm": ("Qwen3ForCausalLM", "Qwen3Config"),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", "Qwen3VLConfig"),
    "qwen3_vl_base": ("Qwen3VLModel", "Qwen3VLConfig"),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config"),
}
LETTERS_ONLY = ("t5", "umt5", "gemma", "gemma2", "t5gemma")  # what the T5 tokenizer of tiny_pipelines serves


def _euler(**arguments: Any) -> tuple[type, dict[str, Any]]:
    return FlowMatchEulerDiscreteScheduler, arguments


def _blocks(count: int, **arguments: Any) -> dict[str, Any]:
    """Arguments of a VAE that halves the image ``count - 1`` times."""
    return {
        "block_out_channels": (4,) * count,
        "down_block_types": ("DownEncoderBlock2D",) * count,
        "up_block_types": ("UpDecoderBlock2D",) * count,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        **arguments,
    }


def _kl(channels: int, blocks: int = 2) -> tuple[str, dict[str, Any]]:
    return "AutoencoderKL", _blocks(blocks, latent_channels=channels, scaling_factor=1.5, shift_factor=0.1)


def _flux2(channels: int) -> tuple[str, dict[str, Any]]:
    return "AutoencoderKLFlux2", _blocks(2, latent_channels=channels)


def _causal(name: str, channels: int, levels: int = 4, **arguments: Any) -> tuple[str, dict[str, Any]]:
    """The VAEs with causal convolutions: Wan, and Qwen's two."""
    statistics = {"latents_mean": [0.1] * channels, "latents_std": [1.5] * channels}
    sizes = {"base_dim": 4, "z_dim": channels, "dim_mult": [1] * levels, "num_res_blocks": 1}
    return name, {**sizes, **statistics, **arguments}


class SmallSizes(JoyImageEditImageProcessor):
    """The stock one knows sizes of a million pixels only."""

    def get_default_height_width(self, *_: Any) -> tuple[int, int]:
        return 64, 64


DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
QWEN_SHIFT = {"use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
COGVIEW_SHIFT = {"use_dynamic_shifting": True, "base_shift": 0.25, "max_shift": 0.75, "time_shift_type": "linear"}
FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}

# denoiser: its class, and what differs from the class' tiny config. scheduler: class and arguments. text: kind, hidden
# size, and (CLIP) projection or (language models) number of layers of each encoder. vae: class and arguments. call:
# arguments of the pipeline; plain and guided: the ones without and with classifier-free guidance, None where there is
# no such call. calls: denoiser calls a step, without and with guidance. processors: the components that are what a
# vision language model has for a tokenizer. options: further arguments of the pipeline's class. attributes: set on
# the pipeline, which fixes them for large images and long prompts.
TEXT_TO_IMAGE: dict[str, dict[str, Any]] = {
    "Flux2Pipeline": {
        "denoiser": ("Flux2Transformer2DModel", {}),
        "scheduler": _euler(use_dynamic_shifting=True, shift=3.0),
        "text": [("mistral3", 16, 2)],
        "vae": _flux2(1),
        "call": {"height": 16, "width": 16, "max_sequence_length": 64, "text_encoder_out_layers": (1, 2)},
        "plain": {"guidance_scale": 4.0},  # embedded
        "guided": None,
        "attributes": {"system_message": "Draw."},
    },
    "Flux2KleinPipeline": {
        "denoiser": ("Flux2Transformer2DModel", {"guidance_embeds": False}),
        "scheduler": _euler(use_dynamic_shifting=True, shift=3.0),
        "text": [("qwen3_lm", 16, 2)],
        "vae": _flux2(1),
        "call": {"height": 16, "width": 16, "max_sequence_length": 64, "text_encoder_out_layers": (1, 2)},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 4.0},
        "calls": (1, 2),
    },
    "ChromaPipeline": {
        "denoiser": ("ChromaTransformer2DModel", {}),
        "scheduler": _euler(**DYNAMIC),
        "text": [("t5", 32, 0)],
        "vae": _kl(1),
        "call": {"height": 16, "width": 16, "max_sequence_length": 16},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 5.0, **NEGATIVE},
        "calls": (1, 2),
    },
    "AuraFlowPipeline": {
        "denoiser": ("AuraFlowTransformer2DModel", {}),
        "scheduler": _euler(shift=1.73),
        "text": [("umt5", 32, 0)],
        "vae": _kl(4),
        "call": {"height": 16, "width": 16, "max_sequence_length": 16},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 3.5, **NEGATIVE},
    },
    "QwenImagePipeline": {
        "denoiser": ("QwenImageTransformer2DModel", {}),
        "scheduler": _euler(**QWEN_SHIFT),
        "text": [("qwen2_5_vl", 16, 2)],
        "vae": _causal("AutoencoderKLQwenImage", 4),
        "call": {"height": 64, "width": 64},
        "plain": {"true_cfg_scale": 1.0},
        "guided": {"true_cfg_scale": 4.0, **NEGATIVE},
        "calls": (1, 2),
    },
    "QwenImage21Pipeline": {
        "denoiser": ("QwenImage21Transformer2DModel", {}),
        "scheduler": _euler(**QWEN_SHIFT),
        "text": [("qwen3_vl", 12, 2)],
        "processors": ("processor",),
        "vae": _causal("AutoencoderKLQwenImage21", 16, levels=5, decoder_base_dim=4),
        "call": {"height": 64, "width": 64},
        "plain": {"true_cfg_scale": 1.0},
        "guided": {"true_cfg_scale": 4.0, **NEGATIVE},
        "calls": (1, 2),
    },
    "HunyuanImagePipeline": {
        "denoiser": ("HunyuanImageTransformer2DModel", {"guidance_embeds": False, "text_embed_2_dim": 16}),
        "scheduler": _euler(shift=5.0),
        "text": [("qwen2_5_vl", 16, 2), ("byt5", 16, 0)],
        "vae": (
            "AutoencoderKLHunyuanImage",
            {
                "in_channels": 3,
                "out_channels": 3,
                "latent_channels": 4,
                "block_out_channels": (32, 32),
                "layers_per_block": 1,
                "spatial_compression_ratio": 2,
                "sample_size": 16,
            },
        ),
        "call": {"height": 16, "width": 16, "prompt": 'a red fox with "hi"'},
        "plain": {},
        "guided": NEGATIVE,
        "calls": (1, 2),
        "guider": (AdaptiveProjectedMixGuidance, {"guidance_scale": 3.5}),
        "attributes": {"tokenizer_max_length": 32, "tokenizer_2_max_length": 16},
    },
    "SanaPipeline": {
        "denoiser": ("SanaTransformer2DModel", {}),
        "scheduler": (DPMSolverMultistepScheduler, FLOW_SIGMAS),
        "text": [("gemma2", 8, 2)],
        "vae": (
            "AutoencoderDC",
            {
                "latent_channels": 4,
                "attention_head_dim": 2,
                "encoder_block_out_channels": (8, 8),
                "decoder_block_out_channels": (8, 8),
                "encoder_layers_per_block": (1, 1),
                "decoder_layers_per_block": (1, 1),
                "encoder_qkv_multiscales": ((), ()),
                "decoder_qkv_multiscales": ((), ()),
                "scaling_factor": 0.5,
            },
        ),
        "call": {
            "height": 32,
            "width": 32,
            "max_sequence_length": 16,
            "use_resolution_binning": False,
            "complex_human_instruction": None,
        },
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 4.5, **NEGATIVE},
    },
    "Lumina2Pipeline": {
        "denoiser": ("Lumina2Transformer2DModel", {}),
        "scheduler": _euler(shift=6.0),
        "text": [("gemma2", 32, 2)],
        "vae": _kl(4),
        "call": {"height": 64, "width": 64, "max_sequence_length": 32, "system_prompt": "draw"},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 4.0, **NEGATIVE},
        "calls": (1, 2),
    },
    "LuminaPipeline": {
        "denoiser": ("LuminaNextDiT2DModel", {"learn_sigma": True}),
        "scheduler": _euler(shift=1.0),
        "text": [("gemma", 32, 2)],
        "vae": _kl(4),
        "call": {"height": 64, "width": 64, "clean_caption": False},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 4.0, **NEGATIVE},
    },
    "CogView4Pipeline": {
        "denoiser": ("CogView4Transformer2DModel", {}),
        "scheduler": _euler(**COGVIEW_SHIFT),
        "text": [("glm", 8, 2)],
        "vae": _kl(4),
        "call": {"height": 16, "width": 16, "max_sequence_length": 16},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 5.0, **NEGATIVE},
        "calls": (1, 2),
    },
    # Its autoregressive model is left out: the tokens that it would write are given.
    "GlmImagePipeline": {
        "denoiser": ("GlmImageTransformer2DModel", {}),
        "scheduler": _euler(**COGVIEW_SHIFT),
        "text": [("byt5", 32, 0)],
        "vae": _kl(4),
        "call": {"height": 32, "width": 32, "prior_token_ids": torch.arange(64)[None], "prompt": "a red 'fox'"},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 1.5},
        "calls": (1, 2),
        "options": {"processor": None, "vision_language_encoder": None},
    },
    "HiDreamImagePipeline": {
        "denoiser": ("HiDreamImageTransformer2DModel", {}),
        "scheduler": (UniPCMultistepScheduler, FLOW_SIGMAS),
        "text": [("clip", 4, 4), ("clip", 4, 4), ("t5", 8, 0), ("llama", 4, 2)],
        "vae": _kl(4),
        "call": {"height": 16, "width": 16, "max_sequence_length": 16},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 5.0, **NEGATIVE},
        "attributes": {"default_sample_size": 8},
    },
    "ErnieImagePipeline": {
        "denoiser": ("ErnieImageTransformer2DModel", {}),
        "scheduler": _euler(shift=3.0),
        "text": [("mistral3_base", 16, 2)],
        "vae": _flux2(4),
        "call": {"height": 16, "width": 16},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 4.0, **NEGATIVE},
    },
    "LongCatImagePipeline": {
        "denoiser": ("LongCatImageTransformer2DModel", {"in_channels": 64}),  # 16 latent channels are hard-coded
        "scheduler": _euler(**DYNAMIC),
        "text": [("qwen2_5_vl", 32, 2)],
        "processors": ("text_processor",),
        "vae": _kl(16),
        "call": {"height": 16, "width": 16, "enable_prompt_rewrite": False},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 4.5, **NEGATIVE},
        "calls": (1, 2),
        "attributes": {"tokenizer_max_length": 32},
    },
    # Its second denoiser, for the prediction without text, is called at every step.
    "Ideogram4Pipeline": {
        "denoiser": ("Ideogram4Transformer2DModel", {"llm_features_dim": 104}),  # 13 layers of the encoder
        "unconditional": True,
        "scheduler": _euler(shift=1.0),
        "text": [("qwen3_vl_base", 8, 36)],
        "vae": _flux2(4),
        "call": {"height": 16, "width": 16, "max_sequence_length": 64},
        "plain": None,
        "guided": {"guidance_scale": 7.0, "guidance_schedule": None},
    },
    "OmniGenPipeline": {
        "denoiser": ("OmniGenTransformer2DModel", {"num_layers": 2}),
        "scheduler": _euler(invert_sigmas=True, num_train_timesteps=1),
        "text": [("llama", 8, 1)],  # only its tokenizer is used
        "vae": _kl(4, blocks=4),
        "call": {"height": 32, "width": 32},
        "plain": None,
        "guided": {"guidance_scale": 2.5},
    },
    "BriaPipeline": {
        "denoiser": ("BriaTransformer2DModel", {}),
        "scheduler": _euler(use_dynamic_shifting=True, shift=3.0),
        "text": [("t5", 32, 0)],
        "vae": _kl(1),
        "call": {"height": 16, "width": 16, "max_sequence_length": 16},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 5.0, **NEGATIVE},
    },
    "BriaFiboPipeline": {
        "denoiser": ("BriaFiboTransformer2DModel", {}),
        "scheduler": _euler(**DYNAMIC),
        "text": [("smollm3", 32, 2)],
        "vae": _causal("AutoencoderKLWan", 48),
        "call": {"height": 64, "width": 64},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 5.0, **NEGATIVE},
    },
    "BriaFibo2Pipeline": {
        "denoiser": ("BriaFibo2Transformer2DModel", {"axes_lens": (256, 32, 32)}),
        "scheduler": _euler(**DYNAMIC),
        "text": [("qwen3_vl", 16, 2)],
        "processors": ("processor",),
        "vae": _flux2(4),
        "call": {"height": 16, "width": 16},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 5.0, **NEGATIVE},
        "calls": (1, 2),
        "attributes": {"text_encoder_out_layers": ((2,), (1,))},
    },
    "Krea2Pipeline": {
        "denoiser": ("Krea2Transformer2DModel", {}),
        "scheduler": _euler(**{**DYNAMIC, "max_image_seq_len": 6400}),
        "text": [("qwen3_vl_base", 16, 2)],
        "vae": _causal("AutoencoderKLQwenImage", 4),
        "call": {"height": 64, "width": 64, "max_sequence_length": 256},
        "plain": {"guidance_scale": 0.0},
        "guided": {"guidance_scale": 4.5, **NEGATIVE},
        "calls": (1, 2),
        "options": {"text_encoder_select_layers": (0, 1, 2)},
    },
    "NucleusMoEImagePipeline": {
        "denoiser": ("NucleusMoEImageTransformer2DModel", {}),
        "scheduler": _euler(**DYNAMIC),
        "text": [("qwen3_vl", 16, 3)],
        "processors": ("processor",),
        "vae": _causal("AutoencoderKLQwenImage", 4),
        "call": {"height": 64, "width": 64, "return_index": -2},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 4.0, **NEGATIVE},
        "calls": (1, 2),
    },
    "OvisImagePipeline": {
        "denoiser": ("OvisImageTransformer2DModel", {}),
        "scheduler": _euler(use_dynamic_shifting=True, shift=3.0),
        "text": [("qwen3", 32, 0)],
        "vae": _kl(1),
        "call": {"height": 16, "width": 16, "max_sequence_length": 192},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 5.0, **NEGATIVE},
        "calls": (1, 2),
    },
    "PRXPipeline": {
        "denoiser": ("PRXTransformer2DModel", {}),
        "scheduler": _euler(shift=3.0),
        "text": [("t5gemma", 16, 2)],
        "vae": _kl(4),
        "call": {"height": 32, "width": 32, "use_resolution_binning": False, "tokenizer_max_length": 16},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 4.0, **NEGATIVE},
    },
    "DreamLitePipeline": {
        "denoiser": ("DreamLiteUNetModel", {}),
        "scheduler": _euler(**{**DYNAMIC, "max_shift": 1.16}),
        "text": [("qwen3_vl", 8, 2)],
        "processors": ("processor",),
        "vae": (
            "AutoencoderTiny",
            {
                "latent_channels": 4,
                "encoder_block_out_channels": (8, 8),
                "decoder_block_out_channels": (8, 8),
                "num_encoder_blocks": (1, 1),
                "num_decoder_blocks": (1, 1),
            },
        ),
        "call": {"height": 16, "width": 16},
        "plain": None,  # both predictions are made whatever the scale
        "guided": {"guidance_scale": 3.5, **NEGATIVE},
    },
    "Kandinsky5T2IPipeline": {
        "denoiser": ("Kandinsky5Transformer3DModel", {}),
        "scheduler": _euler(shift=3.0),
        "text": [("qwen2_5_vl", 16, 2), ("clip_77", 12, 0)],
        "processors": ("tokenizer",),
        "vae": _kl(4),
        "call": {"height": 32, "width": 32},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 3.5, **NEGATIVE},
        "calls": (1, 2),
        "attributes": {"resolutions": [(32, 32)]},
    },
    "JoyImageEditPipeline": {
        "denoiser": ("JoyImageEditTransformer3DModel", {}),
        "scheduler": _euler(shift=4.0),
        "text": [("qwen3_vl", 16, 2)],
        "processors": ("processor",),
        "vae": _causal("AutoencoderKLWan", 16),
        "call": {"height": 64, "width": 64},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 4.0, **NEGATIVE},
        "calls": (1, 2),
        "attributes": {"vae_image_processor": SmallSizes()},
    },
    "JoyImageEditPlusPipeline": {
        "denoiser": ("JoyImageEditPlusTransformer3DModel", {}),
        "scheduler": _euler(shift=4.0),
        "text": [("qwen3_vl", 16, 2)],
        "processors": ("processor",),
        "vae": _causal("AutoencoderKLWan", 16),
        "call": {"height": 64, "width": 64},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 4.0, **NEGATIVE},
        "attributes": {"image_processor": SmallSizes()},
    },
}

IMAGE = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
LARGER_IMAGE = IMAGE.resize((64, 64))
MASK = Image.linear_gradient("L").resize((16, 16))


def _of(name: str, **changes: Any) -> dict[str, Any]:
    """The facts of another pipeline with changes; "call" adds to its arguments."""
    facts = {**tiny_pipelines.PIPELINES, **TEXT_TO_IMAGE}[name]
    return {**facts, **changes, "call": {**facts["call"], **changes.get("call", {})}}


FROM_IMAGE = {"image": IMAGE, "strength": 0.5}  # the second half of the schedule
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
}
FLUX: dict[str, Any] = {"denoiser": ("FluxTransformer2DModel", {}), "vae": _kl(1), "calls": (1, 2)}
SD3: dict[str, Any] = {"denoiser": ("SD3Transformer2DModel", {}), "vae": _kl(4)}

VARIANTS: dict[str, dict[str, Any]] = {
    "Flux2Pipeline:image": _of("Flux2Pipeline", call={"image": LARGER_IMAGE}),
    "ChromaPipeline:beta": _of("ChromaPipeline", scheduler=_euler(use_beta_sigmas=True)),
    "HunyuanImagePipeline:distilled": _of(
        "HunyuanImagePipeline",
        denoiser=(
            "HunyuanImageTransformer2DModel",
            {"guidance_embeds": True, "text_embed_2_dim": 16, "use_meanflow": True},
        ),
        scheduler=_euler(shift=4.0),
        plain={"distilled_guidance_scale": 3.25},
        guided=None,
        guider=None,
    ),
    "HiDreamImagePipeline:dev": _of(
        "HiDreamImagePipeline", scheduler=(FlowMatchLCMScheduler, {"shift": 6.0}), guided=None
    ),
    "BriaPipeline:static": _of("BriaPipeline", scheduler=_euler(shift=3.0)),
    "Krea2Pipeline:distilled": _of(
        "Krea2Pipeline",
        options={"text_encoder_select_layers": (0, 1, 2), "is_distilled": True},
        guided=None,
    ),
    "DreamLiteMobilePipeline": _of("DreamLitePipeline", plain={}, guided=None),
    "StableDiffusionXLPipeline:flow": _of(
        "StableDiffusionXLPipeline",
        denoiser=("UNet2DConditionModel", SDXL),
        scheduler=(UniPCMultistepScheduler, FLOW_SIGMAS),
        vae=_kl(4),
    ),
}
IMAGE_TO_IMAGE: dict[str, dict[str, Any]] = {
    "FluxImg2ImgPipeline": _of("FluxPipeline", **FLUX, call=FROM_IMAGE),
    "StableDiffusion3Img2ImgPipeline": _of("StableDiffusion3Pipeline", **SD3, call=FROM_IMAGE),
    "ZImageImg2ImgPipeline": _of(
        "ZImagePipeline", denoiser=("ZImageTransformer2DModel", {}), vae=_kl(16), call=FROM_IMAGE
    ),
    "QwenImageImg2ImgPipeline": _of("QwenImagePipeline", call=FROM_IMAGE),
    # With FlowMatchEulerDiscreteScheduler it does not run, for want of `scale_model_input` and `add_noise`.
    "StableDiffusionXLImg2ImgPipeline:flow": {
        **VARIANTS["StableDiffusionXLPipeline:flow"],
        "call": FROM_IMAGE,
    },
    "ChromaImg2ImgPipeline": _of("ChromaPipeline", call=FROM_IMAGE),
    "StableDiffusion3InpaintPipeline": _of(
        "StableDiffusion3Pipeline",
        denoiser=("SD3Transformer2DModel", {"in_channels": 16, "out_channels": 16}),  # no other number is accepted
        vae=_kl(16),
        call={**FROM_IMAGE, "mask_image": MASK},
    ),
    "QwenImageInpaintPipeline": _of("QwenImagePipeline", call={**FROM_IMAGE, "mask_image": MASK}),
    "QwenImage21Pipeline:image": _of("QwenImage21Pipeline", call={"image": IMAGE, "output_resolution": 64}),
    "BriaFibo2Pipeline:image": _of(
        "BriaFibo2Pipeline",
        call={"image": IMAGE},
        attributes={"text_encoder_out_layers": ((2,), (1,)), "default_sample_size": 8, "text_encoder_image_size": 16},
    ),
    "DreamLitePipeline:image": _of("DreamLitePipeline", call={"image": IMAGE}),  # three predictions a step
    "JoyImageEditPipeline:image": _of("JoyImageEditPipeline", call={"image": IMAGE}),
    "JoyImageEditPlusPipeline:image": _of("JoyImageEditPlusPipeline", call={"images": [IMAGE, IMAGE]}),
    "FluxKontextPipeline": _of("FluxPipeline", **FLUX, call={"image": IMAGE, "max_area": 256, "_auto_resize": False}),
}
# blocks: the class of the blocks from which it is built. No ``DiffusionPipeline``.
MODULAR: dict[str, dict[str, Any]] = {
    "Flux3ModularPipeline": {
        "blocks": "Flux3AutoBlocks",
        "denoiser": ("Flux3Transformer2DModel", {}),
        "scheduler": _euler(shift=6.93),
        "text": [("qwen3_vl", 12, 2)],
        "processors": ("tokenizer",),
        "vae": _flux2(2),
        "call": {"height": 16, "width": 16, "text_encoder_out_layers": (1, 2), "output": "latents"},
        "plain": {},
        "guided": NEGATIVE,
        "calls": (1, 2),
        "guider": (ClassifierFreeGuidance, {"guidance_scale": 3.5}),
    },
}
MODULAR["Flux3DistilledModularPipeline"] = {
    **MODULAR["Flux3ModularPipeline"],
    "blocks": "Flux3DistilledAutoBlocks",
    "denoiser": ("Flux3Transformer2DModel", {"flow_map": True}),
    "guided": None,
    "guider": None,
}
PIPELINES: dict[str, dict[str, Any]] = {**TEXT_TO_IMAGE, **VARIANTS, **IMAGE_TO_IMAGE, **MODULAR}


class Processor:
    """Of texts and, for Qwen3-VL, of images: without torchvision the real one cannot be made."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        pixels = {"shortest_edge": 8 * 8, "longest_edge": 16 * 16}
        self.image_processor = transformers.Qwen2VLImageProcessorPil(size=pixels, patch_size=4)

    def __call__(self, text: Any, images: Any = None, videos: Any = None, **kwargs: Any) -> Any:
        if videos is not None:
            raise ValueError("This processor has no videos")
        if not images:
            return self.tokenizer(text, **kwargs)
        made = self.image_processor(images, return_tensors="pt")
        counts = iter((made["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist())
        slot = "<|image_pad|>"
        text = [re.sub(re.escape(slot), lambda _: slot * next(counts), prompt) for prompt in text]
        tokens = self.tokenizer(text, **kwargs)
        is_image = tokens["input_ids"] == self.tokenizer.convert_tokens_to_ids(slot)
        return type(tokens)({**tokens, **made, "mm_token_type_ids": is_image.long()})

    def apply_chat_template(self, messages: Any, **kwargs: Any) -> Any:
        """Of one conversation; tokens come as a batch of one, as they do from the real processors."""
        made = self.tokenizer.apply_chat_template(messages, **kwargs)
        return made if isinstance(made, str) else [made]

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return self.tokenizer.decode(*args, **kwargs)


def tokenizer(kind: str) -> Any:
    """The tokenizer of a text encoder; language models read bytes."""
    if kind.startswith("clip") or kind in LETTERS_ONLY:
        return tiny_pipelines.tokenizer(kind.partition("_")[0])
    if kind == "byt5":
        return transformers.ByT5Tokenizer()
    words = ["<|endoftext|>", *SPECIAL, *sorted(ByteLevel.alphabet())]
    return transformers.Qwen2Tokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=[],
        additional_special_tokens=list(SPECIAL),
        chat_template=CHAT_TEMPLATE,
    )


def language_model(kind: str, hidden: int, layers: int, vocabulary: int) -> nn.Module:
    """A decoder-only language model, with a vision tower where its class has one."""
    text: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": max(hidden // 8, 1),
        "num_key_value_heads": 1,
        "head_dim": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind == "t5gemma":
        config = transformers.T5GemmaConfig(encoder=text, decoder=text)
        return transformers.models.t5gemma.modeling_t5gemma.T5GemmaEncoder(config.encoder)
    model_class, config_class = (getattr(transformers, name) for name in LANGUAGE_MODELS[kind])
    if kind.startswith("mistral3"):
        vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = config_class(
            text_config={"model_type": "mistral", **text},
            vision_config={"model_type": "pixtral", "patch_size": 2, "image_size": 8, **vision},
        )
    elif "_vl" in kind:
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "patch_size": 4}
        more = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]} if kind.startswith("qwen3") else {}
        config = config_class(
            text_config=text,
            vision_config={**vision, **more, "out_hidden_size": hidden},
            **{f"{part}_token_id": 1 + SPECIAL.index(f"<|{word}|>") for part, word in VISION_TOKENS.items()},
        )
    else:
        config = config_class(**text, attn_implementation="eager")
    return model_class(config)


def text_encoder(kind: str, hidden: int, extra: int, vocabulary: int) -> nn.Module:
    """``extra`` is the projection size of a CLIP, the number of layers of a language model."""
    if kind in LANGUAGE_MODELS or kind == "t5gemma":
        return language_model(kind, hidden, extra, vocabulary)
    if kind == "byt5":
        return tiny_pipelines.text_encoder("t5", hidden, 0, 384)
    if kind == "clip_77":  # for the pipelines that pad to the length of the published models
        config: Any = tiny_pipelines.text_encoder("clip", hidden, extra, vocabulary).config
        config.max_position_embeddings = 77
        return transformers.CLIPTextModel(config)
    return tiny_pipelines.text_encoder(kind, hidden, extra, vocabulary)


def _denoiser(facts: dict[str, Any], seed: int) -> nn.Module:
    class_name, config = facts["denoiser"]
    return zoo.build(class_name, seed=seed, **config)


def build_pipeline(name: str, transformer: Any = None, seed: int = 0, **components: Any) -> Any:
    """The pipeline with ``transformer`` (or a fresh tiny one) as its denoiser; ``components`` replace its own."""
    facts = PIPELINES[name]
    scheduler, arguments = facts["scheduler"]
    parts: dict[str, Any] = {
        "unet" if "UNet" in facts["denoiser"][0] else "transformer": (
            _denoiser(facts, seed) if transformer is None else transformer
        ),
        "scheduler": scheduler(**arguments),
        **facts.get("options", {}),
    }
    if facts.get("guider"):
        guider, arguments = facts["guider"]
        parts["guider"] = guider(**arguments)
    if facts.get("unconditional"):
        parts["unconditional_transformer"] = _denoiser(facts, seed + 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae, arguments = facts["vae"]
        parts["vae"] = getattr(diffusers, vae)(**arguments).eval()
        for suffix, (kind, hidden, extra) in zip(("", "_2", "_3", "_4"), facts["text"], strict=False):
            parts["tokenizer" + suffix] = tokenizer(kind)
            parts["text_encoder" + suffix] = text_encoder(kind, hidden, extra, len(parts["tokenizer" + suffix])).eval()
    for part in facts.get("processors", ()):
        parts[part] = Processor(parts["tokenizer"])
    parts |= components
    if "blocks" in facts:
        return _modular(facts["blocks"], parts)
    pipeline_class = getattr(diffusers, name.partition(":")[0])
    accepted = inspect.signature(pipeline_class).parameters
    with _no_torchvision():
        pipe = pipeline_class(**{key: part for key, part in parts.items() if key in accepted})
    for attribute, value in facts.get("attributes", {}).items():
        setattr(pipe, attribute, value)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def _no_torchvision() -> Iterator[None]:
    """OmniGen's processor does not exist without torchvision, whose transforms are for images only."""
    processor = processor_omnigen.OmniGenMultiModalProcessor
    with (
        mock.patch.object(pipeline_omnigen, processor.__name__, processor, create=True),
        mock.patch.object(processor_omnigen, "transforms", mock.MagicMock(), create=True),
    ):
        yield


def _modular(blocks_class: str, parts: dict[str, Any]) -> Any:
    """From blocks, without the one that rewrites prompts and the one that decodes."""
    blocks = getattr(diffusers, blocks_class)()
    for unused in ("prompt_upsampler", "decode"):
        blocks.sub_blocks.pop(unused)
    pipe = blocks.init_pipeline()
    pipe.update_components(**{key: part for key, part in parts.items() if key in pipe.components})

    def silence(block: Any) -> None:  # the pipeline's own method does not reach the loop
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)
        for inner in block.sub_blocks.values():
            silence(inner)

    silence(pipe._blocks)
    return pipe


def call_kwargs(name: str, guidance: bool = False) -> dict[str, Any]:
    """Arguments of a call at a tiny resolution that returns latents, with classifier-free guidance or without."""
    facts = PIPELINES[name]
    extra = facts["guided" if guidance else "plain"]
    if extra is None:
        raise ValueError(f"{name} has no call {'with' if guidance else 'without'} guidance")
    latent = {} if "blocks" in facts else {"output_type": "latent"}
    return {"prompt": "a red fox", **latent, **facts["call"], **extra}


def denoiser_calls(name: str, steps: int = 2, guidance: bool = False) -> int:
    """How often a call of the pipeline calls its denoiser."""
    facts = PIPELINES[name]
    return facts.get("calls", (1, 1))[guidance] * int(steps * facts["call"].get("strength", 1.0))


def sample(pipe: Any, name: str, steps: int = 2, seed: int = 0, guidance: bool = False, **overrides: Any) -> Tensor:
    """The latents of one seeded call."""
    arguments = {**call_kwargs(name, guidance), "num_inference_steps": steps, **overrides}
    if PIPELINES[name].get("guider"):
        pipe.guider.enable() if guidance else pipe.guider.disable()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # some schedulers draw noise, from the global generator
        made = pipe(**arguments, generator=torch.Generator().manual_seed(seed))
    made = made if isinstance(made, Tensor) else made[0]
    return made if isinstance(made, Tensor) else torch.stack(list(made))
