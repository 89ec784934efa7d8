"""Is what was stored what was trained? Bytes only, nothing runs.

In: an artifact's reader and the reference that training wrote of its own shards; out: checks. Called by report.py.
Equal means: equal codes, equal scales, and equal dequantised values after the cast to the training dtype.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from megatron_edge.artifact import formats
from megatron_edge.artifact.store import ArtifactReader, read_tensors, sha256_of_tensor
from megatron_edge.contracts import Check, InputError
from megatron_edge.verify.quality import Windows

NAMED_IN_DETAIL = 8
CODES, SCALES, VALUES = "codes that differ", "scales that differ", "dequantised values that differ"
SLICES = "parts that no trained shard covers, or none shipped"


@dataclass(frozen=True)
class Reference:
    """What the trained fake-quantised model said about itself: `facts` is reference.json.

    nll is fp32 [n, s], logits fp32 [m, s, vocabulary] of the first m windows.
    """

    facts: dict[str, Any]
    windows: Windows
    nll: torch.Tensor
    logits: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[self.facts["dtype"]]


def read_reference(directory: Path) -> Reference:
    """Raises InputError where a file or a part of it is missing."""
    for name in ("reference.json", "reference.safetensors"):
        if not (directory / name).is_file():
            raise InputError(f"reference={directory}: {name} is missing; allowed: a run's reference directory")
    tensors = read_tensors(directory / "reference.safetensors")
    missing = {"tokens", "documents", "positions", "loss_mask", "nll", "logits"} - set(tensors)
    if missing:
        raise InputError(f"reference={directory}: reference.safetensors lacks {sorted(missing)}")
    windows = Windows(*(tensors[name] for name in ("tokens", "documents", "positions", "loss_mask")))
    facts = json.loads((directory / "reference.json").read_text())
    return Reference(facts, windows, tensors["nll"], tensors["logits"])


def check_integrity(reader: ArtifactReader) -> Check:
    """Every tensor, scale and file is there, has its shape and type, and hashes to what the manifest says."""
    problems = reader.check()
    return failures("integrity", "tensors and files at fault", problems)


def check_trained(reader: ArtifactReader, reference: Reference) -> list[Check]:
    """Trained equals shipped, slice by slice: every shard that training held against the same part of the artifact."""
    differing: dict[str, list[str]] = {CODES: [], SCALES: [], VALUES: [], SLICES: []}
    slices = defaultdict(list)
    for entry in reference.facts["weights"]:
        slices[_shipped_name(reader, entry["tensor"])].append(entry)
    for name, entries in slices.items():
        _compare_tensor(reader, name, entries, reference.dtype, differing)
    for name in sorted(_weights(reader) - set(slices)):
        differing[SLICES].append(f"{name}: in the artifact, but in no trained shard")
    checks = [failures("trained equals shipped", what, named) for what, named in differing.items()]
    checks.append(failures("trained equals shipped", "input scales that differ", _input_scales(reader, reference)))
    checks.append(failures("trained equals shipped", "KV scales that differ", _kv_scales(reader, reference)))
    return checks


def failures(name: str, metric: str, problems: list[str]) -> Check:
    """A check that counts problems and names the first of them; none are allowed."""
    more = f" ... and {len(problems) - NAMED_IN_DETAIL} more" if len(problems) > NAMED_IN_DETAIL else ""
    detail = "; ".join(problems[:NAMED_IN_DETAIL]) + more
    return Check(name, metric, float(len(problems)), 0.0, not problems, detail)


def _weights(reader: ArtifactReader) -> set[str]:
    """Names of all weights as a plain model has them: X.weight for a quantised linear X, scales left out."""
    manifest = reader.manifest
    owned = {tensor for linear in manifest.linears.values() for tensor in linear.tensors.values()}
    plain = {name for name, entry in manifest.tensors.items() if name not in owned and entry.format != "scale"}
    return plain | {f"{linear}.weight" for linear in manifest.linears}


def _shipped_name(reader: ArtifactReader, name: str) -> str:
    """A tied output layer is stored once, as the embedding."""
    manifest = reader.manifest
    if name == "lm_head.weight" and name not in manifest.tensors and "lm_head" not in manifest.linears:
        return "model.embed_tokens.weight"
    return name


def _compare_tensor(
    reader: ArtifactReader,
    name: str,
    entries: list[dict[str, Any]],
    dtype: torch.dtype,
    differing: dict[str, list[str]],
) -> None:
    linear = name.removesuffix(".weight")
    if linear in reader.manifest.linears:
        encoded = reader.encoded(linear)
        values, shape = formats.decode(encoded, dtype), tuple(encoded.shape)
    elif name in reader.manifest.tensors:
        encoded, values = None, reader.tensor(name).to(dtype)
        shape = tuple(values.shape)
    else:
        differing[SLICES].append(f"{name}: trained, but not in the artifact")
        return
    spans = []
    for entry in entries:
        rows, cols = _span(entry, shape)
        label = f"{name}[{rows[0]}:{rows[1]}, {cols[0]}:{cols[1]}]"
        spans.append((rows, cols))
        part = values[rows[0] : rows[1], cols[0] : cols[1]] if len(shape) == 2 else values[rows[0] : rows[1]]
        if sha256_of_tensor(part) != entry["dequantized_sha256"]:
            differing[VALUES].append(label)
        if encoded is not None:
            _compare_encoding(encoded, entry, rows, cols, label, differing)
        elif entry.get("codes_sha256"):
            differing[CODES].append(f"{label}: trained as {entry['format']}, shipped unquantised")
    differing[SLICES].extend(f"{name}: {gap}" for gap in uncovered(shape, spans))


def _compare_encoding(
    encoded: formats.Encoded,
    entry: dict[str, Any],
    rows: tuple[int, int],
    cols: tuple[int, int],
    label: str,
    differing: dict[str, list[str]],
) -> None:
    trained, shipped = (entry["format"], entry.get("group_size") or 0), (encoded.format, encoded.group_size)
    if trained[0] != shipped[0] or (shipped[1] and trained[1] != shipped[1]):
        differing[CODES].append(f"{label}: trained as {trained}, shipped as {shipped} (format, group size)")
        return
    codes = formats.unpacked_codes(encoded)[rows[0] : rows[1], cols[0] : cols[1]]
    if sha256_of_tensor(codes) != entry["codes_sha256"]:
        differing[CODES].append(label)
    scale = encoded.scale
    if encoded.format == "int8":  # one for the whole row, whichever columns a shard holds
        scale = scale[rows[0] : rows[1]]
    elif scale.dim() == 2:
        group = encoded.group_size
        scale = scale[rows[0] : rows[1], cols[0] // group : cols[1] // group]
    if sha256_of_tensor(scale) != entry["scale_sha256"]:
        differing[SCALES].append(label)
    stored = None if encoded.global_scale is None else float(encoded.global_scale)
    if stored != entry.get("global_scale"):
        differing[SCALES].append(f"{label}: global scale {stored}, trained with {entry.get('global_scale')}")


def _span(entry: dict[str, Any], shape: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of a slice; without columns it is as wide as the tensor, and a vector has one."""
    rows = tuple(entry["rows"])
    cols = (0, 1) if len(shape) == 1 else tuple(entry.get("cols") or (0, shape[1]))
    return (rows[0], rows[1]), (cols[0], cols[1])


