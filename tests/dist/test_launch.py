"""Launches with real processes: rank 0 composes, all get the same, before and instead of any process group."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# The job of a launcher, which says what each rank got; `train.seed` picks what it does then.
SCRIPT = """
import hashlib, json, sys
from pathlib import Path
from megatron_edge.runtime.launcher import launch

def job(config, started):
    from megatron_edge.config import to_yaml
    from megatron_edge.contracts import InputError, StoppedBySignal
    import torch.distributed as dist
    said = {"rank": started.rank, "local_rank": started.local_rank, "dp": started.plan.dp, "threads": started.threads,
            "composed_here": "hydra" in sys.modules, "yaml": hashlib.sha256(to_yaml(config).encode()).hexdigest()}
    Path(f"rank{started.rank}.json").write_text(json.dumps(said))
    if config.train.seed == 6:
        import time
        from megatron_edge.runtime.session import open_session
        with open_session(started.plan, rank=started.rank, local_rank=started.local_rank, store=started.store,
                          timeout_seconds=10, seed=1):
            if started.rank == 1:
                time.sleep(600)
            dist.barrier()
    dist.init_process_group("gloo", store=started.store, rank=started.rank, world_size=started.world_size)
    ranks = [None] * started.world_size
    dist.all_gather_object(ranks, started.rank)
    assert ranks == list(range(started.world_size))
    if config.train.seed == 2:
        raise InputError("all ranks agree")
    if config.train.seed == 3 and started.rank == 1:
        raise InputError("rank 1 alone")
    if config.train.seed == 4:
        if started.rank == 1:
            raise ValueError("the root cause")
        dist.barrier()
    if config.train.seed == 5:
        raise StoppedBySignal("after step 1")
    dist.destroy_process_group()

if __name__ == "__main__":
    launch(job)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "job.py").write_text(SCRIPT)
    return tmp_path / "job.py"


def torchrun(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [*start, *arguments],
        cwd=script.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def own_lines(done: subprocess.CompletedProcess[str], start: str) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith(start)]


def check_ranks(directory: Path) -> None:
    import json

    said = [json.loads((directory / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [one["rank"] for one in said] == [0, 1] == [one["local_rank"] for one in said]
    assert [one["composed_here"] for one in said] == [True, False], "only rank 0 runs Hydra"
    assert said[0]["yaml"] == said[1]["yaml"] and said[0]["dp"] == said[1]["dp"] == 2
    assert {one["threads"] for one in said} == {1}
    assert {path.name for path in directory.iterdir()} == {"job.py", "rank0.json", "rank1.json"}, "no Hydra files"


def test_torchrun_gives_all_ranks_rank_0s_configuration(script: Path) -> None:
    done = torchrun(script, "+scenario=gateway", "threads=1")
    assert done.returncode == 0, done.stderr
    check_ranks(script.parent)


def test_srun_does_the_same(script: Path) -> None:
    """srun's own variables on two processes; a real Slurm is not at hand in every run of the tests."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in (0, 1):
        step = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": 2, "SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0}
        more = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2", "MASTER_PORT": port}
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **{k: str(v) for k, v in step.items()}, **more}
        command = [sys.executable, str(script), "+scenario=gateway", "threads=1"]
        ranks.append(subprocess.Popen(command, cwd=script.parent, env=environment))
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    check_ranks(script.parent)


@pytest.mark.parametrize(("seed", "message"), [(2, "error: all ranks agree"), (3, "error: rank 1 alone")])
def test_a_refusal_inside_a_job_is_said_once(seed: int, message: str, script: Path) -> None:
    done = torchrun(script, f"train.seed={seed}")
    assert own_lines(done, "error:") == [message]
    assert "[rank" not in done.stderr.replace("[rank 0 of 2] ended after", "")
    assert "exitcode  : 2" in done.stderr


def test_the_first_failure_is_the_one_that_is_shown(script: Path) -> None:
    done = torchrun(script, "train.seed=4")
    assert own_lines(done, "[rank 1 of 2] ValueError: the root cause")
    assert len(own_lines(done, "[rank 0 of 2]")) <= 1, "rank 0 only says that it ended too"
    assert done.returncode == 1


def test_a_stop_by_signal_is_told_to_the_launcher(script: Path) -> None:
    done = torchrun(script, "train.seed=5")
    assert own_lines(done, "stopped:") == ["stopped: after step 1"]
    assert "exitcode  : 75" in done.stderr


def test_a_sweep_starts_its_own_torchrun_for_each_combination(script: Path) -> None:
    command = [sys.executable, str(script), "-m", "train.seed=1,3", "parallel.pipeline=2", "threads=1", "run_dir=s"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, cwd=script.parent, env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    for number, seed in ((1, 1), (2, 3)):
        said = f"[{number}/2] train.seed={seed} parallel.pipeline=2 threads=1 run_dir='s/train.seed-{seed}'"
        assert own_lines(done, f"[{number}/2]") == [said]
    assert own_lines(done, "error:") == ["error: rank 1 alone"], "the first combination went well"
    assert done.returncode == 2, "the rank's own code"


def test_a_rank_that_sleeps_is_named_with_its_place(script: Path) -> None:
    """It is alive, and gives signs of life; the others wait for it in a barrier."""
    done = torchrun(script, "train.seed=6")
    (said,) = own_lines(done, "hung: ")
    line = SCRIPT.splitlines().index("                time.sleep(600)") + 1
    assert re.fullmatch(
        rf"hung: rank 1 stands in .*job\.py:{line} job(, in .*)? \(.*\), while the others wait for it; "
        r"no progress for 10 s \(parallel\.timeout_seconds\)",
        said,
    ), said
    assert "exitcode  : 5" in done.stderr and "[rank 1 of 2]" in done.stderr, "and its stack"
