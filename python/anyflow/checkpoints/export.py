"""Students in the formats of stock diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..patching import is_patched
from ..patching.patch import delta_paths
from ..patching.unwrap import unwrap
from ..sampling import AnyStepScheduler
from .files import new_directory, write_tensors
from .layers import adapter_configs, check_unmerged, flowmap_spec, lora_header, lora_scale, tuner_layers
from .plain import plain_state

LORA_FILE = "pytorch_lora_weights.safetensors"


def export_lora(model: Any, directory: str | Path, *, adapter: str | None = None) -> Path:
    """Write one LoRA of ``model`` as ``pipe.load_lora_weights(directory)`` finds it; returns the file.

    Configuration (rank, alpha, DoRA ...) is in the header, targets are listed by path. The delta embedders are no LoRA:
    ``load_student(model, directory, adapters=False)`` brings them, before or after the LoRA. On an unpatched pipeline,
    diffusers loads the layers that it knows, and warns of a LoRA on a delta embedder.
    ``adapter``: its name, where there are several.

    Raises ValueError when there is no such LoRA, when its scale was changed by ``set_adapters``, or when it trains more
    than low-rank layers and delta embedders (modules_to_save, biases): no LoRA file can hold that.
    """
    from peft import get_peft_model_state_dict

    bare = unwrap(model)
    check_unmerged(bare)
    name, config = _one_lora(bare, adapter)
    _check_scales(bare, name, config)
    tensors = get_peft_model_state_dict(bare, adapter_name=name)
    deltas = tuple(f"{path}." for path in (delta_paths(flowmap_spec(bare)) if is_patched(bare) else ()))
    other = sorted(key for key in tensors if ".lora_" not in key and not key.startswith(deltas))
    if other:
        raise ValueError(f"the adapter {name!r} trains {other}, which no LoRA file can hold: use save_student")
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items() if ".lora_" in key}
    path = Path(directory) / LORA_FILE
    component = "unet" if type(bare).__name__.startswith("UNet") else "transformer"
    write_tensors({path: stock_lora(tensors, config, component)})
    return path


def stock_lora(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], component: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a LoRA file of diffusers, for one component of a pipeline."""
    header = {"format": "pt", "lora_adapter_metadata": lora_header(tensors, config, f"{component}.")}
    return {f"{component}.{key}": tensor for key, tensor in tensors.items()}, header


def _one_lora(bare: nn.Module, adapter: str | None) -> tuple[str, dict[str, Any]]:
    configs = adapter_configs(bare)
    name = next(iter(configs), None) if adapter is None else adapter
    if name not in configs or (adapter is None and len(configs) > 1):
        raise ValueError(f"adapter={adapter!r}: name one of {sorted(configs)}")
    if configs[name]["peft_type"] != "LORA":
        raise ValueError(f"the adapter {name!r} is a {configs[name]['peft_type']}, not a LoRA: use save_student")
    return name, configs[name]


def _check_scales(bare: nn.Module, name: str, config: Mapping[str, Any]) -> None:
    """``set_adapters`` with weights changes the scales of layers, which no LoRA file holds."""
    for path, layer in tuner_layers(bare):
        if name not in getattr(layer, "scaling", {}):
            continue
        scale = lora_scale(layer.lora_alpha[name], layer.r[name], config)
        if abs(layer.scaling[name] - scale) > 1e-9 * abs(scale):
            raise ValueError(
                f"{path} has the adapter {name!r} at {layer.scaling[name] / scale:g} times its scale, which no LoRA "
                "file holds: set the weight of the adapter to 1"
            )


def export_pipeline(pipe: Any, directory: str | Path) -> Path:
    """Write a ``WanPipeline`` with a student as an ``AnyFlowPipeline``, which stock diffusers loads and samples.

    The transformer becomes an ``AnyFlowTransformer3DModel`` with every adapter merged (peft's kinds and LyCORIS), gate
    and type in its config; the scheduler a ``FlowMapEulerDiscreteScheduler`` of the same shift. Tensors keep their
    dtypes. The pipeline itself is not touched; at most one layer of it is copied at a time.

    In float32 the samples are those of ``any_step(pipe)`` but for rounding. ``from_pretrained(torch_dtype=bfloat16)``
    rounds the delta embedder, and the stock pipeline the latents between steps, where ours are float32.

    Raises ValueError for other pipelines (only Wan's text-to-video has a stock flow-map pipeline), for models that
    AnyFlow's class cannot hold (image-to-video, two denoisers), and for schedulers whose shift depends on the
    resolution; FileExistsError when ``directory`` is not empty. Nothing appears at ``directory`` before it is complete.
    """
    from diffusers import AnyFlowPipeline

    bare = _wan_student(pipe)
    parts = {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "vae")}
    exported = AnyFlowPipeline(transformer=_flow_map_model(bare), scheduler=_flow_map_scheduler(pipe, bare), **parts)
    with new_directory(Path(directory)) as temporary:
        exported.save_pretrained(temporary)
    return Path(directory)


def _wan_student(pipe: Any) -> nn.Module:
    bare = unwrap(pipe.transformer) if getattr(pipe, "transformer", None) is not None else None
    if type(pipe).__name__ != "WanPipeline" or bare is None or type(bare).__name__ != "WanTransformer3DModel":
        held = "" if bare is None else f" with a {type(bare).__name__}"
        raise ValueError(f"{type(pipe).__name__}{held}: of stock pipelines only Wan text-to-video has a flow-map one")
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError("this pipeline has two denoisers, AnyFlowPipeline has one")
    if not is_patched(bare):
        raise ValueError("the transformer is not patched; there is no student to export")
    config: Any = bare.config
    other = {key: config.get(key) for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len") if config.get(key)}
    if config.get("qk_norm") != "rms_norm_across_heads":
        other["qk_norm"] = config.get("qk_norm")
    if other:
        raise ValueError(f"AnyFlowTransformer3DModel has no place for the image or norm layers of a Wan with {other}")
    return bare


def _flow_map_model(bare: nn.Module) -> nn.Module:
    from diffusers import AnyFlowTransformer3DModel

    settings: Any = bare._flowmap
    config: Any = bare.config
    known = {key for key in AnyFlowTransformer3DModel._get_init_keys(AnyFlowTransformer3DModel) if key in config}
    conditioning = {"gate_value": settings.gate_value, "deltatime_type": settings.deltatime_type}
    with torch.device("meta"):
        model = AnyFlowTransformer3DModel(**{key: config[key] for key in known}, **conditioning)
    model.load_state_dict(plain_state(bare), strict=True, assign=True)
    return model.eval()


def _flow_map_scheduler(pipe: Any, bare: nn.Module) -> Any:
    from diffusers import FlowMapEulerDiscreteScheduler

    like = AnyStepScheduler.like(pipe.scheduler)
    steps = like.config.num_train_timesteps
    if like.config.use_dynamic_shifting:
        raise ValueError(
            "the shift of this scheduler depends on the resolution, FlowMapEulerDiscreteScheduler's cannot"
        )
    spec = flowmap_spec(bare)
    if (spec.time_scale, spec.time_offset) != (steps, 0.0):
        raise ValueError(f"the student takes time as {spec.time_scale} sigma, AnyFlowPipeline gives {steps} sigma")
    return FlowMapEulerDiscreteScheduler(num_train_timesteps=steps, shift=like.shift)
