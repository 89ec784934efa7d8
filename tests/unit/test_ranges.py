"""Ranges smaller than the maximum: percentiles against torch's own, least errors and clipping against plain loops."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny_megatron import megatron_twin, random_batches
from torch import Tensor, nn

from megatron_edge.artifact import formats
from megatron_edge.contracts import QuantPlan, QuantRule
from megatron_edge.quantize import apply, clip, ranges
from megatron_edge.train import step

GROUP = 32


def plan_of(weight: str, activation: str, kv: str, **changes: Any) -> QuantPlan:
    group = {"int4": GROUP, "nvfp4": 16}.get(weight, 0)
    rules = (QuantRule("*.linear_*", weight, activation, group),)
    return QuantPlan(weight, activation, kv, group, "max", rules, **changes)


def calibrated(llama: Any, session: Any, plan: QuantPlan) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with its quantizers, and everything that each data quantizer saw unquantised."""
    model, batches, seen = megatron_twin(llama, session), random_batches(4), {}
    matches = apply.insert_quantizers(model, plan)
    report = apply.calibrate(model, plan, matches, lambda _: step.run_forward(model, batches, session))
    quantizers = apply.enabled_quantizers(model)
    assert set(report.amax) == {name for name, q in quantizers.items() if hasattr(q, "_amax")}
    handles = []
    for name, quantizer in quantizers.items():
        if not name.endswith("weight_quantizer"):
            kept = seen.setdefault(name, [])
            handles.append(quantizer.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0])))
    with apply.quantizers_off(model):
        step.run_forward(model, batches, session)
    for handle in handles:
        handle.remove()
    return model, {name: torch.cat([x.reshape(-1, x.shape[-1]) for x in kept]) for name, kept in seen.items()}


@pytest.mark.parametrize(("activation", "weight", "kv"), [("fp8", "fp8", "fp8"), ("int8", "int8", "nvfp4")])
@pytest.mark.parametrize("percent", [99.0, 90.0, 100.0])
def test_percentiles_are_torchs_quantiles(
    llama: Any, session: Any, activation: str, weight: str, kv: str, percent: float
) -> None:
    """To a bin of the histogram (a 4096th of the maximum), then snapped (0.7%). Weights keep their maxima."""
    plan = plan_of(weight, activation, kv, calibration="percentile", percentile=percent)
    model, seen = calibrated(llama, session, plan)
    assert len(seen) == 2 * (4 + 2)
    for name, x in seen.items():
        quantizer, magnitude = apply.enabled_quantizers(model)[name], x.abs().float().flatten()
        below, above = (float(magnitude.quantile(percent / 100, interpolation=kind)) for kind in ("lower", "higher"))
        step_size = float(magnitude.max()) / ranges.BINS
        assert (below - step_size) * 0.993 <= float(quantizer._amax) <= above + step_size
        fmt = quantizer.backend_extra_args["format"]
        assert torch.equal(formats.snap_tensor_amax(fmt, quantizer._amax), quantizer._amax)
    name = "decoder.layers.0.self_attention.linear_proj.weight_quantizer"
    amax = formats.weight_amax(weight, model[0].get_parameter(name.removesuffix("_quantizer")))
    assert torch.equal(apply.enabled_quantizers(model)[name]._amax, formats.snap_amax(weight, amax))


@pytest.mark.parametrize(
    ("weight", "activation", "kv"), [("int4", "fp8", "fp8"), ("int8", "int8", "nvfp4"), ("nvfp4", "nvfp4", "none")]
)
def test_least_errors_equal_a_plain_loop(llama: Any, session: Any, weight: str, activation: str, kv: str) -> None:
    plan = plan_of(weight, activation, kv, calibration="mse")
    model, seen = calibrated(llama, session, plan)
    shrunk = 0
    for name, quantizer in apply.enabled_quantizers(model).items():
        fmt = quantizer.backend_extra_args["format"]
        if name.endswith("weight_quantizer"):
            x = model[0].get_parameter(name.removesuffix("_quantizer")).detach()
            raw = formats.weight_amax(fmt, x, plan.group_size)
            tried = [formats.snap_amax(fmt, raw * part) for part in ranges.SHRINK]
            values = [formats.fake_quantize(fmt, x, amax, plan.group_size) for amax in tried]
            per_scale = x.numel() // raw.numel()
        else:
            x, raw = seen[name], seen[name].abs().max().float()
            tried = [formats.snap_tensor_amax(fmt, raw * part) for part in ranges.SHRINK]
            values = [formats.fake_quantize_input(fmt, x, amax) for amax in tried]
            per_scale = x.numel()
        errors = [[float(e) for e in (v.double() - x.double()).square().view(-1, per_scale).sum(1)] for v in values]
        best = [min(range(len(tried)), key=lambda i, at=at: errors[i][at]) for at in range(len(errors[0]))]
        expected = [float(tried[i].reshape(-1)[at]) for at, i in enumerate(best)]
        assert quantizer._amax.reshape(-1).tolist() == expected, name
        shrunk += sum(i > 0 for i in best)
    assert shrunk, "every maximum was kept: the test would show nothing"


def test_clipping_equals_a_plain_loop_and_lowers_the_error_of_outputs() -> None:
    generator = torch.Generator().manual_seed(2)
    weight, x = (torch.randn(n, 96, generator=generator) for n in (12, 200))
    weight[3, 40] = 9.0  # worth clipping, as its inputs are small
    x[:, 40] *= 0.01
    blocks = x.view(200, 3, GROUP).transpose(0, 1)
    found = clip.least_error(weight, torch.bmm(blocks.transpose(1, 2), blocks), GROUP)
    raw = formats.weight_amax("int4", weight, GROUP)
    for row in range(12):
        for group in range(3):
            here = slice(group * GROUP, (group + 1) * GROUP)
            costs = []
            for part in clip.PARTS:
                amax = formats.snap_amax("int4", raw[row, group] * part)
                error = formats.fake_quantize("int4", weight[row : row + 1, here], amax, GROUP) - weight[row, here]
                costs.append((float((x[:, here].double() @ error.double().T).square().sum()), float(amax)))
            assert float(found[row, group]) == min(costs, key=lambda cost: cost[0])[1]
    assert found[3, 1] <= 0.6 * raw[3, 1] and (found <= raw).all()
    unseen = clip.least_error(weight, torch.zeros(3, GROUP, GROUP), GROUP)
    assert torch.equal(unseen, formats.snap_amax("int4", raw))


def test_clipped_maxima_reach_the_quantizers_and_cost_less(llama: Any, session: Any) -> None:
    errors, batches = {}, random_batches(4)
    for clips in (False, True):
        plan = dataclasses.replace(plan_of("int4", "none", "none"), algorithm="awq_clip" if clips else "max")
        model = megatron_twin(llama, session)
        plain = step.token_logits(model, batches, session)

        def forward_loop(_: nn.Module, model: nn.Module = model) -> None:
            step.run_forward(model, batches, session)

        clipped = clip.clip_weights(model, plan, forward_loop) if clips else {}
        apply.calibrate(model, plan, apply.insert_quantizers(model, plan), forward_loop, clipped)
        quantizers = apply.enabled_quantizers(model)
        assert not clips or set(clipped) == set(quantizers)
        for name, amax in clipped.items():
            assert torch.equal(quantizers[name]._amax.view_as(amax), amax)
        quantised = step.token_logits(model, batches, session)
        assert plain is not None and quantised is not None
        errors[clips] = float((quantised - plain).square().mean().sqrt())
    print(f"rms logit difference {errors[False]:.3g} without, {errors[True]:.3g} with clipping")
    assert errors[True] < errors[False]
