"""What a user sees when a rank hangs or dies, or training diverges: the message, and what is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import CHECKPOINT_EVERY_STEPS, STEPS, Run
from tests.e2e.launches import REPOSITORY, Running, checkpoints, hashes, last_step, metrics, run, start

pytestmark = pytest.mark.timeout(400)
HUNG_SECONDS = 30


def test_a_rank_that_hangs_is_named_and_all_end(gateway_arguments: tuple[str, ...], tmp_path: Path) -> None:
    command = (*gateway_arguments, f"parallel.timeout_seconds={HUNG_SECONDS}", f"run_dir={tmp_path / 'run'}")
    with start("qat", *command, directory=tmp_path, processes=2) as running:
        running.until(lambda: last_step(tmp_path / "run") > CHECKPOINT_EVERY_STEPS)
        running.rank(1).send_signal(signal.SIGSTOP)
        done = running.wait(4 * HUNG_SECONDS)
    (said,) = done.lines("hung: ")
    assert said.startswith("hung: rank 1 gave no sign of life (stopped, killed or cut off); last: rank 1 stands in ")
    assert said.endswith(f"no progress for {HUNG_SECONDS} s (parallel.timeout_seconds)")
    assert 5 in done.rank_codes, done.rank_codes
    assert checkpoints(tmp_path / "run")[-1] >= CHECKPOINT_EVERY_STEPS


def test_torchrun_restarts_and_the_job_goes_on(gateway_run: Run, tmp_path: Path) -> None:
    """Also with resume=never: what it forbids was there before the first start."""
    run_dir = tmp_path / "run"
    script = str(REPOSITORY / "launch" / "qat.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", script, *gateway_run.arguments, "resume=never", f"run_dir={run_dir}"]

    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    with Running(command, tmp_path, environment) as running:
        running.until(lambda: last_step(run_dir) > CHECKPOINT_EVERY_STEPS)
        running.rank(1).kill()
        done = running.wait()
    assert done.returncode == 0, done.stderr
    assert "lost: rank 1 ended without a word" in done.stderr
    assert "resuming from" in done.stderr
    assert [record["step"] for record in metrics(run_dir)] == list(range(1, STEPS + 1))
    assert hashes(run_dir / "artifact") == hashes(gateway_run.directory / "artifact")


def test_training_that_diverges_stops_with_the_last_good_checkpoint(
    gateway_arguments: tuple[str, ...], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    steep = ("train.learning_rate=1e30", "train.min_learning_rate=1e30", "train.max_skipped_steps=2")
    one = tuple(argument for argument in gateway_arguments if not argument.startswith("parallel.pipeline"))
    done = run("qat", *one, *steep, f"run_dir={run_dir}", directory=tmp_path)
    assert done.returncode == 4, done.stderr
    (said,) = done.lines("diverged: ")
    assert "not finite, nothing was updated (samples " in said and "3 steps in a row, train.max_skipped_steps=2" in said
    skipped = [record["skipped"] for record in metrics(run_dir)]
    assert skipped == [0, 1, 1, 1]
    assert checkpoints(run_dir) == [0]
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["gradient_norm"] is None


def test_two_kills_cost_nothing(tmp_path: Path) -> None:
    """tools/survive.py, which takes twenty."""
    command = [sys.executable, str(REPOSITORY / "tools" / "survive.py"), "--kills", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=390, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kills (" in done.stdout and "0 wrong" in done.stdout
    shutil.rmtree(tmp_path)
