"""Safetensors shards and their index: written as a stream, taken up again after an interruption, read by the tensor.

In come named tensors, whole or by rows; out come files of at most `shard_bytes`. Neither side has a tensor in its own
memory for longer than it takes to write or to read it. Called by `store` and by the targets.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_edge.contracts import InputError

INDEX_FILE = "model.safetensors.index.json"
READ_BYTES = 1 << 23
_ALIGNMENT_BYTES = 64  # of tensors in a spool: no data type needs more


@dataclass(frozen=True)
class Streamed:
    """A tensor that comes in parts, which one under another make it up. They are asked for once, in order."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Iterable[Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the spool of its shard."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    nbytes: int


class ShardWriter:
    """Streams tensors into safetensors shards of at most `shard_bytes` in an existing directory, and their index.

    A tensor larger than `shard_bytes` gets a shard of its own. Tensors are spooled to a file, from which safetensors
    writes the shard when it is full, because the header, which comes first, lists them all. Names of shards hold their
    count, so they are temporary until `finish`. Not atomic by itself: write into a directory that nobody reads yet.
    """

    def __init__(self, directory: Path, shard_bytes: int) -> None:
        if shard_bytes <= 0:
            raise InputError(f"export.shard_bytes={shard_bytes}: allowed are positive numbers of bytes")
        self.directory, self.shard_bytes = Path(directory), shard_bytes
        self.names: set[str] = set()
        self._shards: list[list[str]] = []
        self._pending: dict[str, _Place] = {}
        self._pending_bytes = self._total_bytes = 0

    def add(self, name: str, tensor: Tensor | Streamed) -> None:
        """Writes a tensor on any device. Raises InputError for a name it had before, OSError where the disk refuses."""
        if name in self.names:
            raise InputError(f"tensor {name} was added twice")
        if isinstance(tensor, Tensor):
            tensor = Streamed(tuple(tensor.shape), tensor.dtype, (tensor,))
        place = self._place(tensor)
        _write(self._spool(), place.begin, tensor.parts, place)
        self._take(name, place)

    def reclaim(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, sha256: str) -> bool:
        """Takes over a tensor that an interrupted writer added at this point, where the disk holds it as it was."""
        place = self._place(Streamed(shape, dtype, ()))
        try:
            finished = self._temporary().is_file()
            intact = sha256 == (self._finished_sha256(name, place) if finished else _sha256(self._spool(), place))
        except (OSError, InputError):
            return False
        if intact:
            self._take(name, place)
        return intact

    def settle(self) -> list[str]:
        """After the last `reclaim`: removes what was not taken over. Returns names given up after all, because the
        shard that they are in holds others too."""
        given_up: list[str] = []
        finished = self._temporary()
        if finished.is_file() and set(self._pending) != set(_names(finished)):
            finished.unlink()
            given_up = list(self._pending)
            self.names -= set(given_up)
            self._pending, self._pending_bytes = {}, 0
        kept = [self._temporary(i) for i in range(len(self._shards))] + [finished, self._spool()]
        for path in self.directory.iterdir():
            if path.name.startswith((".shard-", "model-")) and path not in kept:
                path.unlink()
        return given_up

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
        (self.directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return file_of

    def _place(self, tensor: Streamed) -> _Place:
        """Where the next tensor goes; closes the shard before it where there is no room in that."""
        if self._pending and self._pending_bytes + tensor.nbytes > self.shard_bytes:
            self._flush()
        last = next(reversed(self._pending.values()), None)
        end = last.begin + last.nbytes if last else 0
        return _Place(tensor.shape, tensor.dtype, -(-end // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES, tensor.nbytes)

    def _take(self, name: str, place: _Place) -> None:
        self.names.add(name)
        self._pending[name] = place
        self._pending_bytes += place.nbytes

    def _flush(self) -> None:
        finished, spool = self._temporary(), self._spool()
        if not finished.is_file():  # else an interrupted writer came so far
            partial = finished.with_suffix(".partial")
            _save(_mapped(spool, self._pending), partial)
            os.replace(partial, finished)
        spool.unlink(missing_ok=True)
        self._shards.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _finished_sha256(self, name: str, place: _Place) -> str:
        tensor = read_tensor(self._temporary(), name)
        if (tuple(tensor.shape), tensor.dtype) != (place.shape, place.dtype):
            return ""
        return sha256_of_tensor(tensor)

    def _temporary(self, i: int | None = None) -> Path:
        return self.directory / f".shard-{len(self._shards) if i is None else i:05d}.safetensors"

    def _spool(self) -> Path:
        return self.directory / f".shard-{len(self._shards):05d}.spool"


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
            self._file_of.update(dict.fromkeys(_names(file), file.name))

    def names(self) -> list[str]:
        return list(self._file_of)

    def tensor(self, name: str) -> Tensor:
        if name not in self._file_of:
            raise InputError(f"{self.directory}: tensor {name} is missing")
        return read_tensor(self.directory / self._file_of[name], name)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file, there whole or not at all."""
    temporary = path.with_name(f".{path.name}.building")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    sync(temporary)
    os.replace(temporary, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file. Raises InputError where it cannot be read."""
    with open_file(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def read_tensor(path: Path, name: str) -> Tensor:
    """A view of the mapped file: pages are read when they are looked at, and are the file's, not this process's."""
    with open_file(path) as file:
        try:
            return file.get_tensor(name)
        except SafetensorError as error:
            raise InputError(f"{path}: tensor {name} is missing") from error


def open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is no readable safetensors file: {error}") from error


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's contiguous little-endian bytes; its own memory where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def sha256_of_tensor(tensor: Tensor) -> str:
    return hashlib.sha256(bytes_of(tensor)).hexdigest()


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _names(path: Path) -> list[str]:
    with open_file(path) as file:
        return list(file.keys())


def _write(path: Path, begin: int, parts: Iterable[Tensor], place: _Place) -> None:
    """Raises OSError with the file's name where the disk refuses."""
    at = begin
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        for part in parts:
            assert part.dtype == place.dtype, (part.dtype, place)
            rest = bytes_of(part)
            while rest:
                done = os.pwrite(handle, rest, at)
                at, rest = at + done, rest[done:]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)
    assert at - begin == place.nbytes, f"{at - begin} bytes came of {place}"


def _mapped(spool: Path, places: dict[str, _Place]) -> dict[str, Tensor]:
    """The tensors of a spool, which are read when they are looked at."""
    if not any(place.nbytes for place in places.values()):
        return {name: torch.empty(place.shape, dtype=place.dtype) for name, place in places.items()}
    with spool.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    flat = torch.frombuffer(content, dtype=torch.uint8)
    return {
        name: flat[place.begin : place.begin + place.nbytes].view(place.dtype).reshape(place.shape)
        for name, place in places.items()
    }


def _sha256(spool: Path, place: _Place) -> str:
    """Of what a spool holds there; of what is left of it, where it is too short."""
    digest, rest = hashlib.sha256(), place.nbytes
    with spool.open("rb") as file:
        file.seek(place.begin)
        while rest and (piece := file.read(min(rest, READ_BYTES))):
            digest.update(piece)
            rest -= len(piece)
    return digest.hexdigest()


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """safetensors says what the disk said in words alone; raises it as the OSError that it is."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
