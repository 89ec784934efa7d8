"""The jobs of a sweep on Slurm: an array of batch jobs, each of whose ranks is a task of srun (launch/ranks.sh).

In: planned jobs, shaped by cluster=. Out: each with its outcome, from the exit code that its batch script wrote down;
Slurm is asked only about jobs that wrote none (cancelled, lost, out of time). Called by the Slurm launcher, which waits
for the jobs; where it is stopped, it cancels them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from megatron_edge.config import RunConfig
from megatron_edge.contracts import ClusterConfig, InputError
from megatron_edge.runtime.signals import stop_on_signal
from megatron_edge.runtime.sweep import Job, Status, Sweep, outcome
from megatron_edge.runtime.topology import fewest_ranks

RANKS_SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "ranks.sh"
COMMAND_SECONDS = 120
# Of a job that is in none of these, Slurm says how it ended.
ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING")


@dataclass
class _Array:
    """One array: `jobs` by their index in it."""

    number: str
    jobs: dict[int, Job]
    folder: Path
    cancelled: bool = False
    began: dict[int, float] = field(default_factory=dict)

    def exit_file(self, index: int) -> Path:
        return self.folder / f"{index}.exit"

    @property
    def open_jobs(self) -> dict[int, Job]:
        return {index: job for index, job in self.jobs.items() if job.status in ("waiting", "running")}


def run_jobs(sweep: Sweep, jobs: list[Job], poll_seconds: float) -> None:
    """Submits `jobs`, those of one shape as one array, and waits for their ends.

    Raises:
        InputError: there is no Slurm here, or it refuses what cluster= asks for.
    """
    shapes: dict[tuple[ClusterConfig, int], list[Job]] = {}
    for job in jobs:
        assert job.config is not None, "only jobs that were composed are started"
        shapes.setdefault((_hashable(job.config.cluster), ranks_per_node(job.config)), []).append(job)
    arrays = [_submit(sweep, cluster, ranks, members) for (cluster, ranks), members in shapes.items()]
    with stop_on_signal() as stop:
        while open_arrays := [array for array in arrays if array.open_jobs]:
            for array in open_arrays:
                if stop.requested and not array.cancelled:
                    array.cancelled = True
                    _slurm("scancel", array.number)
                _look(sweep, array)
            if any(array.open_jobs for array in arrays):
                time.sleep(poll_seconds)


def ranks_per_node(config: RunConfig) -> int:
    """cluster.ranks_per_node, or as few as hold the layout; one that they do not divide into is refused by the job."""
    cluster, fewest = config.cluster, fewest_ranks(config.parallel)
    return cluster.ranks_per_node or max(1, -(-fewest // cluster.nodes))


def _hashable(cluster: ClusterConfig) -> ClusterConfig:
    return ClusterConfig(**{**vars(cluster), "options": tuple(cluster.options), "before": tuple(cluster.before)})


def _submit(sweep: Sweep, cluster: ClusterConfig, ranks: int, jobs: list[Job]) -> _Array:
    folder = sweep.directory / "slurm" / f"{time.strftime('%Y%m%d-%H%M%S')}-{sweep.jobs.index(jobs[0])}"
    folder.mkdir(parents=True)
    for index, job in enumerate(jobs):
        (folder / f"{index}.arguments").write_text("".join(f"{one}\n" for one in job.overrides))
        log = sweep.log_path(job)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        (folder / f"{index}.log").symlink_to(log.resolve())  # sbatch names logs by index
    script = folder / "job.sbatch"
    script.write_text(batch_script(sweep, cluster, ranks, len(jobs), folder.resolve()))
    number = _slurm("sbatch", "--parsable", str(script)).strip().split(";")[0]
    sys.stderr.write(f"Slurm job {number}: {len(jobs)} job(s) of {cluster.nodes} node(s) x {ranks} rank(s), {script}\n")
    return _Array(number, dict(enumerate(jobs)), folder)


def batch_script(sweep: Sweep, cluster: ClusterConfig, ranks: int, num_jobs: int, folder: Path) -> str:
    """The text that sbatch gets for an array of `num_jobs`, each of cluster.nodes x `ranks` processes."""
    asked = {
        "job-name": f"megatron-edge-{sweep.directory.name}",
        "array": f"0-{num_jobs - 1}" + (f"%{cluster.at_once}" if cluster.at_once else ""),
        "output": f"{folder}/%a.log",
        "open-mode": "append",
        "chdir": os.getcwd(),
        "partition": cluster.partition,
        "account": cluster.account,
        "time": cluster.time_minutes,
        "nodes": cluster.nodes,
        "ntasks-per-node": ranks,
        "gpus-per-node": cluster.gpus_per_node,
        "cpus-per-task": cluster.cpus_per_rank,
        "mem": f"{cluster.memory_gib}G" if cluster.memory_gib else None,
        "signal": f"B:USR1@{cluster.signal_seconds}",
    }
    options = [f"--{name}={value}" for name, value in asked.items() if value is not None]
    srun = [f"--container-image={cluster.container}"] if cluster.container else []
    srun += [f"--container-mounts={cluster.container_mounts}"] if cluster.container_mounts else []
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {option}" for option in [*options, "--requeue", *cluster.options]),
            *cluster.before,
            f"export PYTHON={shlex.quote('python' if cluster.container else sys.executable)}",
            f"export SRUN_OPTIONS={shlex.quote(' '.join(srun))} MAX_REQUEUES={cluster.requeues}",
            f". {shlex.quote(str(RANKS_SCRIPT))}",
            f"folder={shlex.quote(str(folder))}",
            'mapfile -t arguments < "$folder/$SLURM_ARRAY_TASK_ID.arguments"',
            f'run_ranks {shlex.quote(os.path.abspath(sweep.script))} "${{arguments[@]}}"',
            "code=$?",
            '[ -n "$LEFT_TO_SLURM" ] || echo "$code $SECONDS" > "$folder/$SLURM_ARRAY_TASK_ID.exit"',
            "exit $code",
            "",
        ]
    )


def _look(sweep: Sweep, array: _Array) -> None:
    """Ends the jobs that have ended, and says which have begun."""
    states = _states(array.number)
    for index, job in array.open_jobs.items():
        state = states.get(index, "PENDING" if -1 in states else "")  # -1: those that have not begun, in one line
        if state == "RUNNING" and job.status == "waiting":
            job.status, array.began[index] = "running", time.monotonic()
            sys.stderr.write(f"running  {job.name} ({array.number}_{index})\n")
        written = array.exit_file(index)
        if not written.is_file() and state in ALIVE:
            continue
        _end(sweep, array, index, job, state)
        words = f" ({job.exit_code}): {job.reason}" if job.status != "done" else ""
        sys.stderr.write(f"{job.status}{words}  {job.name}, {job.seconds:.1f} s\n")
        sweep.write()


def _end(sweep: Sweep, array: _Array, index: int, job: Job, state: str) -> None:
    written, log = array.exit_file(index), sweep.log_path(job)
    said = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    seconds = time.monotonic() - array.began.get(index, time.monotonic())
    with contextlib.suppress(FileNotFoundError):
        code, ran = written.read_text().split()
        outcome(job, int(code), said, float(ran))
    if state == "CANCELLED" or job.status in ("waiting", "running"):
        status: Status = "cancelled" if state == "CANCELLED" else "failed"
        words = f"Slurm job {array.number}_{index}: {state or 'no longer known to Slurm'}"
        job.ended("done" if job.exit_code == 0 else status, job.exit_code, words, job.seconds or seconds)


def _states(number: str) -> dict[int, str]:
    """Index -> state of the array's jobs that Slurm still knows; -1 for those that wait in one line of its list."""
    found: dict[int, str] = {}
    for line in _slurm("scontrol", "--oneliner", "show", "job", number, missing_ok=True).splitlines():
        index, state = re.search(r"\bArrayTaskId=(\S+)", line), re.search(r"\bJobState=([A-Z_]+)", line)
        if index and state:
            found[int(index.group(1)) if index.group(1).isdigit() else -1] = state.group(1)
    return found


def _slurm(*command: str, missing_ok: bool = False) -> str:
    """What a command of Slurm prints. Raises InputError where there is no Slurm, or it refuses."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    except FileNotFoundError:
        raise InputError(
            f"hydra/launcher=slurm: there is no {command[0]} here; allowed: a login node of a cluster, or torchrun"
        ) from None
    if done.returncode and not missing_ok:
        raise InputError(f"cluster: {command[0]} refuses: {' '.join(done.stderr.split())}")
    return done.stdout
