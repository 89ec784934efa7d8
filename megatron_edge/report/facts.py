"""What a run directory holds, read once. Nothing here judges or draws.

Files that a run did not come to write are None; one that is there and cannot be read is an InputError.
"""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_edge.artifact.store import MANIFEST_FILE, ArtifactReader, read_tensors, sha256_of_file
from megatron_edge.contracts import InputError
from megatron_edge.log import METRICS_FILE, read_metrics
from megatron_edge.verify.statistics import mean_over_tokens

OUTCOME_FILE = "outcome.json"  # how the last job in a run directory ended; jobs/outcome.py writes it
WEIGHT_ERRORS_FILE = "weight_errors.json"
BASELINES = ("bf16", "fp32")  # names of the loss of the model as it came
PLAIN_FORMATS = ("bf16", "fp32", "fp16")


@dataclass(frozen=True)
class ArtifactFacts:
    """`bf16_bytes` is what the same tensors take in bf16."""

    directory: Path
    size_bytes: int
    bf16_bytes: int
    manifest_sha256: str
    versions: dict[str, str]
    step: int


@dataclass(frozen=True)
class HeldOut:
    """The trained model's loss on the held-out text: nats per token, its standard error over windows."""

    nats_per_token: float
    error: float
    windows: int
    tokens: int


@dataclass(frozen=True)
class RunFacts:
    """`losses` are nats per token by name (bf16 or fp32: the model as it came; ptq, trained, artifact, runtimes)."""

    directory: Path
    config: dict[str, Any]
    config_text: str
    plan: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    losses: dict[str, float]
    heldout: HeldOut | None
    artifact: ArtifactFacts | None
    weight_errors: dict[str, Any] | None
    verify: dict[str, Any] | None
    outcome: dict[str, Any] | None
    is_running: bool
    newest_checkpoint: int | None

    @property
    def verify_is_stale(self) -> bool:
        """verify.json is about other bytes than the artifact's that is there now."""
        if self.verify is None or self.artifact is None:
            return False
        return bool(self.verify["artifact"]["manifest_sha256"] != self.artifact.manifest_sha256)

    @property
    def is_whole(self) -> bool:
        """verify found every tensor and file of this artifact as it was written."""
        checks = (self.verify or {}).get("checks", [])
        whole = any(check["name"] == "integrity" and check["ok"] for check in checks)
        return whole and self.artifact is not None and not self.verify_is_stale

    @property
    def baseline_loss(self) -> float | None:
        return next((self.losses[name] for name in BASELINES if name in self.losses), None)

    @property
    def steps_done(self) -> int:
        return int(self.metrics[-1]["step"]) if self.metrics else 0


def read_run(run_dir: Path) -> RunFacts:
    """Raises InputError: no config.yaml there, or a file that is damaged."""
    config_file = run_dir / "config.yaml"
    if not config_file.is_file():
        raise InputError(f"run_dir={run_dir}: no config.yaml; allowed: the directory of a run")
    config_text = config_file.read_text(encoding="utf-8")
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError as error:
        raise InputError(f"{config_file}: {' '.join(str(error).split())}") from None
    verify, reference = read_json(run_dir / "verify.json"), read_json(run_dir / "reference" / "reference.json")
    losses = (
        (verify or {}).get("losses_nats_per_token") or (reference or {}).get("losses") or _losses_of_checkpoint(run_dir)
    )
    return RunFacts(
        directory=run_dir,
        config=config,
        config_text=config_text,
        plan=read_json(run_dir / "plan.json"),
        metrics=read_metrics(run_dir / METRICS_FILE),
        losses={name: loss for name, loss in losses.items() if loss is not None},
        heldout=_heldout(run_dir),
        artifact=_artifact(run_dir / "artifact" / "canonical"),
        weight_errors=read_json(run_dir / WEIGHT_ERRORS_FILE),
        verify=verify,
        outcome=(outcome := read_json(run_dir / OUTCOME_FILE)),
        is_running=outcome is None and _is_locked(run_dir / ".lock"),
        newest_checkpoint=max((_step(path) for path in (run_dir / "checkpoints").glob("step_*")), default=None),
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file. Raises InputError where it holds no JSON object."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds no JSON object")
    return found


def write_text(path: Path, text: str) -> None:
    """At once or not at all. Raises OSError."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def bf16_bytes(linears: Mapping[str, Any], tensors: Mapping[str, Any]) -> int:
    """What an artifact's quantised linears and plain tensors (a manifest's) take in bf16; scales are not there then."""
    values = sum(math.prod(entry.shape) for entry in linears.values())
    return 2 * (values + sum(math.prod(entry.shape) for entry in tensors.values() if entry.format in PLAIN_FORMATS))


def heldout_losses(run_dir: Path) -> dict[str, torch.Tensor] | None:
    """The trained model's nll [n, s] of each held-out token, with tokens and loss_mask; None before it was trained."""
    file = run_dir / "reference" / "reference.safetensors"
    return read_tensors(file) if file.is_file() else None


def _heldout(run_dir: Path) -> HeldOut | None:
    said = heldout_losses(run_dir)
    if said is None:
        return None
    tokens = said["loss_mask"].sum(1)
    windows = int((tokens > 0).sum())
    if windows < 2:
        return None
    mean, error, _ = mean_over_tokens((said["nll"].double() * said["loss_mask"]).sum(1).tolist(), tokens.tolist())
    return HeldOut(mean, error, windows, int(tokens.sum()))


def _artifact(directory: Path) -> ArtifactFacts | None:
    """None also where the manifest is damaged, which is for verify to say."""
    file = directory / MANIFEST_FILE
    try:
        reader = ArtifactReader(directory)
    except InputError:
        return None
    manifest = reader.manifest
    return ArtifactFacts(
        directory=directory,
        size_bytes=reader.size_bytes(),
        bf16_bytes=bf16_bytes(manifest.linears, manifest.tensors),
        manifest_sha256=sha256_of_file(file),
        versions=manifest.versions,
        step=int(manifest.source.get("step", 0)),
    )


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _losses_of_checkpoint(run_dir: Path) -> dict[str, float]:
    """Of the model as it came and as calibrated: the first checkpoint has them, and all that follow."""
    for checkpoint in sorted((run_dir / "checkpoints").glob("step_*"), reverse=True):
        found = read_json(checkpoint / "manifest.json")
        if found is not None:
            return dict(found.get("extra", {}).get("losses_nats_per_token", {}))
    return {}


def _is_locked(path: Path) -> bool:
    """Whether a job is at work in the run directory: it holds this lock as long as it lives."""
    if not path.is_file():
        return False
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
