"""Metrics to Weights & Biases or MLflow as well, for who asks for it (log=wandb, log=mlflow): optional packages.

In: each step's metrics and the configuration. Out: one run there for each run directory, which a resumed job goes on
with (tracker.json says which). What counts is metrics.jsonl: a tracker that fails is told of, once, and left alone.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_edge.config import RunConfig
from megatron_edge.contracts import InputError

log = logging.getLogger("megatron_edge")

TRACKER_FILE = "tracker.json"
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
Write = Callable[[Mapping[str, float]], None]


def check_tracker(config: RunConfig) -> None:
    """Raises InputError where the package of log.tracker is not installed."""
    tracker = config.log.tracker
    if tracker != "none" and find_spec(tracker) is None:
        raise InputError(
            f"log.tracker={tracker}: the package is missing here (pip install {PACKAGES[tracker]}); "
            "allowed without it: none (log=local)"
        )


@contextmanager
def tracked(config: RunConfig, rank: int) -> Iterator[Write]:
    """A function that takes each step's metrics ("step" among them). It does nothing on ranks other than 0, and where
    no tracker is asked for."""
    if rank != 0 or config.log.tracker == "none":
        yield lambda values: None
        return
    tracker = {"wandb": _Wandb, "mlflow": _Mlflow}[config.log.tracker]
    guarded = _Guarded(config.log.tracker)
    sink = guarded.call(lambda: tracker(config, _known_run(config)))
    if sink is not None:
        _remember(config, sink.run_id)
        log.info("metrics also go to %s: run %s", config.log.tracker, sink.run_id)
    ended = "FAILED"
    try:
        yield lambda values: guarded.call(lambda: sink.write(values)) if sink is not None else None
        ended = "FINISHED"
    finally:
        if sink is not None:
            guarded.call(lambda: sink.close(ended))


class _Guarded:
    """Calls another project's client until it fails once: its outage must not end a training."""

    def __init__(self, name: str) -> None:
        self._name, self._failed = name, False

    def call(self, what: Callable[[], Any]) -> Any:
        if self._failed:
            return None
        try:
            return what()
        except Exception as error:  # noqa: BLE001 - whatever it raises; metrics.jsonl has everything
            self._failed = True
            log.warning("%s: %s: %s; it gets nothing more of this run", self._name, type(error).__name__, error)
            return None


class _Wandb:
    def __init__(self, config: RunConfig, known: str | None) -> None:
        import wandb

        run_dir = Path(config.run_dir)
        self._run = wandb.init(
            project=config.log.project,
            name=run_dir.name,
            id=known,
            resume="allow",
            dir=str(run_dir),
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=leaves_of(config),
            settings=wandb.Settings(silent=True),
        )
        self.run_id = str(self._run.id)

    def write(self, values: Mapping[str, float]) -> None:
        self._run.log({key: value for key, value in values.items() if key != "step"}, step=int(values["step"]))

    def close(self, ended: str) -> None:
        self._run.finish(exit_code=0 if ended == "FINISHED" else 1)


class _Mlflow:
    def __init__(self, config: RunConfig, known: str | None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        run_dir = Path(config.run_dir).absolute()
        if config.log.store is None:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # files need no database, nor its packages
        self._client = MlflowClient(tracking_uri=config.log.store or (run_dir.parent / "mlruns").as_uri())
        if known is not None:
            self.run_id = str(self._client.get_run(known).info.run_id)
            self._client.update_run(self.run_id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(config.log.project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(config.log.project)
        self.run_id = str(self._client.create_run(number, run_name=run_dir.name).info.run_id)
        params = [Param(key, str(value)[:500]) for key, value in leaves_of(config).items()]
        self._client.log_batch(self.run_id, params=params)

    def write(self, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now, step = int(time.time() * 1e3), int(values["step"])
        metrics = [Metric(k, v, now, step) for k, v in values.items() if k != "step" and math.isfinite(v)]
        self._client.log_batch(self.run_id, metrics=metrics)

    def close(self, ended: str) -> None:
        self._client.set_terminated(self.run_id, status=ended)


def _known_run(config: RunConfig) -> str | None:
    file = Path(config.run_dir) / TRACKER_FILE
    found = json.loads(file.read_text()) if file.is_file() else {}
    return found.get(config.log.tracker)


def _remember(config: RunConfig, run_id: str) -> None:
    file = Path(config.run_dir) / TRACKER_FILE
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**known, config.log.tracker: run_id}) + "\n")


def leaves_of(config: RunConfig) -> dict[str, Any]:
    """Dotted name -> value of every leaf."""
    leaves: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        leaves.update({f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value})
    return leaves
