"""What an export must write, made the plain way: torch's own reader, whole tensors in memory, names written down here
apart from the product's name table, and safetensors' own writer."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_edge.artifact import formats
from megatron_edge.artifact.store import ArtifactReader
from megatron_edge.model.source import open_source
from megatron_edge.quantize.policy import make_plan, rule_for
from tools.layout_state import read_checkpoint


def check_artifact(artifact: Path, checkpoint: Path, config: Any) -> None:
    """The artifact's one shard is, byte for byte, what `checkpoint` and the recipe of `config` stand for."""
    (shard,) = artifact.glob("*.safetensors")
    with tempfile.TemporaryDirectory() as scratch:
        save_file(whole_tensors(checkpoint, config), Path(scratch) / "whole", metadata={"format": "pt"})
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (shard, Path(scratch) / "whole")]
    assert digests[0] == digests[1], (artifact, checkpoint)
    assert ArtifactReader(artifact).check() == []


def hugging_face_tensors(stored: dict[str, torch.Tensor], hf_config: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(Hugging Face name, Megatron module, weight and a function that cuts row maxima as it) in the order of export;
    written down here apart from the product's name table."""
    heads, kv = hf_config["num_attention_heads"], hf_config["num_key_value_heads"]
    size = hf_config["hidden_size"] // heads
    queries = heads // kv * size

    def cut(which: str) -> Any:
        first, last = {"q": (0, queries), "k": (queries, queries + size), "v": (queries + size, queries + 2 * size)}[
            which
        ]
        return lambda x: x.reshape(kv, queries + 2 * size, -1)[:, first:last].reshape(kv * (last - first), -1)

    def same(x: torch.Tensor) -> torch.Tensor:
        return x

    yield "model.embed_tokens", "embedding.word_embeddings", ("embedding.word_embeddings.weight", same)
    for i in range(hf_config["num_hidden_layers"]):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        yield theirs + "input_layernorm", "", (ours + "self_attention.linear_qkv.layer_norm_weight", same)
        for which in "qkv":
            key = ours + "self_attention.linear_qkv"
            yield theirs + f"self_attn.{which}_proj", key, (key + ".weight", cut(which))
        key = ours + "self_attention.linear_proj"
        yield theirs + "self_attn.o_proj", key, (key + ".weight", same)
        yield theirs + "post_attention_layernorm", "", (ours + "mlp.linear_fc1.layer_norm_weight", same)
        experts = hf_config.get("num_local_experts", 0)
        if experts:
            yield theirs + "block_sparse_moe.gate", "", (ours + "mlp.router.weight", same)
        for expert in range(experts or 1):
            place = ours + (f"mlp.experts.experts.{expert}." if experts else "mlp.")
            module = place.replace(".experts.experts.", ".experts.local_experts.")
            names = ("w1", "w3", "w2") if experts else ("gate_proj", "up_proj", "down_proj")
            prefix = theirs + (f"block_sparse_moe.experts.{expert}." if experts else "mlp.")
            for name, half in zip(names, ("_w", "_v"), strict=False):
                yield prefix + name, module + "linear_fc1", (place + f"linear_fc1.weight{half}", same)
            yield prefix + names[2], module + "linear_fc2", (place + "linear_fc2.weight", same)
    yield "model.norm", "", ("decoder.final_layernorm.weight", same)
    if "output_layer.weight" in stored:
        yield "lm_head", "output_layer", ("output_layer.weight", same)


def whole_tensors(checkpoint: Path, config: Any) -> dict[str, torch.Tensor]:
    """The artifact's tensors, from whole ones that torch's own reader gives."""
    hf_config = open_source(Path(config.model.source)).hf_config
    plan, out = make_plan(config.quant, config.kv, hf_config), {}
    stored = read_checkpoint(checkpoint)
    for name, module, (key, cut) in hugging_face_tensors(stored, hf_config):
        weight, chosen = stored[key], rule_for(module, plan) if module else None
        weight = cut(weight).reshape(-1, weight.shape[1]) if weight.dim() > 1 else weight
        if chosen is None or chosen.weight == "none":
            out[f"{name}.weight"] = weight.to(torch.bfloat16)
            continue
        amax = f"quantizer.{module}.weight_quantizer.amax"
        if amax not in stored:
            amax += ".gate" if key.endswith("_w") else ".up"
        maxima = cut(stored[amax]) if stored[amax].numel() > 1 else stored[amax].reshape(())
        encoded = formats.encode(chosen.weight, weight, maxima, chosen.group_size)
        out |= {f"{name}.weight_codes": encoded.codes, f"{name}.weight_scale": encoded.scale}
        if encoded.global_scale is not None:
            out[f"{name}.weight_global_scale"] = encoded.global_scale
        if chosen.activation != "none":
            amax = stored[f"quantizer.{module}.input_quantizer.amax"].reshape(())
            out[f"{name}.input_scale"] = formats.tensor_scale(chosen.activation, amax)
    for layer, which in itertools.product(range(hf_config["num_hidden_layers"]), "kv"):
        if plan.kv != "none":
            key = f"quantizer.decoder.layers.{layer}.self_attention.core_attention.{which}_bmm_quantizer.amax"
            out[f"model.layers.{layer}.self_attn.{which}_scale"] = formats.tensor_scale(
                plan.kv, stored[key].reshape(())
            )
    return out
