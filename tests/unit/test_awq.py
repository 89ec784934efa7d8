"""AWQ: the search against a plain loop and against modelopt's, and the fold against the model before it."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny_megatron import megatron_twin, random_batches
from torch import Tensor, nn

from megatron_edge.artifact import formats
from megatron_edge.contracts import QuantPlan, QuantRule
from megatron_edge.quantize import apply, awq
from megatron_edge.train import step
from tools.layout_parity import Float64Sums

GROUP = 32
PLAN = QuantPlan(
    weight="int4",
    activation="none",
    kv="fp8",
    group_size=GROUP,
    algorithm="awq",
    rules=tuple(
        QuantRule(f"*.{linear}", "int4", "none", GROUP)
        for linear in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    ),
)
# Megatron's linear layer -> the transformers module whose input it shares, and the modules that it stands for.
TWINS = {
    "self_attention.linear_qkv": ("self_attn.q_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "mlp.linear_fc1": ("mlp.gate_proj", ("mlp.gate_proj", "mlp.up_proj")),
    "mlp.linear_fc2": ("mlp.down_proj", ("mlp.down_proj",)),
}
NUM_TOKENS = 256


@dataclass
class Folded:
    """A model before and after, and what the search chose."""

    before: dict[str, Tensor]
    model: nn.Module
    logits_before: Tensor
    logits_after: Tensor
    choices: dict[str, awq.AwqChoice]


def fold(llama: Any, session: Any, sums: contextlib.AbstractContextManager[Any]) -> Folded:
    model, batches = megatron_twin(llama, session), random_batches(4)
    assert sum(batch.tokens.numel() for batch in batches) == NUM_TOKENS
    before = {name: param.detach().clone() for name, param in model[0].named_parameters()}
    with sums:
        logits = step.token_logits(model, batches, session)

        def forward_loop(_: nn.Module) -> None:
            step.run_forward(model, batches, session)

        choices = awq.search_and_fold(model, PLAN, forward_loop, calib_tokens=NUM_TOKENS, awq_tokens=NUM_TOKENS)
        after = step.token_logits(model, batches, session)
    assert logits is not None and after is not None
    return Folded(before, model, logits, after, choices)


@pytest.fixture(scope="module")
def folded(llama: Any, session: Any) -> Folded:
    return fold(llama, session, contextlib.nullcontext())


@pytest.fixture(scope="module")
def reordered(llama: Any, session: Any) -> Folded:
    """The same with every matrix product summed in float64: what the order of sums alone changes."""
    return fold(llama, session, Float64Sums())


def scale_of(run: Folded, name: str) -> Tensor:
    """The scale [in] that a linear's folded weight holds. up_proj's rows also hold another: gate_proj's tell."""
    old, new = run.before[name + ".weight"], run.model[0].get_parameter(name + ".weight").detach()
    rows = len(old) // 2 if name.endswith("linear_fc1") else len(old)
    largest = old[:rows].abs().argmax(0)
    return new[:rows].gather(0, largest[None])[0] / old[:rows].gather(0, largest[None])[0]


def test_the_unquantised_model_is_unchanged(folded: Folded, reordered: Folded) -> None:
    """Folding rounds each scaled weight once more: as little as summing in another order does."""
    floor = float((folded.logits_before - reordered.logits_before).abs().max())
    difference = float((folded.logits_before - folded.logits_after).abs().max())
    print(
        f"largest logit difference {difference:.2g} of {float(folded.logits_before.abs().max()):.3g}, floor {floor:.2g}"
    )
    assert 0 < difference <= 3 * floor
    for name in folded.choices:
        scale = scale_of(folded, name)
        assert float(scale.max() / scale.min()) > 1.5, "nothing was folded: the test would show nothing"


