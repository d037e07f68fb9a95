"""Killed during a save, a process leaves a checkpoint that can be read: the last one, or the new one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import students
import tiny_models
from safetensors.torch import load_file
from students import SD3

import anyflow
from anyflow.checkpoints import EMA_FILE, STUDENT_FILE

# One process imports; each trial is a fork of it that is killed by SIGKILL, and its parent looks at what is left.
# In the first half, a trial kills itself at the n-th call that a save makes; in the second, its parent kills it at a
# random time while it saves over and over, files so large that most of the time goes into writing.
SCRIPT = """
import json, os, random, signal, sys, time
sys.path[:0] = json.loads(sys.argv[2])
import torch
from safetensors.torch import load_file
import adapter_kinds, anyflow
from anyflow.checkpoints import EMA_FILE, STUDENT_FILE
torch.set_num_threads(1)
directory = sys.argv[1]

def student(value):
    held, _ = adapter_kinds.student("SD3Transformer2DModel", "lora")
    with torch.no_grad():
        for tensor in held.state_dict().values():
            tensor.fill_(value)
    return held

def versions():
    found = []
    for name in (STUDENT_FILE, EMA_FILE):
        values = {v for t in load_file(os.path.join(directory, name)).values() for v in t.unique().tolist()}
        assert len(values) == 1, (name, values)
        found += values
    return found

def killed(run):
    child = os.fork()
    if child == 0:
        run()
        os._exit(3)
    return child

def count(frame, event, argument):
    if event in ("call", "c_call", "c_return"):
        count.left -= 1
        if count.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

old, new = student(0.0), student(1.0)
points, seen = 0, []
def save_until(point):
    count.left = point
    sys.setprofile(count)
    anyflow.save_student(new, directory, ema=new)
    sys.setprofile(None)

def calls():
    count.left = 10**9
    sys.setprofile(count)
    anyflow.save_student(old, directory, ema=old)
    sys.setprofile(None)
    return 10**9 - count.left

total = calls()
tail = range(total - 160, total + 1, 6)  # the files are written in the last calls
for point in [*range(1, total - 160, total // 5), *tail]:
    anyflow.save_student(old, directory, ema=old)
    _, status = os.waitpid(killed(lambda: save_until(point)), 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL or os.WEXITSTATUS(status) == 3, status
    points += os.WIFSIGNALED(status)
    seen.append(versions())

random.seed(0)
large = {v: [torch.full((300_000,), v) for _ in range(3)] for v in (2.0, 3.0)}
for module, value in ((old, 2.0), (new, 3.0)):
    for i, tensor in enumerate(large[value]):
        module.time_text_embed.delta_embedder.register_parameter(f"extra_{i}", torch.nn.Parameter(tensor))
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.fill_(value)

def save_for_ever():
    while True:
        for module in (old, new):
            anyflow.save_student(module, directory, ema=module)

anyflow.save_student(old, directory, ema=old)
timed = []
for _ in range(10):
    child = killed(save_for_ever)
    time.sleep(random.uniform(0.02, 0.3))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    timed.append(versions())
print(json.dumps({"points": points, "seen": seen, "timed": timed}))
"""


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> dict:
    directory = tmp_path_factory.mktemp("killed")
    paths = json.dumps([str(Path(__file__).parent)])
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(directory), paths]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return {**json.loads(result.stdout.splitlines()[-1]), "directory": directory}


def test_killed_at_every_call_of_a_save(trials: dict) -> None:
    assert trials["points"] > 25
    assert {tuple(pair) for pair in trials["seen"]} == {(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)}  # (student, average)


def test_killed_at_random_times(trials: dict) -> None:
    assert len(trials["timed"]) == 10 and {value for pair in trials["timed"] for value in pair} <= {2.0, 3.0}
    assert len({tuple(pair) for pair in trials["timed"]}) > 1  # kills came at different states


def test_what_a_kill_leaves_behind_is_hidden_and_in_nobodys_way(trials: dict) -> None:
    names = {path.name for path in trials["directory"].iterdir()}
    left = names - {STUDENT_FILE, EMA_FILE}
    assert left and all(name.startswith(".") for name in left)


def test_the_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    held, _ = students.make(SD3, "lora")
    entry = os.umask(0o022)
    try:
        path = anyflow.save_student(held, tmp_path)
    finally:
        os.umask(entry)
    assert path.stat().st_mode & 0o777 == 0o644


def test_no_file_is_renamed_before_all_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, _ = students.make(SD3, "lora")
    anyflow.save_student(held, tmp_path, ema=held)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    flushed: list[int] = []

    def fail_at_the_second(descriptor: int) -> None:
        flushed.append(descriptor)
        if len(flushed) == 2:
            raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail_at_the_second)
    held.enable_flowmap_time_conditioning(0.5)
    with pytest.raises(OSError, match="disk full"):
        anyflow.save_student(held, tmp_path, ema=held)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 1000, -1])
def test_a_cut_file_changes_nothing(keep: int, tmp_path: Path) -> None:
    path = anyflow.save_student(students.trained(SD3, "lora", steps=1)[0], tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    fresh = tiny_models.build(SD3)
    before = {key: tensor.clone() for key, tensor in fresh.state_dict().items()}
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        anyflow.load_student(fresh, tmp_path)
    assert fresh.state_dict().keys() == before.keys() and not hasattr(fresh, "peft_config")


@pytest.mark.parametrize("foreign", ["pickle", "safetensors", "text"])
def test_a_foreign_file_changes_nothing(foreign: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    path = tmp_path / STUDENT_FILE
    if foreign == "pickle":
        torch.save({"a": torch.zeros(2)}, path)
    elif foreign == "safetensors":
        save_file({"a": torch.zeros(2)}, path)
    else:
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    fresh = tiny_models.build(SD3)
    with pytest.raises(ValueError, match=r"not an AnyFlow student|not a readable"):
        anyflow.load_student(fresh, tmp_path)
    assert not anyflow.is_patched(fresh)
    if foreign == "safetensors":
        assert load_file(path).keys() == {"a"}
