"""What rounding did to each quantised linear layer: shipped weights against the trained ones that they were made from.

In: a run's checkpoint of any layout and the artifact made of it. Out: weight_errors.json, beside the artifact's
manifest hash, so that it is measured once. The trained weights are those of the checkpoint, before the quantizer: where
AWQ or SmoothQuant folded scales into them, with these folded in. Memory is a few rows at a time.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_edge.artifact.store import ArtifactReader
from megatron_edge.export.gather import CheckpointTensors, rows_of
from megatron_edge.families import all_rules, dims_of, pieces, rules_of
from megatron_edge.log import track
from megatron_edge.report.facts import WEIGHT_ERRORS_FILE, RunFacts, write_text

log = logging.getLogger("megatron_edge")


@dataclass(frozen=True)
class WeightError:
    """`relative_squared_error` is |shipped - trained|^2 / |trained|^2 over all values of one linear layer."""

    format: str
    shape: tuple[int, int]
    relative_squared_error: float


def measure(run: RunFacts) -> dict[str, Any] | None:
    """What weight_errors.json holds, written where it is not there for this artifact yet. None where there is no
    artifact that verify found whole, nothing in it is quantised, or its checkpoint is gone.

    Raises:
        InputError: a tensor of the checkpoint cannot be read.
    """
    if run.artifact is None or not run.is_whole:
        return None
    if run.weight_errors is not None and run.weight_errors["manifest_sha256"] == run.artifact.manifest_sha256:
        return run.weight_errors
    reader = ArtifactReader(run.artifact.directory)
    checkpoint = run.directory / "checkpoints" / f"step_{run.artifact.step:08d}"
    if not checkpoint.is_dir() or not reader.manifest.linears:
        return None
    hf_config = json.loads((run.artifact.directory / "config.json").read_text())
    errors = weight_errors(checkpoint, reader, hf_config)
    found = {
        "manifest_sha256": run.artifact.manifest_sha256,
        "checkpoint": checkpoint.name,
        "linears": {name: asdict(error) for name, error in errors.items()},
    }
    write_text(run.directory / WEIGHT_ERRORS_FILE, json.dumps(found, indent=1) + "\n")
    return found


def weight_errors(checkpoint: Path, reader: ArtifactReader, hf_config: dict[str, Any]) -> dict[str, WeightError]:
    """Of every quantised linear and table of the artifact, by its Hugging Face name."""
    source, dims = CheckpointTensors(checkpoint), dims_of(hf_config)
    found: dict[str, WeightError] = {}
    rules = list(all_rules(rules_of(hf_config), dims))
    for rule in track(rules, "comparing weights", len(rules)):
        placed: dict[str, list[Any]] = {}
        for piece in pieces(rule, dims):
            placed.setdefault(piece.target.removesuffix(".weight"), []).append(piece)
        for name in (name for name in placed if name in reader.manifest.linears):
            entry, weight = reader.manifest.linears[name], source.parameter(rule.pattern)
            error = norm = 0.0
            row = 0
            for shipped in reader.streamed(name, torch.float32).parts:
                trained = rows_of(weight, placed[name], row, row + len(shipped)).float()
                error += float((shipped - trained).square().sum(dtype=torch.float64))
                norm += float(trained.square().sum(dtype=torch.float64))
                row += len(shipped)
            found[name] = WeightError(entry.format, entry.shape, error / norm if norm else 0.0)
    return found
