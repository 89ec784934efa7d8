"""A job that is killed, stopped, damaged and started again ends as one that nothing happened to, byte for byte."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.conftest import CHECKPOINT_EVERY_STEPS, STEPS, Run
from tests.e2e.launches import (
    Finished,
    checkpoints,
    flip_byte,
    hashes,
    last_step,
    metrics,
    refusal,
    run,
    run_all,
    start,
)
from tests.e2e.tiny_model import write_tiny_model

pytestmark = pytest.mark.timeout(400)

EXACT = ("step", "loss_nats_per_token", "gradient_norm", "learning_rate", "tokens")
REFUSAL_SECONDS = 60


@dataclass(frozen=True)
class History:
    """One run directory through three launches of the same command, and what was seen between them."""

    directory: Path
    killed: Finished
    second_job: Finished
    checkpoints_when_killed: list[int]
    last_step_when_killed: int
    stopped: Finished
    checkpoints_when_stopped: list[int]
    damaged: Path
    resumed: Finished


def assert_equal_runs(run_dir: Path, uninterrupted: Path) -> None:
    """Every step once, each number of each step bit for bit, and the same bytes in artifact and reference."""
    ours, theirs = ([{k: r[k] for k in EXACT} for r in metrics(path)] for path in (run_dir, uninterrupted))
    assert [record["step"] for record in ours] == list(range(1, STEPS + 1))
    assert ours == theirs
    for part in ("artifact", "reference"):
        assert hashes(run_dir / part) == hashes(uninterrupted / part)


def kill_rank_1(command: tuple[str, ...], run_dir: Path, scratch: Path) -> tuple[Finished, Finished, list[int], int]:
    """Between two checkpoints: both ranks halt, another job tries the same directory, rank 1 is killed.

    Returns: what torchrun said, what the other job said, the checkpoints there, the last step done.
    """
    with start("qat", *command, directory=scratch, processes=2) as running:
        running.until(lambda: last_step(run_dir) > CHECKPOINT_EVERY_STEPS)
        running.signal_ranks(signal.SIGSTOP)
        saved, step = checkpoints(run_dir), last_step(run_dir)
        intruder = run("qat", *command, "parallel.pipeline=1", directory=scratch)
        running.rank(1).kill()
        running.rank(0).send_signal(signal.SIGCONT)
        return running.wait(), intruder, saved, step


@pytest.fixture(scope="module")
def history(gateway_arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> History:
    scratch = tmp_path_factory.mktemp("interrupted")
    run_dir = scratch / "run"
    command = (*gateway_arguments, f"run_dir={run_dir}")
    killed, intruder, saved, step = kill_rank_1(command, run_dir, scratch)

    # What a crash in the middle of a save leaves behind: some files, no manifest.
    half = run_dir / "checkpoints" / f".saving-step_{2 * CHECKPOINT_EVERY_STEPS:08d}"
    half.mkdir(exist_ok=True)
    shutil.copy(next((run_dir / "checkpoints" / f"step_{saved[-1]:08d}").glob("*.distcp")), half)

    with start("qat", *command, directory=scratch, processes=2) as running:
        running.until(lambda: last_step(run_dir) > step)  # lines up to there are the killed launch's
        running.rank(1).send_signal(signal.SIGTERM)
        stopped = running.wait()
    saved_then = checkpoints(run_dir)

    damaged = next(iter(sorted((run_dir / "checkpoints" / f"step_{saved_then[-1]:08d}").glob("*.distcp"))))
    flip_byte(damaged, damaged.stat().st_size // 2)
    resumed = run("qat", *command, directory=scratch, processes=2)
    return History(run_dir, killed, intruder, saved, step, stopped, saved_then, damaged, resumed)


def test_a_killed_rank_ends_the_job(history: History) -> None:
    """Rank 1 cannot say anything any more; torchrun names it first, and rank 0 does not wait for it."""
    assert history.killed.returncode == 1
    assert re.search(r"Root Cause.*?rank\s+: 1 .*?exitcode\s+: -9", history.killed.stderr, re.DOTALL)
    assert history.checkpoints_when_killed == [0, CHECKPOINT_EVERY_STEPS]
    assert history.last_step_when_killed > CHECKPOINT_EVERY_STEPS, "there is work that the checkpoint does not hold"


def test_a_second_job_in_the_same_directory_is_refused(history: History) -> None:
    assert history.second_job.returncode == 2
    line = refusal(history.second_job)
    assert f"run_dir='{history.directory}'" in line and "another job is at work there" in line


def test_a_crash_while_saving_costs_nothing(history: History) -> None:
    """The same command goes on from the checkpoint before the half-written one, which the next save clears away."""
    assert f"resuming from {history.directory}/checkpoints/step_{CHECKPOINT_EVERY_STEPS:08d}" in history.stopped.stderr
    assert not list((history.directory / "checkpoints").glob(".saving-*"))


def test_sigterm_to_one_rank_saves_and_exits_with_75(history: History) -> None:
    stopped = history.checkpoints_when_stopped[-1]
    assert history.last_step_when_killed < stopped < STEPS, "saved where it was"
    assert history.stopped.rank_codes == [75, 75], history.stopped.stderr
    assert history.stopped.lines("stopped: ") == [
        f"stopped: stopped by a signal after step {stopped}; the same command continues there"
    ]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(history: History) -> None:
    said = [line for line in history.resumed.stderr.splitlines() if "WARNING" in line and "damaged" in line]
    assert len(said) >= 1 and history.damaged.name in said[0] and str(history.damaged.parent) in said[0], said
    before = history.checkpoints_when_stopped[-2]
    assert f"resuming from {history.directory}/checkpoints/step_{before:08d}" in history.resumed.stderr


def test_it_ends_as_an_uninterrupted_run(history: History, gateway_run: Run) -> None:
    assert history.resumed.returncode == 0, history.resumed.stderr
    assert not history.resumed.noise, history.resumed.noise
    assert_equal_runs(history.directory, gateway_run.directory)


@pytest.fixture(scope="module")
def refused(gateway_run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    """In one process each, beside the finished run's config.yaml: the layout is not part of a run's identity."""
    scratch = tmp_path_factory.mktemp("refused")
    other = write_tiny_model(scratch / "other_model", seed=1)
    cases = {
        "model": [f"model.source={other}"],
        "recipe": ["quant=int4"],
        "rate": ["train.learning_rate=2e-3"],
        "nothing": ["resume=must"],
    }
    for name in cases:
        (scratch / name).mkdir()
        shutil.copy(gateway_run.directory / "config.yaml", scratch / name)
    command = (*gateway_run.arguments, "parallel.pipeline=1")
    return run_all(
        {
            name: lambda name=name, case=case: run(
                "qat", *command, *case, f"run_dir={scratch / name}", directory=scratch
            )
            for name, case in cases.items()
        }
    )


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("model", ["run_dir=", "model.source=", "other_model", "tiny_model"]),
        ("recipe", ["run_dir=", "quant.weight='int4' (there: 'nvfp4')"]),
        ("rate", ["run_dir=", "train.learning_rate=0.002 (there: 0.001)"]),
        ("nothing", ["resume=must", "no checkpoint in"]),
    ],
)
def test_what_cannot_be_resumed_is_refused(case: str, words: list[str], refused: dict[str, Finished]) -> None:
    line = refusal(refused[case])
    assert refused[case].returncode == 2
    assert all(word in line for word in words), line
    assert refused[case].seconds < REFUSAL_SECONDS


def test_resume_never_starts_again_in_a_used_directory(gateway_run: Run, tmp_path: Path) -> None:
    """Another recipe in the directory of a finished run: its later checkpoints must not be mistaken for ours."""
    shutil.copytree(gateway_run.directory, tmp_path / "run")
    command = [*gateway_run.arguments, "parallel.pipeline=1", "quant=int4", "train.steps=2"]
    done = run("qat", *command, "resume=never", f"run_dir={tmp_path / 'run'}", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2]
    assert checkpoints(tmp_path / "run") == [0, 2]
    report = json.loads((tmp_path / "run" / "verify.json").read_text())
    assert report["ok"] is True
    assert {check["value"] for check in report["checks"] if check["metric"] == "weight formats"} == {"int4"}


@pytest.mark.long
def test_without_an_intact_checkpoint_it_starts_again(gateway_run: Run, tmp_path: Path) -> None:
    """Each one damaged, and only one kept: the damaged ones must not crowd out the new ones."""
    shutil.copytree(gateway_run.directory, tmp_path / "run")
    for shard in (tmp_path / "run" / "checkpoints").glob("step_*/__0_0.distcp"):
        flip_byte(shard, -1)
    command = (*gateway_run.arguments, "train.keep_checkpoints=1", f"run_dir={tmp_path / 'run'}")
    done = run("qat", *command, directory=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is damaged") >= 2
    assert checkpoints(tmp_path / "run") == [STEPS]
    assert_equal_runs(tmp_path / "run", gateway_run.directory)


@pytest.mark.long
def test_a_replaced_model_file_is_refused(gateway_arguments: tuple[str, ...], tmp_path: Path) -> None:
    """The same path, other weights: what the checkpoint says of its model decides, not the path."""
    model = write_tiny_model(tmp_path / "model")
    command = (*gateway_arguments, f"model.source={model}", "train.steps=1", f"run_dir={tmp_path / 'run'}")
    assert run("qat", *command, directory=tmp_path, processes=2).returncode == 0
    write_tiny_model(model, seed=1)
    done = run("qat", *command, directory=tmp_path, processes=2)
    assert done.rank_codes == [2, 2]
    assert "model.source: " in refusal(done)


@pytest.mark.long
def test_sigterm_to_torchrun_saves(gateway_run: Run, tmp_path: Path) -> None:
    """As a scheduler stops a job; then the same command, which must find something (resume=must)."""
    command = (*gateway_run.arguments, f"run_dir={tmp_path / 'run'}")
    with start("qat", *command, directory=tmp_path, processes=2) as running:
        running.until(lambda: last_step(tmp_path / "run") > CHECKPOINT_EVERY_STEPS)
        time.sleep(0.1)
        running.process.send_signal(signal.SIGTERM)
        stopped = running.wait()
    last = checkpoints(tmp_path / "run")[-1]
    assert stopped.lines("stopped: ") == [
        f"stopped: stopped by a signal after step {last}; the same command continues there"
    ]
    done = run("qat", *command, "resume=must", directory=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert_equal_runs(tmp_path / "run", gateway_run.directory)
