"""The bookkeeping of sweeps: names, run directories, sweep.json, reasons, batch scripts. Nothing is started here."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_edge import compose
from megatron_edge.contracts import InputError
from megatron_edge.runtime import slurm_jobs, sweep

CLUSTER = ["cluster.partition=gpu", "cluster.nodes=2", "cluster.gpus_per_node=4", "cluster.time_minutes=90"]
GRID = [["+scenario=gateway", f"quant={quant}", f"kv={kv}"] for quant in ("int4_awq", "fp8") for kv in ("none", "int8")]

TORCHRUN_LOG = """\
error: rank 1 alone
E1126 failed (exitcode: 2) local_rank: 1
  exitcode  : -15 (pid: 12)
Root Cause (first observed failure):
  exitcode  : 2 (pid: 13)
"""


def opened(directory: Path, swept: tuple[str, ...] = ("quant", "kv")) -> sweep.Sweep:
    return sweep.Sweep.open(directory, "launch/qat.py", swept, own_run_dir=True)


def records(directory: Path) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in json.loads((directory / "sweep.json").read_text())["jobs"]}


def test_each_job_has_a_run_directory_and_a_refused_one_ends_no_sweep(tmp_path: Path) -> None:
    jobs = opened(tmp_path).plan(GRID)
    assert [job.name for job in jobs] == [
        "kv-none__quant-int4_awq",
        "kv-int8__quant-int4_awq",
        "kv-none__quant-fp8",
        "kv-int8__quant-fp8",
    ]
    assert [job.status for job in jobs] == ["waiting", "waiting", "failed", "failed"]
    assert all(job.run_dir == str(tmp_path / job.name) for job in jobs)
    assert jobs[0].config == compose.compose([*GRID[0], f"run_dir='{tmp_path / jobs[0].name}'"])
    written = records(tmp_path)
    assert set(written) == {"kv-none__quant-fp8", "kv-int8__quant-fp8"}, "only what has ended"
    for one in written.values():
        assert set(one) == {"name", "overrides", "run_dir", "status", "exit_code", "reason", "seconds"}
        assert one["exit_code"] == 2 and one["reason"].startswith("error: quant=fp8") and "nearest" in one["reason"]


def test_what_is_done_is_skipped_unless_its_arguments_or_its_directory_changed(tmp_path: Path) -> None:
    first = opened(tmp_path)
    for job in first.plan(GRID[:2]):
        Path(job.run_dir).mkdir()
        sweep.outcome(job, 0, "", 7.0)
    first.write()
    again = opened(tmp_path).plan(GRID)
    assert [job.status for job in again] == ["skipped", "skipped", "failed", "failed"]
    assert again[0].seconds == 7.0 and sweep.exit_code(again) == 2 and sweep.exit_code(again[:2]) == 0
    assert [job.status for job in opened(tmp_path).plan(GRID[:2])] == ["skipped", "skipped"], "also the third time"
    assert set(records(tmp_path)) == {job.name for job in again}, "what this sweep did not have stays"
    other = opened(tmp_path).plan([[*GRID[0], "train.seed=2"]])
    assert [job.status for job in other] == ["waiting"]
    Path(again[1].run_dir).rmdir()
    assert [job.status for job in opened(tmp_path).plan(GRID[:2])] == ["skipped", "waiting"]


def test_names_stay_apart(tmp_path: Path) -> None:
    """Characters that no path should have become a dash, and long names are cut."""
    names = ["a/b", "a-b", "x" * 300, "x" * 299 + "y"]
    jobs = opened(tmp_path, ("data.train",)).plan([[f"data.train={name}"] for name in names])
    assert len({job.run_dir for job in jobs}) == 4 and max(len(job.name) for job in jobs) < 160
    with pytest.raises(InputError, match=r"run_dir=r: .*would share it"):
        opened(tmp_path, ("run_dir", "kv")).plan([["run_dir=r", "kv=none"], ["run_dir=r", "kv=int8"]])


@pytest.mark.parametrize(
    ("returncode", "log", "expected"),
    [
        (0, "error: of an earlier start\n", ("done", 0, None)),
        (1, TORCHRUN_LOG, ("failed", 2, "error: rank 1 alone")),
        (
            3,
            "10:00:00 INFO x\nfailed: 2 checks do not hold: a; b\n",
            ("failed", 3, "failed: 2 checks do not hold: a; b"),
        ),
        (75, "stopped: after step 3\n", ("cancelled", 75, "stopped: after step 3")),
        (1, "[rank 1 of 2] Traceback\n[rank 1 of 2] ValueError: x\n", ("failed", 1, "ValueError: x")),
        (1, "  File 'a'\nmodelopt.some.OddError: y\n", ("failed", 1, "modelopt.some.OddError: y")),
        (-9, "", ("failed", -9, "ended by signal 9")),
        (7, "the last word\n\n", ("failed", 7, "the last word")),
    ],
)
def test_a_job_ends_with_its_ranks_code_and_their_own_word(returncode: int, log: str, expected: Any) -> None:
    job = sweep.Job("a", [], "a")
    sweep.outcome(job, returncode, log, 1.0)
    assert (job.status, job.exit_code, job.reason) == expected


def test_the_sweeps_exit_code() -> None:
    def code(*ends: tuple[Any, int | None, str | None]) -> int:
        jobs = [sweep.Job(str(index), [], "") for index in range(len(ends))]
        for job, end in zip(jobs, ends, strict=True):
            job.ended(*end)
        return sweep.exit_code(jobs)

    assert code(("done", 0, None), ("cancelled", 75, "pruned: loss 3 ...")) == 0
    assert code(("done", 0, None), ("cancelled", 75, "stopped: ...")) == 75
    assert code(("cancelled", 75, "stopped: ..."), ("failed", 4, "diverged: ...")) == 4
    assert code(("failed", -9, "ended by signal 9")) == 1


def test_a_batch_script_asks_for_what_cluster_says(tmp_path: Path) -> None:
    more = ["cluster.container=img.sqsh", "cluster.before=['module load cuda']", "cluster.options=['--qos=high']"]
    config = compose.compose([*CLUSTER, *more, "cluster.at_once=3", "parallel.tensor=4", "parallel.pipeline=2"])
    assert slurm_jobs.ranks_per_node(config) == 4
    text = slurm_jobs.batch_script(opened(tmp_path), config.cluster, 4, 7, tmp_path)
    for line in ("array=0-6%3", "partition=gpu", "nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "time=90"):
        assert f"#SBATCH --{line}\n" in text
    assert "#SBATCH --qos=high\n" in text and "#SBATCH --signal=B:USR1@120\n" in text and "account" not in text
    assert "\nmodule load cuda\n" in text and "--container-image=img.sqsh" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    for script in ("launch/ranks.sh", "launch/qat.sbatch", "tests/slurm/start.sh", "tests/slurm/stop.sh"):
        assert subprocess.run(["bash", "-n", script], cwd=Path(__file__).parents[2], check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hydra/launcher=joblib"], "hydra/launcher=joblib: unknown .*slurm, torchrun"),
        (["hydra.run.dir=x"], "hydra.run.dir: unknown"),
        (["hydra.launcher.workers=2"], "workers"),
        (["quant=fp8,nvfp5"], "quant=nvfp5: unknown"),
        (["train.seed=interval(1,2)"], "train.seed=.*interval is for hydra/sweeper=optuna"),
        (["hydra/sweeper=optuna", "hydra.sweeper.objectives=[speed]", "train.seed=1,2"], "hydra.sweeper.objectives"),
        (["hydra/sweeper=optuna", "hydra.sweeper.prune=true", "train.seed=1,2"], "hydra.sweeper.prune=True"),
        (
            [
                "hydra/sweeper=optuna",
                "hydra/launcher=slurm",
                "hydra.sweeper.prune=true",
                "hydra.sweeper.objectives=[heldout_loss]",
                "train.seed=1,2",
            ],
            "hydra.sweeper.prune=True: allowed is false with this launcher",
        ),
        (["hydra/sweeper=optuna", "train.seed=1"], "nothing is swept"),
    ],
)
def test_a_sweep_with_a_wrong_argument_starts_nothing(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
        compose.multirun("launch/qat.py", arguments, reads_run=False)
    assert not list(tmp_path.rglob("sweep.json"))


def test_the_front_is_what_no_other_beats(tmp_path: Path) -> None:
    jobs = []
    for loss, size in ((3.0, 10), (3.1, 9), (3.2, 9), (2.9, 20), (3.0, 10)):
        job = sweep.Job(f"{len(jobs)}", [], str(tmp_path / f"{len(jobs)}"), status="done")
        facts = {"losses_nats_per_token": {"artifact": loss}, "artifact": {"size_bytes": size}}
        Path(job.run_dir).mkdir()
        (Path(job.run_dir) / "verify.json").write_text(json.dumps(facts))
        jobs.append(job)
    jobs.append(sweep.Job("failed", [], str(tmp_path / "0"), status="failed"))
    assert [job.name for job in sweep.front(jobs)] == ["0", "1", "3", "4"]
