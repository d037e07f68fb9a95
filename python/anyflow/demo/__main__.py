"""``python -m anyflow.demo``: distil the digits teacher, sample it at every number of steps, report."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..checkpoints import read, save_student, write_atomically
from .data import PCASpace, load_digits
from .distil import RECIPES, Distillation, Recipe
from .evaluate import (
    REFERENCE_STEPS,
    STUDENT_STEPS,
    TEACHER_STEPS,
    evaluation_inputs,
    figures,
    sample_student,
    write_teacher_samples,
)
from .plots import plot_quality, plot_samples
from .teacher import load_teacher

RESUME_EVERY = 100  # steps between checkpoints


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m anyflow.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="output folder (default: runs/demo)")
    parser.add_argument(
        "--recipe", choices=[*RECIPES, "all"], default="online", help="training stages (default: online)"
    )
    parser.add_argument("--steps", type=int, help="training steps (default: those of the recipe)")
    parser.add_argument(
        "--guidance",
        type=float,
        default=Recipe.guidance_scale,
        help=f"guidance scale of the teacher, 1 is none (default: {Recipe.guidance_scale})",
    )
    parser.add_argument("--samples", type=int, default=1000, help="samples of the evaluation (default: 1000)")
    arguments = parser.parse_args()
    if (arguments.steps is not None and arguments.steps < 1) or arguments.samples < 32:
        parser.error("--steps must be at least 1, --samples at least 32")
    if not 0.0 < arguments.guidance < math.inf:
        parser.error("--guidance must be above 0")
    try:
        for name in RECIPES if arguments.recipe == "all" else [arguments.recipe]:
            recipe = Recipe(name, arguments.steps, guidance_scale=arguments.guidance)
            run(arguments.out / name, recipe, arguments.samples)
        _print_all(arguments.out, arguments.guidance, arguments.samples)
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command continues from {arguments.out}", file=sys.stderr)
        return 130
    return 0


def run(out: Path, recipe: Recipe, samples: int) -> dict[str, Any]:
    """Distil (or continue, or take what is finished in ``out``), evaluate, write results and pictures."""
    out.mkdir(parents=True, exist_ok=True)
    identity = repr((recipe, samples))
    finished = _finished(out, identity)
    if finished is not None:
        print(f"{out} is finished; remove it to run again")
        _print_table(finished)
        return finished
    data = load_digits()
    noise, labels = evaluation_inputs(data, samples)

    # The teacher is sampled in a process of its own beside the training: these are small networks, of which one more
    # process makes better use of the cores than more threads do.
    teacher_file = out.parent / "teacher_samples.safetensors"  # the same for every recipe
    sampling = multiprocessing.get_context("spawn").Process(
        target=write_teacher_samples, args=(teacher_file, recipe.guidance_scale, samples), daemon=True
    )
    sampling.start()
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    started = time.perf_counter()
    distillation = Distillation(recipe, data)
    _distil(distillation, out / "checkpoint")
    student = distillation.averaged_student()
    save_student(student, out / "student")
    seconds = {"distillation": round(time.perf_counter() - started, 1)}

    started = time.perf_counter()
    sampling.join()
    if sampling.exitcode:
        raise RuntimeError(f"sampling the teacher ended with exit code {sampling.exitcode}")
    torch.set_num_threads(threads)
    teacher_images, _ = read(teacher_file)
    reference = teacher_images.pop(str(REFERENCE_STEPS))
    student_images = {str(n): sample_student(student, noise, labels, n) for n in tqdm(STUDENT_STEPS, desc="evaluation")}
    seconds["evaluation"] = round(time.perf_counter() - started, 1)

    space = PCASpace.of(data.images)
    results = {
        "recipe": recipe.name,
        "guidance_scale": recipe.guidance_scale,
        "steps": recipe.total_steps,
        "samples": samples,
        "teacher": {str(n): figures(teacher_images[str(n)], reference, space) for n in TEACHER_STEPS},
        "student": {n: figures(images, reference, space) for n, images in student_images.items()},
        "seconds": seconds,
        "trainable_parameters": sum(parameter.numel() for parameter in distillation.parameters),
        "teacher_parameters": sum(parameter.numel() for parameter in load_teacher().parameters()),
        "reference": {"steps": REFERENCE_STEPS, "fd": space.frechet_distance(reference)},
        "identity": identity,
    }
    plot_samples(out / "samples.png", teacher_images, student_images, labels)
    plot_quality(out / "quality.png", results)
    write_atomically(out / "results.json", json.dumps(results, indent=2).encode())
    _print_table(results)
    return results


def _distil(distillation: Distillation, checkpoint: Path) -> None:
    """Train to the end; a checkpoint every so often, and on Ctrl-C before the interrupt goes on."""
    if distillation.load(checkpoint):
        print(f"continuing from step {distillation.step}")
    total = distillation.recipe.total_steps
    with (
        _interrupt_noted() as interrupted,
        tqdm(total=total, initial=distillation.step, desc="distillation", unit="step") as progress,
    ):
        while distillation.step < total:
            loss = distillation.train_step()
            progress.update()
            progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
            if interrupted() or distillation.step % RESUME_EVERY == 0 or distillation.step == total:
                distillation.save(checkpoint)
            if interrupted():
                raise KeyboardInterrupt


@contextmanager
def _interrupt_noted() -> Iterator[Callable[[], bool]]:
    """Ctrl-C inside the block is noted, not raised: amid a step it would leave the optimizer between two states."""
    came = False

    def note(*_: Any) -> None:
        nonlocal came
        came = True

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, previous)


def _finished(out: Path, identity: str) -> dict[str, Any] | None:
    """The results of an earlier run of the same recipe, when all of its files are there."""
    files = [out / name for name in ("results.json", "samples.png", "quality.png")]
    if not all(file.exists() for file in files):
        return None
    results = json.loads(files[0].read_text())
    return results if results.get("identity") == identity else None


def _print_table(results: dict[str, Any]) -> None:
    print(f"\n{'steps':>6}{'teacher rmse':>14}{'student rmse':>14}{'teacher fd':>13}{'student fd':>13}")
    for steps, teacher in results["teacher"].items():
        student = results["student"].get(steps)
        row = (teacher["rmse"], student and student["rmse"], teacher["fd"], student and student["fd"])
        cells = ["-" if value is None else f"{value:.3f}" for value in row]
        print(f"{steps:>6}{cells[0]:>14}{cells[1]:>14}{cells[2]:>13}{cells[3]:>13}")
    seconds = ", ".join(f"{name} {value} s" for name, value in results["seconds"].items())
    print(f"{results['trainable_parameters']} trainable parameters; {seconds}")


def _print_all(out: Path, guidance: float, samples: int) -> None:
    """The students of all recipes that are finished in ``out``, side by side; nothing where there is only one."""
    files = [out / name / "results.json" for name in RECIPES]
    found = [json.loads(file.read_text()) for file in files if file.exists()]
    results = [one for one in found if (one["guidance_scale"], one["samples"]) == (guidance, samples)]
    if len(results) < 2:
        return
    for key in ("fd", "rmse"):
        print(f"\n{key:>8}" + "".join(f"{one['recipe']:>12}" for one in results))
        for n in map(str, STUDENT_STEPS):
            print(f"{n:>8}" + "".join(f"{one['student'][n][key]:>12.3f}" for one in results))
    print(f"{'trained':>8}" + "".join(f"{one['seconds']['distillation']:>10} s" for one in results))


if __name__ == "__main__":
    sys.exit(main())