def test_the_choice_for_a_projection_without_a_place_is_none(folded: Folded) -> None:
    """o_proj's input channels come from value heads that query heads share: nothing can take up its scale."""
    for name, old in folded.before.items():
        if name.endswith("linear_proj.weight"):
            assert torch.equal(folded.model[0].get_parameter(name), old)
    assert not any("linear_proj" in name for name in folded.choices)


def test_nothing_is_left_behind(llama: Any, session: Any) -> None:
    """After insertion and calibration too, and what the quantised model does with its weights is what formats says."""
    run = fold(llama, session, contextlib.nullcontext())
    matches = apply.insert_quantizers(run.model, PLAN)
    batches = random_batches(4)
    apply.calibrate(run.model, PLAN, matches, lambda _: step.run_forward(run.model, batches, session))
    for name, module in run.model.named_modules():
        left = [key for key in vars(module) if "pre_quant_scale" in key and getattr(module, key) is not None]
        left = [key for key in left if not isinstance(getattr(module, key), bool)]
        assert not left and getattr(module, "pre_quant_scale", None) is None, (name, left)
    assert not [key for key in run.model.state_dict() if "pre_quant_scale" in key]
    for name, quantizer in apply.enabled_quantizers(run.model).items():
        if name.endswith("weight_quantizer"):
            weight = run.model[0].get_parameter(name.removesuffix("_quantizer")).detach()
            amax = formats.snap_amax("int4", formats.weight_amax("int4", weight, GROUP))
            assert torch.equal(quantizer._amax.view_as(amax), amax)


def inputs_of(llama: Any) -> dict[str, Tensor]:
    """[tokens, in] of each module of TWINS, as transformers' own forward sees them."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for layer, block in enumerate(llama.model.layers):
        for name, (twin, _) in TWINS.items():
            kept = seen.setdefault(f"decoder.layers.{layer}.{name}", [])
            hook = lambda _, args, kept=kept: kept.append(args[0].flatten(0, -2).detach())  # noqa: E731
            handles.append(block.get_submodule(twin).register_forward_pre_hook(hook))
    with torch.no_grad():
        for batch in random_batches(4):
            llama(batch.tokens)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(kept) for name, kept in seen.items()}


def plain_search(
    weight: Tensor, x: Tensor, *, stored_scale: bool, jitter: torch.Generator | None = None
) -> list[tuple[float, Tensor]]:
    """(loss, scale) of every exponent, in float64: arXiv 2306.00978 as modelopt 0.47 words it (model_calib.py:1470).

    Codes are rounded with the scale that will be stored, or (as modelopt does) with the group's amax / 7 in fp32.
    `jitter` moves scales by up to an ulp of fp32: codes that lie on a boundary then fall to either side.
    """
    weight, x = weight.double(), x.double()
    activity = x.abs().mean(0)
    relative = torch.empty_like(weight)
    for begin in range(0, weight.shape[1], GROUP):
        block = weight[:, begin : begin + GROUP].abs()
        relative[:, begin : begin + GROUP] = block / block.amax(1, keepdim=True)
    out = []
    for tenth in range(11):
        alpha = tenth / 10
        scale = (activity**alpha / relative.mean(0) ** (1 - alpha)).clamp(1e-4, 1e4)
        scale /= math.sqrt(float(scale.max() * scale.min()))
        if jitter is not None:
            scale *= 1 + (2 * torch.rand(scale.shape, generator=jitter, dtype=scale.dtype) - 1) * 2.0**-23
        error = torch.empty_like(weight)
        for begin in range(0, weight.shape[1], GROUP):
            here = slice(begin, begin + GROUP)
            scaled = (weight[:, here] * scale[here]).float()
            amax = scaled.abs().amax(1, keepdim=True)
            unit = formats.snap_amax("int4", amax) / 7 if stored_scale else amax / 7
            codes = (scaled / unit).round().clamp(-8, 7)
            error[:, here] = (codes * unit).double() / scale[here] - weight[:, here]
        out.append((float((x @ error.t()).pow(2).sum()), scale))
    return out


def twin_weight(llama: Any, name: str) -> Tensor:
    """The rows of the transformers modules that `name` stands for, in any order."""
    layer, kind = name.split(".", 3)[2:]
    block = llama.model.layers[int(layer)]
    return torch.cat([block.get_submodule(twin).weight.detach() for twin in TWINS[kind][1]])


def relative_difference(losses: list[tuple[float, float]]) -> float:
    return max(abs(a - b) / b for a, b in losses)


def floor_of_losses(folded: Folded, reordered: Folded) -> float:
    """What the order of sums makes of a loss."""
    return relative_difference(
        [
            pair
            for n in folded.choices
            for pair in zip(reordered.choices[n].losses, folded.choices[n].losses, strict=True)
        ]
    )


def test_the_search_equals_a_plain_loop(folded: Folded, reordered: Folded, llama: Any) -> None:
    """Exponents exactly, losses and scales to three times what the order of sums makes; a loss also to three times
    what an ulp of the scales makes of the plain loop's, which rounds in float64."""
    loss_floor = floor_of_losses(folded, reordered)
    scales = [(scale_of(reordered, name), scale_of(folded, name)) for name in folded.choices]
    scale_floor = max(float(((a - b) / b).abs().max()) for a, b in scales)
    inputs = inputs_of(llama)
    losses, differences, jitter = [], [], torch.Generator().manual_seed(7)
    assert len(folded.choices) == len(inputs) == 6
    for name, choice in folded.choices.items():
        found = plain_search(twin_weight(llama, name), inputs[name], stored_scale=True)
        exact = [loss for loss, _ in found]
        losses += list(zip(choice.losses, exact, strict=True))
        for _ in range(8):
            moved = plain_search(twin_weight(llama, name), inputs[name], stored_scale=True, jitter=jitter)
            loss_floor = max(loss_floor, relative_difference(list(zip([x for x, _ in moved], exact, strict=True))))
        best = min(range(11), key=lambda i: found[i][0])
        assert choice.alpha == best / 10, name
        differences.append(float((scale_of(folded, name) / found[best][1] - 1).abs().max()))
    print(f"losses {relative_difference(losses):.2g}, floor {loss_floor:.2g}; ", end="")
    print(f"scales {max(differences):.2g}, floor {scale_floor:.2g}")
    assert relative_difference(losses) <= 3 * loss_floor
    assert max(differences) <= 3 * scale_floor


