"""The main job, small: the same code on fewer steps and samples, interrupted and continued."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import anyflow.demo.__main__ as demo
from anyflow.checkpoints import read
from anyflow.demo.data import PCASpace, conditioning, load_digits, rmse, unconditional
from anyflow.demo.distil import RECIPES, Distillation, Recipe
from anyflow.demo.evaluate import evaluation_inputs, sample_student, sample_teacher
from anyflow.demo.teacher import load_teacher


def small(name: str, steps: int = 4) -> Recipe:
    return Recipe(name, steps=steps, batch_size=8)


def test_digits_and_conditioning() -> None:
    data = load_digits()
    assert data.images.shape == (1797, 1, 8, 8) and data.images.min() == -1 and data.images.max() == 1
    assert sorted(set(data.labels.tolist())) == list(range(10))
    given, null = conditioning(torch.tensor([3])), unconditional(torch.tensor([3]))
    assert given["pooled_projections"].argmax() == 3 and null["pooled_projections"].argmax() == 10


def test_frechet_distance() -> None:
    """Zero to itself; the squared shift of the mean for a shifted copy (the covariance is the same)."""
    data = load_digits()
    space = PCASpace.of(data.images)
    assert space.frechet_distance(data.images) == pytest.approx(0.0, abs=1e-6)
    direction = torch.from_numpy(space.axes[0]).float().reshape(1, 1, 8, 8)
    assert space.frechet_distance(data.images + 0.5 * direction) == pytest.approx(0.25, abs=1e-5)


def test_shipped_teacher_is_a_good_one() -> None:
    data = load_digits()
    noise, labels = evaluation_inputs(data, 1000)
    images = sample_teacher(load_teacher(), noise, labels, 16, Recipe.guidance_scale)
    assert PCASpace.of(data.images).frechet_distance(images) <= 0.7


def test_an_untrained_student_is_the_unguided_teacher() -> None:
    """With a fresh clone, gate 0 and LoRA at its zero start, flow-map steps are the teacher's Euler steps."""
    run = Distillation(Recipe(steps=1, batch_size=4, gate_value=0.0), load_digits())
    noise, labels = evaluation_inputs(load_digits(), 32)
    student = sample_student(run.student.eval(), noise, labels, 4)
    assert rmse(student, sample_teacher(load_teacher(), noise, labels, 4, 1.0)) < 1e-5


@pytest.mark.parametrize(
    ("name", "steps", "after"),
    [("online", 6, 2), ("forward", 6, 2), ("onpolicy", 6, 2), ("full", 12, 2), ("full", 12, 10), ("full", 12, 11)],
)
def test_a_resumed_run_is_the_same_to_the_bit(name: str, steps: int, after: int, tmp_path: Path) -> None:
    """Of the 12 steps of "full", 10 are of the forward stage: resumed within it, at the change, and after it."""
    data = load_digits()
    recipe = small(name, steps)
    whole, first = Distillation(recipe, data), Distillation(recipe, data)
    for _ in range(steps):
        whole.train_step()
    for _ in range(after):
        first.train_step()
    first.save(tmp_path)
    torch.manual_seed(99)
    second = Distillation(recipe, data)
    assert second.load(tmp_path) and second.step == after
    for _ in range(steps - after):
        second.train_step()
    for a, b in zip(whole.parameters, second.parameters, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.average, second.average, strict=True):
        assert torch.equal(a, b)
    other = Distillation(small(name, steps - 1), data)
    assert not other.load(tmp_path)
    assert not other.load(tmp_path / "nothing")


def test_steps_of_the_phases() -> None:
    assert Recipe("full").phases == RECIPES["full"]
    for steps in (1, 2, 7, 100):
        assert [mode for mode, _ in Recipe("full", steps).phases] == ["meanflow", "onpolicy"]
        assert Recipe("full", steps).total_steps == steps


def test_each_recipe_runs_and_is_listed_beside_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in RECIPES:
        results = demo.run(tmp_path / name, small(name), 32)
        assert results["recipe"] == name and results["steps"] == 4
        assert json.loads((tmp_path / name / "results.json").read_text())["recipe"] == name
        student, _ = read(tmp_path / name / "student" / "anyflow_student.safetensors")
        assert not any("critic" in key for key in student)
        capsys.readouterr()
        demo._print_all(tmp_path, Recipe.guidance_scale, 32)
        listed = [line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["fd"]]
        done = list(RECIPES)[: list(RECIPES).index(name) + 1]
        assert listed == ([done] if len(done) > 1 else [])
    demo._print_all(tmp_path, 1.0, 32)  # of another guidance there is none
    assert not capsys.readouterr().out


def command(out: Path, steps: int) -> list[str]:
    return [sys.executable, "-m", "anyflow.demo", "--out", str(out), "--steps", str(steps), "--samples", "32"]


def test_interrupt_resume_and_second_run(tmp_path: Path) -> None:
    base = tmp_path / "demo"
    out = base / "online"
    steps = 30
    process = subprocess.Popen(command(base, steps), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    assert process.stderr is not None
    while time.monotonic() < deadline:
        if "distillation:   3%" in process.stderr.readline(4096) or process.poll() is not None:
            break
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command continues" in error
    assert (out / "checkpoint").is_dir() and not (out / "results.json").exists()

    finished = subprocess.run(command(base, steps), capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "continuing from step" in finished.stdout and "teacher rmse" in finished.stdout
    results = json.loads((out / "results.json").read_text())
    assert list(results["teacher"]) == ["1", "2", "4", "8", "16", "32"]
    assert list(results["student"]) == ["1", "2", "4", "8", "16"]
    assert all(set(row) == {"rmse", "fd"} for rows in (results["teacher"], results["student"]) for row in rows.values())
    assert results["trainable_parameters"] > 0 and set(results["seconds"]) == {"distillation", "evaluation"}
    for name in ("samples.png", "quality.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert (out / "student" / "anyflow_student.safetensors").exists()

    again = subprocess.run(command(base, steps), capture_output=True, text=True, timeout=30, check=False)
    assert again.returncode == 0 and "is finished" in again.stdout and "teacher rmse" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--steps", "0"], "--steps must be at least 1"), (["--guidance", "0"], "--guidance must be above 0")],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "anyflow.demo", *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and message in result.stderr
