"""The jobs of accuracy_study.py: run several at a time, each once, and what their artifacts say about held-out text."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from megatron_edge.artifact.store import ArtifactReader
from megatron_edge.compose import compose
from megatron_edge.log import read_metrics
from megatron_edge.model.source import load_tokenizer
from megatron_edge.train.data import load_data
from megatron_edge.verify.quality import TOKENS_PER_FORWARD, Windows, forward, load_model

if TYPE_CHECKING:
    from tools.accuracy_study import Job

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCHER = REPOSITORY / "launch" / "qat.py"
RECORD, MEASURED = "job.json", "measured.json"
# 3: a check of verify does not hold (a loss that rises by more than declared): the artifact is there all the same.
ENDED_WELL = (0, 3)
CURVES = ("loss_nats_per_token", "label_loss_nats_per_token", "kl_nats_per_token", "tokens_per_second",
          "memory_bytes_rank0")  # fmt: skip
FIRST_JOB_SECONDS, STOP_SECONDS, MEASURE_SECONDS = 60.0, 30.0, 15.0


class Runner:
    """Starts jobs below `out`, `parallel` at a time, until `minutes` are over; None is without end."""

    def __init__(self, out: Path, parallel: int, minutes: float | None, keep: bool) -> None:
        self.out, self.parallel, self._keep = out, parallel, keep
        self._deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._longest_seconds = FIRST_JOB_SECONDS
        self._lock = threading.Lock()
        self._not_started: set[str] = set()
        (out / "data").mkdir(parents=True, exist_ok=True)
        self._devices: SimpleQueue[int] = SimpleQueue()  # jobs are dealt out to the GPUs that there are
        for slot in range(parallel):
            self._devices.put(slot % max(1, torch.cuda.device_count()))

    def directory(self, job: Job) -> Path:
        return self.out / job.name

    def record(self, job: Job) -> dict[str, Any]:
        """What is known of a job's last start; {} where there was none, or with other arguments."""
        path = self.directory(job) / RECORD
        found = json.loads(path.read_text()) if path.is_file() else {}
        return found if found.get("overrides") == list(job.overrides) else {}

    def is_done(self, job: Job) -> bool:
        return self.record(job).get("exit_code") in ENDED_WELL

    def all(self, jobs: list[Job], after: Callable[[Job, Path], None] = lambda job, directory: None) -> None:
        """Runs what is not done yet; `after` is called here for each that is done, one at a time."""
        done = [job for job in jobs if self.is_done(job)]
        with ThreadPoolExecutor(self.parallel) as pool:
            running = {pool.submit(self._run, job): job for job in jobs if job not in done}
            for job in done:
                self._measure(job, after)
            for ended in as_completed(running):
                ended.result()  # a bug of ours must not pass for a job that failed
                if self.is_done(running[ended]):
                    self._measure(running[ended], after)

    def _measure(self, job: Job, after: Callable[[Job, Path], None]) -> None:
        if self._deadline - time.monotonic() > 0:
            after(job, self.directory(job))

    def _run(self, job: Job) -> None:
        if self._deadline - time.monotonic() < self._longest_seconds + MEASURE_SECONDS:
            self._not_started.add(job.name)
            return
        directory = self.directory(job)
        directory.mkdir(exist_ok=True)
        if not (directory / "data").exists():  # tokenised once for all jobs
            (directory / "data").symlink_to(self.out / "data", target_is_directory=True)
        began = time.monotonic()
        gpu = self._devices.get()
        try:
            code = self._start(job, directory, gpu)
        finally:
            self._devices.put(gpu)
        seconds = time.monotonic() - began
        record = {"overrides": list(job.overrides), "exit_code": code, "seconds": round(seconds, 1)}
        (directory / RECORD).write_text(json.dumps(record, indent=1))
        with self._lock:
            print(f"{job.name}: exit code {code}, {seconds:.0f} s", flush=True)
            if code in ENDED_WELL:
                self._longest_seconds = max(self._longest_seconds, seconds)
        if code in ENDED_WELL and not self._keep:  # gigabytes that nothing here reads again
            shutil.rmtree(directory / "checkpoints", ignore_errors=True)
            (directory / "reference" / "reference.safetensors").unlink(missing_ok=True)

    def _start(self, job: Job, directory: Path, gpu: int) -> int:
        """The exit code. SIGTERM in time lets a job save and end with 75: it goes on in the next call."""
        command = [sys.executable, str(LAUNCHER), *job.overrides, f"run_dir={directory}"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
        if torch.cuda.device_count() > 1:
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        with (directory / "log.txt").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            left = self._deadline - time.monotonic() - STOP_SECONDS
            try:
                return process.wait(None if math.isinf(left) else left)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
            try:
                return process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                return process.wait()

    def say_how_it_ended(self, jobs: list[Job]) -> int:
        """Prints every job that is not done or not measured; 0 where there is none."""
        left = 0
        for job in jobs:
            code, directory = self.record(job).get("exit_code"), self.directory(job)
            if code in ENDED_WELL and (directory / MEASURED).is_file():
                continue
            left += 1
            if job.name in self._not_started or code is None:
                words = "not started: too little time was left" if job.name in self._not_started else "not started"
            elif code in ENDED_WELL:
                words = "not measured yet"
            else:
                words = f"exit code {code}, see {directory / 'log.txt'}"
            print(f"{job.name}: {words}", flush=True)
        print(f"{len(jobs) - left} of {len(jobs)} jobs done and measured", flush=True)
        return 1 if left else 0


class Meter:
    """Artifacts against the teacher's (BF16-FT) over the same held-out windows, on one device."""

    def __init__(self, teacher: Path, overrides: Sequence[str], heldout_tokens: int, out: Path) -> None:
        config = compose(overrides)  # of the teacher's job: for its texts and the length of a window
        length = config.train.seq_length_tokens
        # Also the cache that every job then finds, so that none of them tokenises.
        data = load_data(config.data, load_tokenizer(teacher), length, 0, out / "data")
        batch = data.heldout.evaluation(heldout_tokens)
        self._batch = max(1, TOKENS_PER_FORWARD // length)
        self.windows = Windows(batch.tokens, batch.documents, batch.positions, batch.loss_mask)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.teacher_dir = teacher
        self._teacher: torch.nn.Module | None = None

    def measure(self, job: Job, directory: Path) -> None:
        """Writes sums of loss and of KL(teacher || artifact) over each window, in nats, once for an artifact."""
        artifact = directory / "artifact" / "canonical"
        stamp = {"artifact": _stamp(artifact), "teacher": _stamp(self.teacher_dir), "windows": len(self.windows)}
        path = directory / MEASURED
        if path.is_file() and json.loads(path.read_text())["stamp"] == stamp:
            return
        if self._teacher is None:
            self._teacher = self._load(self.teacher_dir)
        losses, divergences = self._compare(self._load(artifact))
        counted = self.windows.loss_mask.sum(1).tolist()
        found = {"stamp": stamp, "loss": losses, "kl": divergences, "tokens": counted}
        path.write_text(json.dumps(found))
        total = sum(counted)
        print(f"{job.name}: {sum(losses) / total:.4f} nats/token, KL {sum(divergences) / total:.5f}", flush=True)

    def _load(self, artifact: Path) -> torch.nn.Module:
        reader = ArtifactReader(artifact)
        return load_model(reader, getattr(torch, reader.manifest.dtype), self.device)

    @torch.no_grad()
    def _compare(self, model: torch.nn.Module) -> tuple[list[float], list[float]]:
        losses: list[float] = []
        divergences: list[float] = []
        assert self._teacher is not None
        for begin in range(0, len(self.windows), self._batch):
            part = self.windows.slice(begin, begin + self._batch)
            mask, targets = part.loss_mask.to(self.device), part.tokens.to(self.device).roll(-1, dims=1)
            ours, teachers = (F.log_softmax(forward(m, part).float(), dim=-1) for m in (model, self._teacher))
            nll = -ours.gather(-1, targets[..., None]).squeeze(-1)
            kl = (teachers.exp() * (teachers - ours)).sum(-1)
            losses += [round(x, 6) for x in (nll.double() * mask).sum(1).tolist()]
            divergences += [round(x, 6) for x in (kl.double() * mask).sum(1).tolist()]
        return losses, divergences


def _stamp(artifact: Path) -> list[int]:
    status = (artifact / "manifest.json").stat()
    return [status.st_mtime_ns, status.st_size]


def collect(run: Runner, jobs: list[Job], meter: Meter, arguments: list[str]) -> dict[str, Any]:
    """All that the tables and the picture need, of the jobs that are done and measured."""
    rows, not_done = [], []
    for job in jobs:
        directory = run.directory(job)
        measured = directory / MEASURED
        if not run.is_done(job) or not measured.is_file():
            not_done.append(job.name)
            continue
        found = json.loads(measured.read_text())
        report = json.loads((directory / "verify.json").read_text())
        metrics = read_metrics(directory / "metrics.jsonl")
        curve = {key: [record.get(key) for record in metrics] for key in CURVES if metrics}
        rows.append(
            {
                "name": job.name, "format": job.format, "method": job.method, "seed": job.seed,
                "overrides": list(job.overrides), **{key: found[key] for key in ("loss", "kl", "tokens")},
                "verified": report["ok"], "seconds": run.record(job)["seconds"], "curve": curve,
                "failed": [f"{check['name']}: {check['metric']}" for check in report["checks"] if not check["ok"]],
            }
        )  # fmt: skip
    device = torch.cuda.get_device_name(0) if meter.device == "cuda" else "CPU"
    packages = {name: version(name) for name in ("torch", "transformers", "megatron-core", "nvidia-modelopt")}
    return {
        "rows": rows, "not_done": not_done, "device": device, "num_devices": max(1, torch.cuda.device_count()),
        "versions": packages, "arguments": arguments, "parallel": run.parallel,
    }  # fmt: skip
