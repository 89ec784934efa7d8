"""AWQ's second step (arXiv 2306.00978, "weight clipping" of its implementation): a smaller maximum for each int4 group.

Of a few parts of a group's maximum, the one with the least error of what the group adds to the layer's output over the
calibration tokens: |(Q(w) - w) . x|^2 summed over tokens is e' H e with H = sum x x' of the group's channels, so all
tokens count and none is kept. A group lies whole on one rank; tokens are summed over the ranks that see others, so that
every layout finds the same. After awq.search_and_fold, before quantizers are inserted. Unlike the paper's code it clips
the query and key rows too: maxima are trained from here on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_edge.artifact import formats
from megatron_edge.contracts import QuantPlan
from megatron_edge.log import track
from megatron_edge.model.build import chunks_of, named_modules
from megatron_edge.quantize.policy import rule_for
from megatron_edge.runtime.session import context_group, expert_groups, tensor_group

# Parts of the maximum, tried in this order; of equal errors the first, which clips less, is taken.
PARTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)


@torch.no_grad()
def clip_weights(model: nn.Module, plan: QuantPlan, forward_loop: Callable[[nn.Module], None]) -> dict[str, Tensor]:
    """Maxima [rows, groups per row] of this shard's int4 weights by their quantizer's name. All ranks call it."""
    linears: dict[str, tuple[nn.Module, int]] = {}
    for name, module in named_modules(model):
        rule = rule_for(name, plan)
        if rule is not None and rule.weight == "int4" and ".layers." in name:  # no table: it has no inputs
            linears[name] = (module, rule.group_size)
    products = _products(model, linears, forward_loop)
    found = {}
    for name in track(linears, "clipping weights", len(linears), dist.get_rank()):
        module, size = linears[name]
        found[f"{name}.weight_quantizer"] = least_error(module.weight.detach(), products[name], size)
    return found


def least_error(weight: Tensor, products: Tensor, group_size: int) -> Tensor:
    """weight [out, in], products fp32 [in / g, g, g] -> the chosen maxima [out, in / g], fp32 and snapped. Where no
    token was seen, those of the weights."""
    amax = formats.weight_amax("int4", weight, group_size)
    best, least = torch.zeros_like(amax), torch.full_like(amax, float("inf"), dtype=torch.float64)
    for part in PARTS:
        candidate = formats.snap_amax("int4", amax * part)
        error = formats.fake_quantize("int4", weight.float(), candidate, group_size) - weight.float()
        error = error.view(weight.shape[0], -1, group_size).transpose(0, 1).double()  # [groups, out, g]
        cost = (torch.bmm(error, products.double()) * error).sum(-1).t()
        better = cost < least
        best, least = candidate.where(better, best), cost.where(better, least)
    return best


def _products(
    model: nn.Module, linears: dict[str, tuple[nn.Module, int]], forward_loop: Callable[[nn.Module], None]
) -> dict[str, Tensor]:
    """Sum over tokens of x x' for each group of channels: fp32 [groups, g, g] of this shard, over all its tokens."""
    found: dict[str, Tensor] = {}

    def hook(name: str, size: int) -> Callable[..., None]:
        def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().float().reshape(-1, module.weight.shape[1] // size, size).transpose(0, 1)
            found[name] += torch.bmm(x.transpose(1, 2), x)  # [groups, g, g]

        return see

    handles = []
    for name, (module, size) in linears.items():
        groups = module.weight.shape[1] // size
        found[name] = torch.zeros(groups, size, size, device=module.weight.device)
        handles.append(module.register_forward_pre_hook(hook(name, size)))
    try:
        forward_loop(model)
    finally:
        for handle in handles:
            handle.remove()
    split = chunks_of(model)[0].config.sequence_parallel
    for name, value in found.items():
        for group in _groups_of_tokens(name, split):
            dist.all_reduce(value, group=group)
    return found


def _groups_of_tokens(name: str, sequence_parallel: bool) -> list[Any]:
    """Ranks that see other tokens at the same channels; replicas of the same tokens are left out."""
    if ".local_experts." in name:
        return [expert_groups()[2]]
    cut = sequence_parallel and name.endswith(("linear_qkv", "linear_fc1"))
    return [context_group(), *([tensor_group()] if cut else [])]
