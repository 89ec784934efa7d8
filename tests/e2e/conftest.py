"""What several end-to-end tests share: a tiny model, and one whole gateway job that nothing interrupted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.launches import Finished, run
from tests.e2e.tiny_model import write_tiny_model

STEPS, CHECKPOINT_EVERY_STEPS = 12, 4

# Small, but every part of it as in a real job. fp32: this hardware may only emulate bf16.
SMALL = (
    "train.precision=fp32",
    "train.seq_length_tokens=64",
    "data.eval_tokens=512",
    "train.learning_rate=1e-3",
    "threads=1",
)


@dataclass(frozen=True)
class Run:
    """A finished job: its directory, what it said, and its arguments without run_dir."""

    directory: Path
    done: Finished
    arguments: tuple[str, ...]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def gateway_arguments(tiny_model: Path) -> tuple[str, ...]:
    """The gateway scenario on two pipeline stages and the default corpus, without its run_dir."""
    return (
        "+scenario=gateway",
        "parallel.pipeline=2",
        f"model.source={tiny_model}",
        f"train.steps={STEPS}",
        f"train.checkpoint_every_steps={CHECKPOINT_EVERY_STEPS}",
        *SMALL,
    )


@pytest.fixture(scope="session")
def gateway_run(gateway_arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Read only: tests that damage something copy it first."""
    directory = tmp_path_factory.mktemp("gateway")
    done = run("qat", *gateway_arguments, f"run_dir={directory / 'run'}", directory=directory, processes=2)
    assert done.returncode == 0, done.stderr
    return Run(directory / "run", done, gateway_arguments)
