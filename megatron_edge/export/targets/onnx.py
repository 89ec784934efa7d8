"""Target `onnx`: an ONNX model for onnxruntime-genai on a CPU, made by its own builder from the target gptq.

In: the canonical artifact, int4 weights alone; out: a directory with model.onnx, model.onnx.data, genai_config.json and
the tokenizer. The builder (onnxruntime-genai 0.18, `python -m onnxruntime_genai.models.builder`) runs in a process of
its own. Left to itself it would quantise the output layer to int4 and every linear's inputs to int8: both are switched
off, so that the model computes what was trained. verify/onnxruntime.py reads its codes and scales back.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_edge.artifact.store import ArtifactReader
from megatron_edge.contracts import InputError
from megatron_edge.export.targets import gptq
from megatron_edge.export.targets.folder import (
    SHARD_BYTES,
    TargetContent,
    TargetReport,
    describe_linears,
    finish_target,
    kv_format,
    plain_linears,
    write_files,
)
from megatron_edge.target_limits import ONNX_ARCHITECTURES

PRECISION, PROVIDER = "int4", "cpu"
# accuracy_level 1: inputs stay fp32 (the builder's default for CPUs, 4, rounds them to int8 in blocks).
# A tied table is stored once; asking for that makes the builder quantise it, unless it is excluded.
OPTIONS = ("accuracy_level=1", "hf_token=false", "hf_remote=false")
PLAIN_NODES = "nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather"


def convert(reader: ArtifactReader, directory: Path, shard_bytes: int = SHARD_BYTES) -> TargetReport:
    """Raises InputError where the target gptq does, or the builder is not installed, does not know the model, or fails
    (its last words)."""
    manifest = reader.manifest
    gptq.refuse_what_is_not_int4(manifest, "onnx")
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise InputError(
            "export.targets: onnx is built by onnxruntime-genai, which is not installed; allowed: "
            "pip install 'megatron-edge[onnx]', or other targets"
        )
    if plain := [name for name in plain_linears(manifest) if ".layers." in name]:
        raise InputError(
            f"export.targets: onnxruntime-genai's builder takes no unquantised linear layers beside packed ones: "
            f"{', '.join(plain[:4])}{', ...' if len(plain) > 4 else ''}; allowed: gptq, compressed_tensors"
        )
    building = directory.with_name(f".{directory.name}.building")
    packed, cache = (directory.with_name(f".{directory.name}.{part}") for part in ("gptq", "cache"))
    for path in (building, packed, cache):
        shutil.rmtree(path, ignore_errors=True)
    try:
        write_files(reader, packed, gptq.content(reader), shard_bytes)
        _build(packed, building, cache)
        content = TargetContent(
            tensors=(),
            config={},
            carried=[
                f"{describe_linears(manifest)} as MatMulNBits with fp32 inputs",
                "everything else as float32 values, embedding and output layer too",
            ],
            dropped=_dropped(reader),
            notes=["one directory for onnxruntime-genai on CPUs; the KV cache is float32"],
        )
        return finish_target(building, directory, "onnx", content.carried, content.dropped, content.notes)
    finally:
        for path in (building, packed, cache):
            shutil.rmtree(path, ignore_errors=True)


def _dropped(reader: ArtifactReader) -> list[str]:
    kv = kv_format(reader.manifest)
    return [] if kv == "none" else [f"the {kv} KV cache: onnxruntime-genai keeps keys and values in float32 here"]


def _build(packed: Path, building: Path, cache: Path) -> None:
    tied = json.loads((packed / "config.json").read_text()).get("tie_word_embeddings", False)
    options = [*OPTIONS, PLAIN_NODES, *(["shared_embeddings=true"] if tied else [])]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(packed), "-o", str(building)]
    command += ["-p", PRECISION, "-e", PROVIDER, "-c", str(cache), "--extra_options", *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not (building / "genai_config.json").is_file():
        said = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
        raise InputError(
            f"export.targets: onnxruntime-genai's builder ended with {done.returncode}: {' | '.join(said[-3:])}; "
            f"allowed: models of {', '.join(ONNX_ARCHITECTURES)}"
        )
