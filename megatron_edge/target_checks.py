"""Refusals of export targets before anything is spent: what one cannot carry of the recipe, or hold of the model.

In: a `RunConfig`, and the model's config.json; out: nothing, or an `InputError` naming the target and what is allowed.
Called by checks.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from megatron_edge.config import TARGETS, RunConfig, lacking, weights_of
from megatron_edge.contracts import InputError
from megatron_edge.families import all_rules, dims_of, rules_of
from megatron_edge.leaves import expected
from megatron_edge.target_limits import CODES_A_WORD, ONNX_ARCHITECTURES


def check_targets(config: RunConfig) -> None:
    """Each must carry the recipe: weights, activations, KV scales, tables; and what builds it must be there."""
    quant, targets, weights = config.quant, config.export.targets, weights_of(config.quant) or {"none"}
    able = [t for t, known in TARGETS.items() if weights <= set(known) and not lacking(t, quant, config.kv.format)]
    for target in targets:
        missing = [f"quant.weight={'/'.join(sorted(strange))}"] if (strange := weights - set(TARGETS[target])) else []
        missing += lacking(target, quant, config.kv.format)
        if missing:
            words = f"{target} cannot carry {', '.join(missing)}; allowed: {', '.join(able)}"
            raise InputError(f"export.targets={targets}: {words}")
    if len(set(targets)) != len(targets):
        raise expected("export.targets", targets, f"each of {', '.join(TARGETS)} at most once")
    if "onnx" in targets and importlib.util.find_spec("onnxruntime_genai") is None:
        raise InputError(
            f"export.targets={targets}: onnx is built by onnxruntime-genai, which is not installed "
            "(pip install 'megatron-edge[onnx]'); allowed without it: the others"
        )


def check_model(config: RunConfig, hf_config: Mapping[str, Any]) -> None:
    """Families that a target's builder knows, and sizes that its words of packed codes divide."""
    targets, dims = config.export.targets, dims_of(hf_config)
    architecture = hf_config["architectures"][0]
    if "onnx" in targets and architecture not in ONNX_ARCHITECTURES:
        raise InputError(
            f"export.targets={targets}: onnxruntime-genai's builder takes no packed {architecture}; allowed for onnx: "
            f"{', '.join(ONNX_ARCHITECTURES)}"
        )
    for linear in all_rules(rules_of(hf_config), dims) if {"gptq", "onnx"} & set(targets) else ():
        names = ("heads", "kv") if linear.merge == "qkv" else linear.shape[:1]
        sizes = [dims.size(name) for name in (*names, linear.shape[1])] if linear.is_linear else []
        if any(size % CODES_A_WORD for size in sizes):
            raise InputError(
                f"export.targets={targets}: gptq and onnx pack {CODES_A_WORD} codes a word, which do not divide the "
                f"sides {sizes} of {linear.targets[0]}; allowed: compressed_tensors, modelopt"
            )
