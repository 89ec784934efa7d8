"""A Megatron-LM or Megatron-Bridge checkpoint (torch_dist), read as the Hugging Face model that it is an instance of.

In: the directory of one iteration, or the one above it, of any layout, and the model's config.json. Out: Hugging Face
names and slices of tensors. Nothing in it is run: `.metadata`, which is a pickle, may name plain records of
torch.distributed.checkpoint and nothing else, tensors are loaded as weights only, `common.pt` is not opened. Called by
`model.source`; export reads the metadata of our own checkpoints through it.

Spellings that Megatron-core 0.9 to 0.16 writes: layers stacked into one tensor (`decoder.layers.mlp...`, [layers, ...])
or apart (`decoder.layers.0.mlp...`), experts likewise; gate and up rows of SwiGLU as one tensor or as `_w` and `_v`; a
norm with the linear layer that reads it, or by itself; embeddings padded with rows that no token has.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_edge.contracts import InputError, ParamRule
from megatron_edge.families import all_rules, dims_of, hf_shape, pieces, rules_of

METADATA_FILE = ".metadata"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_NOT_WEIGHTS = re.compile(r"(optimizer|chained_\d+|rng_state|rerun_state_machine|quantizer)\b|.*_extra_state(/|$)")
_NORM_WITH_READER = {
    "input_layernorm.weight": ("self_attention.linear_qkv.layer_norm_weight",),
    "pre_mlp_layernorm.weight": ("mlp.linear_fc1.layer_norm_weight",),
}
_RECORD_MODULES = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
_ALLOWED = "allowed: a torch_dist checkpoint of the model that its config.json describes"


@dataclass(frozen=True)
class _Part:
    """Where a Megatron parameter lies: rows of a stored tensor behind its leading (layer, expert) indices."""

    key: str
    leading: tuple[int, ...]


class TorchDistStore:
    """Tensors of a torch_dist checkpoint by their Hugging Face names.

    Raises:
        InputError: no such checkpoint, tensors that the config's family does not have, or lacks.
    """

    def __init__(self, directory: Path, hf_config: Mapping[str, Any]) -> None:
        self.directory = iteration_directory(directory)
        self._reader = _reader(self.directory)
        self._stored = _stored_tensors(self._reader, self.directory)
        self.files = [*sorted(self.directory.glob("*.distcp")), self.directory / METADATA_FILE]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._dims = dims_of(hf_config)
        self._rule_of: dict[str, ParamRule] = {}
        self._parts: dict[str, list[_Part]] = {}  # one; gate and up rows may be two
        self._last: tuple[str, torch.Tensor] | None = None
        for rule in all_rules(rules_of(hf_config), self._dims):
            parts = self._parts[rule.pattern] = self._find(rule)
            for target in rule.targets:
                self._rule_of[target] = rule
                self.shapes[target] = hf_shape(target, rule, self._dims)
                self.dtypes[target] = self._stored[parts[0].key].properties.dtype
        self._refuse_surplus()

    def read(self, name: str, rows: slice, cols: slice | None) -> torch.Tensor:
        """A slice of one tensor; q, k and v, which Megatron interleaves, are read together and kept until the next."""
        rule, out = self._rule_of[name], []
        for piece in sorted(pieces(rule, self._dims), key=lambda piece: piece.rows):
            begin, end = max(rows.start, piece.rows[0]), min(rows.stop, piece.rows[1])
            if piece.target == name and begin < end:
                shift = piece.shard_rows[0] - piece.rows[0]
                out.append(self._read_rows(rule, begin + shift, end + shift, cols))
        return torch.cat(out)

    def _read_rows(self, rule: ParamRule, begin: int, end: int, cols: slice | None) -> torch.Tensor:
        """Rows of a Megatron parameter."""
        parts = self._parts[rule.pattern]
        if len(parts) == 2:
            half = self._dims.size(rule.shape[0])
            part, begin, end = parts[begin // half], begin % half, end - begin // half * half
        else:
            part = parts[0]
        if rule.merge != "qkv":
            return self._load(part, begin, end, cols)
        if self._last is None or self._last[0] != rule.pattern:
            self._last = rule.pattern, self._load(part, 0, self._dims.size("qkv"), None)
        kept = self._last[1][begin:end]
        return kept.clone() if cols is None else kept[:, cols].clone()

    def _load(self, part: _Part, begin: int, end: int, cols: slice | None) -> torch.Tensor:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
        from torch.distributed.checkpoint.planner import LoadPlan
        from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

        stored = self._stored[part.key]
        lead, tail = len(part.leading), list(stored.size[len(part.leading) + 1 :])
        first = [0] * len(tail)
        if cols is not None:
            first[0], tail[0] = cols.start, cols.stop - cols.start
        sizes = torch.Size([1] * lead + [end - begin, *tail])
        wanted = ChunkStorageMetadata(torch.Size([*part.leading, begin, *first]), sizes)
        planner = _Filler(torch.empty(sizes, dtype=stored.properties.dtype))
        plan = LoadPlan(create_read_items_for_chunk_list(part.key, stored, [wanted]))
        try:
            self._reader.read_data(plan, planner).wait()
        except (OSError, EOFError, RuntimeError, KeyError, AssertionError, pickle.UnpicklingError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"{self.directory}: {part.key} cannot be read ({reason}); {_ALLOWED}") from error
        if planner.missing:
            raise InputError(f"{self.directory}: {planner.missing} elements of {part.key} are in no file; {_ALLOWED}")
        return planner.tensor.reshape(end - begin, *tail)

    def _find(self, rule: ParamRule) -> list[_Part]:
        """Raises InputError where the checkpoint has none of the spellings of `rule`, or one of another shape."""
        for name in _spellings(rule.pattern):
            halves = [name + "_w", name + "_v"] if rule.merge == "gated" else []
            for keys in ([name], halves):
                found = [part for key in keys for part in self._placements(key)]
                if found and len(found) == len(keys):
                    self._check_shape(rule, found)
                    return found
        raise InputError(
            f"{self.directory}: no {rule.pattern} (nor {', '.join(_stacked(rule.pattern)[1:])}); {_ALLOWED}"
        )

    def _placements(self, key: str) -> list[_Part]:
        indices = {name: int(number) for name, number in re.findall(r"\.(layers|experts)\.(\d+)\.", key)}
        for candidate in _stacked(key):
            if candidate in self._stored:
                kept = {name for name, _ in re.findall(r"\.(layers|experts)\.(\d+)\.", candidate)}
                return [_Part(candidate, tuple(index for name, index in indices.items() if name not in kept))]
        return []

    def _check_shape(self, rule: ParamRule, parts: list[_Part]) -> None:
        # A gated parameter in one tensor holds gate and up rows; qkv's size counts all three.
        rows = self._dims.size(rule.shape[0]) * (2 if rule.merge == "gated" and len(parts) == 1 else 1)
        wanted = (rows, *(self._dims.size(size) for size in rule.shape[1:]))
        for part in parts:
            stored = self._stored[part.key]
            size = tuple(stored.size)[len(part.leading) :]
            padded = "vocab" in rule.shape and len(size) == 2 and size[0] > wanted[0] and size[1] == wanted[1]
            outside = any(index >= stored.size[axis] for axis, index in enumerate(part.leading))
            if (size != wanted and not padded) or outside:
                raise InputError(
                    f"{self.directory}: {part.key} is {list(stored.size)}, and {rule.pattern} needs {list(wanted)} of "
                    f"it at {list(part.leading)}; {_ALLOWED}"
                )
            if stored.properties.dtype not in _FLOATS:
                raise InputError(
                    f"{self.directory}: {part.key} has dtype {stored.properties.dtype}; allowed: "
                    + ", ".join(str(dtype) for dtype in _FLOATS)
                )

    def _refuse_surplus(self) -> None:
        """A tensor that is not read (a bias, an adapter, a scale that is not folded) would be another model."""
        used = {part.key for parts in self._parts.values() for part in parts}
        tied = {"output_layer.weight"} if self._dims.tied else set()
        surplus = [key for key in self._stored if key not in used | tied and not _NOT_WEIGHTS.match(key)]
        sizes = {
            key: tuple(self._stored[part.key].size[: len(part.leading)])
            for parts in self._parts.values()
            for part in parts
            for key in [part.key]
            if part.leading
        }
        counts = (self._dims.num_layers, self._dims.num_experts)
        more = [key for key, leading in sizes.items() if any(size not in counts for size in leading)]
        if surplus or more:
            raise InputError(
                f"{self.directory}: {', '.join((surplus or more)[:3])} (of {len(surplus or more)}) "
                f"{'is unknown to its family' if surplus else 'has more layers or experts'}; {_ALLOWED}"
            )


def iteration_directory(directory: Path) -> Path:
    """The directory of one iteration: `directory` itself, or the newest below it.

    Raises:
        InputError: there is none, or it is of a kind that is not read.
    """
    tracker = directory / "latest_checkpointed_iteration.txt"
    if not (directory / METADATA_FILE).is_file():
        named = tracker.read_text().strip() if tracker.is_file() else ""
        chosen = sorted(directory.glob("iter_*"))[-1:]
        if named:
            chosen = [directory / (named if named == "release" else f"iter_{named:0>7}")]
        directory = chosen[0] if chosen else directory
    if any(directory.glob("mp_rank_*")):
        raise InputError(
            f"{directory}: mp_rank_*: pickled weights can run code when they are read; allowed: torch_dist "
            "(Megatron-LM's --ckpt-convert-format torch_dist)"
        )
    if not (directory / METADATA_FILE).is_file():
        raise InputError(f"{directory}: no {METADATA_FILE}; {_ALLOWED}")
    kind = directory / "metadata.json"
    if kind.is_file():
        backend = json.loads(kind.read_text()).get("sharded_backend", "torch_dist")
        if backend != "torch_dist":
            raise InputError(f"{kind}: sharded_backend is {backend!r}; allowed: torch_dist")
    return directory


def is_torch_dist(directory: Path) -> bool:
    """Whether a directory looks like a Megatron checkpoint, readable or not."""
    return directory.is_dir() and (
        (directory / METADATA_FILE).is_file()
        or (directory / "latest_checkpointed_iteration.txt").is_file()
        or any(directory.glob("iter_*"))
        or any(directory.glob("mp_rank_*"))
    )


def described_by(directory: Path) -> Path | None:
    """The directory with config.json and tokenizer that was saved with a checkpoint, where there is one."""
    inside = iteration_directory(directory)
    for place in (inside, inside / "hf", inside / "tokenizer", inside.parent, inside.parent / "tokenizer"):
        if (place / "config.json").is_file() and (place / "tokenizer.json").is_file():
            return place
    return None


def _spellings(pattern: str) -> list[str]:
    """Names that a parameter may be stored under, its indices still in it."""
    pattern = pattern.replace(".experts.local_experts.", ".experts.experts.")
    names = [pattern]
    for ending, others in _NORM_WITH_READER.items():
        if pattern.endswith(ending):
            names += [pattern.removesuffix(ending) + other for other in others]
    return names


def _stacked(name: str) -> list[str]:
    """`name`, and its spellings with layers, experts or both stacked into one tensor."""
    name = name.replace(".experts.local_experts.", ".experts.experts.")
    without_experts = re.sub(r"(\.experts\.experts)\.\d+\.", r"\1.", name)
    return list(
        dict.fromkeys(
            [name, without_experts] + [re.sub(r"\.layers\.\d+\.", ".layers.", one) for one in (name, without_experts)]
        )
    )


class _Filler:
    """The two calls of a load planner that FileSystemReader.read_data makes: one tensor is filled."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.missing = tensor, tensor.numel()

    def resolve_tensor(self, item: Any) -> torch.Tensor:
        part = self.tensor
        for axis, (offset, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            part = part.narrow(axis, offset, length)
        return part

    def commit_tensor(self, item: Any, tensor: torch.Tensor) -> None:
        self.missing -= tensor.numel()


class _RecordsOnly(pickle.Unpickler):
    """Reads the pickle `.metadata`, which may name records of torch.distributed.checkpoint, dtypes and layouts."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"),  # where torch's own writer was told to write
        ):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if "." not in name and module.startswith(
            ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
        ):
            found = super().find_class(module, name)
            if isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)):
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no record of a checkpoint")


def read_metadata(directory: Path) -> Any:
    """torch.distributed.checkpoint's Metadata of a checkpoint. Raises InputError where it cannot be read."""
    path = directory / METADATA_FILE
    try:
        with path.open("rb") as file:
            return _RecordsOnly(file).load()
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not readable ({error}); {_ALLOWED}") from error


def _reader(directory: Path) -> Any:
    from torch.distributed.checkpoint import FileSystemReader

    metadata = read_metadata(directory)
    reader = FileSystemReader(str(directory))
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.metadata = metadata
    return reader


def _stored_tensors(reader: Any, directory: Path) -> dict[str, Any]:
    """Metadata of every stored tensor, by key (Megatron-LM's own, without the prefix of a chunk)."""
    found = {key: entry for key, entry in reader.metadata.state_dict_metadata.items() if hasattr(entry, "chunks")}
    files = {info.relative_path for info in reader.storage_data.values()}
    missing = sorted(file for file in files if not (directory / file).is_file())
    if missing:
        raise InputError(f"{directory}: {missing[0]} (one of {len(missing)}) is missing; {_ALLOWED}")
    return found
