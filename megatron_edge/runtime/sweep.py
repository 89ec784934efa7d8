"""The jobs of a sweep: their run directories, what became of them (sweep.json), and the table at the end.

In: the arguments of each job, from a Hydra launcher of ours. Out: `Job` records; a repeated sweep skips what is done.
local_jobs.py and slurm_jobs.py run them; nothing here starts a process.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_edge import checks, compose
from megatron_edge.config import RunConfig
from megatron_edge.contracts import InputError
from megatron_edge.log import console

SWEEP_FILE = "sweep.json"
LONGEST_NAME = 120
Status = Literal["waiting", "running", "done", "failed", "skipped", "cancelled"]
ENDED: tuple[Status, ...] = ("done", "failed", "skipped", "cancelled")
STOPPED = 75

# How a job's own last word begins (runtime/launcher.py), the root cause first.
_WORDS = re.compile(r"^(error|failed|diverged|lost|hung|disk|stopped|interrupted): ", re.MULTILINE)
_CRASH = re.compile(r"^(?:\[rank \d+ of \d+\] )?((?:\w+\.)*\w*(?:Error|Exception|Exit)\b.*)$", re.MULTILINE)
_RANK_CODE = re.compile(r"^\s*exitcode\s+: (-?\d+)", re.MULTILINE)


@dataclass
class Job:
    """One job. `name` is its own within the sweep; `seconds` that it ran; `exit_code` is that of its ranks."""

    name: str
    overrides: list[str]
    run_dir: str
    config: RunConfig | None = None
    status: Status = "waiting"
    exit_code: int | None = None
    reason: str | None = None
    seconds: float = 0.0

    def ended(self, status: Status, exit_code: int | None, reason: str | None, seconds: float | None = None) -> None:
        self.status, self.exit_code, self.reason = status, exit_code, reason
        self.seconds = self.seconds if seconds is None else round(seconds, 3)

    def record(self) -> dict[str, Any]:
        names = ("name", "overrides", "run_dir", "status", "exit_code", "reason", "seconds")
        return {name: getattr(self, name) for name in names}


@dataclass
class Sweep:
    """A sweep's directory: sweep.json, logs/, and (but for jobs that read a run) the run directories.

    `swept` are the keys that differ between jobs: they name the jobs.
    """

    directory: Path
    script: str
    swept: Sequence[str]
    own_run_dir: bool
    jobs: list[Job] = field(default_factory=list)
    earlier: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: Path, script: str, swept: Sequence[str], own_run_dir: bool) -> Sweep:
        path = directory / SWEEP_FILE
        known = json.loads(path.read_text())["jobs"] if path.is_file() else []
        return cls(directory, script, swept, own_run_dir, earlier={one["name"]: one for one in known})

    def plan(self, combinations: Iterable[Sequence[str]]) -> list[Job]:
        """Jobs of these arguments: done before (skipped), refused (failed, with the reason), or waiting.

        Nothing is started before all of them are known. Raises InputError where two would share a run directory.
        """
        planned: list[Job] = []
        for arguments in combinations:
            planned.append(self._job(list(arguments), [*self.jobs, *planned]))
        for job in planned:
            self._check(job)
        taken = {job.run_dir: job for job in self.jobs}
        for job in planned if self.own_run_dir else ():
            other = taken.setdefault(job.run_dir, job)
            if other.overrides != job.overrides:
                raise InputError(
                    f"run_dir={job.run_dir}: {other.name} and {job.name} would share it; allowed: one each"
                )
        self.jobs += planned
        self.write()
        return planned

    def _job(self, arguments: list[str], others: list[Job]) -> Job:
        parts = [a.lstrip("+").replace("=", "-", 1) for a in arguments if a.lstrip("+").split("=")[0] in self.swept]
        name = re.sub(r"[^\w.+-]+", "-", "__".join(sorted(parts))) or "job"
        mark = hashlib.sha256("\0".join([self.script, *arguments]).encode()).hexdigest()[:8]
        if len(name) > LONGEST_NAME or any(job.name == name for job in others):
            name = f"{name[:LONGEST_NAME]}-{mark}"
        if self.own_run_dir and not any(argument.startswith("run_dir=") for argument in arguments):
            arguments = [*arguments, f"run_dir='{self.directory / name}'"]
        return Job(name, arguments, str(self.directory / name))

    def _check(self, job: Job) -> None:
        try:
            read = compose.compose if self.own_run_dir else compose.compose_over_run
            job.config = read(job.overrides)
            job.run_dir = job.config.run_dir
            checks.check_config(job.config)
        except InputError as error:
            job.ended("failed", 2, f"error: {error}")
            return
        before = self.earlier.get(job.name, {})
        same = before and before["overrides"] == job.overrides and before["status"] in ("done", "skipped")
        if same and Path(job.run_dir).is_dir():
            job.ended("skipped", 0, "done before", before["seconds"])

    @property
    def waiting(self) -> list[Job]:
        return [job for job in self.jobs if job.status == "waiting"]

    def log_path(self, job: Job) -> Path:
        return self.directory / "logs" / f"{job.name}.log"

    def write(self) -> None:
        """sweep.json: every job that has ended, those of earlier sweeps in this directory too; atomic."""
        mine = {job.name: job.record() for job in self.jobs if job.status in ENDED}
        self.directory.mkdir(parents=True, exist_ok=True)
        scratch = self.directory / f"{SWEEP_FILE}.partial"
        jobs = list({**self.earlier, **mine}.values())
        scratch.write_text(json.dumps({"script": self.script, "jobs": jobs}, indent=1) + "\n")
        scratch.replace(self.directory / SWEEP_FILE)


def outcome(job: Job, returncode: int, log: str, seconds: float) -> None:
    """Ends `job` as its exit code and its log (text) have it.

    torchrun exits with 1 whatever a rank's code was; its summary names them, the root cause last.
    """
    codes = [int(code) for code in _RANK_CODE.findall(log)]
    code = codes[-1] if returncode and codes else returncode
    if code == 0:
        job.ended("done", 0, None, seconds)
        return
    job.ended("cancelled" if code == STOPPED else "failed", code, _reason(log, code), seconds)


def _reason(log: str, code: int) -> str:
    said = _WORDS.search(log)
    if said:
        return log[said.start() :].splitlines()[0]
    crash = _CRASH.findall(log)
    if crash:
        return str(crash[0])
    if code < 0:
        return f"ended by signal {-code}"
    lines = [line for line in log.splitlines() if line.strip()]
    return lines[-1] if lines else "ended without a word"


def _result(job: Job) -> tuple[str, str]:
    """Held-out loss and bytes as text; "-" where there are none."""
    found = objectives(job)
    loss, size = found.get("heldout_loss"), found.get("bytes")
    return (f"{loss:.4f}" if loss is not None else "-"), (f"{size / 1e6:.3f}" if size is not None else "-")


def objectives(job: Job) -> dict[str, float]:
    """What a search minimises, from the job's run directory: heldout_loss (nats per token, of the artifact), bytes (of
    its weights). Empty before verify has run."""
    verified = Path(job.run_dir) / "verify.json"
    if job.status not in ("done", "skipped") or not verified.is_file():
        return {}
    facts = json.loads(verified.read_text())
    loss, size = facts["losses_nats_per_token"].get("artifact"), facts["artifact"]["size_bytes"]
    found = {"heldout_loss": loss, "bytes": size}
    return {name: float(value) for name, value in found.items() if value is not None}


def front(jobs: Sequence[Job]) -> list[Job]:
    """Those that no other beats: none has less of one objective and not more of the other."""
    found = [(number, tuple(objectives(job).values())) for number, job in enumerate(jobs)]
    best = front_of([(number, values) for number, values in found if len(values) == 2])
    return [job for number, job in enumerate(jobs) if number in best]


def front_of(points: list[tuple[int, tuple[float, ...]]]) -> set[int]:
    """Numbers of the points that no other beats: as small in everything, and smaller in something."""

    def beats(ours: tuple[float, ...], theirs: tuple[float, ...]) -> bool:
        return all(a <= b for a, b in zip(ours, theirs, strict=True)) and ours != theirs

    return {number for number, values in points if not any(beats(other, values) for _, other in points)}


def show(jobs: Sequence[Job], directory: Path) -> None:
    """The table at the end of a sweep; a star marks the front of held-out loss and bytes."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "job", "status", "held-out nats/token", "MB", "seconds", "reason", title=f"sweep {directory}")
    colours = {"done": "green", "failed": "red", "skipped": "cyan", "cancelled": "yellow"}
    best = front(jobs)
    for job in jobs:
        code = f" ({job.exit_code})" if job.exit_code else ""
        status = f"[{colours.get(job.status, 'white')}]{job.status}{code}[/]"
        row = (
            "*" if job in best else "",
            escape(job.name),
            status,
            *_result(job),
            f"{job.seconds:.1f}",
            escape(job.reason or ""),
        )
        table.add_row(*row)
    console().print(table)


def exit_code(jobs: Sequence[Job]) -> int:
    """The first failure's code; 75 where the sweep was stopped; else 0. A pruned trial is no failure."""
    for job in jobs:
        if job.status == "failed":
            return job.exit_code if job.exit_code and job.exit_code > 0 else 1
    stopped = [job for job in jobs if job.status == "cancelled" and not (job.reason or "").startswith("pruned")]
    return STOPPED if stopped else 0
