"""The jobs of a sweep on this machine: each under its own torchrun, in turn or as many as have GPUs of their own.

In: planned jobs. Out: each with its outcome; what they say goes to logs/ and, as it comes, to stderr. SIGTERM and
SIGINT are handed to the ranks, which save; jobs that have not begun are cancelled. Called by the torchrun launcher.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from megatron_edge.runtime.signals import stop_on_signal
from megatron_edge.runtime.sweep import Job, Sweep, outcome
from megatron_edge.runtime.topology import fewest_ranks

POLL_SECONDS = 0.1
WATCH_SECONDS = 1.0

Watch = Callable[[Job], str | None]  # why a running job is to be stopped; None: it is not


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    gpus: list[str]
    log: Path
    reader: IO[str]
    label: str
    began: float = field(default_factory=time.monotonic)
    stopped_for: str | None = None

    def show_new(self) -> None:
        for line in self.reader:
            sys.stderr.write(f"{self.label}{line}")
        sys.stderr.flush()

    def ask_to_stop(self) -> None:
        """SIGTERM to the ranks themselves: torchrun would give them only 30 seconds to save."""
        try:
            process = psutil.Process(self.process.pid)
            ranks = [child for child in process.children() if "RANK" in child.environ()]
            for one in ranks or [process]:
                one.send_signal(signal.SIGTERM)
        except psutil.NoSuchProcess:
            return


def run_jobs(
    sweep: Sweep, jobs: list[Job], *, ranks: int | None = None, at_once: int | None = None, watch: Watch | None = None
) -> None:
    """Runs `jobs` to their ends, whatever these are.

    `ranks` are the processes of a job (None: as few as its layout needs), `at_once` the jobs at a time (None: as many
    as have GPUs of their own; one without GPUs). `watch` is asked about each running job now and then.
    """
    gpus, waiting = _visible_gpus(), list(jobs)
    free, limit = list(gpus), at_once or (len(jobs) if gpus else 1)
    running: list[_Running] = []
    watched = time.monotonic()
    with stop_on_signal() as stop:
        while running or (waiting and not stop.requested):
            while waiting and len(running) < limit and not stop.requested:
                needed = min(_ranks(waiting[0], ranks), len(gpus))
                if needed > len(free):
                    break
                mine, free = free[:needed], free[needed:]
                running.append(_start(sweep, waiting.pop(0), ranks, mine, limit, len(jobs) - len(waiting), len(jobs)))
            time.sleep(POLL_SECONDS)
            if watch and time.monotonic() - watched > WATCH_SECONDS:
                watched = time.monotonic()
                _stop_watched(running, watch)
            for one in running:
                if stop.requested and one.stopped_for is None:
                    one.stopped_for = "the sweep was stopped by a signal"
                    one.ask_to_stop()
                one.show_new()
                if one.process.poll() is not None:
                    free += one.gpus
                    _finish(sweep, one)
            running = [one for one in running if one.job.status == "running"]
    for job in waiting:
        job.ended("cancelled", None, "not started: the sweep was stopped by a signal")
    sweep.write()


def _stop_watched(running: list[_Running], watch: Watch) -> None:
    for one in running:
        if one.stopped_for is None and (reason := watch(one.job)):
            one.stopped_for = reason
            one.ask_to_stop()


def _ranks(job: Job, ranks: int | None) -> int:
    assert job.config is not None, "only jobs that were composed are started"
    return ranks or fewest_ranks(job.config.parallel)


def _start(sweep: Sweep, job: Job, ranks: int | None, gpus: list[str], limit: int, number: int, total: int) -> _Running:
    assert job.config is not None
    count, arguments, environment = _ranks(job, ranks), list(job.overrides), dict(os.environ)
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    elif limit > 1 and job.config.threads == 0:
        cores = psutil.cpu_count(logical=False) or 1
        arguments.append(f"threads={max(1, min(cores, len(os.sched_getaffinity(0))) // (limit * count))}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    log = sweep.log_path(job)
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.write(f"[{number}/{total}] {' '.join(job.overrides)}\n")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*torchrun, sweep.script, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the ranks through this process alone, once
        )
    job.status = "running"
    reader = log.open(encoding="utf-8", errors="replace")
    return _Running(job, process, gpus, log, reader, f"[{number}/{total}] " if limit > 1 else "")


def _finish(sweep: Sweep, one: _Running) -> None:
    one.show_new()
    one.reader.close()
    seconds = time.monotonic() - one.began
    outcome(one.job, one.process.returncode, one.log.read_text(encoding="utf-8", errors="replace"), seconds)
    if one.stopped_for and one.job.status != "done":  # before training a signal just ends a rank
        one.job.ended("cancelled", one.job.exit_code, f"{one.stopped_for} ({one.job.reason})")
    words = f" ({one.job.exit_code}): {one.job.reason}" if one.job.status != "done" else ""
    sys.stderr.write(f"{one.job.status}{words}  {one.job.name}, {seconds:.1f} s\n")
    sweep.write()


def _visible_gpus() -> list[str]:
    """The names by which CUDA_VISIBLE_DEVICES gives this machine's GPUs to a job."""
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count = torch.cuda.device_count()
    return named[:count] if named else [str(index) for index in range(count)]
