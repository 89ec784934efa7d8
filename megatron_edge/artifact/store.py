"""How an artifact lies on disk: a manifest and safetensors shards, written as a stream, read and checked by the tensor.

    model-00001-of-0000N.safetensors   model.safetensors.index.json   manifest.json   config.json, tokenizer, ...

In come named tensors, one at a time; out comes a directory that is there whole or not at all. Export writes; verify and
serve read. `shards` is the file under it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megatron_edge.artifact import formats
from megatron_edge.artifact.shards import (
    INDEX_FILE,
    ShardReader,
    ShardWriter,
    Streamed,
    bytes_of,
    open_file,
    read_tensor,
    read_tensors,
    save_tensors,
    sha256_of_tensor,
    sync,
)
from megatron_edge.contracts import InputError, LinearEntry, Manifest, TensorEntry

__all__ = [
    "INDEX_FILE", "MANIFEST_FILE", "SCHEMA", "ArtifactReader", "ArtifactWriter", "ShardReader", "ShardWriter",
    "Streamed", "expected_parts", "read_tensors", "save_tensors", "sha256_of_file", "sha256_of_tensor",
]  # fmt: skip

SCHEMA = "megatron-edge/1"
MANIFEST_FILE = "manifest.json"
_JOURNAL_FILE = ".journal.jsonl"
_DECODED_ELEMENTS = 1 << 20  # of a linear that is decoded by rows
_KEY_PROJECTION = re.compile(r"(.*\.self_attn)\.k_proj(\.weight)?$")


class ArtifactWriter:
    """Streams a canonical artifact into `directory`, which it replaces only when `finish` has written everything.

    `side_files` is where config.json, tokenizer and the like are to be put before `finish`, which hashes what it finds
    there. Used as a context manager, an error leaves `directory` as it was. One process.

    `key` says what is being written: another writer with the same key goes on where one that was interrupted stopped.
    Tensors that it wrote are taken over where their bytes have the sha256 that a journal beside them says. Without a
    key, and where the input was at fault (InputError), nothing is left beside `directory`.
    """

    def __init__(self, directory: Path, shard_bytes: int, key: str = "") -> None:
        self.directory = Path(directory).absolute()
        self.side_files = self.directory.with_name(f".{self.directory.name}.building")
        self._journal, self._key = self.side_files / _JOURNAL_FILE, key
        self._shards = ShardWriter(self.side_files, shard_bytes)
        self._entries: dict[str, tuple[tuple[int, ...], str, str, str]] = {}
        self._reclaimed: set[str] = set()
        lines = _journal_lines(self._journal)
        if key and lines[:1] == [key]:
            self._resume(lines[1:])
            return
        shutil.rmtree(self.side_files, ignore_errors=True)
        self.side_files.mkdir(parents=True)
        self._note(key)

    def __enter__(self) -> ArtifactWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.side_files.exists() and (not self._key or isinstance(error, InputError)):
            shutil.rmtree(self.side_files)

    def holds(self, *names: str) -> bool:
        """Whether these tensors were taken over from an interrupted writer, so that `add` is not needed."""
        return self._reclaimed.issuperset(names)

    def add(self, name: str, tensor: Tensor | Streamed, format: str) -> None:
        """`format` says what the bytes mean: bf16 | fp32 | fp16 | int4 | int8 | nvfp4 | fp8 | scale."""
        if isinstance(tensor, Tensor):
            tensor = Streamed(tuple(tensor.shape), tensor.dtype, (tensor,))
        if name in self._reclaimed:  # on disk already
            self._reclaimed.discard(name)
            for _ in tensor.parts:  # whose maker may live on their being asked for
                pass
            return
        digest = hashlib.sha256()
        self._shards.add(name, replace(tensor, parts=_hashed(tensor.parts, digest)))
        self._entries[name] = (tensor.shape, _name_of(tensor.dtype), format, digest.hexdigest())
        self._note([name, *self._entries[name]])

    def _note(self, line: Any) -> None:
        if self._key:
            with self._journal.open("a") as journal:
                journal.write(json.dumps(line) + "\n")

    def _resume(self, lines: list[Any]) -> None:
        """Takes over the tensors of the journal up to the first whose bytes are not what it says."""
        for name, shape, dtype, format, sha256 in lines:
            if not self._shards.reclaim(name, tuple(shape), getattr(torch, dtype), sha256):
                break
            self._entries[name] = (tuple(shape), dtype, format, sha256)
        for name in self._shards.settle():
            del self._entries[name]
        self._reclaimed = set(self._entries)
        self._journal.unlink()
        for line in [self._key, *([name, *entry] for name, entry in self._entries.items())]:
            self._note(line)

    def finish(self, **fields: Any) -> Manifest:
        """Completes the artifact and puts it in place. `fields` are all of `contracts.Manifest` but `schema`, `tensors`
        and `files`, which are known here.

        Raises:
            InputError: a linear of `fields["linears"]` names a tensor that was not added.
        """
        for linear, entry in fields["linears"].items():
            if absent := sorted(set(entry.tensors.values()) - set(self._entries)):
                raise InputError(f"linear {linear}: tensors {absent} were not added")
        file_of = self._shards.finish({"format": "pt"})
        tensors = {name: TensorEntry(*entry[:3], file_of[name], entry[3]) for name, entry in self._entries.items()}
        ours = {INDEX_FILE, MANIFEST_FILE, _JOURNAL_FILE, *file_of.values()}
        files = {
            path.relative_to(self.side_files).as_posix(): sha256_of_file(path)
            for path in sorted(self.side_files.rglob("*"))
            if path.is_file() and path.name not in ours
        }
        files[INDEX_FILE] = sha256_of_file(self.side_files / INDEX_FILE)
        manifest = Manifest(schema=SCHEMA, tensors=tensors, files=files, **fields)
        _write_json(self.side_files / MANIFEST_FILE, manifest.to_dict())
        self._journal.unlink(missing_ok=True)
        _replace_directory(self.side_files, self.directory)
        return manifest


class ArtifactReader:
    """Reads a canonical artifact. Opening it reads the manifest alone, so that `check` can name what is wrong.

    Raises:
        InputError: no manifest, one that is not JSON, or one of another schema.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        path = self.directory / MANIFEST_FILE
        if not path.is_file():
            raise InputError(f"artifact={self.directory}: {MANIFEST_FILE} is missing; allowed: a canonical artifact")
        try:
            data = json.loads(path.read_bytes())
        except ValueError as error:
            raise InputError(f"artifact={self.directory}: {MANIFEST_FILE} is no JSON: {error}") from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            schema = data.get("schema") if isinstance(data, dict) else None
            raise InputError(f"artifact={self.directory}: {MANIFEST_FILE} has schema {schema!r}; allowed: {SCHEMA!r}")
        try:
            self.manifest = Manifest.from_dict(data)
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(f"artifact={self.directory}: {MANIFEST_FILE} is damaged: {error!r}") from error

    def names(self) -> list[str]:
        return list(self.manifest.tensors)

    def tensor(self, name: str) -> Tensor:
        """As stored. Raises InputError where it is missing or its file unreadable; `check` compares hashes."""
        if name not in self.manifest.tensors:
            raise InputError(f"artifact={self.directory}: tensor {name} is missing from {MANIFEST_FILE}")
        return read_tensor(self.directory / self.manifest.tensors[name].file, name)

    def encoded(self, linear: str) -> formats.Encoded:
        """The stored weight of one quantised linear. Raises InputError where parts are missing or of wrong shape."""
        if linear not in self.manifest.linears:
            raise InputError(f"artifact={self.directory}: {linear} is no quantised linear")
        entry = self.manifest.linears[linear]
        parts = {}
        for role, (dtype, shape) in expected_parts(entry).items():
            if role == "input_scale":
                continue
            if role not in entry.tensors:
                raise InputError(f"artifact={self.directory}: linear {linear} has no {role}")
            parts[role] = self.tensor(entry.tensors[role])
            if (found := (_name_of(parts[role].dtype), tuple(parts[role].shape))) != (dtype, shape):
                raise InputError(f"artifact={self.directory}: {entry.tensors[role]} is {found}, not {(dtype, shape)}")
        group_size = {"fp8": 0, "int8": 0, "nvfp4": formats.NVFP4_BLOCK}.get(entry.format, entry.group_size)
        global_scale = parts.get("global_scale")
        return formats.Encoded(entry.format, parts["codes"], parts["scale"], global_scale, entry.shape, group_size)

    def dequantized(self, linear: str, dtype: torch.dtype) -> Tensor:
        """[out, in]: `formats.decode` of the stored weight."""
        return formats.decode(self.encoded(linear), dtype)

    def streamed(self, linear: str, dtype: torch.dtype) -> Streamed:
        """`dequantized`, by rows: no more than a few of them are in memory."""
        whole = self.encoded(linear)
        rows = max(1, _DECODED_ELEMENTS // whole.shape[1])
        return Streamed(whole.shape, dtype, (formats.decode(part, dtype) for part in _row_parts(whole, rows)))

    def size_bytes(self) -> int:
        """Of all tensors, as stored; headers and other files not counted."""
        return sum(math.prod(t.shape) * getattr(torch, t.dtype).itemsize for t in self.manifest.tensors.values())

    def check(self) -> list[str]:
        """Everything that is wrong, a line for each tensor or file; empty where the artifact is whole. Reads it all."""
        entries = self.manifest.tensors
        problems: list[str] = []
        present = {path.name for path in self.directory.glob("*.safetensors")}
        for file in sorted({entry.file for entry in entries.values()} | present):
            listed = {name: entry for name, entry in entries.items() if entry.file == file}
            problems += _shard_problems(self.directory / file, listed)
        problems += _part_problems(self.manifest)
        problems += _index_problems(self.directory / INDEX_FILE, self.manifest)
        for file, sha256 in self.manifest.files.items():
            path = self.directory / file
            if not path.is_file():
                problems.append(f"file {file}: missing")
            elif sha256_of_file(path) != sha256:
                problems.append(f"file {file}: sha256 differs from the manifest's")
        return problems


def expected_parts(linear: LinearEntry) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Role -> (dtype, shape) of every tensor that a linear of this format must have."""
    out_features, in_features = linear.shape
    packed = ("uint8", (out_features, in_features // 2))
    parts: dict[str, tuple[str, tuple[int, ...]]]
    if linear.format == "fp8":
        parts = {"codes": ("float8_e4m3fn", linear.shape), "scale": ("float32", ())}
    elif linear.format == "int4":
        parts = {"codes": packed, "scale": ("float16", (out_features, in_features // max(linear.group_size, 1)))}
    elif linear.format == "int8":
        parts = {"codes": ("int8", linear.shape), "scale": ("float16", (out_features, 1))}
    elif linear.format == "nvfp4":
        blocks = (out_features, in_features // formats.NVFP4_BLOCK)
        parts = {"codes": packed, "scale": ("float8_e4m3fn", blocks), "global_scale": ("float32", ())}
    else:
        raise InputError(f"{MANIFEST_FILE}: format={linear.format!r}; allowed: {', '.join(formats.WEIGHT_FORMATS)}")
    if linear.activation != "none":
        parts["input_scale"] = ("float32", ())
    return parts


def _row_parts(whole: formats.Encoded, rows: int) -> Iterator[formats.Encoded]:
    """`whole` cut into parts of so many rows."""
    for begin in range(0, whole.shape[0], rows):
        codes = whole.codes[begin : begin + rows]
        scale = whole.scale[begin : begin + rows] if whole.scale.dim() else whole.scale
        yield replace(whole, codes=codes, scale=scale, shape=(codes.shape[0], whole.shape[1]))


def _hashed(parts: Iterable[Tensor], digest: Any) -> Iterator[Tensor]:
    for part in parts:
        digest.update(bytes_of(part))
        yield part


def _journal_lines(path: Path) -> list[Any]:
    """The whole lines of a journal, in order, up to one that is torn (a crash while writing)."""
    lines: list[Any] = []
    if path.is_file():
        for line in path.read_bytes().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines


def _shard_problems(path: Path, listed: dict[str, TensorEntry]) -> list[str]:
    """What one shard holds against what the manifest lists for it."""
    if not path.is_file():
        return [f"tensor {name}: missing with its file {path.name}" for name in listed]
    try:
        shard = open_file(path)
    except InputError as error:
        return [f"file {path.name}: {error}", *(f"tensor {name}: unreadable, {path.name} is" for name in listed)]
    with shard:
        present = set(shard.keys())
        problems = [f"tensor {name}: in {path.name} but not in the manifest" for name in sorted(present - set(listed))]
        for name, entry in listed.items():
            if name not in present:
                problems.append(f"tensor {name}: missing from {path.name}")
                continue
            tensor = shard.get_tensor(name)
            found = (_name_of(tensor.dtype), tuple(tensor.shape))
            if found != (entry.dtype, entry.shape):
                problems.append(f"tensor {name}: is {found}, the manifest says {(entry.dtype, entry.shape)}")
            elif sha256_of_tensor(tensor) != entry.sha256:
                problems.append(f"tensor {name}: sha256 differs from the manifest's")
    return problems


def _part_problems(manifest: Manifest) -> list[str]:
    """Linears without all their parts, parts without a linear, attention without its KV scales."""
    problems, owned = [], set()
    for linear, entry in manifest.linears.items():
        for role, (dtype, shape) in expected_parts(entry).items():
            name = entry.tensors.get(role, f"(no {role})")
            owned.add(name)
            stored = manifest.tensors.get(name)
            if stored is None:
                problems.append(f"linear {linear}: its {role} {name} is missing from the manifest")
            elif (stored.dtype, stored.shape) != (dtype, shape):
                found = (stored.dtype, stored.shape)
                problems.append(f"tensor {name}: is {found}; as {role} of {linear} it must be {(dtype, shape)}")
    if manifest.kv.get("format") in formats.STATIC_KV_FORMATS:
        found_keys = (_KEY_PROJECTION.match(name) for name in (*manifest.linears, *manifest.tensors))
        for attention in sorted({found[1] for found in found_keys if found}):
            scales = {f"{attention}.k_scale", f"{attention}.v_scale"}
            owned |= scales
            problems += [f"tensor {name}: missing from the manifest" for name in sorted(scales - set(manifest.tensors))]
    for name, stored in manifest.tensors.items():
        if stored.format in (*formats.WEIGHT_FORMATS, "scale") and name not in owned:
            problems.append(f"tensor {name}: belongs to no linear and no KV cache of the manifest")
    return problems


def _index_problems(path: Path, manifest: Manifest) -> list[str]:
    try:
        listed = dict(json.loads(path.read_bytes())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError):
        return [f"file {path.name}: unreadable"]
    expected = {name: entry.file for name, entry in manifest.tensors.items()}
    wrong = sorted(name for name in {*listed, *expected} if listed.get(name) != expected.get(name))
    return [f"tensor {name}: {path.name} and the manifest disagree about its file" for name in wrong]


def sha256_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _replace_directory(new: Path, directory: Path) -> None:
    """Sync `new` and put it in the place of `directory`. A machine that dies between the two renames leaves the
    previous directory, whole, beside its place."""
    for path in [*new.rglob("*"), new]:
        sync(path)
    previous = directory.with_name(f".{directory.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if directory.exists():
        os.rename(directory, previous)
    os.rename(new, directory)
    sync(directory.parent)
    shutil.rmtree(previous, ignore_errors=True)
