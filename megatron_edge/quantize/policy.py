"""From a quantisation recipe and a model's sizes to an ordered QuantPlan. Pure: no model, no tensors.

Patterns are fnmatch patterns over Megatron module names with the layer's index in the whole model; a later rule
overrides an earlier one.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

from megatron_edge.artifact.formats import effective_group_size
from megatron_edge.artifact.tables import tables_of
from megatron_edge.contracts import InputError, QuantPlan, QuantRule
from megatron_edge.families import dims_of, rules_of


def in_features(hf_config: Mapping[str, Any]) -> dict[str, int]:
    """Input size of each kind of linear layer, by a pattern of its Megatron modules."""
    dims = dims_of(hf_config)
    return {
        rule.module.replace("decoder.layers.{layer}", "*").replace("{expert}", "*"): dims.size(rule.shape[1])
        for rule in rules_of(hf_config)
        if rule.is_linear
    }


def make_plan(quant: Any, kv: Any, hf_config: Mapping[str, Any]) -> QuantPlan:
    """`quant` is a QuantConfig, `kv` a KvConfig (config.py).

    Raises:
        InputError: a weight format whose group divides no linear layer's input, or a table that cannot be so.
    """
    rules: list[QuantRule] = []
    if quant.weight != "none":
        for pattern, size in in_features(hf_config).items():
            group = _group_size(quant.weight, size, quant.group_size)
            rules.append(QuantRule(pattern, quant.weight, quant.activation, group))
    for table in tables_of(quant, hf_config):
        if table.format != "bf16":
            rules.append(QuantRule(table.module, table.format, "none", table.group_size))
    return QuantPlan(
        weight=quant.weight,
        activation=quant.activation,
        kv=kv.format,
        group_size=quant.group_size,
        algorithm=quant.algorithm,
        rules=tuple(rules),
        excluded=tuple(quant.exclude),
        embedding=quant.embedding,
        head=quant.head,
        smoothquant_alpha=quant.smoothquant_alpha,
        calibration=quant.calibration,
        percentile=quant.percentile,
    )


def _group_size(weight_format: str, size: int, configured: int) -> int:
    if weight_format == "int4":
        return effective_group_size(size, configured)
    if weight_format == "nvfp4":
        if size % 16:
            raise InputError(f"quant.weight: nvfp4 needs input sizes that are multiples of 16; the model has {size}")
        return 16
    return 0


def rule_for(name: str, plan: QuantPlan) -> QuantRule | None:
    """The rule that holds for the module `name` (layer index of the whole model); None: left alone."""
    if any(fnmatch(name, pattern) for pattern in plan.excluded):
        return None
    found = None
    for rule in plan.rules:
        if fnmatch(name, rule.pattern):
            found = rule
    return found


def group_of_tensor(plan: QuantPlan, module_name: str) -> tuple[str, int] | None:
    """(weight format, group size) of a linear layer, None where it is not quantised."""
    rule = rule_for(module_name, plan)
    return None if rule is None or rule.weight == "none" else (rule.weight, rule.group_size)
