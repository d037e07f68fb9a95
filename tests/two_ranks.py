"""Two processes of one group, for the tests of the stages."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from anyflow_kernels._native import ENVIRONMENT_VARIABLE


def launch(script: Path, folder: Path, *jobs: str) -> None:
    """Run ``script`` as two ranks, with batches of 3 and 1; they meet in ``folder`` and leave their results there."""
    (folder / "store").unlink(missing_ok=True)
    path = os.pathsep.join([str(script.parent), *sys.path])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "MASTER_ADDR": "localhost"}
    environment[ENVIRONMENT_VARIABLE] = "reference"  # as the one process that they are compared with
    logs = [folder / f"rank{rank}.log" for rank in range(2)]
    processes = []
    for rank, path_of_log in enumerate(logs):
        with open(path_of_log, "w") as log:
            command = [sys.executable, str(script), str(rank), "3,1", str(folder), *jobs]
            ranked = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=ranked))
    end = time.monotonic() + 400
    try:  # a rank that fails leaves the other one waiting for it
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            assert time.monotonic() < end, "the ranks wait for each other"
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(log.read_text() for log in logs)
