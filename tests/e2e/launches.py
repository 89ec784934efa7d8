"""Launchers as a user starts them: finished ones, running ones whose ranks can be found, and several at once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCH_SECONDS = 240

# What a user cannot act on, or should never see.
_NOISE = re.compile(r"\w*Warning\b|deprecat|^\[?[WE]\d{4} |Traceback|\w+Error\b|will be removed", re.IGNORECASE)
_OUR_WARNING = re.compile(r"\d\d:\d\d:\d\d (\[rank \d+ of \d+\] )?WARNING ")


@dataclass(frozen=True)
class Finished:
    """A launch that is over: torchrun's or python's own exit code, both streams, and how long it took."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def rank_codes(self) -> list[int]:
        """The ranks' own exit codes, as torchrun's summary names them: torchrun itself always exits with 1."""
        return [int(code) for code in re.findall(r"exitcode\s+: (-?\d+)", self.stderr)]

    @property
    def noise(self) -> list[str]:
        """Lines of either stream that look like a library's warning, or like an error."""
        lines = (self.stdout + self.stderr).splitlines()
        return [line for line in lines if _NOISE.search(line) and not _OUR_WARNING.match(line)]

    def lines(self, start: str) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith(start)]


class Running:
    """A launch under way. Use as a context manager: whatever it started is gone at the end."""

    def __init__(self, command: Sequence[str], directory: Path, environment: Mapping[str, str]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._began = time.monotonic()
        self._streams = [directory / f"{time.monotonic_ns()}.{name}" for name in ("stdout", "stderr")]
        with self._streams[0].open("w") as stdout, self._streams[1].open("w") as stderr:
            self.process = subprocess.Popen(command, cwd=directory, env=environment, stdout=stdout, stderr=stderr)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            for process in (*psutil.Process(self.process.pid).children(recursive=True), self.process):
                process.kill()
            self.process.wait(timeout=30)

    def wait(self, timeout_seconds: float = LAUNCH_SECONDS) -> Finished:
        code = self.process.wait(timeout=timeout_seconds)
        return Finished(code, *(path.read_text() for path in self._streams), time.monotonic() - self._began)

    def rank(self, rank: int) -> psutil.Process:
        """The process that torchrun started as `rank`."""
        for child in psutil.Process(self.process.pid).children():
            if child.environ().get("RANK") == str(rank):
                return child
        raise AssertionError(f"no process of rank {rank}: {self._streams[1].read_text()}")

    def signal_ranks(self, number: signal.Signals, world_size: int = 2) -> None:
        for rank in range(world_size):
            self.rank(rank).send_signal(number)

    def until(self, holds: Callable[[], bool], timeout_seconds: float = LAUNCH_SECONDS) -> None:
        """Waits until something holds while the launch runs."""
        deadline = time.monotonic() + timeout_seconds
        while not holds():
            assert self.process.poll() is None, self._streams[1].read_text()
            assert time.monotonic() < deadline, self._streams[1].read_text()
            time.sleep(0.005)


def start(job: str, *arguments: str, directory: Path, processes: int = 1, wrapper: Sequence[str] = ()) -> Running:
    """launch/<job>.py in `directory`, under python or torchrun; `wrapper` is a command that starts each rank."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += ["--no-python", *wrapper, sys.executable] if wrapper else []
    script = str(REPOSITORY / "launch" / f"{job}.py")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    return Running([*command, script, *arguments], directory, environment)


def run(job: str, *arguments: str, directory: Path, processes: int = 1, wrapper: Sequence[str] = ()) -> Finished:
    with start(job, *arguments, directory=directory, processes=processes, wrapper=wrapper) as running:
        return running.wait()


def run_all(launches: Mapping[str, Callable[[], Finished]]) -> dict[str, Finished]:
    """Several launches, two at a time: most of each is one core's imports."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(launches, pool.map(lambda launch: launch(), launches.values()), strict=True))


def refusal(done: Finished) -> str:
    """The one line of a refusal, after checking that nothing else of ours was said."""
    errors = done.lines("error: ")
    assert len(errors) == 1, done.stderr
    assert "megatron_edge" not in "".join(re.findall(r'File "(.*?)"', done.stderr)), "a traceback of ours"
    return errors[0]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(run_dir: Path) -> int:
    return max((record["step"] for record in metrics(run_dir)), default=0)


def checkpoints(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*"))


def hashes(directory: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file below."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def flip_byte(path: Path, offset: int) -> None:
    """Inverts one byte in place; a negative offset counts from the end."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)
