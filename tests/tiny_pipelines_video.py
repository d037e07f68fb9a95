"""Tiny stock diffusers pipelines for video and audio, built from configs and in-memory vocabularies.

A name is a pipeline class, or ``class:variant``. Nothing is downloaded: the components are real ones with random
weights, and a call runs on the CPU in well under a second. ``UNAVAILABLE`` says which denoisers have no such pipeline.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
import transformers
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLMagvit,
    AutoencoderKLMochi,
    AutoencoderOobleck,
    AutoencoderSAME,
    ClassifierFreeGuidance,
    DPMSolverMultistepScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeliosScheduler,
    Kandinsky6SRVAE,
    LongCatAudioDiTVae,
    MiniMaxH3Scheduler,
    MiniMaxMusic3ConditionEncoder,
    MMAudioVAE,
    MMAudioVocoder,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.ace_step import AceStepConditionEncoder
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder
from PIL.Image import Image
from tiny_pipelines import autoencoder, text_encoder, tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def picture(height: int = 32, width: int = 32, phase: int = 0) -> Image:
    """A colour ramp; the phase moves it."""
    rows, columns = np.mgrid[:height, :width]
    channels = [(8 * rows + 16 * phase) % 256, (8 * columns) % 256, (4 * (rows + columns)) % 256]
    return PIL.Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def clip(frames: int, height: int = 32, width: int = 32) -> list[Image]:
    """A moving colour ramp."""
    return [picture(height, width, phase) for phase in range(frames)]


def noise(*shape: int) -> Tensor:
    """Fixed normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def unipc(flow_shift: float) -> tuple[type, dict[str, Any]]:
    """The scheduler of Wan and its relatives."""
    arguments = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": flow_shift}
    return UniPCMultistepScheduler, arguments


def video(channels: int, **arguments: Any) -> dict[str, Any]:
    """Arguments of a small video VAE with the given latent channels."""
    return {"latent_channels": channels, "block_out_channels": (4, 4, 4, 4), **arguments}


# A component is a kind of text encoder (or tokenizer) with its hidden size, "wan" with its latent channels, or a class
# with its arguments or its configuration.
WAN_DENOISER: dict[str, Any] = {
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
}
WAN_IMAGE = {**WAN_DENOISER, "in_channels": 12}  # noise, four mask channels and the latents of the picture
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
CLIP_VISION = {
    "image_encoder": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig(**VISION)),
    "image_processor": (
        transformers.CLIPImageProcessor,
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    ),
}
HUNYUAN_VAE = (
    AutoencoderKLHunyuanVideo,
    video(4, layers_per_block=1, norm_num_groups=2, mid_block_add_attention=False),
)
LTX2_VAE = (
    AutoencoderKLLTX2Video,
    video(
        4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        patch_size=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=8,
    ),
)
CONNECTORS = (
    LTX2TextConnectors,
    {
        "caption_channels": 16,
        "text_proj_in_factor": 3,
        "video_connector_num_attention_heads": 2,
        "video_connector_attention_head_dim": 8,
        "video_connector_num_layers": 1,
        "video_connector_num_learnable_registers": None,
        "audio_connector_num_attention_heads": 2,
        "audio_connector_attention_head_dim": 8,
        "audio_connector_num_layers": 1,
        "audio_connector_num_learnable_registers": None,
        "rope_double_precision": False,
    },
)
NEGATIVE = {"negative_prompt": "a bad dog"}

