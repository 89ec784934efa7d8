"""Targets: pure conversions from the canonical artifact to the layouts that other runtimes load.

In: an `ArtifactReader` and a directory; out: that directory and a `TargetReport`. Called by the export job.
Each conversion streams tensor by tensor, says what it cannot carry, and refuses where the weights cannot be carried.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_edge.artifact.store import ArtifactReader
from megatron_edge.contracts import InputError
from megatron_edge.export.targets import compressed_tensors, gguf, gptq, hf, modelopt, onnx
from megatron_edge.export.targets.folder import SHARD_BYTES, TargetReport

TARGETS: dict[str, Callable[[ArtifactReader, Path, int], TargetReport]] = {
    "modelopt": modelopt.convert,
    "compressed_tensors": compressed_tensors.convert,
    "gptq": gptq.convert,
    "onnx": onnx.convert,
    "gguf": gguf.convert,
    "hf": hf.convert,
}


def convert(name: str, reader: ArtifactReader, directory: Path, shard_bytes: int = SHARD_BYTES) -> TargetReport:
    """Write target `name` of the artifact into `directory` (replaced when complete).

    Raises:
        InputError: the target is unknown or cannot carry this artifact's weights.
    """
    if name not in TARGETS:
        raise InputError(f"export.targets: {name!r} is unknown; allowed: {sorted(TARGETS)}")
    return TARGETS[name](reader, directory, shard_bytes)
