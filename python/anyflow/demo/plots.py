"""samples.png and quality.png."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter

TEACHER_COLOUR, STUDENT_COLOUR = "tab:gray", "tab:red"


def plot_samples(
    path: Path, teacher: Mapping[str, Tensor], student: Mapping[str, Tensor], labels: Tensor, columns: int = 16
) -> None:
    """The same noises through teacher and student at 1, 2, 4 and 8 steps; a row for each."""
    steps = ("1", "2", "4", "8")
    rows = [(f"{name}, {n}", images[n]) for n in steps for name, images in (("teacher", teacher), ("student", student))]
    figure, axes = plt.subplots(len(rows), columns, figsize=(columns * 0.55, len(rows) * 0.6))
    for line, (name, images) in zip(axes, rows, strict=True):
        for axis, image in zip(line, images[:columns], strict=True):
            axis.imshow(image[0], cmap="gray", vmin=-1, vmax=1)
            axis.set_axis_off()
        line[0].text(
            -2, 3.5, name + (" step" if name.endswith(" 1") else " steps"), ha="right", va="center", fontsize=8
        )
    for axis, label in zip(axes[0], labels[:columns].tolist(), strict=True):
        axis.set_title(str(label), fontsize=8)
    figure.suptitle("The same noises and labels", fontsize=9)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def plot_quality(path: Path, results: Mapping[str, Any]) -> None:
    """Error against steps, both curves: distance to the teacher's 64-step sample, and to the data."""
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.4))
    titles = {"rmse": "RMS distance to the teacher's 64-step sample", "fd": "Fréchet distance to the data"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for name, colour, marker in (("teacher", TEACHER_COLOUR, "o"), ("student", STUDENT_COLOUR, "s")):
            steps = [int(n) for n in results[name]]
            axis.plot(steps, [results[name][str(n)][key] for n in steps], color=colour, marker=marker, label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(steps := [1, 2, 4, 8, 16, 32], [str(n) for n in steps])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("sampling steps")
        axis.set_title(title, fontsize=9)
        axis.grid(True, which="both", alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
