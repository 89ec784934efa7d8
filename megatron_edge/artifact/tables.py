"""The embedding and the output layer as tables of one row per word: which a model has, in which format they are stored.

In: a quantisation recipe and a model's checked config.json. Out: records, from which the plan of quantisation, the
bytes on the device and the refusals follow. Pure: no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from megatron_edge.artifact.formats import effective_group_size
from megatron_edge.contracts import InputError
from megatron_edge.families import dims_of, rules_of


@dataclass(frozen=True)
class Table:
    """One row of `shape[1]` values for each of `shape[0]` words. `module` is Megatron's, `name` Hugging Face's; int4
    has a scale per `group_size` values (quant.embedding_group_size, halved until it divides a row); int8 one per row,
    fp8 one for all (`group_size` 0)."""

    module: str
    name: str
    shape: tuple[int, int]
    format: str
    group_size: int


def tables_of(quant: Any, hf_config: Mapping[str, Any]) -> tuple[Table, ...]:
    """The embedding in quant.embedding and, where it is not the same table, the output layer in quant.head; bf16 where
    quant.exclude names it.

    Raises:
        InputError: an output layer that is the embedding in another format than it, or an int4 row without a group.
    """
    dims, found = dims_of(hf_config), []
    if dims.tied and quant.head != quant.embedding:
        raise InputError(
            f"quant.head={quant.head}: this model's output layer is its embedding; "
            f"allowed: {quant.embedding} (quant.embedding), or null"
        )
    for rule in rules_of(hf_config):
        if ".layers." in rule.pattern or len(rule.shape) < 2:
            continue
        leaf = "head" if rule.module == "output_layer" else "embedding"
        shape = (dims.size(rule.shape[0]), dims.size(rule.shape[1]))
        excluded = any(fnmatch(rule.module, pattern) for pattern in quant.exclude)
        chosen = "bf16" if excluded else getattr(quant, leaf)
        group = _group_size(leaf, shape[1], quant.embedding_group_size) if chosen == "int4" else 0
        found.append(Table(rule.module, rule.targets[0].removesuffix(".weight"), shape, chosen, group))
    return tuple(found)


def _group_size(leaf: str, size: int, configured: int) -> int:
    try:
        return effective_group_size(size, configured)
    except InputError:
        raise InputError(
            f"quant.{leaf}=int4: neither quant.embedding_group_size={configured} nor a half of it down to 32 divides "
            f"the model's hidden_size={size}; allowed: bf16, int8, fp8"
        ) from None
