"""hydra/launcher=torchrun and hydra/launcher=slurm: what Hydra calls with the combinations of a sweep.

In: the arguments of each job. Out: a JobReturn each, whose value is the `Job` with its outcome: a job that fails ends
no sweep. The launcher's script is sys.argv[0], as for Hydra's own launchers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from megatron_edge import compose
from megatron_edge.runtime import local_jobs, slurm_jobs
from megatron_edge.runtime.sweep import Job, Sweep


class _JobLauncher(Launcher):
    """What both share. `watch`, where a sweeper sets it and the launcher `watches`, is asked now and then whether a
    running job shall stop."""

    watches = False

    def __init__(self, own_run_dir: bool) -> None:
        self.own_run_dir = own_run_dir
        self.watch: local_jobs.Watch | None = None
        self._sweep: Sweep | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        swept = compose.swept_keys(config.hydra.overrides.task)
        self._sweep = Sweep.open(Path(config.hydra.sweep.dir), sys.argv[0], swept, self.own_run_dir)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        assert self._sweep is not None, "Hydra calls setup first"
        jobs = self._sweep.plan(job_overrides)
        self.run(self._sweep, [job for job in jobs if job.status == "waiting"])
        return [_returned(job) for job in jobs]

    def run(self, sweep: Sweep, jobs: list[Job]) -> None:
        raise NotImplementedError


class TorchrunLauncher(_JobLauncher):
    """Each job under its own torchrun on this machine."""

    watches = True

    def __init__(self, ranks: int | None, at_once: int | None, own_run_dir: bool) -> None:
        super().__init__(own_run_dir)
        self.ranks, self.at_once = ranks, at_once

    def run(self, sweep: Sweep, jobs: list[Job]) -> None:
        local_jobs.run_jobs(sweep, jobs, ranks=self.ranks, at_once=self.at_once, watch=self.watch)


class SlurmLauncher(_JobLauncher):
    """The jobs as arrays of Slurm; this process waits for them."""

    def __init__(self, poll_seconds: float, own_run_dir: bool) -> None:
        super().__init__(own_run_dir)
        self.poll_seconds = poll_seconds

    def run(self, sweep: Sweep, jobs: list[Job]) -> None:
        slurm_jobs.run_jobs(sweep, jobs, self.poll_seconds)


def _returned(job: Job) -> Any:
    returned = JobReturn(overrides=job.overrides, working_dir=job.run_dir, status=JobStatus.COMPLETED)
    returned.return_value = job
    return returned