def test_the_search_beside_modelopts(folded: Folded, reordered: Folded, llama: Any, session: Any) -> None:
    """modelopt's awq_lite on the same model and tokens finds the same exponents. Its losses are a mean per batch and
    are taken with a group scale of amax / 7 in fp32, ours is the fp16 scale that will be stored; the plain loop with
    modelopt's scale gives modelopt's losses. (It also searches o_proj, which we leave alone.)"""
    import modelopt.torch.quantization as mtq

    model, batches = megatron_twin(llama, session), random_batches(4)
    int4 = {"num_bits": 4, "block_sizes": {-1: GROUP, "type": "static"}}
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    entries += [{"quantizer_name": f"*{name}.weight_quantizer", "cfg": int4} for name in TWINS]
    config = {"quant_cfg": entries, "algorithm": {"method": "awq_lite", "debug": True}}
    mtq.quantize(model[0], config, lambda _: step.run_forward(model, batches, session))
    floor = floor_of_losses(folded, reordered)
    inputs = inputs_of(llama)
    ours, plain = [], []
    for name, choice in folded.choices.items():
        theirs = model[0].get_submodule(name).awq_lite
        weight = twin_weight(llama, name)
        elements_per_batch = NUM_TOKENS // len(batches) * len(weight)
        losses = [loss * elements_per_batch for loss in theirs.loss.values()]
        plain += list(
            zip(losses, [loss for loss, _ in plain_search(weight, inputs[name], stored_scale=False)], strict=True)
        )
        ours += list(zip(choice.losses, losses, strict=True))
        assert choice.alpha == round(theirs.best_alpha, 1), name
    print(f"losses: ours against modelopt's {relative_difference(ours):.2g}; ", end="")
    print(f"modelopt's against the plain loop {relative_difference(plain):.2g}, floor {floor:.2g}")
    assert relative_difference(plain) <= 3 * floor


