"""Sweeps and searches with real processes, on a job that is quick: its loss is a known function of its arguments."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# steps decides the loss and weight decay the bytes, by what a front can be told from outside. The seed decides the end.
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
from megatron_edge.runtime.launcher import launch

def job(config, started):
    from megatron_edge.contracts import InputError, StoppedBySignal
    directory, train = Path(config.run_dir), config.train
    directory.mkdir(parents=True, exist_ok=True)
    if train.seed == 4:
        raise InputError("train.seed=4: this job was to fail")
    if train.seed == 9:
        asked = []
        signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
        (directory / "began").touch()
        while not asked:
            time.sleep(0.05)
        raise StoppedBySignal("after step 1")
    loss = 1.0 + abs(train.learning_rate - 0.3)
    with (directory / "metrics.jsonl").open("a") as metrics:
        for step in range(1, train.steps + 1):
            metrics.write(json.dumps({"step": step, "loss_nats_per_token": loss + 1 / step}) + "\\n")
            metrics.flush()
            if config.train.steps > 30:
                time.sleep(0.1)
    facts = {"losses_nats_per_token": {"artifact": loss}}
    facts["artifact"] = {"size_bytes": int(1000 * (1.0 - train.learning_rate))}
    (directory / "verify.json").write_text(json.dumps(facts))
    (directory / f"torchrun-{os.environ['TORCHELASTIC_RUN_ID']}-{started.rank}").touch()

if __name__ == "__main__":
    launch(job)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "job.py").write_text(SCRIPT)
    return tmp_path / "job.py"


def command(script: Path, *arguments: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return {"args": [sys.executable, str(script), "-m", "threads=1", *arguments], "cwd": script.parent, "env": environment}


def sweep(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(**command(script, *arguments), capture_output=True, text=True, timeout=300, check=False)


def jobs(directory: Path) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in json.loads((directory / "sweep.json").read_text())["jobs"]}


def test_one_failed_job_ends_no_sweep_and_a_repeated_sweep_skips_what_is_done(script: Path) -> None:
    arguments = ("train.seed=1,4,2", "hydra.launcher.at_once=2", "run_dir=swept")
    first = sweep(script, *arguments)
    directory = script.parent / "swept"
    found = jobs(directory)
    assert {name: one["status"] for name, one in found.items()} == {
        "train.seed-1": "done",
        "train.seed-2": "done",
        "train.seed-4": "failed",
    }, first.stderr
    failed = found["train.seed-4"]
    assert (failed["exit_code"], failed["reason"]) == (2, "error: train.seed=4: this job was to fail")
    assert first.returncode == 2, "the failed job's code, not torchrun's"
    assert "this job was to fail" in first.stderr.split("sweep swept")[1], "the table names it"
    assert len(list(directory.glob("*/torchrun-*-0"))) == 2, "each under its own torchrun"
    assert not (script.parent / "outputs").exists() and not (script.parent / "multirun").exists()
    second = sweep(script, *arguments)
    assert {one["status"] for one in jobs(directory).values()} == {"skipped", "failed"}
    assert len(list(directory.glob("*/torchrun-*-0"))) == 2, "nothing was done again"
    assert second.returncode == 2 and second.stderr.count("[1/1]") >= 1


def test_a_sweep_that_is_stopped_stops_its_jobs_and_begins_no_other(script: Path) -> None:
    with subprocess.Popen(**command(script, "train.seed=9,1", "parallel.pipeline=2", "run_dir=s")) as running:
        deadline = time.monotonic() + 120
        while not (script.parent / "s" / "train.seed-9" / "began").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=120) == 75
    found = jobs(script.parent / "s")
    assert {one["status"] for one in found.values()} == {"cancelled"}
    assert found["train.seed-9"]["exit_code"] == 75 and "stopped: after step 1" in found["train.seed-9"]["reason"]
    assert "not started" in found["train.seed-1"]["reason"]


def test_a_search_begins_with_the_grid_finds_the_front_and_goes_on_where_it_was(script: Path) -> None:
    pytest.importorskip("optuna")
    search = ("hydra/sweeper=optuna", "hydra.sweeper.at_once=5", "hydra.launcher.at_once=2", "run_dir=found")
    space = ("train.learning_rate=0.1,0.3,0.5,0.7", "train.weight_decay=interval(0.0,0.1)")
    done = sweep(script, *search, *space, "hydra.sweeper.trials=5")
    directory = script.parent / "found"
    assert done.returncode == 0, done.stderr
    trials = json.loads((directory / "optuna.json").read_text())["trials"]
    rates = [float(trial["parameters"]["train.learning_rate"]) for trial in trials]
    assert rates[:4] == [0.1, 0.3, 0.5, 0.7] and [trial["of_grid"] for trial in trials] == [True] * 4 + [False]
    for trial, rate in zip(trials, rates, strict=True):
        assert trial["values"] == {"heldout_loss": 1.0 + abs(rate - 0.3), "bytes": int(1000 * (1.0 - rate))}
        assert trial["best"] == (rate >= 0.3), "a lower rate than 0.3 has more of both"
    again = sweep(script, *search, *space, "hydra.sweeper.trials=6")
    assert again.returncode == 0, again.stderr
    assert len(json.loads((directory / "optuna.json").read_text())["trials"]) == 6
    statuses = [one["status"] for one in jobs(directory).values()]
    assert sorted(statuses) == ["done"] + ["skipped"] * 5


def test_a_trial_that_is_worse_than_the_others_is_pruned(script: Path) -> None:
    pytest.importorskip("optuna")
    one = ("hydra/sweeper=optuna", "hydra.sweeper.objectives=[heldout_loss]", "hydra.sweeper.prune=true")
    done = sweep(script, *one, "hydra.sweeper.trials=4", "train.learning_rate=0.3,0.31,0.32,0.9", "train.steps=40", "run_dir=p")
    assert done.returncode == 0, done.stderr
    trials = json.loads((script.parent / "p" / "optuna.json").read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["complete", "complete", "complete", "pruned"]
    pruned = jobs(script.parent / "p")["train.learning_rate-0.9"]
    assert pruned["status"] == "cancelled" and pruned["reason"].startswith("pruned: training loss")
    assert [trial["best"] for trial in trials] == [True, False, False, False]
