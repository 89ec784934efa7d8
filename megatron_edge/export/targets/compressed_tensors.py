"""Target `compressed_tensors`: the layout of llm-compressor checkpoints, which transformers and vLLM read.

In: the canonical artifact (int4, w4a8, int8, fp8, nvfp4, or layers of each); out: a directory with packed weights and
`config.json: quantization_config`. Layout: compressed-tensors 0.20, compressors/{pack_quantized,naive_quantized,nvfp4}.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_edge.artifact.store import ArtifactReader, Streamed
from megatron_edge.contracts import InputError, LinearEntry, Manifest
from megatron_edge.export.targets.folder import (
    SHARD_BYTES,
    TargetContent,
    TargetReport,
    base_config,
    decoded_tables,
    describe_linears,
    kv_format,
    kv_scales,
    plain_dtype,
    plain_linears,
    recipes,
    role_tensor,
    tables_dropped,
    unquantised,
    write_target,
)

FORMATS = {
    ("int4", "none"): "pack-quantized",
    ("int4", "fp8"): "pack-quantized",
    ("int8", "none"): "int-quantized",
    ("int8", "int8"): "int-quantized",
    ("fp8", "fp8"): "float-quantized",
    ("fp8", "none"): "naive-quantized",
    ("nvfp4", "nvfp4"): "nvfp4-pack-quantized",
    ("nvfp4", "none"): "nvfp4-pack-quantized",
}
# The reasons are in `_notes`; the first that is there decides.
LOADING_DTYPES = {"nvfp4": "bfloat16", "int4": "float16", "int8": "float16"}
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
INT8_PER_ROW, INT8_PER_TENSOR = {**_INT8, "strategy": "channel"}, {**_INT8, "strategy": "tensor"}
FP8_PER_TENSOR = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def convert(reader: ArtifactReader, directory: Path, shard_bytes: int = SHARD_BYTES) -> TargetReport:
    """Raises InputError where compressed-tensors has no format for a layer's weights and activations."""
    manifest = reader.manifest
    found = recipes(manifest, "compressed_tensors", FORMATS, " (use the target hf for unquantised weights)")
    layouts, weights = sorted({FORMATS[pair] for pair in found}), {weight for weight, _ in found}
    kv, carried = kv_format(manifest), [f"{describe_linears(manifest)} as {', '.join(layouts)}"]
    dropped = tables_dropped(manifest)
    if kv == "fp8":
        carried.append("fp8 KV scales as self_attn.k_scale and self_attn.v_scale")
    elif kv == "nvfp4":
        dropped.append("the nvfp4 KV cache and its k_scale and v_scale: compressed-tensors' readers know FP8 only")
    elif kv != "none":
        dropped.append(f"the {kv} KV cache (blocks of 32, scaled as they are written): ask the runtime for its own")
    loading = next((dtype for weight, dtype in LOADING_DTYPES.items() if weight in weights), plain_dtype(manifest))
    if ("int4", "fp8") in found and "nvfp4" not in weights:
        loading = plain_dtype(manifest)
    config = base_config(reader, loading)
    config["quantization_config"] = _config_section(manifest, layouts, kv)
    notes = list(dict.fromkeys(note for pair in found for note in _notes(*pair)))
    if len(weights) > 1:
        notes.append(
            "layers of several formats: transformers has one data type for all, so at most some are exact there"
        )
    content = TargetContent(_tensors(reader), config, carried, dropped, notes)
    return write_target(reader, directory, "compressed_tensors", content, shard_bytes)


def _tensors(reader: ArtifactReader) -> Iterator[tuple[str, torch.Tensor | Streamed]]:
    yield from unquantised(reader)
    yield from decoded_tables(reader)
    for name, linear in reader.manifest.layer_linears.items():
        codes, scale = role_tensor(reader, linear, "codes"), role_tensor(reader, linear, "scale")
        if linear.format == "int4":
            yield f"{name}.weight_packed", _as_int32(codes)
            yield f"{name}.weight_scale", scale
            yield f"{name}.weight_shape", torch.tensor(linear.shape, dtype=torch.int64)
        elif linear.format == "nvfp4":
            yield f"{name}.weight_packed", codes
            yield f"{name}.weight_scale", scale
            yield f"{name}.weight_global_scale", _reciprocal(role_tensor(reader, linear, "global_scale"))
        else:
            yield f"{name}.weight", codes
            yield f"{name}.weight_scale", scale if linear.format == "int8" else scale.reshape(1)
        if linear.activation == "nvfp4":
            yield f"{name}.input_global_scale", _reciprocal(role_tensor(reader, linear, "input_scale"))
        elif linear.activation != "none":
            yield f"{name}.input_scale", role_tensor(reader, linear, "input_scale").reshape(1)
    for attention, which, scale in kv_scales(reader) if kv_format(reader.manifest) == "fp8" else ():
        yield f"{attention}.{which}_scale", scale.reshape(1)


