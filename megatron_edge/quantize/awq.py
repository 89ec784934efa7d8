"""Activation-aware weight quantisation (arXiv 2306.00978): search a scale per input channel, fold it at once.

modelopt's search picks a different exponent on each tensor-parallel rank and averages the scales; ours reduces
statistics and losses over the ranks that share a layer, so that every layout finds the same exponent. Scales are
folded where that is exact and survives training: norm -> qkv, norm -> fc1, rows of up_proj -> down_proj. o_proj under
grouped-query attention has no exact place for its scale and gets none. Nothing is left behind in the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_edge.artifact import formats
from megatron_edge.contracts import QuantPlan
from megatron_edge.model.build import first_layer_of, global_name, unwrap
from megatron_edge.quantize.policy import rule_for
from megatron_edge.runtime.session import gather_sequence, tensor_group

log = logging.getLogger("megatron_edge")

ALPHAS = tuple(step / 10 for step in range(11))
_FOLDED = (".self_attention.linear_qkv", ".mlp.linear_fc1", ".mlp.linear_fc2")


@dataclass
class _Statistics:
    """What calibration saw at one linear's input: mean |x| per channel, and some tokens for the loss."""

    total: Tensor
    count: int = 0
    kept: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class AwqChoice:
    """The exponent found for one linear layer and the loss of every candidate, in the order of ALPHAS."""

    alpha: float
    losses: tuple[float, ...]


@torch.no_grad()
def search_and_fold(
    model: nn.Module, plan: QuantPlan, forward_loop: Callable[[nn.Module], None], *, calib_tokens: int, awq_tokens: int
) -> dict[str, AwqChoice]:
    """Finds and folds the scales of this shard, in place, before quantizers are inserted. All ranks call it.

    `forward_loop` runs the calibration data through the model; about `awq_tokens` of its `calib_tokens` tokens,
    evenly spaced, measure the loss.

    Returns:
        Choices by module name in the whole model (this pipeline stage's).
    """
    inner = unwrap(model)
    offset = first_layer_of(inner)
    group = tensor_group()
    targets = {}
    for name, module in inner.named_modules():
        rule = rule_for(global_name(name, offset), plan)
        if rule is not None and rule.weight == "int4" and name.endswith(_FOLDED):
            targets[name] = (module, rule.group_size)
    stride = max(1, calib_tokens // awq_tokens)
    statistics = _collect(inner, {n: m for n, (m, _) in targets.items()}, forward_loop, stride)
    choices = {}
    scales = {}
    for name, (module, group_size) in targets.items():
        row_parallel = name.endswith("linear_fc2")
        scales[name], choices[global_name(name, offset)] = _search(
            module.weight, statistics.pop(name), group_size, row_parallel, group
        )
    for name, scale in scales.items():
        layer = inner.get_submodule(name.rsplit(".", 2)[0])
        _fold(layer, name.rsplit(".", 1)[1], scale)
    return choices


def _collect(
    model: nn.Module, modules: dict[str, nn.Module], forward_loop: Callable[[nn.Module], None], stride: int
) -> dict[str, _Statistics]:
    found: dict[str, _Statistics] = {}
    sequence_parallel = model.config.sequence_parallel

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            if sequence_parallel and not name.endswith("linear_fc2"):
                x = gather_sequence(x)
            x = x.reshape(-1, x.shape[-1]).float()
            seen = found.setdefault(name, _Statistics(total=torch.zeros_like(x[0])))
            first = -seen.count % stride
            seen.total += x.abs().sum(0)
            seen.count += x.shape[0]
            seen.kept.append(x[first::stride].clone())

        return see

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        forward_loop(model)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _search(
    weight: Tensor, seen: _Statistics, group_size: int, row_parallel: bool, group: Any
) -> tuple[Tensor, AwqChoice]:
    """Scale [in / tp if row_parallel else in] with the least output error over ALPHAS."""
    weight = weight.float()
    x = torch.cat(seen.kept)
    x_mean = seen.total / seen.count
    w_mean = _relative_magnitude(weight, group_size)
    if not row_parallel:
        rows = torch.tensor(float(weight.shape[0]), device=weight.device)
        w_mean = _sum(w_mean, group) / _sum(rows, group)
    else:
        w_mean = w_mean / weight.shape[0]
    losses = []
    for alpha in ALPHAS:
        scale = _scale(x_mean, w_mean, alpha, row_parallel, group)
        losses.append(_loss(weight, x, scale, group_size, row_parallel, group))
    best = min(range(len(ALPHAS)), key=losses.__getitem__)
    scale = _scale(x_mean, w_mean, ALPHAS[best], row_parallel, group)
    return scale, AwqChoice(ALPHAS[best], tuple(losses))


def _relative_magnitude(weight: Tensor, group_size: int) -> Tensor:
    """Sum over rows of |w| / max of its group: [in]."""
    blocks = weight.abs().reshape(weight.shape[0], -1, group_size)
    tiny = torch.finfo(torch.float32).tiny
    return (blocks / (blocks.amax(-1, keepdim=True) + tiny)).reshape(weight.shape).sum(0)


def _scale(x_mean: Tensor, w_mean: Tensor, alpha: float, row_parallel: bool, group: Any) -> Tensor:
    tiny = torch.finfo(torch.float32).tiny
    scale = (x_mean.pow(alpha) / (w_mean.pow(1 - alpha) + tiny)).clamp(1e-4, 1e4)
    extremes = torch.stack((scale.max(), -scale.min()))
    if row_parallel:
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    return scale / (extremes[0] * -extremes[1]).sqrt()


def _loss(weight: Tensor, x: Tensor, scale: Tensor, group_size: int, row_parallel: bool, group: Any) -> float:
    scaled = weight * scale
    amax = formats.snap_amax("int4", formats.weight_amax("int4", scaled, group_size))
    error = formats.fake_quantize("int4", scaled, amax, group_size) / scale - weight
    out = x @ error.t()
    if row_parallel:
        return float(_sum(out, group).pow(2).sum())
    return float(_sum(out.pow(2).sum(), group))


def _sum(value: Tensor, group: Any) -> Tensor:
    dist.all_reduce(value, group=group)
    return value


def _fold(layer: nn.Module, linear: str, scale: Tensor) -> None:
    """weight columns x scale; whatever feeds them / scale. Arithmetic in fp32, one rounding to the stored dtype."""
    if linear == "linear_qkv":
        _multiply(layer.self_attention.linear_qkv.weight, scale)
        _multiply(layer.input_layernorm.weight, 1 / scale)
    elif linear == "linear_fc1":
        _multiply(layer.mlp.linear_fc1.weight, scale)
        _multiply(layer.pre_mlp_layernorm.weight, 1 / scale)
    else:
        _multiply(layer.mlp.linear_fc2.weight, scale)
        up_rows = layer.mlp.linear_fc1.weight[layer.mlp.linear_fc1.weight.shape[0] // 2 :]
        _multiply(up_rows, 1 / scale[:, None])


def _multiply(param: Tensor, factor: Tensor) -> None:
    param.data.copy_(param.data.float() * factor)
