"""Shared by all tests: the launchers as a user starts them, one thread per process, no network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# Two cores are shared by every process of a test; hubs are never asked.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

Launcher = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_launcher(tmp_path: Path) -> Launcher:
    """run_launcher("qat", "train.steps=1", processes=2): the finished process, started in an empty directory."""

    def run(
        job: str, *arguments: str, processes: int = 1, timeout_seconds: float = 300
    ) -> subprocess.CompletedProcess[str]:
        start = [sys.executable]
        if processes > 1:
            start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
        return subprocess.run(
            [*start, str(REPOSITORY / "launch" / f"{job}.py"), *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )

    return run
