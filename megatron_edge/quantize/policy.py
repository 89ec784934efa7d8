"""From a quantisation recipe and a model's sizes to an ordered QuantPlan. Pure: no model, no tensors.

Patterns are fnmatch patterns over Megatron module names with the layer's index in the whole model; a later rule
overrides an earlier one (recipe.py makes them).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_edge.artifact.tables import tables_of
from megatron_edge.contracts import QuantPlan, QuantRule
from megatron_edge.recipe import quant_rules, rule_of


def make_plan(quant: Any, kv: Any, hf_config: Mapping[str, Any]) -> QuantPlan:
    """`quant` is a QuantConfig, `kv` a KvConfig (config.py).

    Raises:
        InputError: an override that matches no layer, a weight format whose group divides no layer's input, or a table
            that cannot be so.
    """
    tables = [table for table in tables_of(quant, hf_config) if table.format != "bf16"]
    of_tables = (QuantRule(table.module, table.format, "none", table.group_size) for table in tables)
    return QuantPlan(
        weight=quant.weight,
        activation=quant.activation,
        kv=kv.format,
        group_size=quant.group_size,
        algorithm=quant.algorithm,
        rules=(*quant_rules(quant, hf_config), *of_tables),
        excluded=tuple(quant.exclude),
        embedding=quant.embedding,
        head=quant.head,
        smoothquant_alpha=quant.smoothquant_alpha,
        calibration=quant.calibration,
        percentile=quant.percentile,
    )


def rule_for(name: str, plan: QuantPlan) -> QuantRule | None:
    """The rule that holds for the module `name` (layer index of the whole model); None: left alone."""
    return rule_of(name, plan.rules, plan.excluded)


def group_of_tensor(plan: QuantPlan, module_name: str) -> tuple[str, int] | None:
    """(weight format, group size) of a linear layer, None where it is not quantised."""
    rule = rule_for(module_name, plan)
    return None if rule is None else (rule.weight, rule.group_size)
