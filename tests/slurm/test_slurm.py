"""A real Slurm of two nodes on this machine: batch jobs, ranks of srun, arrays, cancelling, and preemption."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.launches import metrics
from tests.e2e.tiny_model import write_tiny_model

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch")
MISSING = [name for name in PROGRAMS if shutil.which(name) is None]
REASON = f"{', '.join(MISSING)} not installed" if MISSING else "Slurm's daemons are started as root"

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(MISSING) or os.geteuid() != 0, reason=f"{REASON}; tests/slurm/start.sh does both"),
]

# A launcher whose seed decides how it ends; each rank leaves a file that says what it was started as.
SCRIPT = """
import signal, socket, time
from pathlib import Path
from megatron_edge.runtime.launcher import launch

def job(config, started):
    from megatron_edge.contracts import InputError, StoppedBySignal
    import torch.distributed as dist
    directory = Path(config.run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    if started.world_size > 1:
        dist.init_process_group("gloo", store=started.store, rank=started.rank, world_size=started.world_size)
        ranks = [None] * started.world_size
        dist.all_gather_object(ranks, started.rank)
        assert ranks == list(range(started.world_size))
    (directory / f"rank{started.rank}").write_text(f"{socket.gethostname()} {started.local_rank} {started.plan.dp}")
    if config.train.seed == 4:
        raise InputError("train.seed=4: this job was to fail")
    if config.train.seed == 9:
        asked = []
        signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
        (directory / "began").touch()
        while not asked:
            time.sleep(0.05)
        raise StoppedBySignal("after step 1")

if __name__ == "__main__":
    launch(job)
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of Slurm's commands."""
    directory = tmp_path_factory.mktemp("slurm")
    try:
        subprocess.run([REPOSITORY / "tests/slurm/start.sh", directory], check=True, timeout=120)
        yield {
            **os.environ,
            "SLURM_CONF": str(directory / "slurm.conf"),
            "PYTHONPATH": str(REPOSITORY),
            "PYTHON": sys.executable,
        }
    finally:
        subprocess.run([REPOSITORY / "tests/slurm/stop.sh", directory], check=False, timeout=120)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "job.py").write_text(SCRIPT)
    return tmp_path / "job.py"


def run(environment: dict[str, str], directory: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment, cwd=directory, capture_output=True, text=True, timeout=600, check=False
    )


def until(holds: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "not so in time"
        time.sleep(0.2)


def state(environment: dict[str, str], job: str) -> str:
    said = run(environment, REPOSITORY, "scontrol", "--oneliner", "show", "job", job).stdout
    return re.findall(r"JobState=([A-Z_]+)", said)[0]


def jobs(directory: Path) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in json.loads((directory / "sweep.json").read_text())["jobs"]}


def test_srun_starts_the_ranks_without_torchrun(slurm: dict[str, str], script: Path) -> None:
    two_by_two = ("srun", "--nodes=2", "--ntasks-per-node=2", sys.executable, script)
    done = run(slurm, script.parent, *two_by_two, "run_dir=r", "threads=1", "parallel.tensor=2")
    assert done.returncode == 0, done.stderr
    ranks = [(script.parent / "r" / f"rank{rank}").read_text() for rank in range(4)]
    assert ranks == ["n1 0 2", "n1 1 2", "n2 0 2", "n2 1 2"], "host, local rank, data parallel size"
    refused = run(slurm, script.parent, *two_by_two, "run_dir=r", "train.stepz=1")
    assert refused.returncode == 2 and refused.stderr.count("error: train.stepz: unknown") == 1
    assert "TCPStore" not in refused.stderr, "the process that holds the store leaves last"


