"""Target `gguf`: one file for llama.cpp, with weights, tokenizer and chat template.

In: the canonical artifact (int4 as Q4_0, int8 as Q8_0, nvfp4 as NVFP4, unquantised as it is); out: `model.gguf`. Codes
and scales are those of the artifact, bit for bit. What the format or llama.cpp's reader has no place for is refused:
quantised activations, fp8 weights, calibrated scales of a KV cache.
Names, keys and order of rows: the `gguf` package and convert_hf_to_gguf.py of llama.cpp b11434.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_edge.artifact.store import ArtifactReader
from megatron_edge.contracts import InputError, Manifest
from megatron_edge.export.targets import gguf_blocks, gguf_tokenizer
from megatron_edge.export.targets.folder import (
    SHARD_BYTES,
    TargetReport,
    describe_linears,
    finish_target,
    kv_format,
    new_target,
    recipes,
)
from megatron_edge.families import dims_of, expected_tensors, renormalises, rules_of
from megatron_edge.model.gguf_source import interleaved_rows, llama3_factors
from megatron_edge.model.hf_config import checked_config
from megatron_edge.model.source import ModelSource

FILE = "model.gguf"
FORMATS = (("int4", "none"), ("int8", "none"), ("nvfp4", "none"), ("none", "none"))
# Of transformers -> (llama.cpp's name, whether it turns neighbouring rows of q and k instead of halves of a head).
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", True),
    "MixtralForCausalLM": ("llama", True),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
    "Qwen3MoeForCausalLM": ("qwen3moe", False),
}
WITHOUT_TENSOR_SCALES = ("Qwen2ForCausalLM",)  # src/models/qwen2.cpp never multiplies by `.scale`; seen with b11549
BLOCKS = {"int4": "Q4_0", "int8": "Q8_0", "nvfp4": "NVFP4", "bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(\w+\.weight)$")


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file: `shape` is numpy's, of bytes where `kind` has blocks; `make` reads and packs it."""

    name: str
    kind: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def convert(reader: ArtifactReader, directory: Path, shard_bytes: int = SHARD_BYTES) -> TargetReport:
    """`shard_bytes` does not matter: llama.cpp maps one file.

    Raises:
        InputError: a format, family, tokenizer or size that the file has no place for.
    """
    manifest = reader.manifest
    config = checked_config(json.loads((reader.directory / "config.json").read_text()), str(reader.directory))
    _refuse(manifest, config)
    words = gguf_tokenizer.read(reader.directory, config["vocab_size"])
    building = new_target(directory)
    tensors = list(_tensors(reader, config))
    _write(building / FILE, manifest, config, words, tensors)
    kinds = sorted({tensor.kind for tensor in tensors})
    carried = [
        f"{describe_linears(manifest)}, bit for bit; tensors are {', '.join(kinds)}",
        f"tokenizer ({words.pre}, {len(words.tokens)} tokens){', chat template' if words.chat_template else ''}",
    ]
    notes = ["llama.cpp's CPU kernels round the inputs of Q4_0, Q8_0 and NVFP4 weights to q8_0 as they multiply"]
    if kv_format(manifest) == "int8":
        notes.append("the q8_0 KV cache is an option of the runtime: --cache-type-k q8_0 --cache-type-v q8_0")
    return finish_target(building, directory, "gguf", carried, words.dropped, notes)


def _refuse(manifest: Manifest, config: dict[str, Any]) -> None:
    """Raises InputError for what the file cannot carry, by name."""
    recipes(manifest, "gguf", FORMATS, " (llama.cpp runs weights alone quantised, and none in fp8)")
    for name, table in manifest.tables.items():
        if table.format not in BLOCKS:
            raise InputError(f"export.targets: gguf cannot carry {name} in {table.format}; allowed: bf16, int8, int4")
    if kv_format(manifest) not in ("none", "int8"):
        raise InputError(
            f"export.targets: gguf cannot carry the scales of the {kv_format(manifest)} KV cache, which llama.cpp "
            "would not read; allowed: kv=none, int8"
        )
    _refuse_model(config, {linear.format for linear in manifest.layer_linears.values()})


