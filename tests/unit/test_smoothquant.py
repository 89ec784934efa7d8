"""SmoothQuant: scales against the paper's formula on what transformers' own forward sees, and the fold."""

from __future__ import annotations

from typing import Any

import torch
from tiny_megatron import megatron_twin, random_batches, random_experts
from torch import Tensor, nn

from megatron_edge.artifact import formats
from megatron_edge.contracts import QuantPlan, QuantRule
from megatron_edge.quantize import apply, smoothquant
from megatron_edge.train import step
from tools.layout_parity import Float64Sums

PLAN = QuantPlan(
    weight="int8",
    activation="int8",
    kv="none",
    group_size=0,
    algorithm="smoothquant",
    rules=(QuantRule("*.linear_*", "int8", "int8", 0),),
)
READ_BY = {
    "self_attention.linear_qkv": ("self_attn.q_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "mlp.linear_fc1": ("mlp.gate_proj", ("mlp.gate_proj", "mlp.up_proj")),
    "mlp.linear_fc2": ("mlp.down_proj", ("mlp.down_proj",)),
}


def smoothed(model: nn.Module, session: Any, plan: QuantPlan = PLAN) -> tuple[Tensor, Tensor]:
    """Logits before and after."""
    batches = random_batches(4)
    before = step.token_logits(model, batches, session)
    smoothquant.smooth_and_fold(model, plan, lambda _: step.run_forward(model, batches, session))
    after = step.token_logits(model, batches, session)
    assert before is not None and after is not None
    return before, after


def input_maxima(llama: Any) -> dict[str, Tensor]:
    """[in] of each linear of READ_BY, from transformers' forward."""
    seen: dict[str, Tensor] = {}
    handles = []
    for layer, block in enumerate(llama.model.layers):
        for name, (twin, _) in READ_BY.items():
            key = f"decoder.layers.{layer}.{name}"

            def see(_: Any, args: tuple[Tensor, ...], key: str = key) -> None:
                value = args[0].flatten(0, -2).abs().amax(0)
                seen[key] = torch.maximum(seen.get(key, value), value)

            handles.append(block.get_submodule(twin).register_forward_pre_hook(see))
    with torch.no_grad():
        for batch in random_batches(4):
            llama(batch.tokens)
    for handle in handles:
        handle.remove()
    return seen


def test_scales_are_the_papers_up_to_a_common_factor(llama: Any, session: Any) -> None:
    """Columns of gate_proj's rows (or all of the others) show the scale; up_proj's rows also hold another."""
    model = megatron_twin(llama, session)
    before = {name: param.detach().clone() for name, param in model[0].named_parameters()}
    smoothed(model, session)
    maxima = input_maxima(llama)
    assert len(maxima) == 6
    for name, seen in maxima.items():
        layer, kind = name.split(".", 3)[2:]
        block = llama.model.layers[int(layer)]
        weight = torch.cat([block.get_submodule(twin).weight.detach() for twin in READ_BY[kind][1]]).abs().amax(0)
        expected = seen.sqrt() / weight.sqrt()
        expected /= (expected.max() * expected.min()).sqrt()
        old, new = before[name + ".weight"], model[0].get_parameter(name + ".weight").detach()
        rows = len(old) // 2 if kind == "mlp.linear_fc1" else len(old)
        largest = old[:rows].abs().argmax(0)
        found = new[:rows].gather(0, largest[None])[0] / old[:rows].gather(0, largest[None])[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        assert found.max() / found.min() > 1.5, "nothing was folded: the test would show nothing"
    for name, old in before.items():
        if name.endswith("linear_proj.weight"):
            assert torch.equal(model[0].get_parameter(name), old)


def test_the_unquantised_model_is_unchanged(llama: Any, session: Any) -> None:
    """To three times what another order of sums changes."""
    before, after = smoothed(megatron_twin(llama, session), session)
    with Float64Sums():
        reordered = step.token_logits(megatron_twin(llama, session), random_batches(4), session)
    assert reordered is not None
    floor, difference = (float((before - other).abs().max()) for other in (reordered, after))
    print(f"largest logit difference {difference:.2g}, floor {floor:.2g}")
    assert 0 < difference <= 3 * floor


def test_experts_share_the_norms_scale_and_the_router_takes_it(session: Any) -> None:
    model = random_experts(session)
    for name, weight in model.named_parameters():
        if name.endswith("layernorm.weight"):
            weight.data.uniform_(0.5, 1.5)
            weight.data[::16] *= 12
    old = {name: param.detach().clone() for name, param in model[0].named_parameters()}
    before, after = smoothed(model, session)
    assert float((before - after).abs().max()) < 1e-5 * float(before.abs().max())
    prefix = "decoder.layers.0."
    norm = old[prefix + "pre_mlp_layernorm.weight"] / model[0].get_parameter(prefix + "pre_mlp_layernorm.weight")
    assert norm.max() / norm.min() > 1.5
    router = model[0].get_parameter(prefix + "mlp.router.weight") / old[prefix + "mlp.router.weight"]
    torch.testing.assert_close(router, norm.expand_as(router).contiguous(), rtol=1e-5, atol=0)
    for expert in range(4):
        name = f"{prefix}mlp.experts.local_experts.{expert}.linear_fc1.weight"
        gate = (model[0].get_parameter(name) / old[name]).chunk(2)[0]
        torch.testing.assert_close(gate, norm.expand_as(gate).contiguous(), rtol=1e-5, atol=0)


def test_a_channel_or_an_expert_that_saw_nothing_keeps_its_weights() -> None:
    inputs, weights = torch.tensor([4.0, 0.0, 1.0]), torch.tensor([1.0, 9.0, 1.0])
    scale = smoothquant.smoothing_scale(inputs, weights, 0.5)
    assert scale[1] == 1 and scale[0] == 2 * scale[2] and (scale[0] * scale[2]).isclose(torch.tensor(1.0))
    assert smoothquant.smoothing_scale(torch.zeros(3), weights, 0.5).eq(1).all()


def test_outliers_of_inputs_cost_less(llama: Any, session: Any) -> None:
    """Norms that are 12 times larger in some channels: the quantised model is nearer to the plain one with SmoothQuant.
    Every quantised weight and input is what formats says."""
    errors, batches = {}, random_batches(4)
    for smooths in (False, True):
        model = megatron_twin(llama, session)
        plain = step.token_logits(model, batches, session)
        if smooths:
            smoothed(model, session)
        matches = apply.insert_quantizers(model, PLAN)
        apply.calibrate(model, PLAN, matches, lambda _, m=model: step.run_forward(m, batches, session))
        quantised = step.token_logits(model, batches, session)
        assert plain is not None and quantised is not None
        errors[smooths] = float((quantised - plain).square().mean().sqrt())
        for name, quantizer in apply.enabled_quantizers(model).items():
            if name.endswith("weight_quantizer"):
                weight = model[0].get_parameter(name.removesuffix("_quantizer")).detach()
                amax = formats.snap_amax("int8", formats.weight_amax("int8", weight))
                assert torch.equal(quantizer._amax, amax)
                assert torch.equal(quantizer(weight), formats.fake_quantize("int8", weight, amax))
            else:
                x = torch.randn(5, 64 if "fc2" not in name else 128)
                assert torch.equal(quantizer(x), formats.fake_quantize_input("int8", x, quantizer._amax))
    print(f"rms logit difference {errors[False]:.3g} without, {errors[True]:.3g} with SmoothQuant")
    assert errors[True] < 0.7 * errors[False]