# denoiser: class and config. scheduler: class and arguments. parts: the other components. call: arguments of the
# pipeline; plain and guided: the ones without and with classifier-free guidance (guided is None where there is none;
# guider: the scale, where a component holds it). guidance: how the guided prediction is made, in one batch of twice
# the rows or in a second call. calls: of the denoiser in a plain run, where that is not the number of steps;
# extra_calls: those that guidance does not double. options: further arguments of the pipeline's class.
WAN: dict[str, Any] = {
    "denoiser": ("WanTransformer3DModel", WAN_DENOISER),
    "scheduler": unipc(3.0),
    "parts": {"text_encoder": ("umt5", 16), "vae": ("wan", 4)},
    "call": {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16},
    "plain": {"guidance_scale": 1.0},
    "guided": {"guidance_scale": 5.0, **NEGATIVE},
    "guidance": "second call",
}
WAN_I2V: dict[str, Any] = {
    **WAN,
    "denoiser": ("WanTransformer3DModel", WAN_IMAGE),
    "call": {**WAN["call"], "image": picture()},
}
SKYREELS = {**WAN, "denoiser": ("SkyReelsV2Transformer3DModel", WAN_DENOISER), "scheduler": unipc(8.0)}
CHRONOEDIT: dict[str, Any] = {
    **WAN_I2V,
    "denoiser": (
        "ChronoEditTransformer3DModel",
        {**WAN_IMAGE, "image_dim": 16, "added_kv_proj_dim": 24, "rope_temporal_skip_len": 8},
    ),
    "scheduler": unipc(5.0),
    "parts": {**WAN["parts"], **CLIP_VISION},
}
LTX: dict[str, Any] = {
    "denoiser": (
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "num_layers": 1,
            "caption_channels": 16,
        },
    ),
    "scheduler": (
        FlowMatchEulerDiscreteScheduler,
        {
            "use_dynamic_shifting": True,
            "base_image_seq_len": 1024,
            "max_image_seq_len": 4096,
            "base_shift": 0.95,
            "max_shift": 2.05,
            "shift_terminal": 0.1,
        },
    ),
    "parts": {
        "text_encoder": ("t5", 16),
        "vae": (
            AutoencoderKLLTXVideo,
            video(
                4,
                decoder_block_out_channels=(4, 4, 4, 4),
                layers_per_block=(1, 1, 1, 1, 1),
                decoder_layers_per_block=(1, 1, 1, 1, 1),
                spatio_temporal_scaling=(True, False, False, False),
                decoder_spatio_temporal_scaling=(True, False, False, False),
            ),
        ),
    },
    "call": {"height": 32, "width": 32, "num_frames": 3, "max_sequence_length": 16},
    "plain": {"guidance_scale": 1.0},
    "guided": {"guidance_scale": 3.0, **NEGATIVE},
    "guidance": "batched",
}
LTX2_DENOISER: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "audio_in_channels": 8,
    "audio_out_channels": 8,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "num_layers": 2,
    "caption_channels": 16,
    "rope_double_precision": False,
}
LTX2: dict[str, Any] = {
    "denoiser": ("LTX2VideoTransformer3DModel", LTX2_DENOISER),
    "scheduler": LTX["scheduler"],
    "parts": {
        "text_encoder": ("gemma3", 16),
        "vae": LTX2_VAE,
        "audio_vae": (
            AutoencoderKLLTX2Audio,
            {"base_channels": 8, "ch_mult": (1, 1, 1), "num_res_blocks": 1, "latent_channels": 2, "mel_bins": 16},
        ),
        "connectors": CONNECTORS,
        "vocoder": (
            LTX2Vocoder,
            {"in_channels": 32, "hidden_channels": 32, "upsample_kernel_sizes": [4, 4], "upsample_factors": [2, 2]},
        ),
    },
    "call": {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16},
    "plain": {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0},
    "guided": {"guidance_scale": 3.0, "stg_scale": 0.0, "modality_scale": 1.0, **NEGATIVE},
    "guidance": "batched",
}
for _kind in ("plain", "guided"):  # the audio has its own scales
    LTX2[_kind] = {**LTX2[_kind], "audio_stg_scale": 0.0, "audio_modality_scale": 1.0}
