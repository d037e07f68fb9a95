"""Options of the benchmarks, and what pytest-benchmark's JSON becomes: results.json, summary.md and bench.png."""

from __future__ import annotations

import contextlib
import datetime
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config

from . import measure, report
from .operators import LEVELS


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("anyflow", "AnyFlow's benchmarks")
    group.addoption("--level", choices=LEVELS, default="default", help="how many sizes")
    group.addoption("--full", dest="level", action="store_const", const="full", help="every size")
    group.addoption("--device", choices=("cpu", "cuda"), default=None, help="default: a GPU where there is one")
    group.addoption("--rounds", type=int, default=None, help="timed rounds of each benchmark")
    group.addoption("--new-pages", action="store_true", help="on a CPU: large arrays in new pages, as glibc has it")
    group.addoption("--out", type=Path, default=Path("runs/bench"), help="folder of the results")


SECONDS, FEWEST_ROUNDS, MOST_ROUNDS = 5.0, 5, 100


class Session:
    """What all benchmarks of a run share."""

    def __init__(self, config: pytest.Config) -> None:
        self.device: str = config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: PyTorch sees no GPU")
        self.level: str = config.getoption("--level")
        self.out: Path = config.getoption("--out")
        self._rounds: int | None = config.getoption("--rounds")
        self.refused: list[dict[str, str]] = []
        self.reported = 0
        # What is counted while compiling is not counted when it comes from a cache.
        torch._inductor.config.fx_graph_cache = False
        self.keeps_pages = self.device == "cpu" and not config.getoption("--new-pages") and measure.keep_pages()
        if self.device == "cpu":
            torch.set_num_threads(measure.THREADS)

    def rounds(self, first: float) -> int:
        """As many as fit into some seconds, by how long the ``first`` one took, unless the command line says."""
        return self._rounds or min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(SECONDS / first)))

    def report(self, benchmark: Any, **record: Any) -> None:
        benchmark.extra_info.update(record)
        self.reported += 1

    @functools.cached_property
    def clock(self) -> measure.Clock:
        return measure.Clock(self.device)

    @functools.cached_property
    def roofs(self) -> dict[str, float]:
        return measure.roofs(self.clock, self.device)

    @contextlib.contextmanager
    def refused_when_red(self, what: str, mode: str) -> Iterator[None]:
        try:
            yield
        except measure.RedGate as error:
            self.refused.append({"what": what, "mode": mode, "why": str(error)})
            raise


SESSION = pytest.StashKey[Session]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SESSION] = Session(config)


@pytest.fixture(scope="session")
def session(pytestconfig: pytest.Config) -> Session:
    return pytestconfig.stash[SESSION]


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    report.write(config.stash[SESSION], output_json)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """pytest-benchmark writes nothing where nothing was timed; what was refused is written all the same."""
    ours = session.config.stash[SESSION]
    if ours.refused and not ours.reported:
        report.write(
            ours,
            {
                "benchmarks": [],
                "commit_info": session.config.hook.pytest_benchmark_generate_commit_info(config=session.config),
                "machine_info": session.config.hook.pytest_benchmark_generate_machine_info(config=session.config),
                "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
            },
        )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    summary = config.stash[SESSION].out / "summary.md"
    if summary.exists():
        terminalreporter.section(str(config.stash[SESSION].out))
        terminalreporter.write(summary.read_text())
