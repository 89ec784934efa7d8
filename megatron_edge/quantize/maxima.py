"""Maxima of quantizers, equal on all ranks that share what they are of.

In: the enabled quantizers of a shard by their name in the whole model, each with what modelopt collected (or did not:
an expert that saw no token). Out: fp32 maxima, not snapped. Called by apply.calibrate on all ranks.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_edge.artifact import formats
from megatron_edge.runtime.session import compute_device, data_group, expert_groups, tensor_group

ROW_PARALLEL = ("linear_proj", "linear_fc2")


def wants_data(quantizer: Any) -> bool:
    """Whether its maximum comes from data: inputs, and the KV cache but for int8, which is scaled as it is written."""
    args = quantizer.backend_extra_args
    return args["role"] == "input" or (args["role"] == "kv" and args["format"] in formats.STATIC_KV_FORMATS)


def is_row_parallel(name: str) -> bool:
    """Whether tensor parallelism cuts the columns of the weight behind a quantizer's name, and not its rows."""
    return name.split(".")[-2] in ROW_PARALLEL


def groups_of(name: str, role: str) -> tuple[str, list[Any]]:
    """What a quantizer's single maximum is shared by: (a name that all quantizers with the same maximum have, process
    groups over which it is reduced). Inputs of all experts of a layer share one."""
    expert_tensor, expert_model, expert_data = expert_groups()
    if ".local_experts." not in name:
        return name, [tensor_group(), data_group()]
    if role == "input":
        shared = re.sub(r"(?<=\.local_experts\.)\d+", "*", name)
        return shared, [expert_tensor, expert_model, expert_data]
    return name, [expert_tensor, expert_data]


def ranks_with_other_columns(name: str) -> list[Any]:
    """Process groups that hold the other columns of a weight's rows."""
    if not is_row_parallel(name):
        return []
    return [expert_groups()[0] if ".local_experts." in name else tensor_group()]


def shared(quantizers: dict[str, Any]) -> dict[str, Tensor]:
    """Collected maxima. All ranks call it with the same layers."""
    found: dict[str, Tensor] = {}
    single: dict[str, list[str]] = {}  # what shares a maximum -> names
    rows: list[str] = []
    for name, quantizer in quantizers.items():
        args = quantizer.backend_extra_args
        if args["role"] == "weight" and args["format"] in ("int4", "int8"):
            found[name] = quantizer._amax.detach().float()
            if args["format"] == "int8" and is_row_parallel(name):
                rows.append(name)
        elif args["role"] == "weight" or wants_data(quantizer):
            single.setdefault(groups_of(name, args["role"])[0], []).append(name)
    _reduce_single(quantizers, single, found)
    for is_expert in (False, True):
        _reduce_rows([name for name in rows if (".local_experts." in name) == is_expert], found)
    return found


def _reduce_single(quantizers: dict[str, Any], single: dict[str, list[str]], found: dict[str, Tensor]) -> None:
    """One collective for all maxima with the same process groups."""
    together: dict[tuple[int, ...], list[str]] = {}
    for key, names in single.items():
        groups = groups_of(names[0], quantizers[names[0]].backend_extra_args["role"])[1]
        together.setdefault(tuple(id(group) for group in groups), []).append(key)
    for keys in together.values():
        first = single[keys[0]][0]
        maxima = torch.stack([_largest([quantizers[name] for name in single[key]]) for key in keys])
        for group in groups_of(first, quantizers[first].backend_extra_args["role"])[1]:
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
        for key, value in zip(keys, maxima, strict=True):
            found.update((name, value) for name in single[key])


def _reduce_rows(names: list[str], found: dict[str, Tensor]) -> None:
    """Maxima of the rows of weights whose columns lie on several ranks."""
    if not names:
        return
    sizes = [found[name].numel() for name in names]
    maxima = torch.cat([found[name].reshape(-1) for name in names])
    for group in ranks_with_other_columns(names[0]):
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
    found.update((name, part.reshape(-1, 1)) for name, part in zip(names, maxima.split(sizes), strict=True))


def _largest(quantizers: list[Any]) -> Tensor:
    """fp32 []; 0 where none of them saw anything."""
    seen = [q._amax.detach().float().reshape(()) for q in quantizers if getattr(q, "_amax", None) is not None]
    return torch.stack(seen).max() if seen else torch.zeros((), device=compute_device())
