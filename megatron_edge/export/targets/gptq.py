"""Target `gptq`: the layout of GPTQ checkpoints, which onnxruntime-genai's builder, vLLM and TensorRT Edge-LLM read.

In: the canonical artifact, int4 weights alone; out: a directory with packed weights, `config.json:
quantization_config` and the same section as `quantize_config.json`, where older readers look for it.

Layout, as AutoGPTQ writes it (`checkpoint_format: gptq`), for a linear [out, in] in groups of g along `in`:

    qweight  int32 [in / 8, out]       word r of column o holds codes 8 r .. 8 r + 7 of row o, the first in the low bits
    qzeros   int32 [in / g, out / 8]   zero points less one, packed likewise along `out`: all 7, for codes stored + 8
    scales   fp16  [in / g, out]       the artifact's own
    g_idx    int32 [in]                group of each input: i // g
    value = (code - (zero + 1)) * scale
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_edge.artifact.store import ArtifactReader
from megatron_edge.contracts import InputError, LinearEntry, Manifest
from megatron_edge.export.targets.folder import (
    SHARD_BYTES,
    TargetContent,
    TargetReport,
    base_config,
    describe_linears,
    kv_format,
    plain_linears,
    recipes,
    role_tensor,
    unquantised,
    write_target,
)
from megatron_edge.target_limits import CODES_A_WORD, STATIC_KV

BITS = 4
PACKED_ZEROS = 0x77777777  # eight zero points of 8, each stored as 7
# Modules that vLLM fuses and looks up under one name.
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | dict.fromkeys(
    ("gate_proj", "up_proj"), "gate_up_proj"
)


def convert(reader: ArtifactReader, directory: Path, shard_bytes: int = SHARD_BYTES) -> TargetReport:
    """Raises InputError where the artifact has weights, inputs, tables or KV scales that this layout has no place for,
    or sizes that eight codes a word do not divide."""
    refuse_what_is_not_int4(reader.manifest, "gptq")
    return write_target(reader, directory, "gptq", content(reader), shard_bytes)


def content(reader: ArtifactReader) -> TargetContent:
    """What the directory holds, for an artifact that `refuse_what_is_not_int4` lets pass."""
    manifest, section = reader.manifest, quantization(reader.manifest)
    kv, dropped = kv_format(manifest), []
    if kv != "none":
        dropped.append(f"the {kv} KV cache (blocks of 32, scaled as they are written): ask the runtime for its own")
    return TargetContent(
        tensors=_tensors(reader),
        config={**base_config(reader, "float16"), "quantization_config": section},
        carried=[f"{describe_linears(manifest)} as GPTQ, symmetric, in order"],
        dropped=dropped,
        notes=[
            "compute in float16 (config.json says so) or float32: bfloat16 would round the fp16 scales",
            "unquantised tensors are as the artifact stores them; float16 rounds those of their values below 6e-5",
        ],
        sidecars={"quantize_config.json": section},
    )


def refuse_what_is_not_int4(manifest: Manifest, target: str) -> None:
    """Raises InputError naming what `target` has no place for."""
    recipes(manifest, target, {("int4", "none")}, " (use the target compressed_tensors)")
    for name, table in manifest.tables.items():
        raise InputError(
            f"export.targets: {target} cannot carry the {table.format} codes of {name}; allowed: quant.embedding=bf16 "
            "and quant.head=bf16, or the target compressed_tensors, which stores their values"
        )
    if kv_format(manifest) in STATIC_KV:
        raise InputError(
            f"export.targets: {target} cannot carry the scales of kv.format={kv_format(manifest)}; allowed: kv=none or "
            "kv=int8, or the targets compressed_tensors (fp8) and modelopt (fp8, nvfp4)"
        )
    for name, linear in manifest.layer_linears.items():
        if any(size % CODES_A_WORD for size in linear.shape):
            raise InputError(
                f"export.targets: {target} packs eight codes a word, which do not divide {name} of "
                f"{linear.shape[0]} x {linear.shape[1]}; allowed: compressed_tensors"
            )


def _tensors(reader: ArtifactReader) -> Iterator[tuple[str, torch.Tensor]]:
    yield from unquantised(reader)
    for name, linear in reader.manifest.layer_linears.items():
        out_features, in_features = linear.shape
        group = linear.group_size
        codes = role_tensor(reader, linear, "codes").contiguous()
        # The artifact's bytes hold two codes each, low nibble first: by fours they are the words, row by row.
        yield f"{name}.qweight", codes.view(torch.int32).T.contiguous()
        zeros = torch.full((in_features // group, out_features // CODES_A_WORD), PACKED_ZEROS, dtype=torch.int32)
        yield f"{name}.qzeros", zeros
        yield f"{name}.scales", role_tensor(reader, linear, "scale").T.contiguous()
        yield f"{name}.g_idx", (torch.arange(in_features) // group).to(torch.int32)


def quantization(manifest: Manifest) -> dict[str, Any]:
    """`quantization_config`: the most frequent group size; under `dynamic` the layers that have another, and those
    that are not quantised (GPTQModel's rules, which vLLM and onnxruntime-genai's builder take too)."""
    sizes = Counter(linear.group_size for linear in manifest.layer_linears.values())
    usual = sizes.most_common(1)[0][0]
    others = {name: x for name, x in manifest.layer_linears.items() if x.group_size != usual}
    plain = {name: None for name in plain_linears(manifest) if ".layers." in name}
    rules: dict[str, dict[str, Any]] = {}
    for pattern, linear in _patterns(manifest, {**others, **plain}):
        if linear is None:
            rules[f"-:{pattern}"] = {}
        else:
            rules[f"+:{pattern}"] = {"bits": BITS, "group_size": linear.group_size, "sym": True, "desc_act": False}
    return {
        "quant_method": "gptq",
        "bits": BITS,
        "group_size": usual,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "true_sequential": True,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "dynamic": rules,
    }


def _patterns(manifest: Manifest, chosen: dict[str, LinearEntry | None]) -> Iterator[tuple[str, LinearEntry | None]]:
    """A pattern for each kind of linear (its name without the layer's number) that is chosen in all layers with one
    group size, and for each other chosen linear one of its own. They match from the beginning, and with vLLM's name for
    the module that a linear is fused into."""
    kinds: dict[str, list[str]] = {}
    for name in [*plain_linears(manifest), *manifest.layer_linears]:
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "N", name), []).append(name)
    for kind, names in kinds.items():
        found = [chosen[name] for name in names if name in chosen]
        sizes = {linear and linear.group_size for linear in found}
        if len(found) == len(names) and len(sizes) == 1:
            yield _pattern(kind).replace(r"\.N\.", r"\.\d+\."), found[0]
        else:
            yield from ((_pattern(name), chosen[name]) for name in names if name in chosen)


def _pattern(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    fused = f"(?:{leaf}|{FUSED[leaf]})" if leaf in FUSED else leaf
    return "^" + re.escape(module) + rf"\.{fused}(?:\.|$)"
