"""The demo's training loop: what a user's own trainer does around ``AnyFlowDistiller``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from safetensors.torch import save
from torch import Tensor

import anyflow

from ..checkpoints import read, write_atomically
from ..distiller import STATE_FILE
from .data import Digits, conditioning, unconditional
from .teacher import load_teacher

TRAINER_FILE = "trainer.safetensors"
PATH_STATE = ("x", "sigmas", "labels")
FINISHED = 0.02  # in sigma: below it a path has arrived
LONGEST_R = 0.98  # of t: an interval has a length
LORA_TARGETS = (
    r".*attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"|.*ff(_context)?\.net\.(0\.proj|2)"
    r"|.*norm1(_context)?\.linear|norm_out\.linear|proj_out"
    r"|time_text_embed\.timestep_embedder\.linear_[12]"
)


@dataclass(frozen=True)
class Recipe:
    """One distillation.

    Steps alternate: a long one over intervals of any length, from noise for a ``noise_share`` of the rows and down to
    r = 0 for a ``zero_share`` of them, and a short one over intervals of at most ``short_interval`` in sigma, where the
    teacher needs fewer Euler steps and errors, which many-step sampling adds up, weigh ``short_weight`` times as much.
    """

    steps: int = 760
    batch_size: int = 64
    learning_rate: float = 3e-3
    lora_rank: int = 64
    guidance_scale: float = 1.5
    gate_value: float = 0.25
    rollout_steps: int = 8
    short_rollout_steps: int = 4
    short_interval: float = 0.1
    short_weight: float = 2.0
    noise_share: float = 0.6
    zero_share: float = 0.15
    seed: int = 0


def build_student(recipe: Recipe) -> SD3Transformer2DModel:
    """The teacher itself, patched, with a LoRA."""
    torch.manual_seed(recipe.seed)
    student = load_teacher()
    anyflow.patch(student, gate_value=recipe.gate_value)
    student.add_adapter(
        LoraConfig(r=recipe.lora_rank, lora_alpha=recipe.lora_rank, target_modules=LORA_TARGETS, lora_dropout=0.0)
    )
    return student


class Distillation:
    """A resumable run: everything that a step changes is in ``save`` and comes back with ``load``."""

    def __init__(self, recipe: Recipe, data: Digits) -> None:
        self.recipe, self.data = recipe, data
        self.student = build_student(recipe)
        self.distiller, self.short_distiller = (
            anyflow.AnyFlowDistiller(
                self.student,
                config={
                    "target_mode": "online_teacher",
                    "teacher_rollout_steps": rollout_steps,
                    "teacher_guidance_scale": recipe.guidance_scale,
                    "loss_weight": weight,
                },
            )
            for rollout_steps, weight in (
                (recipe.rollout_steps, 1.0),
                (recipe.short_rollout_steps, recipe.short_weight),
            )
        )
        self.named = self.distiller.trainable_parameters()
        self.parameters = [parameter for _, parameter in self.named]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.step = 0
        # Where the rows of the last batch ended: nowhere yet, so all of them start from noise.
        self.x = torch.zeros(recipe.batch_size, 1, 8, 8)
        self.sigmas = torch.zeros(recipe.batch_size)
        self.labels = torch.zeros(recipe.batch_size, dtype=torch.long)

    def batch(self, short: bool) -> dict[str, Any]:
        """The teacher's own paths: each row goes on from where the last target took it, or starts again from noise."""
        size, generator = self.recipe.batch_size, self.generator
        noise = torch.randn(size, 1, 8, 8, generator=generator)
        index = torch.randint(len(self.data.images), (size,), generator=generator)
        u, v, w = torch.rand(3, size, generator=generator)
        restart = (self.sigmas < FINISHED) | ((u < self.recipe.noise_share) & (not short))
        self.labels = torch.where(restart, self.data.labels[index], self.labels)
        self.sigmas = torch.where(restart, 1.0, self.sigmas)
        self.x = torch.where(restart.view(-1, 1, 1, 1), noise, self.x)
        if short:
            r = (self.sigmas - self.recipe.short_interval * v).clamp_min(0.0)
            r = torch.minimum(r, LONGEST_R * self.sigmas)
        else:
            r = torch.where(w < self.recipe.zero_share, 0.0, LONGEST_R * self.sigmas * v)
        return {
            "latents": self.data.images[index],
            "noise": noise,
            "noisy_latents": self.x,
            "sigmas": self.sigmas,
            "r_sigmas": r,
            "conditioning": conditioning(self.labels),
            "negative_conditioning": unconditional(self.labels),
        }

    def train_step(self) -> float:
        progress = self.step / self.recipe.steps
        rate = self.recipe.learning_rate * min(1.0, (self.step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.student.train()
        short = self.step % 2 == 1
        distiller = self.short_distiller if short else self.distiller
        batch = distiller.prepare_batch(self.batch(short))
        velocity = self.student(
            batch["noisy_latents"],
            timestep=batch["timesteps"],
            r_timestep=batch["flowmap_r_timesteps"],
            **batch["conditioning"],
            return_dict=False,
        )[0]
        loss, _ = distiller.compute_distill_loss(batch, velocity)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # x_r = x_t - (t - r) u: the target itself says where the teacher's path goes on.
        self.x = self.x - batch["anyflow_timestep_interval"].view(-1, 1, 1, 1) * batch["target"]
        self.sigmas = batch["anyflow_r_sigmas"]
        self.step += 1
        decay = min(0.99, self.step / (self.step + 10))
        for kept, parameter in zip(self.average, self.parameters, strict=True):
            kept.lerp_(parameter.detach(), 1 - decay)
        return loss.item()

    def averaged_student(self) -> SD3Transformer2DModel:
        """The student with the moving average of its trained weights, in evaluation mode. Ends the run."""
        with torch.no_grad():
            for kept, parameter in zip(self.average, self.parameters, strict=True):
                parameter.copy_(kept)
        return self.student.eval()

    def save(self, directory: Path) -> None:
        """The student through the distiller, then the optimizer, the average and the data stream; no pickle."""
        self.distiller.on_save_checkpoint(self.step, directory)
        tensors: dict[str, Tensor] = {key: getattr(self, key) for key in PATH_STATE}
        tensors["generator"] = self.generator.get_state()
        for (name, parameter), kept in zip(self.named, self.average, strict=True):
            tensors[f"average.{name}"] = kept
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        write_atomically(directory / TRAINER_FILE, save(tensors, {"step": str(self.step), "recipe": repr(self.recipe)}))

    def load(self, directory: Path) -> bool:
        """Continue from ``directory``; False when it holds no checkpoint of this recipe."""
        try:
            tensors, metadata = read(directory / TRAINER_FILE)
        except FileNotFoundError:
            return False
        # A run killed between the two files has a student of a later step: start over rather than mix them.
        _, student_metadata = read(directory / STATE_FILE)
        if metadata.get("recipe") != repr(self.recipe) or student_metadata.get("step") != metadata["step"]:
            return False
        self.step = self.distiller.on_load_checkpoint(directory)
        self.generator.set_state(tensors["generator"])
        for key in PATH_STATE:
            setattr(self, key, tensors[key])
        for (name, parameter), kept in zip(self.named, self.average, strict=True):
            kept.copy_(tensors[f"average.{name}"])
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.optimizer.state[parameter] = {key: tensors[f"optimizer.{key}.{name}"] for key in keys}
        return True
