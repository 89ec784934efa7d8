"""A run directory with a checkpoint of random weights, of any size and layout, made in one process without a model.

What ranks of the layout would store, each in a file of its own, written through torch.distributed.checkpoint. Values
depend on a tensor's name and place in the whole tensor alone, so that checkpoints of two layouts hold the same model.
The model's source beside it is a safetensors file with a header and a hole: it takes no room on the disk.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_edge.artifact import formats
from megatron_edge.artifact.store import sha256_of_file
from megatron_edge.contracts import ParallelPlan, ParamRule
from megatron_edge.families import all_rules, dims_of, expected_tensors, rules_of
from megatron_edge.quantize.policy import make_plan, rule_for
from megatron_edge.quantize.state import PREFIX, amax_keys
from tools.random_models import save_byte_tokenizer

_LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5,
          "max_position_embeddings": 4096, "rope_theta": 500000.0, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
# fmt: off
SIZES: dict[str, dict[str, Any]] = {
    "tiny": _LLAMA | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
                      "num_key_value_heads": 4, "vocab_size": 5000, "tie_word_embeddings": False},
    "tiny_experts": _LLAMA | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 256,
                              "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
                              "num_key_value_heads": 4, "vocab_size": 600, "tie_word_embeddings": True,
                              "num_local_experts": 4, "num_experts_per_tok": 2},
    "345m": _LLAMA | {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24,
                      "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 49152,
                      "tie_word_embeddings": True},
    "1b": _LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "7b": _LLAMA | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32,
                    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
                    "tie_word_embeddings": False},
}
# fmt: on
_POOL_ELEMENTS = (1 << 24) + 43
_EXPERT_WEIGHTS = ".experts.local_experts."


@dataclass(frozen=True)
class Chunk:
    """A rank's part of a stored tensor: rows [begin, end) and columns [left, right) of it.

    Maxima have `dtype` fp32; those of rows or groups are of the stored tensor `weight`, `width` columns wide.
    """

    key: str
    size: tuple[int, ...]
    rows: tuple[int, int]
    cols: tuple[int, int] | None
    dtype: torch.dtype
    weight: str = ""
    width: int = 0
    format: str = ""
    group_size: int = 0

    @property
    def offsets(self) -> tuple[int, ...]:
        return (self.rows[0],) if self.cols is None else (self.rows[0], self.cols[0])

    @property
    def sizes(self) -> tuple[int, ...]:
        ends = (self.rows, *((self.cols,) if self.cols else ()))
        return tuple(end - begin for begin, end in ends)


def make_run(
    run_dir: Path, source: Path, layout: ParallelPlan, arguments: list[str], dtype: torch.dtype
) -> tuple[Any, int]:
    """`run_dir` as training on the model `source` (of `write_source`) leaves it. Returns its configuration and the
    checkpoint's bytes."""
    from megatron_edge.compose import compose
    from megatron_edge.config import to_yaml
    from megatron_edge.model.source import open_source

    run_dir.mkdir(parents=True)
    config = compose([f"model.source={source}", f"run_dir={run_dir}", *arguments])
    (run_dir / "config.yaml").write_text(to_yaml(config))
    hf_config = open_source(source).hf_config
    plan = make_plan(config.quant, config.kv, hf_config)
    return config, write_checkpoint(run_dir / "checkpoints" / "step_00000001", hf_config, plan, layout, dtype)


def write_source(directory: Path, model: dict[str, Any]) -> Path:
    """A model's directory: config.json, tokenizer, and weights that are all zero."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(model))
    save_byte_tokenizer(directory)
    header, at = {}, 0
    for name, shape in expected_tensors(rules_of(model), dims_of(model)).items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(8 + len(content) + at)
    return directory


def write_checkpoint(
    directory: Path, hf_config: dict[str, Any], plan: Any, layout: ParallelPlan, dtype: torch.dtype
) -> int:
    """Files of all ranks, `.metadata` and our manifest.json; one chunk is in memory at a time."""
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
    from torch.distributed.checkpoint.planner import SavePlan

    directory.mkdir(parents=True)
    writer = FileSystemWriter(str(directory), sync_files=False)
    writer.set_up_storage_writer(is_coordinator=True)
    values, results = Values(dtype), []
    tensors: dict[str, TensorStorageMetadata] = {}
    for rank, chunks in enumerate(chunks_of_ranks(hf_config, plan, layout, dtype)):
        items = [_write_item(chunk) for chunk in chunks]
        for item in items:
            data = item.tensor_data
            tensors.setdefault(item.index.fqn, TensorStorageMetadata(data.properties, data.size, []))
            tensors[item.index.fqn].chunks.append(data.chunk)
        local = SavePlan(items)
        local = writer.prepare_global_plan([writer.prepare_local_plan(local)] * (rank + 1))[rank]
        results.append(writer.write_data(local, _Planner(chunks, values)).value())
    writer.finish(Metadata(tensors), results)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        for path in sorted(directory.iterdir())
    }
    extra = {"model": "random weights"}
    (directory / "manifest.json").write_text(json.dumps({"step": 1, "extra": extra, "files": files}))
    return sum(int(str(file["bytes"])) for file in files.values())


def chunks_of_ranks(
    hf_config: dict[str, Any], plan: Any, layout: ParallelPlan, dtype: torch.dtype
) -> list[list[Chunk]]:
    """What each rank stores: pipeline stages, in each its experts' ranks, in each its tensor ranks."""
    dims = dims_of(hf_config)
    ranks: list[list[Chunk]] = [[] for _ in range(layout.pp * layout.ep * layout.tp)]
    for rule in all_rules(rules_of(hf_config), dims):
        stage = layout.pp - 1 if not rule.pattern.startswith("embedding") else 0
        expert_rank = 0
        if ".layers." in rule.pattern:
            stage = int(rule.pattern.split(".")[2]) * layout.pp // dims.num_layers
        if _EXPERT_WEIGHTS in rule.pattern:
            expert = int(rule.pattern.split(_EXPERT_WEIGHTS)[1].split(".")[0])
            expert_rank = expert * layout.ep // dims.num_experts
        first = (stage * layout.ep + expert_rank) * layout.tp
        for tp_rank in range(layout.tp):
            ranks[first + tp_rank] += _chunks(rule, dims, plan, dtype, tp_rank, layout.tp)
    ranks[0] += [Chunk(key, (1,), (0, 1), None, torch.float32) for key in _kv_keys(dims.num_layers, plan)]
    return ranks