LTX2["plain"]["audio_guidance_scale"] = 1.0
LTX2["plain"]["audio_guidance_rescale"] = 0.0
HUNYUAN_DENOISER: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}
HUNYUAN: dict[str, Any] = {
    "denoiser": ("HunyuanVideoTransformer3DModel", HUNYUAN_DENOISER),
    "scheduler": (FlowMatchEulerDiscreteScheduler, {"shift": 7.0}),
    "parts": {"text_encoder": ("llama", 16), "text_encoder_2": ("clip", 8), "vae": HUNYUAN_VAE},
    "call": {
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "max_sequence_length": 16,
        "prompt_template": {"template": "{}", "crop_start": 0},
    },
    "plain": {"guidance_scale": 6.0},  # the embedded guidance
    "guided": {"guidance_scale": 6.0, "true_cfg_scale": 4.0, **NEGATIVE},
    "guidance": "second call",
}
COSMOS_VAE = ("wan", 4)
PIPELINES: dict[str, dict[str, Any]] = {
    "WanPipeline:experts": {**WAN, "options": {"boundary_ratio": 0.875}, "experts": True},
    "WanImageToVideoPipeline": {
        **WAN_I2V,
        "denoiser": ("WanTransformer3DModel", {**WAN_IMAGE, "image_dim": 16, "added_kv_proj_dim": 24}),
        "parts": {**WAN["parts"], **CLIP_VISION},
    },
    "WanImageToVideoPipeline:tokenwise": {
        **WAN_I2V,
        "denoiser": WAN["denoiser"],
        "scheduler": unipc(5.0),
        "options": {"expand_timesteps": True},
    },
    "WanImageToVideoPipeline:experts": {**WAN_I2V, "options": {"boundary_ratio": 0.9}, "experts": True},
    "WanVACEPipeline": {
        **WAN,
        "denoiser": (
            "WanVACETransformer3DModel",
            {**WAN_DENOISER, "vace_layers": (0,), "vace_in_channels": 2 * 4 + 8 * 8},
        ),
    },
    "WanAnimatePipeline": {
        **CHRONOEDIT,
        "denoiser": (
            "WanAnimateTransformer3DModel",
            {
                **WAN_IMAGE,
                "latent_channels": 4,
                "image_dim": 16,
                "added_kv_proj_dim": 24,
                "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
                "motion_encoder_size": 16,
                "motion_style_dim": 8,
                "motion_dim": 4,
                "motion_encoder_dim": 16,
                "face_encoder_hidden_dim": 16,
                "face_encoder_num_heads": 2,
                "inject_face_latents_blocks": 2,
            },
        ),
        "call": {
            "height": 32,
            "width": 32,
            "segment_frame_length": 5,
            "max_sequence_length": 16,
            "image": picture(),
            "pose_video": clip(5),
            "face_video": clip(5, 16, 16),
        },
    },
    "SkyReelsV2Pipeline": SKYREELS,
    "SkyReelsV2DiffusionForcingPipeline": {**SKYREELS, "call": {**WAN["call"], "num_frames": 9}},
    "SkyReelsV2DiffusionForcingPipeline:staggered": {
        **SKYREELS,
        "call": {**WAN["call"], "num_frames": 9, "ar_step": 1, "causal_block_size": 1},
        "calls": 4,  # the frames finish one after another
    },
    "ChronoEditPipeline": CHRONOEDIT,
    "ChronoEditPipeline:reasoning": {
        **CHRONOEDIT,
        "call": {
            **CHRONOEDIT["call"],
            "num_frames": 9,
            "enable_temporal_reasoning": True,
            "num_temporal_reasoning_steps": 1,
        },
    },
    "AnyFlowPipeline": {
        **WAN,
        "denoiser": ("AnyFlowTransformer3DModel", WAN_DENOISER),
        "scheduler": (FlowMapEulerDiscreteScheduler, {"shift": 5.0}),
        "guidance": "batched",
    },
    "AnyFlowFARPipeline": {
        **WAN,
        "denoiser": (
            "AnyFlowFARTransformer3DModel",
            {**WAN_DENOISER, "compressed_patch_size": (1, 4, 4), "full_chunk_limit": 3},
        ),
        "scheduler": (FlowMapEulerDiscreteScheduler, {"shift": 5.0}),
        "call": {**WAN["call"], "num_frames": 9, "chunk_partition": [1, 2]},
        "guidance": "batched",
        "calls": 5,  # two chunks and, between them, one pass that fills the cache
    },
    "HeliosPipeline": {
        **WAN,
        "denoiser": (
            "HeliosTransformer3DModel",
            {
                **{key: value for key, value in WAN_DENOISER.items() if key != "rope_max_seq_len"},
                "rope_dim": (4, 4, 4),
                "has_multi_term_memory_patch": True,
                "guidance_cross_attn": True,
                "zero_history_timestep": True,
                "is_amplify_history": False,
            },
        ),
        "scheduler": (HeliosScheduler, {"stages": 1, "stage_range": [0, 1], "use_dynamic_shifting": True}),
        "call": {
            **WAN["call"],
            "num_latent_frames_per_chunk": 2,
            "history_sizes": [4, 2, 1],
        },
    },
    "LTXPipeline": LTX,
    "LTXImageToVideoPipeline": {**LTX, "call": {**LTX["call"], "image": picture()}},
    "LTX2Pipeline": LTX2,
    "LTX2Pipeline:perturbed": {
        **LTX2,
        "plain": {**LTX2["plain"], "stg_scale": 1.0, "audio_stg_scale": 1.0, "spatio_temporal_guidance_blocks": [1]},
        "guided": None,
        "calls": 4,
    },
    "HunyuanVideoPipeline": HUNYUAN,
    "HunyuanVideoFramepackPipeline": {
        **HUNYUAN,
        "denoiser": (
            "HunyuanVideoFramepackTransformer3DModel",
            {**HUNYUAN_DENOISER, "has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True},
        ),
        "parts": {
            **HUNYUAN["parts"],
            "image_encoder": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig(**VISION)),
            "feature_extractor": (transformers.SiglipImageProcessor, {"size": {"height": 32, "width": 32}}),
        },
        "call": {**HUNYUAN["call"], "num_frames": 9, "latent_window_size": 2, "image": picture()},
        "calls": 4,  # two sections
    },
    "HunyuanVideo15Pipeline": {
        "denoiser": (
            "HunyuanVideo15Transformer3DModel",
            {
                "in_channels": 2 * 4 + 1,
                "out_channels": 4,
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "num_layers": 1,
                "num_refiner_layers": 1,
                "mlp_ratio": 2.0,
                "patch_size": 1,
                "patch_size_t": 1,
                "text_embed_dim": 16,
                "text_embed_2_dim": 8,
                "image_embed_dim": 12,
                "rope_axes_dim": (2, 2, 4),
                "target_size": 64,
                "task_type": "t2v",
            },
        ),
        "scheduler": (FlowMatchEulerDiscreteScheduler, {"shift": 5.0}),
        "parts": {
            "text_encoder": ("qwen2.5vl_text", 16),
            "text_encoder_2": ("byt5", 8),
            "vae": (AutoencoderKLHunyuanVideo15, video(4, block_out_channels=(8,) * 5, layers_per_block=1)),
            "guider": (ClassifierFreeGuidance, {}),
        },
        "call": {"height": 64, "width": 64, "num_frames": 5},
        "plain": {"guider": 1.0},
        "guided": {"guider": 6.0, **NEGATIVE},
        "guidance": "second call",
    },
    "SanaVideoPipeline": {
        "denoiser": (
            "SanaVideoTransformer3DModel",
            {
                "in_channels": 4,
                "out_channels": 4,
                "num_attention_heads": 2,
                "attention_head_dim": 12,
                "num_layers": 2,
                "num_cross_attention_heads": 2,
                "cross_attention_head_dim": 12,
                "cross_attention_dim": 24,
                "caption_channels": 16,
                "sample_size": 30,
                "rope_max_seq_len": 32,
            },
        ),
        "scheduler": (
            DPMSolverMultistepScheduler,
            {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 8.0},
        ),
        "parts": {"text_encoder": ("gemma2", 16), "vae": ("wan", 4)},
        "call": {
            "height": 32,
            "width": 32,
            "frames": 5,
            "max_sequence_length": 16,
            "use_resolution_binning": False,
            "complex_human_instruction": None,
        },
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 6.0, **NEGATIVE},
        "guidance": "batched",
    },
    "SanaWMPipeline": {
        "denoiser": (
            "SanaWMTransformer3DModel",
            {
                "in_channels": 4,
                "num_layers": 2,
                "hidden_size": 48,
                "num_attention_heads": 2,
                "softmax_every_n": 2,
                "linear_head_dim": 24,
                "use_chunk_plucker_post_attn": False,
                "caption_channels": 16,
            },
        ),
        "scheduler": (FlowMatchEulerDiscreteScheduler, {"shift": 8.0}),
        "parts": {"text_encoder": ("gemma2", 16), "vae": LTX2_VAE},
        "call": {
            "height": 32,
            "width": 32,
            "num_frames": 9,
            "max_sequence_length": 16,
            "image": picture(),
            "action": "w-8",
            "intrinsics": [32.0, 32.0, 16.0, 16.0],
        },
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 5.0, **NEGATIVE},
        "guidance": "batched",
    },
    "SanaWMLTX2Refiner": {
        "denoiser": ("SanaWMLTX2RefinerTransformer3DModel", LTX2_DENOISER),
        "scheduler": (FlowMatchEulerDiscreteScheduler, {"shift": 1.0}),
        "parts": {"text_encoder": ("gemma3", 16), "vae": LTX2_VAE, "connectors": CONNECTORS},
        "options": {"text_max_sequence_length": 16},
        "call": {"sana_latent": torch.linspace(-1.0, 1.0, 4 * 3 * 2 * 2).view(1, 4, 3, 2, 2), "fps": 16.0},
        "plain": {},
        "guided": None,
        "calls": 4,  # one pass more for the first frame and one for the block, with t = 0
    },
    "Cosmos2_5_PredictBasePipeline": {
        "denoiser": (
            "CosmosTransformer3DModel",
            {
                "in_channels": 4 + 1,
                "out_channels": 4,
                "num_attention_heads": 2,
                "attention_head_dim": 12,
                "num_layers": 2,
                "mlp_ratio": 2.0,
                "text_embed_dim": 16,
                "adaln_lora_dim": 4,
                "max_size": (4, 32, 32),
                "patch_size": (1, 2, 2),
                "rope_scale": (2.0, 1.0, 1.0),
                "concat_padding_mask": False,
                "use_crossattn_projection": True,
                "crossattn_proj_in_channels": 2 * 16,
                "encoder_hidden_states_channels": 16,
            },
        ),
        "scheduler": (
            UniPCMultistepScheduler,
            {
                "use_karras_sigmas": True,
                "use_flow_sigmas": True,
                "prediction_type": "flow_prediction",
                "sigma_max": 200.0,
                "sigma_min": 0.01,
            },
        ),
        "parts": {"text_encoder": ("qwen2.5vl", 16), "vae": ("wan", 4)},
        "call": {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 128},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 7.0, **NEGATIVE},
        "guidance": "second call",
    },
    "Cosmos3OmniPipeline": {
        "denoiser": (
            "Cosmos3OmniTransformer",
            {
                "head_dim": 6,
                "hidden_act": "relu2",
                "hidden_size": 12,
                "intermediate_size": 24,
                "latent_channel": 4,
                "latent_patch_size": 2,
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "num_key_value_heads": 1,
                "patch_latent_dim": 16,
                "rope_axes_dim": (1, 1, 1),
                "vocab_size": 300,
            },
        ),
        "scheduler": unipc(10.0),
        "parts": {"text_tokenizer": ("bytes",), "vae": ("wan", 4)},
        "options": {"enable_safety_checker": False},
        "call": {"height": 32, "width": 32, "num_frames": 5, "use_system_prompt": False},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 6.0, **NEGATIVE},
        "guidance": "second call",
    },
    "MochiPipeline": {
        "denoiser": (
            "MochiTransformer3DModel",
            {
                "patch_size": 2,
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "num_layers": 2,
                "pooled_projection_dim": 16,
                "in_channels": 4,
                "text_embed_dim": 16,
                "time_embed_dim": 4,
                "max_sequence_length": 16,
            },
        ),
        "scheduler": (FlowMatchEulerDiscreteScheduler, {"invert_sigmas": True}),
        "parts": {
            "text_encoder": ("t5", 16),
            "vae": (
                AutoencoderKLMochi,
                {
                    "latent_channels": 4,
                    "encoder_block_out_channels": (32,) * 4,
                    "decoder_block_out_channels": (32,) * 4,
                    "layers_per_block": (1,) * 5,
                },
            ),
        },
        "call": {"height": 32, "width": 32, "num_frames": 7, "max_sequence_length": 16},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 4.5, **NEGATIVE},
        "guidance": "batched",
    },
    "Kandinsky5T2VPipeline": {
        "denoiser": (
            "Kandinsky5Transformer3DModel",
            {
                "in_visual_dim": 4,
                "in_text_dim": 16,
                "in_text_dim2": 12,
                "time_dim": 16,
                "out_visual_dim": 4,
                "patch_size": (1, 2, 2),
                "model_dim": 24,
                "ff_dim": 32,
                "num_text_blocks": 1,
                "num_visual_blocks": 2,
                "axes_dims": (4, 4, 4),
            },
        ),
        "scheduler": (FlowMatchEulerDiscreteScheduler, {"shift": 5.0}),
        "parts": {"text_encoder": ("qwen2.5vl", 16), "text_encoder_2": ("clip", 12), "vae": HUNYUAN_VAE},
        "call": {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 1024},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 5.0, **NEGATIVE},
        "guidance": "second call",
    },
    "Kandinsky6TI2VAPipeline": {
        "denoiser": (
            "Kandinsky6Transformer3DModel",
            {
                "in_visual_dim": 4,
                "out_visual_dim": 4,
                "in_text_dim": 16,
                "in_text_dim2": 12,
                "time_dim": 16,
                "patch_size": (1, 2, 2),
                "model_dim": 24,
                "ff_dim": 32,
                "num_text_blocks": 1,
                "num_visual_blocks": 2,
                "axes_dims": (4, 4, 4),
                "visual_cond": False,
                "in_audio_dim": 6,
                "out_audio_dim": 6,
            },
        ),
        "scheduler": (FlowMatchEulerDiscreteScheduler, {"shift": 5.0}),
        "parts": {
            "text_encoder": ("qwen2.5vl", 16),
            "text_encoder_2": ("clip", 12),
            "vae": HUNYUAN_VAE,
            "audio_vae": (
                MMAudioVAE,
                {"mel_bins": 8, "latent_channels": 6, "hidden_channels": 8, "layers_per_block": 1},
            ),
            "vocoder": (
                MMAudioVocoder,
                {
                    "num_mels": 8,
                    "upsample_initial_channel": 8,
                    "upsample_rates": (2, 2),
                    "upsample_kernel_sizes": (4, 4),
                },
            ),
        },
        "call": {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 1024},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 5.0, **NEGATIVE},
        "guidance": "second call",
    },
    "Kandinsky6SRPipeline": {
        "denoiser": (
            "Kandinsky6SRTransformer3DModel",
            {
                "in_visual_dim": 4,
                "out_visual_dim": 4,
                "time_dim": 16,
                "patch_size": (1, 1, 1),
                "model_dim": 24,
                "ff_dim": 32,
                "num_visual_blocks": 1,
                "axes_dims": (4, 4, 4),
                "tile_sizes": ((32, 32),),
            },
        ),
        "scheduler": (FlowMatchEulerDiscreteScheduler, {"shift": 5.0}),
        "parts": {
            "vae": (
                Kandinsky6SRVAE,
                {
                    "latent_channels": 4,
                    "encoder_block_out_channels": (16, 16, 16),
                    "decoder_block_out_channels": (16, 16, 16),
                    "layers_per_block": 1,
                },
            ),
        },
        "call": {"video": clip(5, 16, 16), "resolution_scale": 2, "output_type": "pt", "prompt": None},
        "plain": {},
        "guided": None,
    },
    "MotifVideoPipeline": {
        "denoiser": (
            "MotifVideoTransformer3DModel",
            {
                "in_channels": 2 * 4 + 1,
                "out_channels": 4,
                "num_attention_heads": 2,
                "attention_head_dim": 12,
                "num_layers": 1,
                "num_single_layers": 1,
                "num_decoder_layers": 0,
                "patch_size": 2,
                "patch_size_t": 1,
                "text_embed_dim": 16,
                "image_embed_dim": 4,
                "rope_axes_dim": (4, 4, 4),
                "enable_text_cross_attention_dual": False,
                "enable_text_cross_attention_single": False,
            },
        ),
        "scheduler": (FlowMatchEulerDiscreteScheduler, {"shift": 15.0}),
        "parts": {
            "text_encoder": ("t5gemma2", 16),
            "vae": ("wan", 4),
            "guider": (ClassifierFreeGuidance, {}),
        },
        "call": {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16},
        "plain": {"guider": 1.0},
        "guided": {"guider": 6.0, **NEGATIVE},
        "guidance": "second call",
    },
    "EasyAnimatePipeline": {
        "denoiser": (
            "EasyAnimateTransformer3DModel",
            {
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "in_channels": 4,
                "out_channels": 4,
                "mmdit_layers": 1,
                "num_layers": 2,
                "patch_size": 2,
                "text_embed_dim": 16,
                "time_embed_dim": 8,
            },
        ),
        "scheduler": (FlowMatchEulerDiscreteScheduler, {"shift": 5.0}),
        "parts": {
            "text_encoder": ("qwen2vl", 16),
            "vae": (AutoencoderKLMagvit, video(4, layers_per_block=1, norm_num_groups=2)),
        },
        "call": {"height": 32, "width": 32, "num_frames": 5},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 5.0, **NEGATIVE},
        "guidance": "batched",
    },
    "AceStepPipeline": {
        "denoiser": (
            "AceStepTransformer1DModel",
            {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "in_channels": 24,
                "audio_acoustic_hidden_dim": 8,
                "patch_size": 2,
                "rope_theta": 10000.0,
                "sliding_window": 16,
            },
        ),
        "scheduler": (FlowMatchEulerDiscreteScheduler, {"num_train_timesteps": 1, "shift": 1.0}),
        "parts": {
            "text_encoder": ("qwen3", 16),
            "vae": (
                AutoencoderOobleck,
                {
                    "encoder_hidden_size": 8,
                    "downsampling_ratios": [2, 4],
                    "channel_multiples": [1, 2],
                    "decoder_channels": 4,
                    "decoder_input_channels": 8,
                    "sampling_rate": 64,
                },
            ),
            "condition_encoder": (
                AceStepConditionEncoder,
                {
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "text_hidden_dim": 16,
                    "timbre_hidden_dim": 8,
                    "num_lyric_encoder_hidden_layers": 2,
                    "num_timbre_encoder_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "head_dim": 8,
                },
            ),
        },
        "call": {"audio_duration": 2.0},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 7.0},
        "guidance": "batched",
    },
    "LongCatAudioDiTPipeline": {
        "denoiser": (
            "LongCatAudioDiTTransformer",
            {
                "dit_dim": 64,
                "dit_depth": 2,
                "dit_heads": 4,
                "dit_text_dim": 16,
                "latent_dim": 8,
                "text_conv": False,
            },
        ),
        "scheduler": (FlowMatchEulerDiscreteScheduler, {"shift": 1.0, "invert_sigmas": True}),
        "parts": {
            "text_encoder": ("umt5", 16),
            "vae": (
                LongCatAudioDiTVae,
                {
                    "channels": 8,
                    "c_mults": [1, 2],
                    "strides": [2, 4],
                    "latent_dim": 8,
                    "encoder_latent_dim": 16,
                    "downsampling_ratio": 8,
                    "sample_rate": 64,
                },
            ),
        },
        "call": {"audio_duration_s": 2.0},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 4.0, **NEGATIVE},
        "guidance": "second call",
    },
    "StableAudio3Pipeline": {
        "denoiser": (
            "StableAudio3DiTModel",
            {
                "io_channels": 8,
                "patch_size": 1,
                "embed_dim": 32,
                "depth": 2,
                "num_heads": 4,
                "cond_token_dim": 16,
                "global_cond_dim": 16,
                "timestep_features_dim": 16,
                "ff_mult": 2,
                "num_memory_tokens": 3,
                "use_differential_attention": False,
            },
        ),
        "scheduler": (FlowMatchEulerDiscreteScheduler, {"num_train_timesteps": 1, "shift": 1.0}),
        "parts": {
            "text_encoder": ("t5gemma", 16),
            "duration_embedder": (StableAudio3DurationEmbedder, {"output_dim": 16, "fourier_dim": 8}),
            "vae": (
                AutoencoderSAME,
                {
                    "patch_size": 4,
                    "encoder_channels": 8,
                    "encoder_c_mults": (2,),
                    "encoder_strides": (2,),
                    "encoder_transformer_depths": (1,),
                    "latent_dim": 8,
                    "dim_heads": 8,
                    "sampling_rate": 64,
                },
            ),
        },
        "call": {"duration": 2.0},
        "plain": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 7.0, **NEGATIVE},
        "guidance": "batched",
    },
}
# These exist as blocks only; the ones that denoise are run, on embeddings and latents of their own.
MODULAR: dict[str, dict[str, Any]] = {
    "WanAnimate2ModularPipeline": {
        "blocks": "wan_animate_2.modular_blocks_wan_animate_2.WanAnimate2CoreDenoiseStep",
        "output": "segment_frames",
        "denoiser": (
            "WanAnimate2Transformer3DModel",
            {
                "text_len": 16,
                "in_dim": 12,
                "dim": 64,
                "ffn_dim": 64,
                "freq_dim": 64,
                "text_dim": 16,
                "out_dim": 4,
                "num_heads": 4,
                "num_layers": 2,
            },
        ),
        "scheduler": (
            DPMSolverMultistepScheduler,
            {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 5.0},
        ),
        "parts": {"vae": ("wan", 4), "guider": (ClassifierFreeGuidance, {})},
        "call": {
            "prompt_embeds": noise(1, 16, 16),
            "negative_prompt_embeds": noise(1, 16, 16).flip(1),
            "prompt_ref_embeds": noise(1, 16, 16).flip(2),
            "condition_clip_context": noise(1, 4, 1280),
            "denoiser_input_fields": {"encoder_hidden_states_image": noise(1, 4, 1280)},
            "reference_image_latents": noise(8, 1, 4, 4),
            "driving_video_pixels": noise(1, 3, 5, 32, 32).clamp(-1.0, 1.0),
            "num_segments": 1,
            "effective_segment": 4,
            "segment_frame_length": 5,
            "height": 32,
            "width": 32,
        },
        "plain": {"guider": 1.0},
        "guided": {"guider": 3.0},
        "guidance": "second call",
        "extra_calls": 1,  # the reference is read once, with the first timestep
    },
    "MiniMaxH3ModularPipeline": {
        "blocks": "minimax_h3.modular_blocks_minimax_h3.MiniMaxH3CoreDenoiseStep",
        "output": "latents",
        "denoiser": (
            "MiniMaxH3Transformer3DModel",
            {
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "hidden_size": 24,
                "num_layers": 2,
                "num_refiner_layers": 2,
                "ffn_dim": 32,
                "text_dim": 8,
                "freq_dim": 8,
                "time_embed_hidden_dim": 24,
                "time_embed_dim": 16,
                "rope_freq_dim": 2,
            },
        ),
        "scheduler": (MiniMaxH3Scheduler, {"shift": 12.0}),
        "parts": {"audio_scheduler": (MiniMaxH3Scheduler, {"shift": 3.0})},
        "call": {
            "prompt_embeds": noise(1, 6, 8),
            "text_token_tags": torch.ones(6, dtype=torch.long),
            "height": 32,
            "width": 32,
            "num_frames": 124,  # five seconds, the least it takes
        },
        "plain": {},
        "guided": None,
    },
    "MiniMaxMusic3ModularPipeline": {
        "blocks": "minimax_music3.modular_blocks_minimax_music3.MiniMaxMusic3CoreDenoiseStep",
        "output": "latent_chunks",
        "denoiser": (
            "MiniMaxMusic3Transformer1DModel",
            {
                "in_channels": 8,
                "condition_dim": 16,
                "num_layers": 2,
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "ff_inner_dim": 32,
                "rotary_dim": 4,
                "fourier_embedding_dim": 8,
            },
        ),
        "scheduler": (
            FlowMatchEulerDiscreteScheduler,
            {"num_train_timesteps": 1, "shift": 1.0, "invert_sigmas": True},
        ),
        "parts": {
            "condition_encoder": (
                MiniMaxMusic3ConditionEncoder,
                {"condition_hidden_dim": 8, "num_condition_layers": 2, "out_dim": 16},
            ),
            "guider": (ClassifierFreeGuidance, {}),
        },
        "call": {"frame_hiddens": noise(1, 8, 2 * 8)},
        "plain": {"guider": 1.0},
        "guided": {"guider": 1.7},
        "guidance": "second call",
    },
}
PIPELINES.update(MODULAR)
PIPELINES["StableAudio3Pipeline:stochastic"] = {
    **PIPELINES["StableAudio3Pipeline"],
    "scheduler": (
        FlowMatchEulerDiscreteScheduler,
        {"num_train_timesteps": 1, "shift": 1.0, "stochastic_sampling": True},
    ),
}
PIPELINES["Cosmos3OmniPipeline:native"] = {
    **PIPELINES["Cosmos3OmniPipeline"],
    "options": {"enable_safety_checker": False, "use_native_flow_schedule": True},
}
UNAVAILABLE: dict[str, str] = {}