def test_an_array_over_two_nodes_and_a_second_sweep(slurm: dict[str, str], script: Path) -> None:
    launcher = ("hydra/launcher=slurm", "hydra.launcher.poll_seconds=0.5", "threads=1", "run_dir=swept")
    shape = ("cluster.nodes=2", "parallel.tensor=2", "train.seed=1,4,9,2")
    command = [sys.executable, script, "-m", *launcher, *shape]
    with subprocess.Popen(command, env=slurm, cwd=script.parent, stderr=subprocess.PIPE, text=True) as sweep:
        assert sweep.stderr is not None
        number = re.findall(r"Slurm job (\d+)", sweep.stderr.readline())[0]
        until((script.parent / "swept" / "train.seed-9" / "began").exists)
        run(slurm, script.parent, "scancel", f"{number}_2")
        said = sweep.stderr.read()
        assert sweep.wait(timeout=300) == 2, said
    found = jobs(script.parent / "swept")
    statuses = {name.removeprefix("train.seed-"): one["status"] for name, one in found.items()}
    assert statuses == {"1": "done", "4": "failed", "9": "cancelled", "2": "done"}, said
    assert found["train.seed-4"]["exit_code"] == 2 and "was to fail" in found["train.seed-4"]["reason"]
    assert "CANCELLED" in found["train.seed-9"]["reason"]
    hosts = [(script.parent / "swept" / "train.seed-1" / f"rank{rank}").read_text()[:2] for rank in (0, 1)]
    assert hosts == ["n1", "n2"]
    again = run(slurm, script.parent, *[str(one).replace("1,4,9,2", "1,2") for one in command])
    assert again.returncode == 0 and "Slurm job" not in again.stderr
    assert {jobs(script.parent / "swept")[f"train.seed-{seed}"]["status"] for seed in (1, 2)} == {"skipped"}


def test_a_sweep_that_is_stopped_cancels_its_jobs(slurm: dict[str, str], script: Path) -> None:
    command = [sys.executable, script, "-m", "hydra/launcher=slurm", "hydra.launcher.poll_seconds=0.5", "threads=1"]
    with subprocess.Popen([*command, "train.seed=9", "run_dir=s"], env=slurm, cwd=script.parent) as sweep:
        until((script.parent / "s" / "job" / "began").exists)
        sweep.terminate()
        assert sweep.wait(timeout=120) == 75
    assert jobs(script.parent / "s")["job"]["status"] == "cancelled"
    until(lambda: not run(slurm, script.parent, "squeue", "--noheader").stdout.strip(), 60)


def test_a_preempted_job_is_queued_again_and_ends_like_an_uninterrupted_one(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    """launch/qat.sbatch, whose partition a job of a higher one takes over in the middle of training."""
    model = write_tiny_model(tmp_path / "model")
    arguments = ["+scenario=gateway", "parallel.pipeline=2", f"model.source={model}", "train.steps=60", "threads=1"]
    arguments += ["train.precision=fp32", "train.seq_length_tokens=64", "data.eval_tokens=512"]
    arguments += ["train.learning_rate=1e-3", "train.checkpoint_every_steps=0"]

    def submit(name: str) -> str:
        options = ["--parsable", f"--output={tmp_path / name}.log"]
        job = ["launch/qat.sbatch", *arguments, f"run_dir={tmp_path / name}"]
        return run(slurm, REPOSITORY, "sbatch", *options, *job).stdout.strip()

    whole = submit("whole")
    until(lambda: state(slurm, whole) not in ("PENDING", "RUNNING", "COMPLETING"))
    assert state(slurm, whole) == "COMPLETED", (tmp_path / "whole.log").read_text()
    cut = submit("cut")
    until(lambda: len(metrics(tmp_path / "cut")) >= 10)
    urgent = ["--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    run(slurm, tmp_path, "sbatch", *urgent)
    until(lambda: "queued again" in (tmp_path / "cut.log").read_text())
    until(lambda: state(slurm, cut) == "COMPLETED")
    log = (tmp_path / "cut.log").read_text()
    (step,) = re.findall(r"stopped: stopped by a signal after step (\d+)", log)
    assert 10 <= int(step) < 60 and f"resuming from {tmp_path}/cut/checkpoints/step_{int(step):08d}" in log
    losses = [
        [(one["step"], one["loss_nats_per_token"]) for one in metrics(tmp_path / name)] for name in ("whole", "cut")
    ]
    assert len(losses[0]) == 60 and losses[0] == losses[1]
