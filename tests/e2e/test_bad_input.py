"""Bad input to the launchers, as a user gives it: exit code 2, one line with what is allowed, no traceback of ours.

torchrun exits with 1 whatever its ranks return, and prints their exit code: there the ranks' own code is looked at.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SECONDS = 60


def refused_line(done: object) -> str:
    """The one line of the refusal, after checking that there is nothing else of ours."""
    stderr: str = done.stderr  # type: ignore[attr-defined]
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, stderr
    assert "megatron_edge" not in "".join(re.findall(r"File \"(.*?)\"", stderr)), "a traceback of ours"
    return lines[0]


@pytest.mark.parametrize(
    ("job", "arguments", "words"),
    [
        ("qat", ["+scenario=gatway"], ["scenario=gatway", "'gateway'", "gateway_thor, vehicle, vehicle_sm89"]),
        ("qat", ["train.stepz=3"], ["train.stepz", "did you mean 'train.steps'"]),
        ("qat", ["train.precision=bf61"], ["train.precision='bf61'", "bf16, fp32"]),
        ("qat", ["quant=nvfp5"], ["quant=nvfp5", "nvfp4_w4a16"]),
        ("qat", ["model.backend=te"], ["model.backend=te: TransformerEngine", "is missing here; allowed: local"]),
        ("qat", ["model.backend=apex"], ["model.backend=apex: NVIDIA's apex", "is missing here; allowed: local"]),
        ("qat", ["parallel.tensor=2"], ["tensor=2", "1 process"]),
        ("qat", ["+scenario=gateway", "quant=fp8"], ["device=board_2gb", "the nearest is quant=int4_awq"]),
        ("qat", ["train.global_batch=3", "train.micro_batch=2"], ["train.global_batch=3", "2 x 1"]),
        ("qat", ["--config-name=x"], ["--config-name=x", "allowed are --help"]),
        ("qat", ["-m", "quant=fp8,nvfp5"], ["quant=nvfp5"]),
        ("plan", ["model=custom"], ["model.source"]),
        ("export", ["run_dir=nowhere"], ["run_dir='nowhere'", "earlier run"]),
        ("verify", ["reference=nowhere"], ["reference='nowhere'", "earlier run"]),
        ("evaluate", ["artefact=x"], ["artefact", "did you mean 'artifact'"]),
    ],
)
def test_one_process(job: str, arguments: list[str], words: list[str], run_launcher, tmp_path: Path) -> None:
    done = run_launcher(job, *arguments, timeout_seconds=SECONDS)
    line = refused_line(done)
    assert done.returncode == 2
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir()), "a refusal leaves nothing behind"


def test_unwritable_run_dir(run_launcher, tmp_path: Path) -> None:
    """Root may write everywhere, so the obstacle is a regular file where a directory is needed."""
    (tmp_path / "file").write_text("")
    done = run_launcher("qat", f"run_dir={tmp_path / 'file' / 'run'}", timeout_seconds=SECONDS)
    line = refused_line(done)
    assert done.returncode == 2 and "run_dir=" in line and "is no directory" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["+scenario=gatway"], ["scenario=gatway"]),
        (["parallel.tensor=3"], ["tensor=3", "2 processes"]),
        (["-m", "train.seed=1,2"], ["-m with 2 processes", "plain `python"]),
    ],
)
def test_two_processes_say_it_once_and_all_exit_with_2(arguments: list[str], words: list[str], run_launcher) -> None:
    done = run_launcher("qat", *arguments, processes=2, timeout_seconds=SECONDS)
    line = refused_line(done)
    assert all(word in line for word in words), line
    assert re.findall(r"exitcode\s+: (-?\d+)", done.stderr) == ["2", "2"], done.stderr


def test_help_needs_no_model(run_launcher) -> None:
    done = run_launcher("qat", "--help", timeout_seconds=SECONDS)
    assert done.returncode == 0 and "train.steps" in done.stdout and not done.stderr