class PassingChecker(nn.Module):
    """Lets every prompt through: the guardrails of Cosmos are a package of their own."""

    device = torch.device("cpu")
    dtype = torch.float32

    def check_text_safety(self, _: str) -> bool:
        return True


def byte_tokenizer() -> Any:
    """A tokenizer of bytes with the special tokens of Qwen; stands for those of Llama and Gemma too."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    vocabulary = {word: index for index, word in enumerate([*words, *sorted(ByteLevel.alphabet())])}
    return transformers.Qwen2Tokenizer(
        vocab=vocabulary, merges=[], additional_special_tokens=words[1:], chat_template=CHAT_TEMPLATE
    )


def language_model(kind: str, hidden: int, vocabulary: int) -> nn.Module:
    """A text encoder of two or three layers."""
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 1, "head_dim": 8}
    if kind in ("t5", "umt5", "qwen3"):
        return text_encoder(kind, hidden, 0, vocabulary)
    if kind == "byt5":
        return text_encoder("t5", hidden, 0, vocabulary)
    if kind == "clip":
        special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        config = transformers.CLIPTextConfig(vocab_size=vocabulary, max_position_embeddings=77, **special, **sizes)
        return transformers.CLIPTextModel(config)
    if kind == "llama":  # its pipelines read the third last state
        config = transformers.LlamaConfig(vocab_size=vocabulary, **{**sizes, "num_hidden_layers": 3}, **heads)
        return transformers.LlamaModel(config)
    if kind == "gemma2":
        return transformers.Gemma2Model(transformers.Gemma2Config(vocab_size=vocabulary, **sizes, **heads))
    text: dict[str, Any]
    if kind == "gemma3":
        text = {"vocab_size": vocabulary, **sizes, **heads}
        config = transformers.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
        return transformers.Gemma3ForConditionalGeneration(config)
    if kind == "t5gemma":
        side = {"vocab_size": vocabulary, **sizes, **heads}
        config = transformers.T5GemmaConfig(encoder=side, decoder=side, is_encoder_decoder=False)
        return transformers.T5GemmaEncoderModel(config)
    if kind == "t5gemma2":
        text = {"vocab_size": vocabulary, "dropout_rate": 0.0, **sizes, **heads}
        config = transformers.T5Gemma2EncoderConfig(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
        return transformers.T5Gemma2Encoder(config)
    rope = {"rope_type": "default", "type": "default", "mrope_section": [2, 1, 1]}
    text = {"vocab_size": vocabulary, **sizes, "num_key_value_heads": 1, "rope_scaling": rope}
    if kind == "qwen2.5vl_text":
        config = transformers.Qwen2_5_VLConfig(text_config={**text, "num_hidden_layers": 3}).text_config
        return transformers.Qwen2_5_VLTextModel(config)
    if kind == "qwen2.5vl":
        eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": hidden}
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=eyes)
        return transformers.Qwen2_5_VLForConditionalGeneration(config)
    eyes = {"depth": 1, "embed_dim": 16, "hidden_size": hidden, "num_heads": 2}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=eyes)
    return transformers.Qwen2VLForConditionalGeneration(config)


def tokens(kind: str) -> Any:
    """The tokenizer of a kind of text encoder."""
    if kind == "byt5":
        return transformers.ByT5Tokenizer()
    return tokenizer(kind) if kind in ("clip", "t5", "umt5") else byte_tokenizer()


def components(parts: dict[str, Any]) -> dict[str, Any]:
    """The components of a pipeline besides denoiser and scheduler, with random weights."""
    made: dict[str, Any] = {}
    for name, (kind, *rest) in parts.items():
        if kind == "wan":
            made[name] = autoencoder("Wan", rest[0])
        elif kind == "bytes":
            made[name] = byte_tokenizer()
        elif isinstance(kind, str):
            words = made[name.replace("text_encoder", "tokenizer")] = tokens(kind)
            made[name] = language_model(kind, rest[0], len(words))
        elif isinstance(rest[0], dict):
            made[name] = kind(**rest[0])
        else:
            made[name] = kind(rest[0])
    return {name: part.eval() if isinstance(part, nn.Module) else part for name, part in made.items()}


@torch.no_grad()
def build_denoiser(name: str, seed: int = 0) -> Any:
    """The pipeline's denoiser in eval mode; parameters that start at zero are drawn normal(0, 0.05)."""
    class_name, config = PIPELINES[name]["denoiser"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(diffusers, class_name)(**config)
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05)
    return model.eval()


