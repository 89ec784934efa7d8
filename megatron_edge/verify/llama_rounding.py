"""What llama.cpp's CPU kernels round while they run: the artifact's model in transformers with the same roundings.

The rule (ggml-cpu.c, vec_dot_type, b11549): the input of a product is rounded to the format that the kernel multiplies
by (`INPUTS`): q8_0, blocks of 32 with the scale amax / 127 in fp16 and the codes rint(x * (127 / amax)), which is
formats.py's int8 of a KV cache. Under a q8_0 cache queries are rounded as well as keys and values. Called by
llama_cpp.py and gguf_tensors.py, whose check of every product on llama.cpp's own inputs holds this rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_edge.artifact import formats
from megatron_edge.artifact.store import ArtifactReader
from megatron_edge.verify import experts

# Format of a weight -> what the other factor is rounded to.
INPUTS = {"int4": "q8_0", "int8": "q8_0", "nvfp4": "q8_0", "bf16": "bf16", "fp16": "fp16", "fp32": None}
ATTENTION = "megatron_edge_llama_cpp_cache"


def round_as_llama_cpp(reader: ArtifactReader, model: Any) -> None:
    """Give a plain model the roundings of llama.cpp's CPU kernels: inputs of products, and the cache.

    The router has fp32 weights in the file, and its inputs stay as they are.
    """
    import transformers

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            rounding = rounding_of(_format_of(reader, name))
            module.register_forward_pre_hook(lambda _, args, rounding=rounding: (rounding(args[0]), *args[1:]))
        elif name.endswith(".mlp.experts"):
            weight = experts.stored_name(reader, experts.fused_targets(reader, f"{name}.gate_up_proj")[0][0])
            experts.round_inputs(module, rounding_of(_format_of(reader, weight.removesuffix(".weight"))))
        elif name.endswith(".self_attn"):
            module.cache_format = str(reader.manifest.kv.get("format", "none"))
            module.neighbours = reader.manifest.family in ("LlamaForCausalLM", "MixtralForCausalLM")
    transformers.AttentionInterface.register(ATTENTION, _attention)
    model.config._attn_implementation = ATTENTION


def _format_of(reader: ArtifactReader, linear: str) -> str:
    """Format of a linear layer's weight; a tied output layer has the embedding's."""
    manifest = reader.manifest
    for name in (linear, "model.embed_tokens"):
        if name in manifest.linears:
            return manifest.linears[name].format
        if f"{name}.weight" in manifest.tensors:
            return manifest.tensors[f"{name}.weight"].format
    raise KeyError(linear)


def rounding_of(weight: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """What becomes of the other factor of a product with weights of this format."""
    kind = INPUTS[weight]
    if kind == "q8_0":
        return lambda x: formats.fake_quantize_kv("int8", x)
    if kind is None:
        return lambda x: x
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[kind]
    return lambda x: x.to(dtype).to(x.dtype)


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
) -> tuple[torch.Tensor, Any]:
    """Post-RoPE [b, heads, s, head_dim]; a head's halves lie interleaved in llama.cpp's Llama, and so do its blocks."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if module.cache_format == "int8":
        query, key = (_q8_0(x, module.neighbours) for x in (query, key))
        value = _q8_0(value, neighbours=False)
    else:
        query, key, value = (x.half().to(x.dtype) for x in (query, key, value))
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **options)


def _q8_0(x: torch.Tensor, neighbours: bool) -> torch.Tensor:
    if not neighbours:
        return formats.fake_quantize_kv("int8", x)
    turned = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return formats.fake_quantize_kv("int8", turned).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