def _kv_keys(num_layers: int, plan: Any) -> list[str]:
    layers = range(num_layers) if plan.kv in formats.STATIC_KV_FORMATS else ()
    attention = "self_attention.core_attention"
    return [f"{PREFIX}decoder.layers.{i}.{attention}.{w}_bmm_quantizer.amax" for i in layers for w in "kv"]


def _chunks(rule: ParamRule, dims: Any, plan: Any, dtype: torch.dtype, tp_rank: int, tp: int) -> Iterator[Chunk]:
    size = tuple(dims.size(name) for name in rule.shape)
    axis = rule.split_axis
    if axis is None and tp_rank:
        return
    ends = [(0, length) for length in size]
    if axis is not None:
        length = size[axis] // tp
        ends[axis] = (tp_rank * length, (tp_rank + 1) * length)
    rows, cols = ends[0], ends[1] if len(ends) > 1 else None
    keys = [_stored_key(rule) + half for half in (("_w", "_v") if rule.merge == "gated" else ("",))]
    for key in keys:
        yield Chunk(key, size, rows, cols, dtype)
    module = rule.pattern.removesuffix(".weight")
    chosen = rule_for(module, plan)
    if chosen is None or chosen.weight == "none":
        return
    per_row = formats.scales_per_row(chosen.weight, size[-1], chosen.group_size)
    names = amax_keys(f"{module}.weight_quantizer", per_row > 0)
    whole_rows = per_row == 1 and axis == 1  # no rank holds all of a row, and all hold its maximum
    if per_row and cols and not (whole_rows and tp_rank):
        left, right = (0, 1) if per_row == 1 else (c // chosen.group_size for c in cols)
        for key, name in zip(keys, names, strict=True):
            size_of_amax, of_weight = (size[0], per_row), (key, size[1], chosen.weight, chosen.group_size)
            yield Chunk(name, size_of_amax, rows, (left, right), torch.float32, *of_weight)
    if not per_row and tp_rank == 0:
        yield Chunk(names[0], (1,), (0, 1), None, torch.float32)
    if chosen.activation != "none" and tp_rank == 0:
        yield Chunk(f"{PREFIX}{module}.input_quantizer.amax", (1,), (0, 1), None, torch.float32)


def _stored_key(rule: ParamRule) -> str:
    name = rule.pattern.replace(_EXPERT_WEIGHTS, ".experts.experts.")
    name = name.replace(".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight")
    return name.replace(".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight")


class Values:
    """The numbers of a checkpoint: a stretch of one random pool for each row of each tensor."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(7)
        self.pool = torch.empty(_POOL_ELEMENTS).normal_(0, 0.02, generator=generator).to(dtype)
        self.largest = formats.snap_tensor_amax("fp8", self.pool.abs().max())

    def of(self, chunk: Chunk) -> Tensor:
        if chunk.cols is None and len(chunk.size) == 1 and chunk.key.startswith(PREFIX):
            return self.largest.reshape(1)
        if not chunk.weight:
            return self._rows(chunk.key, chunk.size, chunk.rows, chunk.cols)
        assert chunk.cols is not None
        per_column = chunk.width // chunk.size[1]
        cols = (chunk.cols[0] * per_column, chunk.cols[1] * per_column)
        weight = self._rows(chunk.weight, (chunk.size[0], chunk.width), chunk.rows, cols)
        amax = formats.weight_amax(chunk.format, weight, chunk.group_size)
        return formats.snap_amax(chunk.format, amax).reshape(chunk.sizes)

    def _rows(self, key: str, size: tuple[int, ...], rows: tuple[int, int], cols: tuple[int, int] | None) -> Tensor:
        width = math.prod(size[1:])
        count, at = (rows[1] - rows[0]) * width, zlib.crc32(key.encode()) + rows[0] * width
        parts = []
        while count:
            begin = at % _POOL_ELEMENTS
            parts.append(self.pool[begin : begin + count])
            count, at = count - len(parts[-1]), at + len(parts[-1])
        whole = torch.cat(parts).reshape(rows[1] - rows[0], *size[1:])
        return whole if cols is None or cols == (0, width) else whole[:, slice(*cols)].contiguous()


class _Planner:
    """The one call of a save planner that FileSystemWriter.write_data makes."""

    def __init__(self, chunks: list[Chunk], values: Values) -> None:
        self._chunks = {(chunk.key, chunk.offsets): chunk for chunk in chunks}
        self._values = values

    def resolve_data(self, item: Any) -> Tensor:
        return self._values.of(self._chunks[item.index.fqn, tuple(item.index.offset)])


def _write_item(chunk: Chunk) -> Any:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

    offsets, sizes = torch.Size(chunk.offsets), torch.Size(chunk.sizes)
    data = TensorWriteData(
        ChunkStorageMetadata(offsets, sizes), TensorProperties(dtype=chunk.dtype), torch.Size(chunk.size)
    )
    return WriteItem(MetadataIndex(chunk.key, offsets), WriteItemType.SHARD, tensor_data=data)
