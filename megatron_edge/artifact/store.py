"""How an artifact lies on disk: a manifest and safetensors shards, written as a stream, read and checked by the tensor.

    model-00001-of-0000N.safetensors   model.safetensors.index.json   manifest.json   config.json, tokenizer, ...

In come named tensors, one at a time; out comes a directory that is there whole or not at all. Export writes; verify and
serve read. Neither side holds more than one shard.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_edge.artifact import formats
from megatron_edge.contracts import InputError, LinearEntry, Manifest, TensorEntry

SCHEMA = "megatron-edge/1"
INDEX_FILE = "model.safetensors.index.json"
MANIFEST_FILE = "manifest.json"
_KEY_PROJECTION = re.compile(r"(.*\.self_attn)\.k_proj(\.weight)?$")


class ShardWriter:
    """Streams tensors into safetensors shards of at most `shard_bytes` in an existing directory, and their index.

    A tensor larger than `shard_bytes` gets a shard of its own. Names of shards hold their count, so they are temporary
    until `finish`. Not atomic by itself: write into a directory that nobody reads yet.
    """

    def __init__(self, directory: Path, shard_bytes: int) -> None:
        if shard_bytes <= 0:
            raise InputError(f"export.shard_bytes={shard_bytes}: allowed are positive numbers of bytes")
        self.directory, self.shard_bytes = Path(directory), shard_bytes
        self.names: set[str] = set()
        self._shards: list[list[str]] = []
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> Tensor:
        """Takes a copy, which it returns, of a tensor on any device. Raises InputError for a name it had before."""
        if name in self.names:
            raise InputError(f"tensor {name} was added twice")
        # A copy, because a view would keep its base in memory, and because the caller may go on writing to its own.
        stored = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        if self._pending and self._pending_bytes + stored.nbytes > self.shard_bytes:
            self._flush()
        self.names.add(name)
        self._pending[name] = stored
        self._pending_bytes += stored.nbytes
        return stored

    def finish(self, metadata: dict[str, str]) -> dict[str, str]:
        """Writes the last shard and the index; returns the shard of each tensor. `metadata` goes into the index."""
        if self._pending or not self._shards:
            self._flush()
        file_of: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            file = f"model-{i + 1:05d}-of-{len(self._shards):05d}.safetensors"
            os.replace(self._temporary(i), self.directory / file)
            file_of.update(dict.fromkeys(names, file))
        index = {"metadata": {**metadata, "total_size": self._total_bytes}, "weight_map": file_of}
        _write_json(self.directory / INDEX_FILE, index)
        return file_of

    def _flush(self) -> None:
        save_file(self._pending, self._temporary(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _temporary(self, i: int) -> Path:
        return self.directory / f".shard-{i:05d}.safetensors"


class ArtifactWriter:
    """Streams a canonical artifact into `directory`, which it replaces only when `finish` has written everything.

    `side_files` is where config.json, tokenizer and the like are to be put before `finish`, which hashes what it finds
    there. Used as a context manager, an error leaves `directory` as it was and nothing beside it. One process.
    """

    def __init__(self, directory: Path, shard_bytes: int) -> None:
        self.directory = Path(directory).absolute()
        self.side_files = self.directory.with_name(f".{self.directory.name}.building")
        shutil.rmtree(self.side_files, ignore_errors=True)
        self.side_files.mkdir(parents=True)
        self._shards = ShardWriter(self.side_files, shard_bytes)
        self._entries: dict[str, tuple[tuple[int, ...], str, str, str]] = {}

    def __enter__(self) -> ArtifactWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.side_files.exists():
            shutil.rmtree(self.side_files)

    def add(self, name: str, tensor: Tensor, format: str) -> None:
        """`format` says what the bytes mean: bf16 | fp32 | fp16 | int4 | int8 | nvfp4 | fp8 | scale."""
        stored = self._shards.add(name, tensor)
        self._entries[name] = (tuple(stored.shape), _name_of(stored.dtype), format, sha256_of_tensor(stored))

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
        ours = {INDEX_FILE, MANIFEST_FILE, *file_of.values()}
        files = {
            path.relative_to(self.side_files).as_posix(): sha256_of_file(path)
            for path in sorted(self.side_files.rglob("*"))
            if path.is_file() and path.name not in ours
        }
        files[INDEX_FILE] = sha256_of_file(self.side_files / INDEX_FILE)
        manifest = Manifest(schema=SCHEMA, tensors=tensors, files=files, **fields)
        _write_json(self.side_files / MANIFEST_FILE, manifest.to_dict())
        _replace_directory(self.side_files, self.directory)
        return manifest


class ShardReader:
    """Reads tensors by name out of a directory of safetensors shards, with or without an index.

    Raises:
        InputError: no safetensors file, or one whose header cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self._file_of: dict[str, str] = {}
        files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            raise InputError(f"{self.directory}: no *.safetensors file")
        for file in files:
            with _open(file) as shard:
                self._file_of.update(dict.fromkeys(shard.keys(), file.name))

    def names(self) -> list[str]:
        return list(self._file_of)

    def tensor(self, name: str) -> Tensor:
        if name not in self._file_of:
            raise InputError(f"{self.directory}: tensor {name} is missing")
        return _read_tensor(self.directory / self._file_of[name], name)


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
        return _read_tensor(self.directory / self.manifest.tensors[name].file, name)

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


def _shard_problems(path: Path, listed: dict[str, TensorEntry]) -> list[str]:
    """What one shard holds against what the manifest lists for it."""
    if not path.is_file():
        return [f"tensor {name}: missing with its file {path.name}" for name in listed]
    try:
        shard = _open(path)
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


def sha256_of_tensor(tensor: Tensor) -> str:
    """Of its contiguous little-endian bytes."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def sha256_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file, there whole or not at all."""
    temporary = path.with_name(f".{path.name}.building")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    _sync(temporary)
    os.replace(temporary, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file. Raises InputError where it cannot be read."""
    with _open(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def _read_tensor(path: Path, name: str) -> Tensor:
    with _open(path) as file:
        try:
            return file.get_tensor(name)
        except SafetensorError as error:
            raise InputError(f"{path}: tensor {name} is missing") from error


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is no readable safetensors file: {error}") from error


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _replace_directory(new: Path, directory: Path) -> None:
    """Sync `new` and put it in the place of `directory`. A machine that dies between the two renames leaves the
    previous directory, whole, beside its place."""
    for path in [*new.rglob("*"), new]:
        _sync(path)
    previous = directory.with_name(f".{directory.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if directory.exists():
        os.rename(directory, previous)
    os.rename(new, directory)
    _sync(directory.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
