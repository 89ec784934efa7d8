"""Optional trackers: an absent package is refused before anything is spent, one that fails ends nothing, and MLflow
is told every step, read back from its store where its package is installed."""

from __future__ import annotations

import json
import logging
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_edge.compose import compose
from megatron_edge.contracts import InputError
from megatron_edge.tracking import TRACKER_FILE, check_tracker, tracked


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_an_absent_package_is_refused(tracker: str) -> None:
    if find_spec(tracker) is not None:
        pytest.skip(f"{tracker} is installed here")
    with pytest.raises(
        InputError, match=rf"log.tracker={tracker}: the package is missing here \(pip install {tracker}"
    ):
        check_tracker(compose([f"log={tracker}"]))


def test_nothing_is_asked_for_by_default(tmp_path: Path) -> None:
    config = compose([f"run_dir={tmp_path}"])
    check_tracker(config)
    with tracked(config, rank=0) as write:
        write({"step": 1, "loss_nats_per_token": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_fails_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An absent package stands for any failure of a client."""
    if find_spec("mlflow") is not None:
        pytest.skip("mlflow is installed here")
    monkeypatch.setattr(logging.getLogger("megatron_edge"), "propagate", True)
    with caplog.at_level(logging.WARNING), tracked(compose(["log=mlflow", f"run_dir={tmp_path}"]), rank=0) as write:
        for step in (1, 2):
            write({"step": step, "loss_nats_per_token": 1.0})
    records = {
        id(record): record for record in caplog.records
    }  # another test may have left a handler: each is seen twice
    (said,) = [found.getMessage() for found in records.values() if "mlflow" in found.getMessage()]
    assert said.startswith("mlflow: ModuleNotFoundError: ") and said.endswith("it gets nothing more of this run")


def test_mlflow_has_every_step_of_a_resumed_run_in_one_run(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    config = compose(["log=mlflow", f"run_dir={run_dir}"])
    for steps in ((1, 2), (3, 4)):
        with tracked(config, rank=0) as write:
            for step in steps:
                write({"step": step, "loss_nats_per_token": 5.0 - step, "gradient_norm": float("nan")})
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    found = json.loads((run_dir / TRACKER_FILE).read_text())["mlflow"]
    history = client.get_metric_history(found, "loss_nats_per_token")
    assert [(metric.step, metric.value) for metric in history] == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]
    run = client.get_run(found)
    assert run.info.status == "FINISHED" and run.data.params["train.steps"] == "20"
    assert "gradient_norm" not in run.data.metrics
