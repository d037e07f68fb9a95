"""Small models with a LoRA, and a whole distillation step of each, with AnyFlow and in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from peft import LoraConfig
from torch import Tensor

import anyflow

from .baselines import distillation

GATE, GUIDANCE, ROLLOUT_STEPS = 0.25, 3.0, 4
# Of the loss, relative to plain PyTorch's. float32: another order of sums. bfloat16: guidance in float32, not there.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Model:
    name: str
    class_name: str
    config: Mapping[str, Any]
    inputs: Mapping[str, tuple[int, ...]]  # of the forward, beside the time; the latents are hidden_states
    embedder: str
    projection: str
    level: str = "full"

    def build(self, device: str, dtype: torch.dtype) -> Any:
        torch.manual_seed(0)
        model = getattr(diffusers, self.class_name)(**self.config).to(device, dtype)
        return model.requires_grad_(False)

    def batch(self, device: str, dtype: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        rows = self.inputs["hidden_states"][0]

        def draw() -> dict[str, Tensor]:
            drawn = {name: torch.randn(shape, generator=generator) for name, shape in self.inputs.items()}
            return {name: tensor.to(device, dtype) for name, tensor in drawn.items()}

        conditioning, negative = draw(), draw()
        latents, noise = conditioning.pop("hidden_states"), negative.pop("hidden_states")
        sigmas = torch.linspace(0.9, 0.6, rows, device=device)
        return {
            "latents": latents,
            "noise": noise,
            "sigmas": sigmas,
            "r_sigmas": 0.3 * sigmas,
            "conditioning": conditioning,
            "negative_conditioning": negative,
        }


def _lora() -> LoraConfig:
    """Both of its matrices random, so that teacher and student differ from the first step."""
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    return LoraConfig(r=8, lora_alpha=8, target_modules=targets, init_lora_weights=False)


def _stepper(model: Any, parameters: list[Tensor], loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def with_anyflow(model: Model, device: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A step: forward, backward, optimizer; returns its loss."""
    network, batch = model.build(device, dtype), model.batch(device, dtype)
    anyflow.patch(network, gate_value=GATE)
    torch.manual_seed(1)
    network.add_adapter(_lora())
    config = {"teacher_rollout_steps": ROLLOUT_STEPS, "teacher_guidance_scale": GUIDANCE, "gate_value": GATE}
    distiller = anyflow.AnyFlowDistiller(network, config=config)
    network.train()
    parameters: list[Tensor] = [parameter for _, parameter in distiller.trainable_parameters()]
    return _stepper(network, parameters, lambda: distiller.training_step(batch)[0])


def with_plain_pytorch(model: Model, device: str, dtype: torch.dtype, compiled: bool = False) -> Callable[[], Tensor]:
    network, batch = model.build(device, dtype), model.batch(device, dtype)
    embedder = distillation.add_second_time(network, model.embedder, model.projection, GATE)
    torch.manual_seed(1)
    network.add_adapter(_lora())
    embedder.delta.requires_grad_(True)
    network.train()
    if compiled:
        network.compile(dynamic=False)
    parameters: list[Tensor] = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return _stepper(
        network, parameters, lambda: distillation.training_step(network, embedder, batch, ROLLOUT_STEPS, GUIDANCE)
    )


def _wan(
    name: str, level: str, heads: int, head_dim: int, layers: int, channels: int, latents: tuple[int, ...]
) -> Model:
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "num_layers": layers,
        "in_channels": channels,
        "out_channels": channels,
        "text_dim": 64,
        "ffn_dim": 4 * heads * head_dim,
        "rope_max_seq_len": 64,
    }
    inputs = {"hidden_states": (1, channels, *latents), "encoder_hidden_states": (1, 32, 64)}
    paths = ("condition_embedder.time_embedder", "condition_embedder.timesteps_proj")
    return Model(name, "WanTransformer3DModel", config, inputs, *paths, level)


def _sd3(name: str, level: str, heads: int, head_dim: int, layers: int, side: int) -> Model:
    config = {
        "sample_size": side,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "num_layers": layers,
        "in_channels": 16,
        "out_channels": 16,
        "caption_projection_dim": heads * head_dim,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": side,
    }
    inputs = {
        "hidden_states": (2, 16, side, side),
        "encoder_hidden_states": (2, 32, 64),
        "pooled_projections": (2, 64),
    }
    paths = ("time_text_embed.timestep_embedder", "time_text_embed.time_proj")
    return Model(name, "SD3Transformer2DModel", config, inputs, *paths, level)


MODELS = (
    _wan("tiny Wan", "smallest", 2, 12, 2, 4, (2, 8, 8)),
    _wan("small Wan", "default", 4, 64, 4, 16, (5, 16, 26)),
    _sd3("tiny SD3", "default", 4, 8, 2, 16),
    _sd3("small SD3", "default", 4, 64, 4, 32),
)
