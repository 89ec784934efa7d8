"""Puts modelopt's quantizers into a Megatron shard, calibrates them, and computes with the project's own numerics.

modelopt inserts the quantizers, routes weights and activations through them and collects maxima over data and
ranks; what a quantizer computes comes from `artifact.formats` through modelopt's backend registry, so that what is
trained is what is stored.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_edge.artifact import formats
from megatron_edge.contracts import InputError, QuantPlan, QuantReport, QuantRule
from megatron_edge.model.build import chunks_of, named_modules, named_shards
from megatron_edge.model.layers import PackedAttention, vocab_embedding_class
from megatron_edge.quantize import direct, kernels, maxima, ranges
from megatron_edge.quantize.policy import rule_for
from megatron_edge.recipe import rule_matches
from megatron_edge.runtime import compat
from megatron_edge.runtime.session import data_group, tensor_group

log = logging.getLogger("megatron_edge")

BACKEND = "megatron_edge"

# What modelopt needs to know of each format: how maxima are collected. The arithmetic is ours.
_PER_TENSOR: dict[str, Any] = {"num_bits": (4, 3), "axis": None}
_ATTRIBUTES: dict[tuple[str, str], dict[str, Any]] = {
    ("weight", "fp8"): _PER_TENSOR,
    ("weight", "nvfp4"): {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
    ("weight", "int4"): {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}},
    ("weight", "int8"): {"num_bits": 8, "axis": 0},
    ("input", "nvfp4"): {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
    ("kv", "int8"): {"num_bits": 8, "axis": None, "type": "dynamic"},
}


# What a quantizer keeps of its first use, which modelopt does not forget when its format changes.
_OF_ANOTHER_FORMAT = ("_amax", "_block_reshape_size", "_original_shape", "_padding", "_slices")


class _StraightThrough(torch.autograd.Function):
    """The quantised value forward, the gradient unchanged backward (arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _fake_quantize(x: Tensor, quantizer: Any) -> Tensor:
    """Entry of modelopt's backend registry. int4 weights come as [groups, group_size], everything else as is.
    `_route` is an adapter's (adapters.py)."""
    route = getattr(quantizer, "_route", None)
    if route is not None:
        x = route(x)
    return _StraightThrough.apply(x, _quantised(x, quantizer))


def _quantised(x: Tensor, quantizer: Any) -> Tensor:
    """What an enabled quantizer of ours makes of x, without gradient; kept, where weights are constant."""
    state = quantizer.__dict__
    kept = state.get("_kept")
    if kept is not None:
        return kept.view(x.shape)  # a tied table comes in groups to one of its layers, and whole to the other
    value = kernels.fake_quantize(state["backend_extra_args"], x, quantizer._buffers.get("_amax"))
    if state.get("_keep"):
        quantizer._kept = value
    return value


@contextlib.contextmanager
def constant_weights(model: nn.Module) -> Iterator[None]:
    """Inside, weights do not change: each is quantised once, at its first use, and kept until the end (of the outer
    one, where two are nested)."""
    states = ((q, q.__dict__) for q in _weight_quantizers(model))
    quantizers = [q for q, state in states if state.get("_may_keep", True) and not state.get("_keep")]
    for quantizer in quantizers:
        quantizer._keep = True
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer._keep, quantizer._kept, quantizer._kept_operand = False, None, None


def set_weight_cache(model: nn.Module, kept: bool) -> None:
    """Whether `constant_weights` keeps anything; else a weight is quantised at each use. Same bits, in place."""
    for quantizer in _weight_quantizers(model):
        quantizer._may_keep = kept


def _weight_quantizers(model: nn.Module) -> list[Any]:
    return [quantizer for name, quantizer in _quantizers(model) if name.endswith("weight_quantizer")]


def _register() -> None:
    """modelopt knows Megatron's linear layers; it has to be told of its embedding, our attention and our numerics."""
    from modelopt.torch.quantization.nn import QuantEmbedding, QuantModule, QuantModuleRegistry, TensorQuantizer
    from modelopt.torch.quantization.nn.modules.tensor_quantizer import (
        is_registered_quant_backend,
        register_quant_backend,
    )
    from modelopt.torch.utils.distributed import ParallelState

    if is_registered_quant_backend(BACKEND):
        return
    register_quant_backend(BACKEND, _fake_quantize)

    class QuantPackedAttention(QuantModule):
        """With a local core attention modelopt's KV recipes do nothing, silently; this gives them quantizers."""

        def _setup(self) -> None:
            self.k_bmm_quantizer = TensorQuantizer()
            self.v_bmm_quantizer = TensorQuantizer()
            self.parallel_state = ParallelState(data_group(), tensor_group())

        def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            key = direct.through(key, self._modules["k_bmm_quantizer"], BACKEND, _fake_quantize)
            value = direct.through(value, self._modules["v_bmm_quantizer"], BACKEND, _fake_quantize)
            return super().forward(query, key, value, *args, **kwargs)

    class QuantVocabParallelEmbedding(QuantEmbedding):
        """This rank's rows of the table, quantised where they are looked up."""

        def _setup(self) -> None:
            super()._setup()
            self.parallel_state = ParallelState(data_group(), tensor_group())

    QuantModuleRegistry.register({PackedAttention: "edge_PackedAttention"})(QuantPackedAttention)
    QuantModuleRegistry.register({vocab_embedding_class(): "edge_VocabParallelEmbedding"})(QuantVocabParallelEmbedding)
    direct.register(BACKEND, _quantised)


def insert_quantizers(model: nn.Module, plan: QuantPlan) -> dict[str, int]:
    """Adds the plan's quantizers to this shard, not yet calibrated, in the place of any that it has. In place; all
    ranks call it.

    Returns:
        How many modules of the whole model each pattern (of rules and exclusions) matches.

    Raises:
        InputError: a pattern that matches nothing, in the whole model.
    """
    compat.install()
    import modelopt.torch.quantization as mtq

    _register()
    for _, quantizer in _quantizers(model):
        for attribute in _OF_ANOTHER_FORMAT:
            if hasattr(quantizer, attribute):
                delattr(quantizer, attribute)
    names = {module: name for name, module in named_modules(model)}
    matches = _count_matches(list(names.values()), plan)
    for chunk in chunks_of(model):
        entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
        for name, module in chunk.named_modules():
            rule = rule_for(names[module], plan)
            if rule is not None:
                entries += _linear_entries(name, rule)
            if plan.kv != "none" and name.endswith(".core_attention"):
                entries += _kv_entries(name, plan.kv)
        if len(entries) > 1:
            with contextlib.redirect_stdout(io.StringIO()):  # modelopt prints a count per rank; ours are better
                mtq.quantize(chunk, {"quant_cfg": entries, "algorithm": None})
            _share_table_quantizer(chunk)
    return matches


def _share_table_quantizer(chunk: Any) -> None:
    """Megatron hands a tied table of its own stage to the output layer as an argument, which the output layer's
    quantizer quantises: let that be the embedding's, so that a table has one maximum and is quantised once."""
    if chunk.share_embeddings_and_output_weights and chunk.pre_process and chunk.post_process:
        chunk.output_layer.weight_quantizer = chunk.embedding.word_embeddings.weight_quantizer


def _kv_entries(name: str, kv: str) -> list[dict[str, Any]]:
    args = {"format": kv, "role": "kv", "group_size": 0}
    cfg = _attributes(args)
    return [{"quantizer_name": f"{name}.{which}_bmm_quantizer", "cfg": cfg} for which in "kv"]


def _linear_entries(name: str, rule: QuantRule) -> list[dict[str, Any]]:
    entries = []
    for role, chosen in (("weight", rule.weight), ("input", rule.activation)):
        if chosen != "none":
            args = {"format": chosen, "role": role, "group_size": rule.group_size}
            cfg = _attributes(args)
            entries.append({"quantizer_name": f"{name}.{role}_quantizer", "cfg": cfg})
    return entries


def _attributes(args: dict[str, Any]) -> dict[str, Any]:
    known = _ATTRIBUTES.get((args["role"], args["format"]), _PER_TENSOR)
    attributes = {**known, "backend": BACKEND, "backend_extra_args": args}
    if args["format"] == "int4":
        attributes["block_sizes"] = {-1: args["group_size"], "type": "static"}
    return attributes


def _count_matches(names: list[str], plan: QuantPlan) -> dict[str, int]:
    """An override is one rule for each kind of layer that it reaches: all of them count."""
    mine: dict[str, set[str]] = {}
    for rule in plan.rules:
        mine.setdefault(rule.pattern, set()).update(name for name in names if rule_matches(rule, name))
    for pattern in plan.excluded:
        mine.setdefault(pattern, set()).update(name for name in names if fnmatch(name, pattern))
    if not mine:
        return {}
    everyone: list[dict[str, set[str]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    matches = {pattern: len(set().union(*(found[pattern] for found in everyone))) for pattern in mine}
    empty = [pattern for pattern, count in matches.items() if count == 0]
    if empty:
        raise InputError(f"quant: patterns {empty} match no module of the model; names look like {names[-3:]}")
    return matches


def calibrate(
    model: nn.Module,
    plan: QuantPlan,
    matches: dict[str, int],
    forward_loop: Callable[[nn.Module], None],
    clipped: dict[str, Tensor] | None = None,
) -> QuantReport:
    """Sets every quantizer's maximum from the weights and from `forward_loop` (data), as plan.calibration says, then
    snaps it so that the scale that will be stored is exact. All ranks call it; maxima end equal on ranks that share a
    tensor, and those of inputs on all experts of a layer, so that one that saw no token has a safe scale. `clipped` has
    maxima of weights, by quantizer, that were found otherwise (clip.py)."""
    from modelopt.torch.quantization import model_calib

    enabled = {name: q for name, q in _quantizers(model) if q.is_enabled}
    with torch.no_grad(), _counted_tokens(model) as tokens:
        for chunk in chunks_of(model):
            model_calib.enable_stats_collection(chunk)
            model_calib.weight_only_quantize(chunk)
        if any(maxima.wants_data(q) for q in enabled.values()):
            forward_loop(model)
        for chunk in chunks_of(model):
            model_calib.finish_stats_collection(chunk)
        found = maxima.shared(enabled) | (clipped or {})

        def run_data() -> None:
            with quantizers_off(model):
                forward_loop(model)

        if plan.calibration == "percentile":
            found |= ranges.percentile(enabled, found, plan.percentile, run_data)
        elif plan.calibration == "mse":
            if any(maxima.wants_data(q) for q in enabled.values()):
                found |= ranges.least_error_of_data(enabled, found, run_data)
            # Not of tables: a clipped embedding is nearer in its values and further in its logits.
            of_layers = {name: q for name, q in enabled.items() if ".layers." in name}
            found |= ranges.least_error_of_weights(of_layers, found, named_shards(model), dist.get_rank())
    amax = {}
    for name, value in found.items():
        set_amax(enabled[name], value)
        amax[name] = float(enabled[name]._amax.max())
    disabled = tuple(name for name, q in _quantizers(model) if not q.is_enabled)
    unseen = tuple(name for name, count in tokens.items() if count == 0)
    return QuantReport(matches_per_rule=matches, disabled=disabled, amax=amax, unseen=unseen)


@contextlib.contextmanager
def _counted_tokens(model: nn.Module) -> Iterator[dict[str, int]]:
    """Inside, the tokens that each expert of this shard sees are counted, by its name."""
    counts: dict[str, int] = {}
    handles = []
    for name, module in named_modules(model):
        if ".local_experts." in name and name.endswith(".linear_fc1"):
            expert = name.removesuffix(".linear_fc1")
            counts[expert] = 0

            def count(_: nn.Module, inputs: tuple[Tensor, ...], expert: str = expert) -> None:
                counts[expert] += inputs[0].shape[0]

            handles.append(module.register_forward_pre_hook(count))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def set_amax(quantizer: Any, value: Tensor) -> None:
    """Sets a quantizer's maximum, in fp32 and snapped; int4 and int8 weights: any shape with one element per group or
    row."""
    args = quantizer.backend_extra_args
    snap = formats.snap_amax if args["role"] == "weight" else formats.snap_tensor_amax
    value = snap(args["format"], value.detach().float())
    if args["role"] == "weight" and args["format"] in ("int4", "int8"):
        value = value.reshape(-1, 1)
    if hasattr(quantizer, "_amax"):
        delattr(quantizer, "_amax")
    quantizer.register_buffer("_amax", value.clone())


def _quantizers(model: nn.Module) -> list[tuple[str, Any]]:
    """All quantizers of this shard by their name in the whole model."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    return [(name, module) for name, module in named_modules(model) if isinstance(module, TensorQuantizer)]


def enabled_quantizers(model: nn.Module) -> dict[str, Any]:
    """Enabled quantizers of this shard by their name in the whole model (…linear_fc1.weight_quantizer)."""
    return {name: quantizer for name, quantizer in _quantizers(model) if quantizer.is_enabled}


@contextlib.contextmanager
def quantizers_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes as if it had no quantizers."""
    enabled = [q for _, q in _quantizers(model) if q.is_enabled]
    for quantizer in enabled:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in enabled:
            quantizer.enable()
