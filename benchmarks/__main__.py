"""``python -m benchmarks [--full] [--device cuda] [--rounds N] [--new-pages] [--out FOLDER] [-k EXPRESSION]``

Runs the suite, and writes results.json, summary.md and bench.png to the folder (runs/bench). Other arguments are
pytest's.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = [str(HERE / name) for name in ("bench_operators.py", "bench_overhead.py", "bench_end_to_end.py")]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    out = parser.parse_known_args(arguments)[0].out
    out.mkdir(parents=True, exist_ok=True)
    # Threads that wait asleep. Spinning ones, where anything else runs, take the cores from those that work: steps of
    # small models became twenty times as slow. Read when PyTorch is imported, which is below.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    own = ["-q", "-p", "no:xdist", "--benchmark-disable-gc", "--benchmark-columns=rounds"]
    return pytest.main([*own, f"--benchmark-json={out / 'pytest-benchmark.json'}", *FILES, *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
