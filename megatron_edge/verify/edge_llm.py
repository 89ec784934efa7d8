"""TensorRT Edge-LLM's own export reads the target modelopt: what it parsed, compared with the artifact. Never what ran.

In: the artifact's reader, the target's directory, the export's program in an environment of its own (make runtimes);
out: checks. Called by tools/edge_llm.py. Engines need NVIDIA's GPUs; its ONNX shows that the layout was understood:
which kernels each linear gets, under which scales, and the scales of the KV cache.

Edge-LLM 0.11 exports some checkpoints that it cannot run, or reads them as something else; those are refused here:
int4 in other groups than 128 or with sides that 128 does not divide; an nvfp4 KV cache, whose scales it would take for
FP8's; weight-only nvfp4, which it exports as W4A4, and with --no-quantize-activations still so for q, k and v.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_edge.artifact.store import ArtifactReader
from megatron_edge.contracts import Check, InputError, LinearEntry, Manifest
from megatron_edge.target_limits import EDGE_LLM_GROUP
from megatron_edge.verify.parity import failures

LABEL = "TensorRT Edge-LLM"
WEIGHT_ONLY = "--no-quantize-activations"
QKV = ("q_proj", "k_proj", "v_proj")


@dataclass
class Graph:
    """What the exported ONNX file holds: its nodes, and its stored tensors as bytes."""

    nodes: list[Any]
    stored: dict[str, Any]
    directory: Path
    attention: list[dict[str, Any]] = field(default_factory=list)

    def bytes_of(self, name: str) -> bytes | None:
        from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

        tensor = self.stored.get(name)
        if tensor is None:
            return None
        if uses_external_data(tensor):
            load_external_data_for_tensor(tensor, str(self.directory))
        return bytes(tensor.raw_data)


def limits_broken(manifest: Manifest) -> list[str]:
    """Where an artifact is outside of what Edge-LLM documents, by name."""
    found = []
    for name, linear in manifest.layer_linears.items():
        if linear.format == "int4":
            if linear.group_size != EDGE_LLM_GROUP:
                found.append(f"{name}: int4 in groups of {linear.group_size}, not {EDGE_LLM_GROUP}")
            elif any(size % EDGE_LLM_GROUP for size in linear.shape):
                found.append(f"{name}: {linear.shape[0]} x {linear.shape[1]}, no multiples of {EDGE_LLM_GROUP}")
    if manifest.kv.get("format") == "nvfp4":
        found.append("KV cache: its nvfp4 scales would be taken for those of an FP8 cache")
    found += [
        f"{name}: nvfp4 weights alone; it would quantise the inputs too"
        for name, linear in manifest.layer_linears.items()
        if (linear.format, linear.activation) == ("nvfp4", "none")
    ]
    return found


def _formats(manifest: Manifest) -> set[str]:
    return {linear.format for linear in manifest.layer_linears.values()}


def parse(
    reader: ArtifactReader, directory: Path, program: Path, output: Path, beyond_limits: bool = False
) -> list[Check]:
    """Export target `directory` into `output` and compare; `beyond_limits` leaves the documented limits out.

    Raises:
        InputError: the artifact is outside of the documented limits, has no chat template, or `program` is not there.
        RuntimeError: the export failed (its last words).
    """
    manifest = reader.manifest
    broken = [] if beyond_limits else limits_broken(manifest)
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise InputError(f"{LABEL} does not run this artifact: {broken[0]}{more}")
    _check_chat_template(directory)
    if not program.is_file():
        raise InputError(f"{program} is not there; allowed: `make runtimes`, which sets its environment up")
    weight_only = {linear.activation for linear in manifest.layer_linears.values()} == {"none"}
    command = [str(program), str(directory), str(output), *([WEIGHT_ONLY] if weight_only else [])]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    written = output / "llm" / "model.onnx"
    if done.returncode or not written.is_file():
        said = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
        raise RuntimeError(f"{LABEL}'s export ended with {done.returncode}: {' | '.join(said[-3:])}")
    graph = _read(written)
    config = json.loads((output / "llm" / "config.json").read_text())
    version = config["edgellm_version"]
    kinds, detail = ", ".join(sorted(_formats(manifest))), f"tensorrt-edgellm {version}"
    if "fp8" in kinds.split(", "):
        detail += f"; it rounds fp8 scales to fp16, by {fp8_scale_rounding(reader):.2g} of their value at most"
    parsed = Check(LABEL, "parsed (never ran)", kinds, "parsed", True, detail)
    return [parsed, _check_linears(reader, graph), _check_cache(reader, graph, config)]


def _check_chat_template(directory: Path) -> None:
    tokenizer = directory / "tokenizer_config.json"
    known = json.loads(tokenizer.read_text()).get("chat_template") if tokenizer.is_file() else None
    if not known and not (directory / "chat_template.jinja").is_file():
        raise InputError(f"{directory}: {LABEL}'s export wants a chat template in the tokenizer, and there is none")


def _read(path: Path) -> Graph:
    import onnx

    model = onnx.load(path, load_external_data=False)
    graph = Graph(list(model.graph.node), {tensor.name: tensor for tensor in model.graph.initializer}, path.parent)
    for node in graph.nodes:
        if node.op_type == "AttentionPlugin":
            graph.attention.append({item.name: onnx.helper.get_attribute_value(item) for item in node.attribute})
    return graph


def _check_linears(reader: ArtifactReader, graph: Graph) -> Check:
    """Codes and scales as the export stores them; int4's codes are shuffled for its kernel and only counted."""
    problems: list[str] = []
    for name, linear in reader.manifest.layer_linears.items():
        problems += (_int4_problems if linear.format == "int4" else _plain_problems)(reader, graph, name, linear)
    wanted = sum(linear.activation == "nvfp4" for linear in reader.manifest.layer_linears.values())
    found = sum(node.op_type == "TRT_FP4DynamicQuantize" for node in graph.nodes)
    if bool(wanted) != bool(found):
        problems.append(f"{found} nodes quantise inputs to nvfp4, for {wanted} linears with such inputs")
    return failures(LABEL, "linears parsed otherwise (codes, scales, kernels)", problems)