def check_model(source: ModelSource, weights: set[str]) -> None:
    """Before anything is spent: raises InputError where the file would have no place for this model's architecture or
    tokenizer, or llama.cpp would not run it with linears of the formats `weights`."""
    _refuse_model(source.hf_config, weights)
    with tempfile.TemporaryDirectory() as directory:
        source.save_tokenizer(Path(directory))
        gguf_tokenizer.read(Path(directory), source.hf_config["vocab_size"])


def _refuse_model(config: dict[str, Any], weights: set[str]) -> None:
    architecture = config["architectures"][0]
    if "nvfp4" in weights and architecture in WITHOUT_TENSOR_SCALES:
        raise InputError(
            f"export.targets: gguf cannot carry nvfp4 weights of {architecture}: llama.cpp leaves their scale "
            "out where it runs this architecture, and answers NaN; allowed: int4, int8"
        )
    if architecture not in ARCHITECTURES:
        raise InputError(f"export.targets: gguf knows no {architecture}; allowed: {', '.join(ARCHITECTURES)}")
    if dims_of(config).num_experts and not renormalises(config):
        raise InputError(
            "export.targets: gguf cannot carry norm_topk_prob=false: llama.cpp scales the weights of the chosen "
            "experts to sum to 1"
        )


# ---------------------------------------------------------------- tensors


def _tensors(reader: ArtifactReader, config: dict[str, Any]) -> Iterator[_Tensor]:
    """Every tensor of the model in the order of the forward pass, experts of a layer stacked."""
    import gguf

    architecture, dims = ARCHITECTURES[config["architectures"][0]][0], dims_of(config)
    by_name = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(by_name[architecture], dims.num_layers)
    if (config["rope_scaling"] or {}).get("rope_type") == "llama3":
        factors = llama3_factors(config["rope_scaling"], config["rope_theta"], dims.head_dim).astype(np.float32)
        yield _Tensor("rope_freqs.weight", "F32", factors.shape, lambda: factors)
    stacks: dict[str, list[str]] = {}
    for name in expected_tensors(rules_of(config), dims):
        stacks.setdefault(_EXPERT.sub(r"\1.\2", name), []).append(name)
    for name, members in stacks.items():
        theirs = names.get_name(name, (".weight", ".bias"))
        if theirs is None:
            raise InputError(f"export.targets: gguf has no name for {name} in the architecture {architecture}")
        yield _stacked(reader, config, theirs, members, stack=name != members[0])
        if _format_of(reader, members[0]) == "nvfp4":
            yield _tensor_scales(reader, theirs.removesuffix("weight") + "scale", members)


def _format_of(reader: ArtifactReader, name: str) -> str:
    linear = reader.manifest.linears.get(name.removesuffix(".weight"))
    if linear is None and name not in reader.manifest.tensors:
        raise InputError(f"artifact={reader.directory}: tensor {name} is missing, but config.json describes it")
    return reader.manifest.tensors[name].format if linear is None else linear.format


