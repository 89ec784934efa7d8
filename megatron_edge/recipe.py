"""Which format each linear layer has: the base recipe, then quant.overrides in their order, then quant.exclude. Pure.

In: a `QuantConfig` and a model's checked config.json. Out: ordered `QuantRule`s, of which the last that matches a
Megatron module (layer and expert index of the whole model) holds. Checks, byte arithmetic and the quantisation plan all
read these rules, so that training, export and memory agree on every layer. An input size that a group does not divide
has one answer too: `formats.effective_group_size`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from typing import Any

from megatron_edge.artifact.formats import NVFP4_BLOCK, effective_group_size
from megatron_edge.config import QuantConfig
from megatron_edge.contracts import InputError, ParamRule, QuantRule
from megatron_edge.families import ModelDims, all_rules, dims_of, rules_of


def kinds(hf_config: Mapping[str, Any]) -> dict[str, ParamRule]:
    """Each kind of linear layer, by a pattern of its Megatron modules."""
    return {
        rule.module.replace("decoder.layers.{layer}", "*").replace("{expert}", "*"): rule
        for rule in rules_of(hf_config)
        if rule.is_linear
    }


def linear_modules(hf_config: Mapping[str, Any]) -> list[str]:
    """Megatron modules of all linear layers that can be quantised, in the order of the forward pass."""
    return [rule.module for rule in all_rules(rules_of(hf_config), dims_of(hf_config)) if rule.is_linear]


def quant_rules(quant: QuantConfig, hf_config: Mapping[str, Any]) -> tuple[QuantRule, ...]:
    """The base recipe as a rule for each kind of linear layer, then each override for each kind that it matches.

    Raises:
        InputError: an override that matches no linear layer, a pattern for some experts of a layer alone, or a format
            whose group divides no layer's input.
    """
    dims, modules, rules = dims_of(hf_config), linear_modules(hf_config), []
    patterns = [(f"quant.exclude[{i}]", pattern) for i, pattern in enumerate(quant.exclude)]
    patterns += [(f"quant.overrides[{i}].pattern", one.pattern) for i, one in enumerate(quant.overrides)]
    for field, pattern in patterns:
        _refuse_some_experts(field, pattern, modules)
    if quant.weight != "none":
        for kind, linear in kinds(hf_config).items():
            group = _group(quant.weight, linear, dims, quant.group_size)
            rules.append(QuantRule(kind, quant.weight, quant.activation, group))
    for index, one in enumerate(quant.overrides):
        matched = [name for name in modules if fnmatch(name, one.pattern)]
        if not matched:
            near = ", ".join(modules[:4])
            raise InputError(
                f"quant.overrides[{index}].pattern={one.pattern!r}: matches no linear layer of the model; "
                f"allowed are patterns over names such as {near}"
            )
        for kind, linear in kinds(hf_config).items():
            if any(fnmatch(name, kind) for name in matched):
                group = _group(one.weight, linear, dims, one.group_size)
                rules.append(QuantRule(one.pattern, one.weight, one.activation, group, linear=kind))
    return tuple(rules)


def _refuse_some_experts(field: str, pattern: str, modules: list[str]) -> None:
    """Experts of a layer share the scale of their input, and lie on different ranks."""
    matched: dict[str, set[bool]] = {}
    for name in modules:
        together = re.sub(r"(?<=\.local_experts\.)\d+", "*", name)
        matched.setdefault(together, set()).add(fnmatch(name, pattern))
    for together, found in matched.items():
        if len(found) > 1:
            raise InputError(
                f"{field}={pattern!r}: matches some experts of a layer and not others; allowed: "
                f"all or none of {together}"
            )


def rule_matches(rule: QuantRule, name: str) -> bool:
    return fnmatch(name, rule.pattern) and fnmatch(name, rule.linear)


def rule_of(name: str, rules: Iterable[QuantRule], excluded: Iterable[str]) -> QuantRule | None:
    """The rule that holds for the module `name`; None: left alone."""
    if any(fnmatch(name, pattern) for pattern in excluded):
        return None
    found = None
    for rule in rules:
        if rule_matches(rule, name):
            found = rule
    return None if found is None or found.weight == "none" else found


def _group(weight: str, linear: ParamRule, dims: ModelDims, configured: int) -> int:
    size = dims.size(linear.shape[1])
    if weight == "int4":
        return effective_group_size(size, configured)
    if weight == "nvfp4" and size % NVFP4_BLOCK:
        name = " and ".join(target.split(".")[-2] for target in linear.targets)
        raise InputError(
            f"quant.group_size={NVFP4_BLOCK}: does not divide the {size} inputs of {name}, which nvfp4 needs; allowed: "
            "a model whose sizes are multiples of it, or quant=fp8"
        )
    return NVFP4_BLOCK if weight == "nvfp4" else 0
