"""A canonical artifact of any Hugging Face model with random weights, without Megatron: the same format everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_edge.artifact import formats
from megatron_edge.artifact.store import ArtifactWriter, sha256_of_file
from megatron_edge.contracts import LinearEntry
from megatron_edge.families import dims_of
from megatron_edge.model.hf_config import checked_config
from megatron_edge.model.source import open_source
from tests.unit.tiny_tokenizer import tiny_tokenizer
from tools.random_models import RANDOM_MODELS, make_random_model


def any_artifact(
    directory: Path, model: str, weight: str, table: str = "bf16", group: int = 64, kv: str = "int8"
) -> Path:
    """`directory`/canonical from RANDOM_MODELS[model]: linears in `weight`, embedding and output layer in `table`."""
    source = make_random_model(RANDOM_MODELS[model], directory / "model")
    tiny_tokenizer().save_pretrained(source)
    opened = open_source(source)
    linears: dict[str, LinearEntry] = {}
    with ArtifactWriter(directory / "canonical", 10**9) as writer:
        for name, tensor in sorted(
            {k: v for file in source.glob("*.safetensors") for k, v in load_file(file).items()}.items()
        ):
            name, tensor = name, tensor.to(torch.bfloat16)
            quantised = tensor.dim() == 2 and not name.endswith(("norm.weight", "gate.weight"))
            fmt = (weight if ".layers." in name else table) if quantised else "none"
            if fmt in ("none", "bf16"):
                writer.add(name, tensor, "bf16")
                continue
            linears[name.removesuffix(".weight")] = _encode(writer, name.removesuffix(".weight"), tensor, fmt, group)
        opened.save_tokenizer(writer.side_files)
        opened.save_config(writer.side_files, torch.bfloat16)
        config = checked_config(json.loads((source / "config.json").read_text()), model)
        writer.finish(
            family=config["architectures"][0],
            dims={"num_experts": dims_of(config).num_experts},
            dtype="bfloat16",
            linears=linears,
            quant={"weight": weight},
            kv={"format": kv},
            tokenizer_sha=sha256_of_file(writer.side_files / "tokenizer.json"),
            source={"model": model},
            versions={},
        )
    return directory / "canonical"


def _encode(writer: ArtifactWriter, linear: str, tensor: torch.Tensor, fmt: str, group: int) -> LinearEntry:
    size = {"int4": formats.effective_group_size(tensor.shape[1], group), "nvfp4": 16}.get(fmt, 0)
    amax = formats.snap_amax(fmt, formats.weight_amax(fmt, tensor, size))
    encoded = formats.encode(fmt, tensor, amax, size)
    parts = {"codes": encoded.codes, "scale": encoded.scale, "global_scale": encoded.global_scale}
    names = {role: f"{linear}.weight_{role}" for role, part in parts.items() if part is not None}
    for role, name in names.items():
        writer.add(name, parts[role], fmt if role == "codes" else "scale")
    return LinearEntry(fmt, "none", encoded.group_size, encoded.shape, names)
