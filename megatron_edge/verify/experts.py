"""Mixtures of experts in transformers' models: their weights from the artifact, and their arithmetic.

transformers fuses the experts of a layer into two tensors and may run them through a kernel; an artifact names each
expert's linear layers, as Hugging Face checkpoints do. Called by quality.py and runtimes.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from megatron_edge.artifact import formats
from megatron_edge.artifact.store import ArtifactReader
from megatron_edge.contracts import ParamRule
from megatron_edge.families import FAMILIES, find_rule

Read = Callable[[str], torch.Tensor]


def stored_name(reader: ArtifactReader, name: str) -> str:
    """The artifact's name of a parameter of transformers' model, which renames Mixtral's blocks as it loads them."""
    if name in reader.manifest.tensors or name.removesuffix(".weight") in reader.manifest.linears:
        return name
    return name.replace(".mlp.", ".block_sparse_moe.")


def is_fused(name: str) -> bool:
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def fused_weight(reader: ArtifactReader, name: str, read: Read) -> torch.Tensor:
    """`experts.gate_up_proj` [experts, 2 * width, hidden] or `experts.down_proj` [experts, hidden, width], out of what
    `read` gives for each expert's own tensors."""
    kind = "linear_fc1" if name.endswith("gate_up_proj") else "linear_fc2"
    return torch.stack(
        [torch.cat([read(target) for target in rule.targets]) for rule in _rules(reader, _layer_of(name), kind)]
    )


def fused_targets(reader: ArtifactReader, name: str) -> list[list[str]]:
    """The tensors of the artifact that make up a fused one: [expert][part]."""
    kind = "linear_fc1" if name.endswith("gate_up_proj") else "linear_fc2"
    return [list(rule.targets) for rule in _rules(reader, _layer_of(name), kind)]


def _layer_of(name: str) -> int:
    found = re.search(r"\.layers\.(\d+)\.", name)
    assert found is not None, name
    return int(found.group(1))


def _rules(reader: ArtifactReader, layer: int, kind: str) -> list[ParamRule]:
    rules, count = FAMILIES[reader.manifest.family].rules, reader.manifest.dims["num_experts"]
    found = [
        find_rule(f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}.{kind}.weight", rules)
        for expert in range(count)
    ]
    return [rule for rule in found if rule is not None]


def run_plainly(reader: ArtifactReader, model: torch.nn.Module, activations: bool) -> None:
    """Every block of experts computes expert by expert in plain torch, its inputs quantised as the artifact says."""
    for name, module in model.named_modules():
        if name.endswith(".mlp.experts"):
            scales = []
            for kind in ("linear_fc1", "linear_fc2"):
                rules = _rules(reader, _layer_of(name + "."), kind)
                scales.append([_quantise(reader, rule.targets[0]) if activations else None for rule in rules])
            module.cut = None
            module.forward = _forward(module, scales[0], scales[1])


def round_inputs(module: Any, rounding: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A block of experts that `run_plainly` made rounds the inputs of all its products so, instead."""
    number = len(module.gate_up_proj)
    module.forward = _forward(module, [rounding] * number, [rounding] * number)


def _quantise(reader: ArtifactReader, weight: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
    linear = reader.manifest.linears.get(weight.removesuffix(".weight"))
    if linear is None or linear.activation == "none":
        return None
    amax = formats.amax_of_scale(linear.activation, reader.tensor(linear.tensors["input_scale"]))
    kind = linear.activation
    return lambda x: formats.fake_quantize_input(kind, x, amax.to(x.device))


def _forward(module: Any, before: list[Any], between: list[Any]) -> Callable[..., torch.Tensor]:
    def run(hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """hidden [n, h], indices and weights [n, k] -> [n, h]."""
        out = torch.zeros_like(hidden)
        for expert in range(len(before)):
            token, place = torch.where(indices == expert)
            if not len(token):
                continue
            x = hidden[token]
            x = before[expert](x) if before[expert] else x
            gate, up = _linear(x, module.gate_up_proj[expert], module.cut).chunk(2, dim=-1)
            x = F.silu(gate) * up
            x = between[expert](x) if between[expert] else x
            x = _linear(x, module.down_proj[expert], module.cut) * weights[token, place, None]
            out.index_add_(0, token, x.to(out.dtype))
        return out

    return run


def _linear(x: torch.Tensor, weight: torch.Tensor, cut: float | None) -> torch.Tensor:
    """`cut`: the inputs are summed in two parts, of which the first is that much of them."""
    if cut is None:
        return F.linear(x, weight)
    at = int(cut * weight.shape[1])
    return F.linear(x[:, :at], weight[:, :at]) + F.linear(x[:, at:], weight[:, at:])