def uncovered(shape: tuple[int, ...], spans: list[tuple[tuple[int, int], tuple[int, int]]]) -> list[str]:
    """What of a matrix no slice covers, and slices that reach out of it, as text."""
    height, width = shape[0], shape[1] if len(shape) == 2 else 1
    outside = [
        f"slice [{r[0]}:{r[1]}, {c[0]}:{c[1]}] reaches out of {height} x {width}"
        for r, c in spans
        if not (0 <= r[0] < r[1] <= height and 0 <= c[0] < c[1] <= width)
    ]
    row_edges = sorted({0, height, *(edge for r, _ in spans for edge in r if 0 < edge < height)})
    col_edges = sorted({0, width, *(edge for _, c in spans for edge in c if 0 < edge < width)})
    gaps = [
        f"no trained shard covers [{top}:{bottom}, {left}:{right}]"
        for top, bottom in pairwise(row_edges)
        for left, right in pairwise(col_edges)
        if not any(r[0] <= top and bottom <= r[1] and c[0] <= left and right <= c[1] for r, c in spans)
    ]
    return outside + gaps


def _input_scales(reader: ArtifactReader, reference: Reference) -> list[str]:
    trained = reference.facts.get("activations") or {}
    shipped = {name: linear for name, linear in reader.manifest.linears.items() if linear.activation != "none"}
    problems = [f"{name}: trained with an input scale, shipped without" for name in sorted(set(trained) - set(shipped))]
    problems += [
        f"{name}: shipped with an input scale, trained without" for name in sorted(set(shipped) - set(trained))
    ]
    for name in sorted(set(trained) & set(shipped)):
        scale = float(reader.tensor(shipped[name].tensors["input_scale"]))
        expected = trained[name]
        if (shipped[name].activation, scale) != (expected["format"], expected["input_scale"]):
            problems.append(
                f"{name}: {shipped[name].activation} {scale}, trained {expected['format']} {expected['input_scale']}"
            )
    return problems


def _kv_scales(reader: ArtifactReader, reference: Reference) -> list[str]:
    trained = reference.facts.get("kv") or {"format": "none"}
    shipped = reader.manifest.kv.get("format", "none")
    if trained.get("format", "none") != shipped:
        return [f"KV cache: {shipped}, trained with {trained.get('format')}"]
    problems = []
    expected = {
        f"model.layers.{layer}.self_attn.{which}": value
        for layer, scales in (trained.get("layers") or {}).items()
        for which, value in scales.items()
    }
    stored = {name for name in reader.manifest.tensors if name.endswith((".self_attn.k_scale", ".self_attn.v_scale"))}
    for name in sorted(set(expected) | stored):
        value = float(reader.tensor(name)) if name in stored else None
        if value != expected.get(name):
            problems.append(f"{name}: {value}, trained with {expected.get(name)}")
    return problems