def _stacked(reader: ArtifactReader, config: dict[str, Any], theirs: str, members: list[str], stack: bool) -> _Tensor:
    """The tensor of one member, or of all experts as [experts, rows, bytes of a row]."""
    import gguf

    found = {_format_of(reader, member) for member in members}
    if len(found) > 1:
        raise InputError(f"export.targets: gguf stacks the experts of {theirs}, which have {', '.join(sorted(found))}")
    linear = reader.manifest.linears.get(members[0].removesuffix(".weight"))
    shape = reader.manifest.tensors[members[0]].shape if linear is None else linear.shape
    plain_fp32 = linear is None and (len(shape) == 1 or ".ffn_gate_inp." in theirs)
    kind = "F32" if plain_fp32 else BLOCKS[found.pop()]
    values, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if kind not in ("F32", "F16"):
        shape = (*shape[:-1], shape[-1] // values * nbytes)

    def make() -> np.ndarray:
        parts = [_member(reader, config, member, kind) for member in members]
        return torch.stack(parts).numpy() if stack else parts[0].numpy()

    return _Tensor(theirs, kind, (len(members), *shape) if stack else tuple(shape), make)


def _member(reader: ArtifactReader, config: dict[str, Any], name: str, kind: str) -> torch.Tensor:
    """One tensor of the artifact as the file holds it: bytes, or fp32 and fp16 numbers."""
    linear = name.removesuffix(".weight")
    if linear in reader.manifest.linears:
        stored = gguf_blocks.packed(linear, reader.encoded(linear))
    elif kind == "F32":
        stored = reader.tensor(name).float()
    else:
        stored = reader.tensor(name).contiguous()
        stored = stored if kind == "F16" else stored.view(torch.uint8)
    if ARCHITECTURES[config["architectures"][0]][1] and name.endswith((".q_proj.weight", ".k_proj.weight")):
        place = interleaved_rows(np.arange(len(stored)), config["head_dim"])
        stored = stored[torch.from_numpy(np.argsort(place))]
    return stored


def _tensor_scales(reader: ArtifactReader, theirs: str, members: list[str]) -> _Tensor:
    """NVFP4's scale of each whole tensor, fp32 [members]."""

    def make() -> np.ndarray:
        linears = [reader.manifest.linears[member.removesuffix(".weight")] for member in members]
        return torch.stack([reader.tensor(linear.tensors["global_scale"]).reshape(()) for linear in linears]).numpy()

    return _Tensor(theirs, "F32", (len(members),), make)


# ---------------------------------------------------------------- the file


def _write(
    path: Path, manifest: Manifest, config: dict[str, Any], words: gguf_tokenizer.Words, tensors: list[_Tensor]
) -> None:
    """Header, metadata, then one tensor at a time."""
    import gguf

    writer = gguf.GGUFWriter(path, ARCHITECTURES[config["architectures"][0]][0])
    try:
        _add_metadata(writer, manifest, config, {tensor.kind for tensor in tensors})
        _add_precision(writer, [tensor.name for tensor in tensors if tensor.kind == "NVFP4"])
        gguf_tokenizer.add(writer, words)
        for tensor in tensors:
            plain = {"F32": np.float32, "F16": np.float16}.get(tensor.kind, np.uint8)
            nbytes = int(np.prod(tensor.shape)) * np.dtype(plain).itemsize
            raw = None if plain is not np.uint8 else gguf.GGMLQuantizationType[tensor.kind]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(plain), nbytes, raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(np.ascontiguousarray(tensor.make()))
    finally:
        writer.close()


def _add_precision(writer: Any, names: list[str]) -> None:
    """Weights alone are quantised: a GPU with FP4 products must not round the inputs of NVFP4 weights to FP4 as well.

    The keys are those that llama.cpp's converter writes (b11434); `gguf` 0.19 has no names for them.
    """
    if names:
        writer.add_array("general.tensor_extra.name", sorted(names))
        writer.add_array("general.tensor_extra.prec_a4", [False] * len(names))


def _add_metadata(writer: Any, manifest: Manifest, config: dict[str, Any], kinds: set[str]) -> None:
    import gguf

    dims, scaling = dims_of(config), config["rope_scaling"] or {}
    writer.add_type("model")
    writer.add_name(str(manifest.source.get("model", manifest.family)))
    main = next((kind for kind in ("NVFP4", "Q4_0", "Q8_0", "BF16", "F16") if kind in kinds), None)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{main}" if main else "ALL_F32"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(dims.vocab_size)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(dims.hidden_size)
    writer.add_block_count(dims.num_layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(dims.num_heads)
    writer.add_head_count_kv(dims.num_kv_heads)
    writer.add_key_length(dims.head_dim)
    writer.add_value_length(dims.head_dim)
    writer.add_rope_dimension_count(dims.head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if scaling.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    if dims.num_experts:
        writer.add_expert_count(dims.num_experts)
        writer.add_expert_used_count(dims.experts_per_token)
        writer.add_expert_feed_forward_length(dims.expert_ffn_size)
