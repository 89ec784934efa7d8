"""SmoothQuant (arXiv 2211.10438): outliers of activations move into weights, by a scale per input channel.

    s_j = max |x_j| ^ alpha / max |w_j| ^ (1 - alpha)        x_j / s_j, w_j * s_j        (equation 4)

Folded at once, before quantizers are inserted, at the places where that is exact and survives training; they are
awq.py's: norm -> qkv, norm -> fc1 (all experts and the router share it), rows of up_proj -> down_proj. Maxima are taken
over all ranks that hold a part of the data or of the weights, so that every layout finds the same scales.

A factor that all scales of a place share changes no code of int8, but the size of the weights, and with it what a step
of the optimizer does: scales are divided by the root of their largest times their smallest, as AWQ's are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_edge.contracts import QuantPlan
from megatron_edge.model.build import named_modules
from megatron_edge.quantize import maxima
from megatron_edge.quantize.awq import fold
from megatron_edge.quantize.policy import rule_for
from megatron_edge.runtime.session import data_group, expert_groups, tensor_group

_READ = (".self_attention.linear_qkv", ".mlp.linear_fc1", ".linear_fc2", ".mlp.router")
_SMALLEST = 1e-5  # of a maximum that takes part in a scale, as in the paper's code
_EXPERTS = "mlp.experts.linear_fc1"


@torch.no_grad()
def smooth_and_fold(model: nn.Module, plan: QuantPlan, forward_loop: Callable[[nn.Module], None]) -> None:
    """Folds the scales into this shard, in place. All ranks call it; `forward_loop` runs the calibration data, the same
    on all data-parallel ranks. Where a channel never was other than 0, or an expert saw no token, the scale is 1."""
    modules = dict(named_modules(model))
    seen = _input_maxima(modules, forward_loop)
    for prefix in [name.removesuffix("self_attention") for name in modules if name.endswith(".self_attention")]:
        layer = {name.removeprefix(prefix): module for name, module in modules.items() if name.startswith(prefix)}
        scales = {}
        for name, (site, readers, groups) in _sites(layer, prefix, plan).items():
            weights = torch.stack([layer[reader].weight.detach().abs().amax(0).float() for reader in readers]).amax(0)
            for group in groups:
                dist.all_reduce(weights, op=dist.ReduceOp.MAX, group=group)
            others = maxima.ranks_with_other_columns(f"{name}.weight")
            scales[name] = smoothing_scale(seen[prefix + site], weights, plan.smoothquant_alpha, others)
        for name, scale in scales.items():
            fold(layer, name, scale)


def smoothing_scale(inputs: Tensor, weights: Tensor, alpha: float, others: Sequence[Any] = ()) -> Tensor:
    """Maxima of a channel's inputs and weights, fp32 [in] -> its scale, 1 where the input was always 0. `others` are
    the process groups with the other channels."""
    scale = inputs.clamp_min(_SMALLEST).pow(alpha) / weights.clamp_min(_SMALLEST).pow(1 - alpha)
    alive = inputs > 0
    extremes = torch.stack((scale.where(alive, 0.0).max(), (1 / scale).where(alive, 0.0).max()))
    for group in others:
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    return (scale / (extremes[0] / extremes[1]).sqrt()).where(alive, 1.0)


def _input_maxima(modules: dict[str, nn.Module], forward_loop: Callable[[nn.Module], None]) -> dict[str, Tensor]:
    """Largest |x| of each channel at the input of each module that is read, fp32 [in of the shard], over all ranks."""
    read = {name: module for name, module in modules.items() if name.endswith(_READ)}
    seen = {name: torch.zeros(m.weight.shape[1], device=m.weight.device) for name, m in read.items()}

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            if x.numel():
                torch.maximum(seen[name], x.reshape(-1, x.shape[-1]).abs().amax(0).float(), out=seen[name])

        return see

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in read.items()]
    try:
        forward_loop(next(iter(modules.values())))
    finally:
        for handle in handles:
            handle.remove()
    for name, value in seen.items():
        for group in _groups_of_tokens(name):
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return seen


def _groups_of_tokens(name: str) -> list[Any]:
    """Ranks that see other tokens at the same channels. What tensor parallelism cuts along the sequence is the input of
    qkv, fc1 and the router; fc2's channels are each rank's own."""
    if ".local_experts." in name:
        return [expert_groups()[2]]
    return [data_group()] if name.endswith(".linear_fc2") else [tensor_group(), data_group()]


def _sites(layer: dict[str, nn.Module], prefix: str, plan: QuantPlan) -> dict[str, tuple[str, list[str], list[Any]]]:
    """What is folded, by the name that `fold` takes: (whose input, whose weights, ranks with other rows of them)."""

    def is_smoothed(name: str) -> bool:
        rule = rule_for(prefix + name, plan)
        return rule is not None and rule.weight == "int8" and rule.activation != "none"

    sites: dict[str, tuple[str, list[str], list[Any]]] = {}
    for name in ("self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2"):
        if name in layer and is_smoothed(name):
            sites[name] = (name, [name], [] if name.endswith("linear_fc2") else [tensor_group()])
    experts = [name for name in layer if ".local_experts." in name and is_smoothed(name)]
    if readers := [name for name in experts if name.endswith(".linear_fc1")]:
        sites[_EXPERTS] = ("mlp.router", readers, list(expert_groups()[:2]))
    sites.update((name, (name, [name], [])) for name in experts if name.endswith(".linear_fc2"))
    return sites