def e2m1(value: Tensor) -> Tensor:
    """float64 -> the nearest of the sixteen numbers of E2M1, by looking at all of them; ties to the even code."""
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=value.dtype)
    distance = (value.abs()[..., None] - grid).abs()
    distance[..., 1::2] *= 1 + 1e-12  # of two that are as near the even one
    return grid[distance.argmin(-1)] * value.sign()


def nvfp4(value: Tensor) -> Tensor:
    """[n, in] as nvfp4 holds it: one scale for the tensor, an E4M3 one for each 16 of a row."""
    whole = (formats.snap_tensor_amax("nvfp4", value.abs().max().float()) / 2688).double()
    blocks = value.float().double().view(len(value), -1, 16)
    scale = (blocks.abs().amax(-1, keepdim=True) / 6 / whole).clamp(2.0**-9, 448).float().to(torch.float8_e4m3fn)
    unit = scale.double() * whole
    return (e2m1((blocks / unit).clamp(-6, 6)) * unit).view_as(value)


@pytest.mark.parametrize("activation", ["none", "nvfp4"])
def test_nvfp4_counts_the_rounding_of_weights_and_of_inputs(activation: str, llama: Any, session: Any) -> None:
    """Losses are those of a plain loop in float64, the folded model is the same one unquantised, and the exponents
    chosen leave less error than no scale at all where a channel of the inputs is an outlier."""
    with torch.no_grad():
        llama.model.layers[0].input_layernorm.weight[3] *= 30
    try:
        model, batches, inputs = megatron_twin(llama, session), random_batches(4), inputs_of(llama)
        rules = tuple(QuantRule(rule.pattern, "nvfp4", activation, 16) for rule in PLAN.rules)
        plan = QuantPlan("nvfp4", activation, "none", 16, "awq", rules)

        def forward_loop(_: nn.Module) -> None:
            step.run_forward(model, batches, session)

        before = step.token_logits(model, batches, session)
        choices = awq.search_and_fold(model, plan, forward_loop, calib_tokens=NUM_TOKENS, awq_tokens=NUM_TOKENS)
        after = step.token_logits(model, batches, session)
        assert before is not None and after is not None
        assert float((before - after).abs().max()) < 1e-4 * float(before.abs().max())
        for name, choice in choices.items():
            weight, x = twin_weight(llama, name).double(), inputs[name].double()
            relative = weight.abs().view(len(weight), -1, 16) / weight.abs().view(len(weight), -1, 16).amax(-1, True)
            losses = []
            for tenth in range(11):
                scale = x.abs().mean(0) ** (tenth / 10) / relative.view_as(weight).mean(0) ** (1 - tenth / 10)
                scale /= math.sqrt(float(scale.max() * scale.min()))
                seen = nvfp4(x / scale) * scale if activation == "nvfp4" else x
                losses.append(float((seen @ (nvfp4(weight * scale) / scale).t() - x @ weight.t()).pow(2).sum()))
            # Sums in fp32; a code on a boundary would count for more.
            apart = relative_difference(list(zip(choice.losses, losses, strict=True)))
            print(f"{name}: losses {apart:.1e} apart, exponent {choice.alpha}")
            assert apart < 1e-5
            if name == "decoder.layers.0.self_attention.linear_qkv":
                unscaled = (nvfp4(x) if activation == "nvfp4" else x) @ nvfp4(weight).t() - x @ weight.t()
                assert min(choice.losses) < 0.9 * float(unscaled.pow(2).sum())
    finally:
        with torch.no_grad():
            llama.model.layers[0].input_layernorm.weight[3] /= 30
