"""Reads rows of whole tensors from a sharded checkpoint of any layout: the bytes asked for and no others, without the
training world, without process groups.

In: a checkpoint's directory. Out: `Whole`, a tensor of the whole model by its Megatron name, and slices of the Hugging
Face tensors that it is made of. torch.distributed.checkpoint stores each chunk of a tensor as a file of torch.save
(a zip of raw bytes) inside of a larger one; `.metadata` says where. Any thread may read.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_edge.contracts import InputError
from megatron_edge.families import Piece
from megatron_edge.model.torch_dist_source import read_metadata

# Megatron stores a norm with the linear layer that reads it, as TransformerEngine's fused layers have it.
_STORED_AS = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}
_LOCAL_HEADER_BYTES = 30  # of a zip entry, before its name and extra field


class CheckpointTensors:
    """What is in a checkpoint, by name. Opening it reads its metadata alone.

    Raises:
        InputError: metadata that cannot be read; here and in all that reads: naming the file or the tensor at fault.
    """

    def __init__(self, path: Path) -> None:
        metadata = read_metadata(path)
        self.path = path
        self._tensors = {
            name: entry for name, entry in metadata.state_dict_metadata.items() if hasattr(entry, "chunks")
        }
        self._stored = {
            (index.fqn, tuple(index.offset)): stored
            for index, stored in metadata.storage_data.items()
            if index.offset is not None
        }
        self._places: dict[tuple[str, tuple[int, ...]], tuple[Path, int]] = {}

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def parameter(self, name: str) -> Whole:
        """A parameter by its Megatron name, with the layer and expert index of the whole model."""
        for ending, stored in _STORED_AS.items():
            if name.endswith(ending):
                name = name.removesuffix(ending) + stored
        name = name.replace(".experts.local_experts.", ".experts.experts.")  # Megatron's own spelling
        gated = name.endswith(".linear_fc1.weight")  # SwiGLU: gate rows, then up rows
        return self.whole([name + half for half in ("_w", "_v")] if gated else [name])

    def whole(self, keys: Sequence[str]) -> Whole:
        """One tensor of the stored ones under `keys`, one under another."""
        for key in keys:
            if key not in self._tensors:
                raise InputError(f"{self.path}: no tensor {key} in this checkpoint")
            stored = self._tensors[key]
            missing = math.prod(stored.size) - sum(math.prod(chunk.sizes) for chunk in stored.chunks)
            if missing:
                raise InputError(f"{self.path}: {missing} elements of {key} are in no file of this checkpoint")
        first = self._tensors[keys[0]]
        rows = tuple(self._tensors[key].size[0] for key in keys)
        return Whole(self, tuple(keys), rows, (sum(rows), *first.size[1:]), first.properties.dtype)

    def read(self, key: str, begin: int, end: int, out: Tensor) -> None:
        """Fills `out` with the rows [begin, end) of a stored tensor."""
        for chunk in self._tensors[key].chunks:
            first, last = max(begin, chunk.offsets[0]), min(end, chunk.offsets[0] + chunk.sizes[0])
            if first >= last:
                continue
            target = out[first - begin : last - begin]
            for axis in range(1, out.dim()):
                target = target.narrow(axis, chunk.offsets[axis], chunk.sizes[axis])
            part = target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
            row_bytes = math.prod(chunk.sizes[1:]) * out.dtype.itemsize
            file, at = self._place(key, chunk)
            _read_into(part, file, at + (first - chunk.offsets[0]) * row_bytes)
            if part is not target:
                target.copy_(part)

    def _place(self, key: str, chunk: Any) -> tuple[Path, int]:
        """(file, position) of the first byte of a chunk's values."""
        index = (key, tuple(chunk.offsets))
        if index not in self._places:
            if index not in self._stored:
                raise InputError(f"{self.path}: {key} at {list(chunk.offsets)} is in no file of this checkpoint")
            stored = self._stored[index]
            file = self.path / stored.relative_path
            try:
                begin = _values_begin(file, stored, tuple(chunk.sizes), self._tensors[key].properties.dtype)
            except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
                raise InputError(f"{file}: {key} cannot be read ({error})") from error
            self._places[index] = (file, begin)
        return self._places[index]