def build_pipeline(name: str, transformer: Any = None, seed: int = 0, **replaced: Any) -> Any:
    """The pipeline with ``transformer`` (or a fresh tiny one) as its denoiser; ``replaced`` are other components."""
    facts = PIPELINES[name]
    scheduler, arguments = facts["scheduler"]
    parts = {
        "transformer": build_denoiser(name, seed) if transformer is None else transformer,
        "scheduler": scheduler(**arguments),
        **facts.get("options", {}),
    }
    if facts.get("experts"):
        parts["transformer_2"] = build_denoiser(name, seed + 1)
    if name.startswith("Cosmos2"):
        parts["safety_checker"] = PassingChecker()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts.update(components(facts["parts"]))
    if "blocks" in facts:
        module, _, step = facts["blocks"].rpartition(".")
        blocks = getattr(importlib.import_module(f"diffusers.modular_pipelines.{module}"), step)
        pipe = blocks().init_pipeline()
        pipe.update_components(**{**parts, **replaced})
    else:
        pipe = getattr(diffusers, name.partition(":")[0])(**{**parts, **replaced})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_kwargs(name: str, guidance: bool = False) -> dict[str, Any]:
    """Arguments of a call at a tiny size, with classifier-free guidance or without; latents where they can be had."""
    facts = PIPELINES[name]
    extra = facts["guided" if guidance else "plain"]
    usual = {"output": facts["output"]} if "blocks" in facts else {"prompt": "a red fox", "output_type": "latent"}
    arguments = {**usual, **facts["call"], **extra}
    return {key: value for key, value in arguments.items() if value is not None and key != "guider"}


