"""quantize/direct.py against modelopt's own way through the same layers: the same bits forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_megatron import hf_config_of, megatron_twin, random_batches
from torch import Tensor, nn

from megatron_edge.compose import compose
from megatron_edge.model.build import chunks_of, forward
from megatron_edge.quantize import apply, kernels, plain_modelopt, policy
from megatron_edge.train import placement, step

RECIPES = {
    "int4": ["quant.weight=int4", "quant.group_size=32"],
    "fp8": ["quant.weight=fp8", "quant.activation=fp8", "quant.embedding=fp8", "kv=fp8"],
    "int8": ["quant.weight=int8", "quant.activation=int8", "quant.embedding=int4"],
    "nvfp4": ["quant.weight=nvfp4", "quant.activation=nvfp4", "quant.group_size=16"],
}


def quantised(llama: Any, session: Any, recipe: list[str], dtype: torch.dtype) -> nn.Module:
    model = megatron_twin(llama, session, dtype)
    composed = compose(["quant.name=own", *recipe])
    plan = policy.make_plan(composed.quant, composed.kv, hf_config_of(llama))
    matches = apply.insert_quantizers(model, plan)
    apply.calibrate(model, plan, matches, lambda _: step.run_forward(model, random_batches(), session))
    return model


def loss_and_gradients(model: nn.Module, session: Any) -> tuple[Tensor, dict[str, Tensor], set[str]]:
    """Over two micro-batches of a step; and the kinds of nodes in the graph of its loss."""
    losses, kinds = [], set()
    with apply.constant_weights(model):
        for batch in random_batches():
            on_device = placement.to_device(batch, session)
            loss = forward(chunks_of(model)[0], on_device, labels=on_device.labels).sum()
            losses.append(loss.detach())
            kinds |= nodes(loss.grad_fn)
            loss.backward()
    gradients = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    model.zero_grad(set_to_none=True)
    return torch.stack(losses), gradients, kinds


def nodes(node: Any) -> set[str]:
    seen, left = set(), [node]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left.extend(parent for parent, _ in node.next_functions)
    return {node.name() for node in seen}


def watched(model: nn.Module) -> list[nn.Module]:
    """One quantizer of each layer, and those of keys and values."""
    ends = ("output_quantizer", "k_bmm_quantizer", "v_bmm_quantizer")
    return [module for name, module in model.named_modules() if name.endswith(ends)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_same_bits_as_modelopts_way(llama: Any, session: Any, recipe: str, dtype: torch.dtype) -> None:
    model = quantised(llama, session, RECIPES[recipe], dtype)
    losses, gradients, kinds = loss_and_gradients(model, session)
    assert "LinearOfValuesBackward" in kinds
    for quantizer in watched(model):  # a hook must be called: modelopt's forward does so
        quantizer.register_forward_hook(lambda *_: None)
    expected, theirs, others = loss_and_gradients(model, session)
    assert "LinearOfValuesBackward" not in others and "_StraightThroughBackward" in others
    assert losses.equal(expected) and losses.isfinite().all()
    assert gradients.keys() == theirs.keys() and len(gradients) > 10
    for name, gradient in gradients.items():
        assert gradient.equal(theirs[name]), name


def test_disabled_quantizers_and_frozen_weights(llama: Any, session: Any) -> None:
    model = quantised(llama, session, RECIPES["fp8"], torch.float32)
    on, _, _ = loss_and_gradients(model, session)
    with apply.quantizers_off(model):
        off, _, _ = loss_and_gradients(model, session)
    plain, _, _ = loss_and_gradients(megatron_twin(llama, session), session)
    assert off.equal(plain) and not on.equal(plain)
    frozen = chunks_of(model)[0].decoder.layers[0].mlp.linear_fc1
    frozen.weight.requires_grad_(False)
    again, gradients, _ = loss_and_gradients(model, session)
    assert again.equal(on) and not any("layers.0.mlp.linear_fc1" in name for name in gradients)


def test_modelopts_own_layers_beside_ours(llama: Any, session: Any) -> None:
    before, theirs = quantised(llama, session, RECIPES["fp8"], torch.float32), megatron_twin(llama, session)
    plain_modelopt.quantize(theirs, "fp8", lambda _: step.run_forward(theirs, random_batches(), session))
    after = quantised(llama, session, RECIPES["fp8"], torch.float32)
    enabled = apply.enabled_quantizers(theirs)
    parts = {name.rsplit(".", 2)[-2] for name in enabled}
    assert parts == {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"} and len(enabled) == 2 * 4 * 2
    assert all(quantizer.backend is None for quantizer in enabled.values())
    for model, is_ours in ((before, True), (theirs, False), (after, True)):
        losses, _, kinds = loss_and_gradients(model, session)
        assert losses.isfinite().all() and ("LinearOfValuesBackward" in kinds) == is_ours


def test_weights_that_are_not_cached_give_the_same_bits(
    llama: Any, session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantised once in a step of two micro-batches, or at each use."""
    model = quantised(llama, session, RECIPES["int4"], torch.float32)
    calls, quantise = [], kernels.fake_quantize
    monkeypatch.setattr(kernels, "fake_quantize", lambda *args: (calls.append(1), quantise(*args))[1])
    losses, gradients, _ = loss_and_gradients(model, session)
    assert len(calls) == 2 * 4
    apply.set_weight_cache(model, False)
    again, others, _ = loss_and_gradients(model, session)
    assert len(calls) == 2 * 4 + 2 * 2 * 4
    assert again.equal(losses) and all(gradient.equal(others[name]) for name, gradient in gradients.items())
