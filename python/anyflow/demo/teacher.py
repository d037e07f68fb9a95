"""The demo's teacher: a small class-conditional SD3 transformer, and the script that trained the shipped weights.

``python -m anyflow.demo.teacher --out FILE`` trains it again from the digits alone.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file

from .data import CLASSES, NULL_LABEL, conditioning, load_digits

SHIPPED_WEIGHTS = Path(__file__).with_name("teacher.safetensors")
CONFIG = {
    "sample_size": 8,
    "patch_size": 4,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 4,
    "attention_head_dim": 24,
    "num_attention_heads": 4,
    "joint_attention_dim": CLASSES + 1,
    "pooled_projection_dim": CLASSES + 1,
    "caption_projection_dim": 96,
    "pos_embed_max_size": 2,
}


def build_teacher() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(**CONFIG)


def load_teacher(path: Path = SHIPPED_WEIGHTS) -> SD3Transformer2DModel:
    """The shipped teacher, in evaluation mode. Its weights are stored as float16 and used as float32."""
    model = build_teacher()
    model.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
    return model.eval().requires_grad_(False)


def train_teacher(
    steps: int = 6000,
    batch_size: int = 128,
    peak_learning_rate: float = 2e-3,
    label_dropout: float = 0.1,
    seed: int = 0,
) -> SD3Transformer2DModel:
    """Flow matching (Lipman et al. 2023): regress noise - x0 at x = (1 - sigma) x0 + sigma noise, sigma uniform.
    Returns the exponential moving average of the weights."""
    from tqdm import tqdm

    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    data = load_digits()
    model = build_teacher().train()
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    warmup = 200
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    progress = tqdm(range(steps), desc="teacher", mininterval=1.0)
    for step in progress:
        index = torch.randint(len(data.images), (batch_size,), generator=generator)
        x0, labels = data.images[index], data.labels[index].clone()
        labels[torch.rand(batch_size, generator=generator) < label_dropout] = NULL_LABEL
        noise = torch.randn(x0.shape, generator=generator)
        sigma = torch.rand(batch_size, generator=generator)
        s = sigma.view(-1, 1, 1, 1)
        velocity = model((1 - s) * x0 + s * noise, timestep=1000 * sigma, **conditioning(labels), return_dict=False)[0]
        loss = (velocity - (noise - x0)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            for kept, current in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(current, 1 - decay)
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    return average.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=SHIPPED_WEIGHTS)
    parser.add_argument("--steps", type=int, default=6000)
    arguments = parser.parse_args()
    teacher = train_teacher(steps=arguments.steps)
    save_file({name: weight.half().contiguous() for name, weight in teacher.state_dict().items()}, arguments.out)


if __name__ == "__main__":
    main()