@dataclass(frozen=True)
class Whole:
    """A tensor of the whole model: stored tensors of `stored_rows` rows each, one under another."""

    source: CheckpointTensors
    keys: tuple[str, ...]
    stored_rows: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, begin: int, end: int, out: Tensor) -> None:
        """Fills `out` with the rows [begin, end)."""
        above = 0
        for key, rows in zip(self.keys, self.stored_rows, strict=True):
            first, last = max(begin, above), min(end, above + rows)
            if first < last:
                self.source.read(key, first - above, last - above, out[first - begin : last - begin])
            above += rows

    def all(self) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype)
        self.read(0, self.shape[0], out)
        return out


def rows_of(whole: Whole, parts: Sequence[Piece], begin: int, end: int) -> Tensor:
    """Rows [begin, end) of a Hugging Face tensor that `parts`, all of it, place in a Megatron tensor; new memory."""
    out = torch.empty((end - begin, *whole.shape[1:]), dtype=whole.dtype)
    for part in parts:
        first, last = max(begin, part.rows[0]), min(end, part.rows[1])
        if first < last:
            shift = part.shard_rows[0] - part.rows[0]
            whole.read(first + shift, last + shift, out[first - begin : last - begin])
    return out


def _read_into(part: Tensor, file: Path, at: int) -> None:
    """Fills a contiguous tensor with the bytes of a file."""
    rest = part.view(-1).view(torch.uint8).numpy().data
    try:
        handle = os.open(file, os.O_RDONLY)
        try:
            while rest:
                done = os.preadv(handle, [rest], at)
                if not done:
                    raise EOFError(f"it ends at byte {at}")
                at, rest = at + done, rest[done:]
        finally:
            os.close(handle)
    except (OSError, EOFError) as error:
        raise InputError(f"{file} cannot be read ({error})") from error


class _Window(io.RawIOBase):
    """A stretch of a file as a file of its own."""

    def __init__(self, handle: int, begin: int, length: int) -> None:
        self._handle, self._begin, self._length, self._at = handle, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        done = os.preadv(self._handle, [view], self._begin + self._at) if view else 0
        self._at += done
        return done


class _StoredTensor(pickle.Unpickler):
    """What torch.save says of a tensor: (offset in its storage, shape, strides). Names nothing but that."""

    def persistent_load(self, pid: Any) -> Any:
        return pid

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *rest: (offset, tuple(shape), tuple(strides))
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a tensor")


def _values_begin(file: Path, stored: Any, sizes: tuple[int, ...], dtype: torch.dtype) -> int:
    """Position in `file` of the values of one chunk. Raises ValueError where they are not all there and in order."""
    handle = os.open(file, os.O_RDONLY)
    try:
        with zipfile.ZipFile(io.BufferedReader(_Window(handle, stored.offset, stored.length))) as archive:
            entries = {entry.filename.split("/", 1)[-1]: entry for entry in archive.infolist()}
            described = _StoredTensor(io.BytesIO(archive.read(entries["data.pkl"]))).load()
            values = entries["data/0"]
        head = os.pread(handle, _LOCAL_HEADER_BYTES, stored.offset + values.header_offset)
    finally:
        os.close(handle)
    strides = tuple(math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))
    expected = math.prod(sizes) * dtype.itemsize
    if described != (0, sizes, strides) or values.file_size != expected or values.compress_type:
        raise ValueError(f"{values.file_size} bytes of {described}, not {expected} of {(0, sizes, strides)}")
    names = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    return int(stored.offset + values.header_offset + _LOCAL_HEADER_BYTES + names)
