"""A target directory: what the conversions of this package share.

In: an artifact's reader and a stream of tensors; out: a directory that another runtime loads, with
`target_report.json`. Called by the targets beside it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_edge.artifact.store import INDEX_FILE, ArtifactReader, ShardWriter, Streamed
from megatron_edge.contracts import InputError, LinearEntry, Manifest

logger = logging.getLogger("megatron_edge")

SHARD_BYTES = 5_000_000_000
KV_SCALE_SUFFIXES = (".self_attn.k_scale", ".self_attn.v_scale")


@dataclass(frozen=True)
class TargetReport:
    """What a conversion did. `dropped` is what the target cannot carry; `notes` is what its readers must know."""

    name: str
    directory: str
    size_bytes: int
    carried: tuple[str, ...]
    dropped: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TargetContent:
    """What one target puts into its directory, apart from the tokenizer and generation files, which all copy. Tensors
    are asked for one at a time; a large one that is computed should come by rows, as `Streamed`."""

    tensors: Iterable[tuple[str, torch.Tensor | Streamed]]
    config: dict[str, Any]
    carried: list[str]
    dropped: list[str]
    notes: list[str] = dataclasses.field(default_factory=list)
    sidecars: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


def write_target(
    reader: ArtifactReader, directory: Path, name: str, content: TargetContent, shard_bytes: int
) -> TargetReport:
    """Stream `content` into a new directory that replaces `directory` only once it is complete."""
    building = directory.with_name(f".{directory.name}.building")
    write_files(reader, building, content, shard_bytes)
    return finish_target(building, directory, name, content.carried, content.dropped, content.notes)


def write_files(reader: ArtifactReader, building: Path, content: TargetContent, shard_bytes: int) -> None:
    """Tensors, config, sidecars and the artifact's other files, into a directory that is made anew."""
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    writer = ShardWriter(building, shard_bytes)
    for tensor_name, tensor in content.tensors:
        writer.add(tensor_name, tensor)
    writer.finish({"format": "pt"})
    for file in reader.manifest.files:
        if file not in ("config.json", INDEX_FILE):
            shutil.copyfile(reader.directory / file, building / file)
    for file, values in {"config.json": content.config, **content.sidecars}.items():
        _write_json(building / file, values)


