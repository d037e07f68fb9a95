"""Two processes of one group, for the tests of the stages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from anyflow_kernels._native import ENVIRONMENT_VARIABLE


def launch(script: Path, folder: Path, *jobs: str) -> None:
    """Run ``script`` as two ranks, with batches of 3 and 1; they meet in ``folder`` and leave their results there."""
    (folder / "store").unlink(missing_ok=True)
    path = os.pathsep.join([str(script.parent), *sys.path])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "MASTER_ADDR": "localhost"}
    environment[ENVIRONMENT_VARIABLE] = "reference"  # as the one process that they are compared with
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), "3,1", str(folder), *jobs],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
