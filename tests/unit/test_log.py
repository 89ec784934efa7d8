"""metrics.jsonl has each step once, whatever was killed when; TensorBoard has the same; the logger knows its rank."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import pytest

from megatron_edge import log
from megatron_edge.log import METRICS_FILE, MetricsWriter, TrainingProgress, read_metrics


def values(step: int, loss: float = 1.0) -> dict[str, float]:
    return {"step": step, "loss_nats_per_token": loss, "tokens_per_second": 10.0}


def steps_of(run_dir: Path) -> list[int]:
    return [record["step"] for record in read_metrics(run_dir / METRICS_FILE)]


def test_a_resumed_run_writes_each_step_once(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, rank=0) as writer:
        for step in range(1, 8):
            writer.write(values(step, loss=1.0))
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 8, "loss_na')  # killed while writing
    with MetricsWriter(tmp_path, rank=0, after_step=5) as writer:
        for step in range(6, 11):
            writer.write(values(step, loss=2.0))
    assert steps_of(tmp_path) == list(range(1, 11))
    records = read_metrics(tmp_path / METRICS_FILE)
    assert [record["loss_nats_per_token"] for record in records] == [1.0] * 5 + [2.0] * 5


def test_a_run_from_the_start_forgets_the_one_before(tmp_path: Path) -> None:
    for _ in range(2):
        with MetricsWriter(tmp_path, rank=0) as writer:
            writer.write(values(1))
    assert steps_of(tmp_path) == [1]


def test_lines_are_there_before_the_writer_is_closed_and_are_strict_json(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "new" / "run", rank=0) as writer:
        writer.write(values(1, loss=float("nan")))
        line = (tmp_path / "new" / "run" / METRICS_FILE).read_text()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name))["loss_nats_per_token"] is None


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, rank=1) as writer:
        writer.write(values(1))
    assert not list(tmp_path.iterdir())


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, rank=0) as writer:
        for step in (1, 2):
            writer.write(values(step, loss=step / 4))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss_nats_per_token")] == [(1, 0.25), (2, 0.5)]


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(0, 1)
    with TrainingProgress(steps=7, start_step=2, rank=0, log_every_steps=3) as progress:
        for step in range(3, 8):
            progress.update(values(step))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("step ")[1].split()[0] for line in lines] == ["3/7", "6/7", "7/7"]
    assert "loss 1.0000 nats/token" in lines[0] and "10 tokens/s" in lines[0] and "left" in lines[0]


def test_only_rank_0_says_what_is_not_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        logger = log.setup(rank, 2)
        logger.info("plain %d", rank)
        logger.warning("odd %d", rank)
    said = capsys.readouterr().err
    assert "plain 0" in said and "odd 0" in said and "plain 1" not in said
    assert "[rank 1 of 2] WARNING odd 1" in said
    log.setup(0, 1)
    assert len(logging.getLogger("megatron_edge").handlers) == 1


def test_quiet_hides_one_warning_and_no_other() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with log.quiet("the pin", DeprecationWarning):
            warnings.warn("the pin is bent", DeprecationWarning, stacklevel=1)
            warnings.warn("the pin is bent", UserWarning, stacklevel=1)
            warnings.warn("the house burns", DeprecationWarning, stacklevel=1)
    assert [str(w.message) for w in caught] == ["the pin is bent", "the house burns"]


def test_track_passes_everything_through() -> None:
    assert list(log.track(range(5), "reading", total=5)) == list(range(5))
