"""Ranks out of the environment, outcomes into exit codes, what --help says. Real processes: tests/dist."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import psutil
import pytest

from megatron_edge import compose
from megatron_edge import config as configuration
from megatron_edge.config import RunConfig
from megatron_edge.contracts import InputError, StoppedBySignal, VerificationFailed
from megatron_edge.runtime import launcher
from megatron_edge.runtime.launcher import Launch, Processes, read_processes

SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_LAUNCH_NODE_IPADDR": "10.1.2.3",
}


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, and the environment as it was afterwards."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name in launcher.THREAD_VARIABLES:
        monkeypatch.setenv(name, os.environ.get(name, "1"))


def test_torchruns_variables_win() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h"}
    environment = {**SRUN, **torchrun}
    assert read_processes(environment) == Processes(3, 4, 1, 2)
    assert environment == {**SRUN, **torchrun}


def test_srun_is_written_under_torchruns_names() -> None:
    environment = dict(SRUN)
    assert read_processes(environment) == Processes(5, 6, 1, 2)
    assert environment["MASTER_ADDR"] == "10.1.2.3"  # no scontrol here: the last resort
    other_step = {**SRUN, "SLURM_STEP_ID": "3"}
    read_processes(other_step)
    assert 1024 < int(environment["MASTER_PORT"]) < 32768, "below the ephemeral ports"
    assert other_step["MASTER_PORT"] != environment["MASTER_PORT"]


def test_srun_on_one_node_needs_no_name_service() -> None:
    environment = {**SRUN, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "6"}
    assert read_processes(environment).local_world_size == 6
    assert environment["MASTER_ADDR"] == "127.0.0.1"


def test_srun_without_any_way_to_the_first_host_is_refused() -> None:
    environment = {key: value for key, value in SRUN.items() if key != "SLURM_LAUNCH_NODE_IPADDR"}
    with pytest.raises(InputError, match="MASTER_ADDR"):
        read_processes({**environment, "SLURM_STEP_NODELIST": "n[1-3]"})


def test_python_in_a_batch_script_is_one_process() -> None:
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1", "ENVIRONMENT": "BATCH"}
    assert read_processes(batch) == Processes()
    assert read_processes({}) == Processes()


def exit_code(job: Callable[[RunConfig, Launch], int | None], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["launch/x.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        launcher.launch(job)
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("data.train='x': allowed is a file"), 2, "error: data.train='x': allowed is a file"),
        (VerificationFailed("2 checks"), 3, "failed: 2 checks"),
        (StoppedBySignal("after step 3"), 75, "stopped: after step 3"),
    ],
)
def test_outcomes_are_one_line_and_an_exit_code(
    error: Exception, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def job(config: RunConfig, launch: Launch) -> int | None:
        raise error

    assert exit_code(job, monkeypatch) == code
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == line and "Traceback" not in said


@pytest.mark.usefixtures("clean")
def test_our_own_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def job(config: RunConfig, launch: Launch) -> int | None:
        raise KeyError("a bug")

    assert exit_code(job, monkeypatch) == 1
    said = capsys.readouterr().err
    assert "[rank 0 of 1] Traceback" in said and "[rank 0 of 1] KeyError: 'a bug'" in said


@pytest.mark.usefixtures("clean")
def test_a_job_gets_its_configuration_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[RunConfig, Launch]] = []

    def job(config: RunConfig, launch: Launch) -> int | None:
        seen.append((config, launch))
        return None

    assert exit_code(job, monkeypatch, "+scenario=vehicle", "threads=3") == 0
    assert seen[0][0] == compose.compose(["+scenario=vehicle", "threads=3"])
    assert seen[0][1].threads == 3 and os.environ["OMP_NUM_THREADS"] == "3"
    assert exit_code(job, monkeypatch) == 0
    physical = psutil.cpu_count(logical=False) or psutil.cpu_count()
    assert seen[1][1].threads == min(physical or 1, len(os.sched_getaffinity(0)))


def test_help_names_every_group_option_and_leaf() -> None:
    text = launcher.help_text()
    for group in (*configuration.GROUPS, "scenario"):
        assert f"{group}=" in text and all(option in text for option in compose.options(group))
    assert all(name in text for name in compose.leaves())
    assert max(len(line) for line in text.splitlines()) < 180