def denoiser_calls(name: str, guidance: bool = False) -> int:
    """How often a run of two steps calls its denoisers."""
    facts = PIPELINES[name]
    passes = 2 if guidance and facts["guidance"] == "second call" else 1
    return facts.get("calls", 2) * passes + facts.get("extra_calls", 0)


def sample(pipe: Any, name: str, steps: int = 2, seed: int = 0, guidance: bool = False, **overrides: Any) -> Tensor:
    """The latents of one seeded call (of the video, where there is audio too)."""
    arguments = call_kwargs(name, guidance)
    if name.startswith("MiniMaxH3"):  # counts the end of its grid as a step
        arguments["num_inference_steps"] = steps + 1
    elif name == "SanaWMLTX2Refiner":  # takes no number of steps; the last of its sigmas is dropped
        arguments["sigmas"] = tuple(np.linspace(0.909375, 0.0, steps + 1))
    else:
        arguments["num_inference_steps"] = steps
    scale = PIPELINES[name]["guided" if guidance else "plain"].get("guider")
    if scale is not None:
        pipe.guider.guidance_scale = scale
    # This one compiles the making of its attention mask, which takes longer than all the rest.
    eager = torch.compiler.set_stance("force_eager") if name.startswith("WanAnimate2") else contextlib.nullcontext()
    with eager:
        result = pipe(**{**arguments, **overrides}, generator=torch.Generator().manual_seed(seed))
    latents = result if isinstance(result, Tensor) or "blocks" in PIPELINES[name] else result[0]
    latents = latents[-1] if isinstance(latents, list) else latents
    return latents.float()
