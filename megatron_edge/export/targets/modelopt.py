"""Target `modelopt`: NVIDIA ModelOpt's unified Hugging Face layout, read by TensorRT-LLM, TensorRT Edge-LLM and vLLM.

In: the canonical artifact (fp8, int4 alone, nvfp4 with or without activations, or layers of each); out: a directory
with packed weights, `config.json` (`quantization_config`, `quant_method: modelopt`) and `hf_quant_config.json`, which
Edge-LLM reads first. int4 is what ModelOpt calls W4A16_AWQ, without a `pre_quant_scale`: AWQ is folded long before.
Layout: nvidia-modelopt 0.47, modelopt/torch/export/{unified_export_megatron,convert_hf_config,quant_utils}.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_edge.artifact.formats import unpack_nibbles
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

LAYOUT_VERSION = "0.47.0"
ALGORITHMS = {
    ("fp8", "fp8"): "FP8",
    ("int4", "none"): "W4A16_AWQ",
    ("nvfp4", "nvfp4"): "NVFP4",
    ("nvfp4", "none"): "W4A16_NVFP4",
}
KV_ALGORITHMS = {"fp8": "FP8", "nvfp4": "NVFP4"}
NVFP4_BLOCK = 16


def convert(reader: ArtifactReader, directory: Path, shard_bytes: int = SHARD_BYTES) -> TargetReport:
    """Raises InputError where ModelOpt has no algorithm for a layer's weights and activations."""
    manifest = reader.manifest
    advice = " (use the target compressed_tensors for w4a8 and int8, hf for unquantised weights)"
    found = recipes(manifest, "modelopt", ALGORITHMS, advice)
    groups = {linear.group_size for linear in manifest.layer_linears.values() if linear.format == "int4"}
    algorithm = ALGORITHMS[found[0]] if len(found) == 1 and len(groups) < 2 else "MIXED_PRECISION"
    kv = kv_format(manifest)
    carried, dropped = [f"{describe_linears(manifest)} as {algorithm}"], tables_dropped(manifest)
    if kv in KV_ALGORITHMS:
        carried.append(f"{kv} KV scales as self_attn.k_proj.k_scale and self_attn.v_proj.v_scale")
    elif kv != "none":
        dropped.append(f"the {kv} KV cache (blocks of 32, scaled as they are written): ask the runtime for its own")
    quantization = _quantization(algorithm, kv, manifest)
    config = base_config(reader, plain_dtype(manifest))
    config["quantization_config"] = _config_section(quantization)
    content = TargetContent(
        tensors=_tensors(reader),
        config=config,
        carried=carried,
        dropped=dropped,
        notes=["transformers has no modelopt quantiser: it loads this directory without an error and answers nonsense"],
        sidecars={"hf_quant_config.json": {"producer": _producer(), "quantization": quantization}},
    )
    return write_target(reader, directory, "modelopt", content, shard_bytes)


def _tensors(reader: ArtifactReader) -> Iterator[tuple[str, torch.Tensor | Streamed]]:
    yield from unquantised(reader)
    yield from decoded_tables(reader)
    for name, linear in reader.manifest.layer_linears.items():
        codes, scale = role_tensor(reader, linear, "codes"), role_tensor(reader, linear, "scale")
        yield f"{name}.weight", _by_row_pairs(name, codes) if linear.format == "int4" else codes
        yield f"{name}.weight_scale", scale.float() if linear.format == "int4" else scale
        if linear.format == "nvfp4":
            yield f"{name}.weight_scale_2", role_tensor(reader, linear, "global_scale")
        if linear.activation != "none":
            yield f"{name}.input_scale", role_tensor(reader, linear, "input_scale")
    for attention, which, scale in kv_scales(reader):
        yield f"{attention}.{which}_proj.{which}_scale", scale


def _by_row_pairs(name: str, codes: torch.Tensor) -> torch.Tensor:
    """uint8 [out, in / 2] of code + 8, two columns a byte -> uint8 [out / 2, in] of two's complement, two rows a byte,
    the first in the low nibble."""
    if codes.shape[0] % 2:
        raise InputError(
            f"export.targets: modelopt packs two rows a byte, and {name} has {codes.shape[0]}; "
            "allowed: compressed_tensors"
        )
    nibbles = unpack_nibbles(codes) ^ 8  # code + 8 and two's complement differ in the sign bit
    return nibbles[0::2] | (nibbles[1::2] << 4)


def _producer() -> dict[str, str]:
    """Readers recognise the layout by this name; the version is the layout's."""
    return {"name": "modelopt", "version": LAYOUT_VERSION}


def _quantization(algorithm: str, kv: str, manifest: Manifest) -> dict[str, Any]:
    """`quantization` of hf_quant_config.json; layers that differ are each listed with their algorithm."""
    section: dict[str, Any] = {"quant_algo": algorithm, "exclude_modules": plain_linears(manifest)}
    if algorithm == "MIXED_PRECISION":
        section["quantized_layers"] = {
            name: _algorithm(ALGORITHMS[linear.format, linear.activation], linear)
            for name, linear in manifest.layer_linears.items()
        }
    else:
        section |= _algorithm(algorithm, next(iter(manifest.layer_linears.values())))
    section["kv_cache_quant_algo"] = KV_ALGORITHMS.get(kv)
    return section


def _algorithm(name: str, linear: LinearEntry) -> dict[str, Any]:
    if name == "W4A16_AWQ":
        return {
            "quant_algo": name,
            "group_size": linear.group_size,
            "has_zero_point": False,
            "pre_quant_scale": False,
        }
    return {"quant_algo": name} | ({"group_size": NVFP4_BLOCK} if "NVFP4" in name else {})


def _group(algorithm: dict[str, Any], targets: list[str]) -> dict[str, Any]:
    """An algorithm in compressed-tensors' vocabulary."""
    form: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
    if "group_size" in algorithm:
        kind = "int" if algorithm["quant_algo"] == "W4A16_AWQ" else "float"
        form = {"dynamic": False, "num_bits": 4, "type": kind, "group_size": algorithm["group_size"]}
    group: dict[str, Any] = {"weights": form, "targets": targets}
    if not algorithm["quant_algo"].startswith("W4A16"):
        group["input_activations"] = form
    return group


def _config_section(quantization: dict[str, Any]) -> dict[str, Any]:
    """`quantization_config` of config.json: the sidecar's facts, layers of one algorithm together."""
    layers = quantization.get("quantized_layers")
    groups = [_group(quantization, ["Linear"])]
    if layers:
        kinds: dict[tuple[str, int | None], list[str]] = {}
        for name, algorithm in layers.items():
            kinds.setdefault((algorithm["quant_algo"], algorithm.get("group_size")), []).append(name)
        groups = [_group(layers[names[0]], sorted(names)) for names in kinds.values()]
    section: dict[str, Any] = {
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups)},
        "ignore": quantization["exclude_modules"],
        "quant_algo": quantization["quant_algo"],
        "producer": _producer(),
        "quant_method": "modelopt",
    }
    if layers:
        section["quantized_layers"] = layers
    if quantization["kv_cache_quant_algo"] == "NVFP4":
        section["kv_cache_scheme"] = "NVFP4"
    elif quantization["kv_cache_quant_algo"] == "FP8":
        section["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return section