def _int4_problems(reader: ArtifactReader, graph: Graph, name: str, linear: LinearEntry) -> Iterator[str]:
    out_features, in_features = linear.shape
    scale_name = f"_model.{name}.weight_scale"
    nodes = [node for node in graph.nodes if node.op_type.startswith("Int4Groupwise") and scale_name in node.input]
    facts = {item.name: item.i for node in nodes for item in node.attribute}
    expected = {"gemm_n": out_features, "gemm_k": in_features, "group_size": linear.group_size}
    if len(nodes) != 1 or {key: facts.get(key) for key in expected} != expected:
        yield f"{name}: {len(nodes)} int4 kernels {facts}, not one of {expected}"
    scale = reader.tensor(linear.tensors["scale"])
    if graph.bytes_of(scale_name) != _bytes(scale.T):
        yield f"{name}: scales"


def _plain_problems(reader: ArtifactReader, graph: Graph, name: str, linear: LinearEntry) -> Iterator[str]:
    """fp8 and nvfp4: the artifact's bytes, of q, k and v one under another where the export fuses them."""
    stem, _, leaf = name.rpartition(".")
    for part, role in (("weight", "codes"), ("weight_scale", "scale")):
        if part == "weight_scale" and linear.format == "fp8":
            names = [node.input[1] for node in graph.nodes if [f"_model.{name}.weight"] == node.input[:1]]
            ours = _bytes(reader.tensor(linear.tensors[role]).half())
            if [graph.bytes_of(other) for other in names] != [ours]:
                yield f"{name}: {part}"
            continue
        ours = _bytes(reader.tensor(linear.tensors[role]))
        stored = graph.bytes_of(f"_model.{name}.{part}")
        if stored is None and leaf in QKV:
            whole = graph.bytes_of(f"_model.{stem}.qkv_proj_fused.{part}") or b""
            before = QKV[: QKV.index(leaf)]
            linears = (reader.manifest.linears[f"{stem}.{other}"] for other in before)
            sizes = [len(_bytes(reader.tensor(other.tensors[role]))) for other in linears]
            stored = whole[sum(sizes) : sum(sizes) + len(ours)]
        if stored != ours:
            yield f"{name}: {part}"


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _check_cache(reader: ArtifactReader, graph: Graph, config: dict[str, Any]) -> Check:
    """k_scale and v_scale of every layer, in fp32, in the order of the layers."""
    fp8 = reader.manifest.kv.get("format") == "fp8"
    problems = [] if config["kv_cache_dtype"] == ("fp8" if fp8 else "fp16") else [f"it is {config['kv_cache_dtype']}"]
    layers = int(config["num_hidden_layers"])
    if len(graph.attention) != layers:
        problems.append(f"{len(graph.attention)} attention nodes for {layers} layers")
    for layer, node in enumerate(graph.attention):
        if bool(node["enable_fp8_kv_cache"]) != fp8:
            problems.append(f"layer {layer}: fp8 is {'off' if fp8 else 'on'}")
        if fp8:
            stem = f"model.layers.{layer}.self_attn"
            ours = [float(reader.tensor(f"{stem}.{which}_scale").float()) for which in ("k", "v")]
            if list(node["qkv_scales"])[1:] != ours:
                problems.append(f"layer {layer}: scales {list(node['qkv_scales'])[1:]}, not {ours}")
    return failures(LABEL, "layers whose KV cache or its scales are parsed otherwise", problems)


def fp8_scale_rounding(reader: ArtifactReader) -> float:
    """The largest relative change of an fp8 scale of weights or inputs, which Edge-LLM keeps in fp16."""
    largest = 0.0
    for linear in reader.manifest.layer_linears.values():
        for role in ("scale", "input_scale") if linear.format == "fp8" else ():
            scale = reader.tensor(linear.tensors[role]).float()
            largest = max(largest, float((scale.half().float() / scale - 1).abs()))
    return largest
