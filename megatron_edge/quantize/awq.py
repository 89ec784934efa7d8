"""Activation-aware weight quantisation (arXiv 2306.00978): search a scale per input channel, fold it at once.

modelopt's search picks a different exponent on each tensor-parallel rank and averages the scales; ours reduces
statistics and losses over the ranks that share a layer, so that every layout finds the same exponent. Scales are
folded where that is exact and survives training: norm -> qkv, norm -> fc1, rows of up_proj -> down_proj. All experts of
a layer read one norm, so they share its scale, and the router's columns take it as well. o_proj under grouped-query
attention has no exact place for its scale and gets none. Nothing is left behind in the model.

For int4 weights (with inputs of any format) the loss is that of the weights' rounding, as in the paper. For nvfp4 it is
that of weights and inputs, as both share scales among 16 neighbouring channels: an outlier channel costs its neighbours
their resolution, and on a small model the inputs' part of the damage is as large as the weights'.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_edge.artifact import formats
from megatron_edge.contracts import QuantPlan, QuantRule
from megatron_edge.model.build import chunks_of, named_modules
from megatron_edge.quantize.policy import rule_for
from megatron_edge.runtime.session import expert_groups, gather_context, gather_sequence, tensor_group

log = logging.getLogger("megatron_edge")

WEIGHTS = ("int4", "nvfp4")
ALPHAS = tuple(step / 10 for step in range(11))
_READ = (".self_attention.linear_qkv", ".mlp.linear_fc1", ".mlp.linear_fc2", ".mlp.router")


@dataclass
class _Statistics:
    """What calibration saw at one module's input: mean |x| per channel, and some tokens for the loss."""

    total: Tensor
    count: int = 0
    kept: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class AwqChoice:
    """The exponent found for one scale and the loss of every candidate, in the order of ALPHAS."""

    alpha: float
    losses: tuple[float, ...]


@dataclass(frozen=True)
class _Site:
    """Linear layers that share a scale, each with the tokens that it reads; `groups` hold the rest of them: other rows
    (or, `row_parallel`, columns) of the same weights, which the first of them shares, and other experts."""

    weights: Sequence[Tensor]
    inputs: Sequence[Tensor]
    x_mean: Tensor
    rule: QuantRule
    row_parallel: bool
    groups: tuple[Any, ...]