def _as_int32(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [out, in/2], low nibble first -> int32 [out, in/8], little-endian nibbles: the same bytes by fours."""
    if codes.shape[1] % 4:
        raise InputError(
            f"compressed_tensors packs eight int4 codes a word; {2 * codes.shape[1]} inputs are no multiple"
        )
    return codes.contiguous().view(torch.int32)


def _reciprocal(scale: torch.Tensor) -> torch.Tensor:
    """compressed-tensors divides by its global scales where this project multiplies; fp32 [1]."""
    return (1.0 / scale.float()).reshape(1)


def _config_section(manifest: Manifest, layouts: list[str], kv: str) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": layouts[0] if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": plain_linears(manifest),
        "kv_cache_scheme": FP8_PER_TENSOR if kv == "fp8" else None,
        "config_groups": {
            f"group_{index}": {
                "targets": targets,
                "format": FORMATS[linear.format, linear.activation],
                **_scheme(linear),
            }
            for index, (targets, linear) in enumerate(_groups(manifest))
        },
    }


def _groups(manifest: Manifest) -> list[tuple[list[str], LinearEntry]]:
    """One config group per format and group size: class `Linear` where there is only one, else a pattern for each kind
    of linear that is wholly in the group, and the names of the others.

    Kinds are names without the layer's number, such as `model.layers.N.mlp.down_proj`.
    """
    by_scheme: dict[tuple[str, str, int], list[str]] = {}
    kinds: dict[str, list[str]] = {}
    for name, linear in manifest.layer_linears.items():
        by_scheme.setdefault((linear.format, linear.activation, linear.group_size), []).append(name)
    if len(by_scheme) == 1:
        return [(["Linear"], next(iter(manifest.layer_linears.values())))]
    for name in [*plain_linears(manifest), *manifest.layer_linears]:
        kinds.setdefault(_kind(name), []).append(name)
    groups = []
    for scheme in sorted(by_scheme):
        names = set(by_scheme[scheme])
        whole = sorted(kind for kind, members in kinds.items() if names.issuperset(members))
        rest = sorted(name for name in names if _kind(name) not in whole)
        groups.append((["re:" + _pattern(kind) for kind in whole] + rest, manifest.layer_linears[by_scheme[scheme][0]]))
    return groups


def _kind(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", name)


def _pattern(kind: str) -> str:
    return "^" + re.escape(kind).replace(r"\.N\.", r"\.\d+\.") + "$"


def _scheme(linear: LinearEntry) -> dict[str, Any]:
    if linear.format == "int4":
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": linear.group_size,
            "dynamic": False,
        }
        inputs = FP8_PER_TENSOR if linear.activation == "fp8" else None
        return {"weights": weights, "input_activations": inputs, "output_activations": None}
    if linear.format in ("fp8", "int8"):
        weights, static = (FP8_PER_TENSOR,) * 2 if linear.format == "fp8" else (INT8_PER_ROW, INT8_PER_TENSOR)
        inputs = static if linear.activation != "none" else None
        return {"weights": weights, "input_activations": inputs, "output_activations": None}
    block = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group",
        "group_size": linear.group_size,
        "dynamic": False,
        "scale_dtype": "torch.float8_e4m3fn",
        "zp_dtype": "torch.float8_e4m3fn",
    }
    inputs = {**block, "dynamic": "local"} if linear.activation == "nvfp4" else None
    return {"weights": block, "input_activations": inputs, "output_activations": None}


def _notes(weight: str, activation: str) -> list[str]:
    """How transformers 5.23 with compressed-tensors 0.20 must load it: scales are cast to the model's data type."""
    if (weight, activation) == ("int4", "fp8"):
        return [
            "load as float32: scales are cast to the model's data type, and only that one holds all of them",
            "vLLM runs int4 weights under fp8 inputs with scales per token only, and not from these static ones",
        ]
    if weight in ("int4", "int8"):
        return [
            "load as float16 (config.json says so) or float32: bfloat16 would round the fp16 scales",
            "unquantised tensors are as the artifact stores them; float16 rounds those of their values below 6e-5",
        ]
    if weight == "fp8":
        return ["transformers casts the fp32 scales to the model's data type: only dtype=float32 is exact"]
    return ["transformers runs nvfp4 with dtype=bfloat16 only; global scales are stored as fp32 reciprocals"]
