"""Sampling teacher and student from the same noises, and the figures of merit."""

from __future__ import annotations

import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..checkpoints import read, write_atomically
from ..time import sigma_grid
from .data import Digits, PCASpace, conditioning, load_digits, rmse, unconditional
from .teacher import load_teacher

SAMPLES = 1000
REFERENCE_STEPS = 64
TEACHER_STEPS = (1, 2, 4, 8, 16, 32)
STUDENT_STEPS = (1, 2, 4, 8, 16)


def evaluation_inputs(data: Digits, samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    """The same noises [samples, 1, 8, 8] and labels [samples] for every model and every run."""
    generator = torch.Generator().manual_seed(1234)
    noise = torch.randn(samples, 1, 8, 8, generator=generator)
    return noise, data.labels[torch.randint(len(data.labels), (samples,), generator=generator)]


@torch.no_grad()
def sample_teacher(teacher: Any, noise: Tensor, labels: Tensor, steps: int, guidance_scale: float) -> Tensor:
    """Euler steps of the guided teacher: two forwards a step, as one batch."""
    sigmas, x = sigma_grid(steps), noise
    both = {key: torch.cat([value, unconditional(labels)[key]]) for key, value in conditioning(labels).items()}
    for sigma, following in pairwise(sigmas):
        time = 1000 * sigma.expand(2 * len(x))
        v_cond, v_uncond = teacher(x.repeat(2, 1, 1, 1), timestep=time, **both, return_dict=False)[0].chunk(2)
        x = x + (following - sigma) * (v_uncond + guidance_scale * (v_cond - v_uncond))
    return x


@torch.no_grad()
def sample_student(student: Any, noise: Tensor, labels: Tensor, steps: int) -> Tensor:
    """Flow-map steps x_r = x_t - (sigma_t - sigma_r) u(x_t, t, r): one forward a step, no guidance."""
    sigmas, x = sigma_grid(steps), noise
    for sigma, following in pairwise(sigmas):
        t, r = (1000 * s.expand(len(x)) for s in (sigma, following))
        u = student(x, timestep=t, r_timestep=r, **conditioning(labels), return_dict=False)[0]
        x = x - (sigma - following) * u
    return x


def write_teacher_samples(path: Path, guidance_scale: float, samples: int) -> None:
    """The teacher's samples at every number of steps, the reference's included, to ``path``; once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C, and takes this process with it
    identity = repr((guidance_scale, samples, TEACHER_STEPS, REFERENCE_STEPS))
    if path.exists() and read(path)[1].get("identity") == identity:
        return
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    noise, labels = evaluation_inputs(load_digits(), samples)
    teacher = load_teacher()
    images = {
        str(steps): sample_teacher(teacher, noise, labels, steps, guidance_scale)
        for steps in (*TEACHER_STEPS, REFERENCE_STEPS)
    }
    write_atomically(path, save(images, {"identity": identity}))


def figures(images: Tensor, reference: Tensor, space: PCASpace) -> dict[str, float]:
    """{"rmse": to ``reference``, "fd": to the data}"""
    return {"rmse": rmse(images, reference), "fd": space.frechet_distance(images)}
