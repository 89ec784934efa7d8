"""Target `hf`: a plain Hugging Face checkpoint in BF16, quantised weights decoded to the values that they stand for.

In: the canonical artifact; out: a directory that `transformers.from_pretrained` loads without any quantisation package.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_edge.artifact.store import ArtifactReader, Streamed
from megatron_edge.export.targets.folder import (
    SHARD_BYTES,
    TargetContent,
    TargetReport,
    base_config,
    describe_linears,
    kv_format,
    plain_dtype,
    tables_dropped,
    unquantised,
    write_target,
)


def convert(reader: ArtifactReader, directory: Path, shard_bytes: int = SHARD_BYTES) -> TargetReport:
    manifest = reader.manifest
    linears = manifest.layer_linears.values()
    weight = "/".join(sorted({linear.format for linear in linears}))
    activation = "/".join(sorted({linear.activation for linear in linears} - {"none"}))
    carried, dropped = ["all tensors as bfloat16"], []
    if weight:
        carried.append(f"{describe_linears(manifest)}, decoded")
        dropped.append(f"the packed {weight} codes: this checkpoint takes the memory of a BF16 model")
    dropped += tables_dropped(manifest)
    if activation:
        dropped.append(f"{activation} quantisation of activations and its input scales")
    if kv_format(manifest) != "none":
        dropped.append(f"{kv_format(manifest)} quantisation of the KV cache and its scales")
    if plain_dtype(manifest) == "float32" or (weight and manifest.dtype == "float32"):
        dropped.append("float32 digits that bfloat16 cannot hold")
    content = TargetContent(_tensors(reader), base_config(reader, "bfloat16"), carried, dropped)
    return write_target(reader, directory, "hf", content, shard_bytes)


def _tensors(reader: ArtifactReader) -> Iterator[tuple[str, torch.Tensor | Streamed]]:
    for name, tensor in unquantised(reader):
        yield name, tensor.to(torch.bfloat16)
    for linear in reader.manifest.linears:
        yield f"{linear}.weight", reader.streamed(linear, torch.bfloat16)