@torch.no_grad()
def search_and_fold(
    model: nn.Module, plan: QuantPlan, forward_loop: Callable[[nn.Module], None], *, calib_tokens: int, awq_tokens: int
) -> dict[str, AwqChoice]:
    """Finds and folds the scales of this shard, in place, before quantizers are inserted. All ranks call it.

    `forward_loop` runs the calibration data through the model, the same on all data-parallel ranks; about `awq_tokens`
    of its `calib_tokens` tokens, evenly spaced, measure the loss.

    Returns:
        Choices by module name in the whole model (this shard's); experts' fc1 under `...mlp.experts.linear_fc1`.
    """
    modules = dict(named_modules(model))
    statistics = _collect(model, modules, forward_loop, max(1, calib_tokens // awq_tokens))
    choices: dict[str, AwqChoice] = {}
    for prefix in [name.removesuffix("self_attention") for name in modules if name.endswith(".self_attention")]:
        layer = {name.removeprefix(prefix): module for name, module in modules.items() if name.startswith(prefix)}
        seen = {name.removeprefix(prefix): value for name, value in statistics.items() if name.startswith(prefix)}
        rules = {name: rule for name in layer if (rule := _rule(prefix + name, plan)) is not None}
        sites = list(_dense_sites(layer, rules, seen))
        if "mlp.router" in layer:
            sites += _expert_sites(layer, rules, seen)
        scales = {}
        for name, site in sites:
            scales[name], choices[prefix + name] = _search(site)
        for name, scale in scales.items():
            fold(layer, name, scale)
    return choices


def _rule(name: str, plan: QuantPlan) -> QuantRule | None:
    """None where the module is not a linear layer whose weights have scales of a few channels each."""
    rule = rule_for(name, plan)
    return rule if rule is not None and rule.weight in WEIGHTS else None


def _collect(
    model: nn.Module, modules: dict[str, nn.Module], forward_loop: Callable[[nn.Module], None], stride: int
) -> dict[str, _Statistics]:
    found: dict[str, _Statistics] = {}
    sequence_parallel = chunks_of(model)[0].config.sequence_parallel

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            if sequence_parallel and not name.endswith("linear_fc2"):
                x = gather_sequence(x)
            x = gather_context(x)
            x = x.reshape(-1, x.shape[-1]).float()
            seen = found.setdefault(name, _Statistics(total=torch.zeros_like(x[0])))
            first = -seen.count % stride
            seen.total += x.abs().sum(0)
            seen.count += x.shape[0]
            seen.kept.append(x[first::stride].clone())

        return see

    handles = [m.register_forward_pre_hook(hook(name)) for name, m in modules.items() if name.endswith(_READ)]
    try:
        forward_loop(model)
    finally:
        for handle in handles:
            handle.remove()
    return found


_Layer = dict[str, nn.Module]
_Sites = Iterator[tuple[str, _Site]]


def _dense_sites(layer: _Layer, rules: dict[str, QuantRule], seen: dict[str, _Statistics]) -> _Sites:
    for name in ("self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2"):
        if name in rules:
            stats, weight = seen.pop(name), layer[name].weight
            row_parallel = name.endswith("linear_fc2")
            x = torch.cat(stats.kept)
            yield name, _Site((weight,), (x,), stats.total / stats.count, rules[name], row_parallel, (tensor_group(),))


def _expert_sites(layer: _Layer, rules: dict[str, QuantRule], seen: dict[str, _Statistics]) -> _Sites:
    """One site for what all experts read; one for each expert's hidden activations. An expert that the kept tokens do
    not reach says nothing on the first and is left unscaled in the second."""
    stats = seen.pop("mlp.router")
    x, router = torch.cat(stats.kept), layer["mlp.router"]
    _, routed = router(x[:, None].to(router.weight.dtype))  # [tokens, experts of the whole model]
    experts = [name.removesuffix(".linear_fc1") for name in layer if name.endswith(".linear_fc1")]
    tokens = {name: x[routed[:, int(name.rsplit(".", 1)[1])].bool()] for name in experts}
    chosen = [name for name in experts if f"{name}.linear_fc1" in rules]
    expert_tensor, expert_model, _ = expert_groups()
    if chosen:
        yield (
            "mlp.experts.linear_fc1",
            _Site(
                [layer[f"{name}.linear_fc1"].weight for name in chosen],
                [tokens[name] for name in chosen],
                stats.total / stats.count,
                rules[f"{chosen[0]}.linear_fc1"],
                row_parallel=False,
                groups=(expert_tensor, expert_model),
            ),
        )
    for name in experts:
        rule, fc1 = rules.get(f"{name}.linear_fc2"), layer[f"{name}.linear_fc1"]
        if rule is not None and len(tokens[name]):
            gate, up = (tokens[name] @ fc1.weight.float().t()).chunk(2, dim=-1)
            hidden = F.silu(gate) * up
            weight = layer[f"{name}.linear_fc2"].weight
            yield (
                f"{name}.linear_fc2",
                _Site((weight,), (hidden,), hidden.abs().mean(0), rule, row_parallel=True, groups=(expert_tensor,)),
            )


def _search(site: _Site) -> tuple[Tensor, AwqChoice]:
    """Scale [in of the shard] with the least output error over ALPHAS."""
    size = site.rule.group_size
    magnitude = torch.stack([_relative_magnitude(weight.float(), size) for weight in site.weights]).sum(0)
    rows = torch.tensor(float(sum(weight.shape[0] for weight in site.weights)), device=magnitude.device)
    if not site.row_parallel:
        magnitude, rows = _sum(magnitude, site), _sum(rows, site)
    w_mean = magnitude / rows
    losses = [_loss(site, _scale(site, w_mean, alpha)) for alpha in ALPHAS]
    best = min(range(len(ALPHAS)), key=losses.__getitem__)
    return _scale(site, w_mean, ALPHAS[best]), AwqChoice(ALPHAS[best], tuple(losses))


def _relative_magnitude(weight: Tensor, group_size: int) -> Tensor:
    """Sum over rows of |w| / max of its group: [in]."""
    blocks = weight.abs().reshape(weight.shape[0], -1, group_size)
    tiny = torch.finfo(torch.float32).tiny
    return (blocks / (blocks.amax(-1, keepdim=True) + tiny)).reshape(weight.shape).sum(0)


def _scale(site: _Site, w_mean: Tensor, alpha: float) -> Tensor:
    tiny = torch.finfo(torch.float32).tiny
    scale = (site.x_mean.pow(alpha) / (w_mean.pow(1 - alpha) + tiny)).clamp(1e-4, 1e4)
    extremes = torch.stack((scale.max(), -scale.min()))
    if site.row_parallel:
        for group in site.groups:
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    return scale / (extremes[0] * -extremes[1]).sqrt()


def _loss(site: _Site, scale: Tensor) -> float:
    """Squared error of the outputs, summed over the site's weights and groups."""
    total = torch.zeros((), device=scale.device)
    fmt, size = site.rule.weight, site.rule.group_size
    for stored, x in zip(site.weights, site.inputs, strict=True):
        weight = stored.float()
        scaled = weight * scale
        amax = formats.weight_amax(fmt, scaled, size)
        if fmt == "nvfp4":
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=site.groups[0])
        quantised = formats.fake_quantize(fmt, scaled, formats.snap_amax(fmt, amax), size) / scale
        out = x @ (quantised - weight).t()
        if site.rule.activation == "nvfp4" and len(x):
            out += _input_error(site, x, scale) @ quantised.t()
        total += (_sum(out, site) if site.row_parallel else out).pow(2).sum()
    return float(total if site.row_parallel else _sum(total, site))


def _input_error(site: _Site, x: Tensor, scale: Tensor) -> Tensor:
    """What quantising the inputs [tokens, in] under `scale` adds to them."""
    scaled = x / scale
    amax = scaled.abs().amax()
    if site.row_parallel:
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=site.groups[0])
    amax = formats.snap_tensor_amax("nvfp4", amax)
    return formats.fake_quantize_input("nvfp4", scaled, amax) * scale - x


def _sum(value: Tensor, site: _Site) -> Tensor:
    for group in site.groups:
        dist.all_reduce(value, group=group)
    return value


def fold(layer: _Layer, name: str, scale: Tensor) -> None:
    """weight columns x scale; whatever feeds them / scale. Arithmetic in fp32, one rounding to the stored dtype."""
    if name.endswith("linear_fc2"):
        _multiply(layer[name].weight, scale)
        fc1 = layer[name.removesuffix("linear_fc2") + "linear_fc1"].weight
        _multiply(fc1[fc1.shape[0] // 2 :], 1 / scale[:, None])
        return
    norm, readers = "pre_mlp_layernorm", [name]
    if name == "self_attention.linear_qkv":
        norm = "input_layernorm"
    elif name == "mlp.experts.linear_fc1":
        readers = ["mlp.router", *(key for key in layer if key.endswith(".linear_fc1"))]
    for reader in readers:
        _multiply(layer[reader].weight, scale)
    _multiply(layer[norm].weight, 1 / scale)


def _multiply(param: Tensor, factor: Tensor) -> None:
    param.data.copy_(param.data.float() * factor)
