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
LORA_TARGETS = (  # the last block has no output for its text, so nothing depends on that query
    r"(?!transformer_blocks\.3\.attn\.add_q_proj).*attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"|.*ff(_context)?\.net\.(0\.proj|2)"
    r"|.*norm1(_context)?\.linear|norm_out\.linear|proj_out"
    r"|time_text_embed\.timestep_embedder\.linear_[12]"
)


ONLINE, SHORT = "online_teacher", "short"

# The target mode of each phase of a recipe, and its steps. Without guidance a step of "meanflow" takes 0.79 of the time
# of one of "online_teacher", one of "onpolicy" 2.35 times it: so all recipes train for about as long. With guidance,
# which slows the teacher's rollout most, it is 0.64 and 1.76.
RECIPES: dict[str, tuple[tuple[str, int], ...]] = {
    "online": ((ONLINE, 760),),
    "forward": (("meanflow", 950),),
    "onpolicy": (("onpolicy", 320),),
    "full": (("meanflow", 530), ("onpolicy", 140)),
}


@dataclass(frozen=True)
class Recipe:
    """One distillation: ``name`` is of ``RECIPES``, ``steps`` None takes what that says; otherwise its phases share
    ``steps`` in the same ratio.

    online: steps alternate: a long one over intervals of any length, from noise for a ``noise_share`` of the rows and
    down to r = 0 for a ``zero_share`` of them, and a short one over intervals of at most ``short_interval`` in sigma,
    where the teacher needs fewer Euler steps and errors, which many-step sampling adds up, weigh ``short_weight`` times
    as much.
    forward: the forward stage, from the digits alone. onpolicy: distribution matching beside the forward loss, from
    the untrained student, on its samples of ``simulation_steps``: mostly of one step, of which there is most to learn.
    full: the forward stage, then the on-policy stage.
    """

    name: str = "online"
    steps: int | None = None
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
    diffusion_ratio: float = 0.3
    consistency_ratio: float = 0.3
    simulation_steps: tuple[int, ...] = (1, 1, 2)
    onpolicy_learning_rate: float = 7e-4
    critic_learning_rate: float = 2e-3
    dmd_weight: float = 0.5
    seed: int = 0

    @property
    def phases(self) -> tuple[tuple[str, int], ...]:
        """(target mode, steps)"""
        given = RECIPES[self.name]
        if self.steps is None:
            return given
        last = [
            round(self.steps * sum(n for _, n in given[: i + 1]) / sum(n for _, n in given)) for i in range(len(given))
        ]
        return tuple((mode, end - start) for (mode, _), start, end in zip(given, [0, *last], last, strict=False))

    @property
    def total_steps(self) -> int:
        return sum(steps for _, steps in self.phases)


def build_student(recipe: Recipe) -> SD3Transformer2DModel:
    """The teacher itself, patched, with a LoRA."""
    torch.manual_seed(recipe.seed)
    student = load_teacher()
    anyflow.patch(student, gate_value=recipe.gate_value)
    student.add_adapter(
        LoraConfig(r=recipe.lora_rank, lora_alpha=recipe.lora_rank, target_modules=LORA_TARGETS, lora_dropout=0.0)
    )
    return student


def distiller_config(recipe: Recipe, name: str) -> dict[str, Any]:
    """Of a target mode, or of the short intervals beside the long ones of the online teacher."""
    online = {"target_mode": ONLINE, "teacher_guidance_scale": recipe.guidance_scale}
    forward = {
        "target_mode": "meanflow",
        "schedule_shift": 1.0,
        "diffusion_ratio": recipe.diffusion_ratio,
        "consistency_ratio": recipe.consistency_ratio,
        "fuse_guidance_scale": recipe.guidance_scale,
        "meanflow_weight_type": "uniform",  # the others have no weight at sigma 1, where one step starts
        "seed": recipe.seed,
    }
    onpolicy = {
        "target_mode": "onpolicy",
        "real_guidance_scale": recipe.guidance_scale,
        "simulation_steps": recipe.simulation_steps,
        "dmd_weight": recipe.dmd_weight,
        "critic_learning_rate": recipe.critic_learning_rate,
        "critic_betas": (0.5, 0.99),
    }
    return {
        ONLINE: {**online, "teacher_rollout_steps": recipe.rollout_steps},
        SHORT: {
            **online,
            "teacher_rollout_steps": recipe.short_rollout_steps,
            "loss_weight": recipe.short_weight,
        },
        "meanflow": forward,
        "onpolicy": {**forward, **onpolicy},
    }[name]


class Distillation:
    """A resumable run: everything that a step changes is in ``save`` and comes back with ``load``."""

    def __init__(self, recipe: Recipe, data: Digits) -> None:
        self.recipe, self.data = recipe, data
        self.student = build_student(recipe)
        modes = [mode for mode, _ in recipe.phases]
        names = [*modes, SHORT] if ONLINE in modes else modes
        self.distillers = {
            name: anyflow.AnyFlowDistiller(self.student, config=distiller_config(recipe, name)) for name in names
        }
        self.named = next(iter(self.distillers.values())).trainable_parameters()
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

    @property
    def phase(self) -> tuple[str, int, int]:
        """Of the next step: the target mode, the phase's first step, and its steps. Of the last phase at the end."""
        first, (mode, steps) = 0, self.recipe.phases[0]
        for mode_after, steps_after in self.recipe.phases[1:]:
            if self.step < first + steps:
                break
            first, mode, steps = first + steps, mode_after, steps_after
        return mode, first, steps

    def data_batch(self) -> dict[str, Any]:
        """Digits, their noises and labels."""
        size = self.recipe.batch_size
        index = torch.randint(len(self.data.images), (size,), generator=self.generator)
        labels = self.data.labels[index]
        return {
            "latents": self.data.images[index],
            "noise": torch.randn(size, 1, 8, 8, generator=self.generator),
            "conditioning": conditioning(labels),
            "negative_conditioning": unconditional(labels),
        }

    def path_batch(self, short: bool) -> dict[str, Any]:
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
        mode, first, steps = self.phase
        done = self.step - first
        peak = self.recipe.onpolicy_learning_rate if mode == "onpolicy" else self.recipe.learning_rate
        rate = peak * min(1.0, (done + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * done / steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.student.train()
        online = mode == ONLINE
        short = online and self.step % 2 == 1
        distiller = self.distillers[SHORT if short else mode]
        batch = distiller.prepare_batch(self.path_batch(short) if online else self.data_batch(), self.student)
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
        if online:  # x_r = x_t - (t - r) u: the target itself says where the teacher's path goes on.
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
        """What the phase's distiller holds (student, critic), the optimizer, average and data stream; no pickle."""
        self.distillers[self.phase[0]].on_save_checkpoint(self.step, directory)
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
        self.step = int(metadata["step"])
        self.distillers[self.phase[0]].on_load_checkpoint(directory)
        self.generator.set_state(tensors["generator"])
        for key in PATH_STATE:
            setattr(self, key, tensors[key])
        for (name, parameter), kept in zip(self.named, self.average, strict=True):
            kept.copy_(tensors[f"average.{name}"])
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.optimizer.state[parameter] = {key: tensors[f"optimizer.{key}.{name}"] for key in keys}
        return True