def new_target(directory: Path) -> Path:
    """An empty directory beside `directory`, for `finish_target` to put in its place."""
    building = directory.with_name(f".{directory.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    return building


def finish_target(
    building: Path, directory: Path, name: str, carried: list[str], dropped: list[str], notes: list[str]
) -> TargetReport:
    """Writes target_report.json, puts `building` in the place of `directory`, and says what is not carried."""
    size_bytes = sum(file.stat().st_size for file in building.iterdir())
    report = TargetReport(name, str(directory), size_bytes, tuple(carried), tuple(dropped), tuple(notes))
    described = {key: value for key, value in dataclasses.asdict(report).items() if key != "directory"}
    _write_json(building / "target_report.json", described)
    shutil.rmtree(directory, ignore_errors=True)
    building.rename(directory)
    for line in report.dropped:
        logger.warning("target %s does not carry: %s", name, line)
    logger.info("target %s: %.1f MB in %s", name, size_bytes / 1e6, directory)
    return report


def recipes(
    manifest: Manifest, target: str, allowed: Collection[tuple[str, str]], advice: str = ""
) -> list[tuple[str, str]]:
    """The (weight, activation) formats of the quantised linears, sorted; ("none", "none") where there are none.

    Raises:
        InputError: linears whose formats are not among `allowed`, by name.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for name, linear in manifest.layer_linears.items():
        found.setdefault((linear.format, linear.activation), []).append(name)
    found = found or {("none", "none"): []}
    for (weight, activation), names in sorted(found.items()):
        if (weight, activation) not in allowed:
            where = f" in {', '.join(names)}" if len(found) > 1 else ""
            raise InputError(
                f"export.targets: {target} cannot carry weight={weight} activation={activation}{where}; "
                f"allowed: {', '.join(f'weight={w} activation={a}' for w, a in allowed)}{advice}"
            )
    return sorted(found)


def kv_format(manifest: Manifest) -> str:
    return str(manifest.kv.get("format", "none"))


def plain_dtype(manifest: Manifest) -> str:
    """The data type in which the unquantised tensors are stored: what a runtime should compute in."""
    return "float32" if any(entry.format == "fp32" for entry in manifest.tensors.values()) else "bfloat16"


def base_config(reader: ArtifactReader, dtype: str) -> dict[str, Any]:
    """The artifact's config.json under both spellings of the data type (transformers renamed `torch_dtype`)."""
    config: dict[str, Any] = json.loads((reader.directory / "config.json").read_text())
    config.pop("quantization_config", None)
    return {**config, "dtype": dtype, "torch_dtype": dtype}


def unquantised(reader: ArtifactReader) -> Iterator[tuple[str, torch.Tensor]]:
    """Embeddings, norms, excluded linears, biases: every tensor that belongs to no quantised linear and no KV cache."""
    for name in unquantised_names(reader.manifest):
        yield name, reader.tensor(name)


def decoded_tables(reader: ArtifactReader) -> Iterator[tuple[str, Streamed]]:
    """Quantised embedding and output layer as their bf16 values: no target's runtime reads them packed. Values of a
    model trained in bf16 are its own; of one trained in fp32 they are rounded once more."""
    for name in reader.manifest.tables:
        yield f"{name}.weight", reader.streamed(name, torch.bfloat16)


def tables_dropped(manifest: Manifest) -> list[str]:
    """A line for each quantised embedding or output layer, of what `decoded_tables` does to it."""
    rounded = "" if manifest.dtype == "bfloat16" else f", rounded to bfloat16 from the {manifest.dtype} of training"
    return [
        f"the packed {table.format} codes of {name}: it is stored as its values{rounded}, and takes the memory of BF16"
        for name, table in manifest.tables.items()
    ]


def unquantised_names(manifest: Manifest) -> list[str]:
    owned = {tensor for linear in manifest.linears.values() for tensor in linear.tensors.values()}
    return [name for name in manifest.tensors if name not in owned and not name.endswith(KV_SCALE_SUFFIXES)]


def plain_linears(manifest: Manifest) -> list[str]:
    """Names of linears that stayed unquantised, the output layer included even where it is tied to the embedding."""
    names = {"lm_head"}
    for name in unquantised_names(manifest):
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and len(manifest.tensors[name].shape) == 2 and not module.endswith("embed_tokens"):
            names.add(module)
    return sorted(names)


def kv_scales(reader: ArtifactReader) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yields (attention module, "k" or "v", fp32 scalar)."""
    for name in reader.manifest.tensors:
        if name.endswith(KV_SCALE_SUFFIXES):
            module, _, leaf = name.rpartition(".")
            yield module, leaf[0], reader.tensor(name).float()


def describe_linears(manifest: Manifest) -> str:
    """One line such as "210 linears: int4, groups of 64 (180), 128 (30)"; of several formats, how many have each."""
    groups: dict[int, int] = {}
    for linear in manifest.layer_linears.values():
        groups[linear.group_size] = groups.get(linear.group_size, 0) + 1
    counts: dict[str, int] = {}
    for linear in manifest.layer_linears.values():
        counts[linear.format] = counts.get(linear.format, 0) + 1
    formats = [f"{name} ({count})" if len(counts) > 1 else name for name, count in sorted(counts.items())]
    sizes = ", ".join(f"{size} ({count})" for size, count in sorted(groups.items()) if size > 0)
    return f"{len(manifest.layer_linears)} linears: {'/'.join(formats)}" + (f", groups of {sizes}" if sizes else "")


def role_tensor(reader: ArtifactReader, linear: LinearEntry, role: str) -> torch.Tensor:
    return reader.tensor(linear.tensors[role])


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
