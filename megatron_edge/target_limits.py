"""What each export target cannot carry, by the names of the configuration.

In: the formats of a recipe; out: what a target lacks. Called by config.py to choose the default targets and by
target_checks.py to refuse before anything is spent. The conversions of export/targets refuse the same of an artifact.
"""

from __future__ import annotations

from collections.abc import Collection

STATIC_KV = ("fp8", "nvfp4")  # KV formats with calibrated scales, which an artifact stores

# Targets that hold int4 codes and nothing else that is quantised.
INT4_ALONE = ("gptq", "onnx")
# (weight, activation) that a target has no form for, though it has one for the weight under other inputs.
NO_FORM = {
    "modelopt": (("int4", "fp8"), ("fp8", "none")),
    "gptq": (("int4", "fp8"),),
    "onnx": (("int4", "fp8"),),
}
# Targets whose every decoder linear must be quantised.
NO_PLAIN_LINEARS = ("onnx",)

CODES_A_WORD = 8  # int4 codes in a word of gptq
# Families of ours whose packed weights onnxruntime-genai 0.18's builder takes.
ONNX_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

# TensorRT Edge-LLM, documented and not checked by itself: int4 groups, and what divides both sides of an int4 weight.
EDGE_LLM_RUNTIME, EDGE_LLM_GROUP = "tensorrt-edge-llm", 128


def lacking(
    target: str, recipes: Collection[tuple[str, str]], kv: str, tables: Collection[str], excludes: bool = False
) -> list[str]:
    """Leaves of the configuration, with their values, that `target` cannot carry beyond its weight formats.

    `recipes` are the (weight, activation) pairs of the base recipe and its overrides, `tables` the formats of the
    embedding and the output layer; `excludes`: some linears stay unquantised.
    """
    pairs = [pair for pair in NO_FORM.get(target, ()) if pair in recipes]
    found = [f"quant.weight={weight} with quant.activation={activation}" for weight, activation in pairs]
    if target in INT4_ALONE:
        found += [f"quant.embedding or quant.head={table}" for table in sorted(set(tables) - {"bf16"})]
        found += [f"kv.format={kv}"] if kv in STATIC_KV else []
    if target == "gguf":  # llama.cpp quantises inputs itself, and has q8_0 caches, which need no scales
        found += [f"quant.activation={one}" for one in sorted({activation for _, activation in recipes} - {"none"})]
        found += ["quant.embedding or quant.head=fp8"] if "fp8" in tables else []
        found += [f"kv.format={kv}"] if kv in STATIC_KV else []
    if target in NO_PLAIN_LINEARS and (excludes or ("none", "none") in recipes):
        found.append("linear layers left unquantised (quant.exclude, quant.overrides)")
    return found
