"""Norms and SwiGLU that write the nvfp4 value which the linear layer after them multiplies, against the plain function
followed by that layer's own rounding: the same bits. CUDA has tests/gpu/test_nvfp4_inputs_cuda.py.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from test_direct import RECIPES, loss_and_gradients, quantised
from test_fp8_gemm import awkward
from test_fp8_inputs import OURS, calibrated, check_bits, check_states, inputs_of, owners, same, written_by
from tiny_megatron import random_batches
from torch import Tensor

from megatron_edge.artifact import formats
from megatron_edge.compose import compose
from megatron_edge.model import fused
from megatron_edge.model.build import chunks_of, named_shards
from megatron_edge.quantize import adapters, kernels, written_inputs
from megatron_edge.train import step


@pytest.mark.parametrize("maximum", [4.0, 0.3, 0.0], ids=["ordinary", "saturated", "zero"])
@pytest.mark.parametrize("spoilt", [False, True], ids=["finite", "not finite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["norm", "swiglu"])
def test_bits_of_the_two_steps(what: str, dtype: torch.dtype, spoilt: bool, maximum: float) -> None:
    quantizer = calibrated(maximum, "nvfp4")
    ours, plain = written_by(what, quantizer)
    inputs, again = (inputs_of(what, dtype, spoilt) for _ in range(2))
    value, result = ours(*inputs), plain(*again)
    assert written_inputs.taken(value, quantizer) == () and written_inputs.taken(value, quantizer) is None
    assert same(value, formats.fake_quantize_input("nvfp4", result.detach(), quantizer._buffers["_amax"]))
    gradient = awkward(*value.shape).to(dtype)
    for mine, theirs in zip(
        torch.autograd.grad(value, inputs, gradient), torch.autograd.grad(result, again, gradient), strict=True
    ):
        assert same(mine, theirs)


def test_a_value_rounded_again_may_be_another() -> None:
    """So that one which comes rounded must say so: where a block's scale is a subnormal number of E4M3, its largest
    value becomes less than 6 steps."""
    x, amax = torch.zeros(16), torch.tensor(2688.0)
    x[0] = 9 * 2.0**-9
    value = formats.fake_quantize_input("nvfp4", x, amax)
    again = formats.fake_quantize_input("nvfp4", value, amax)
    assert (value[0], again[0]) == (8 * 2.0**-9, 6 * 2.0**-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_models_step_has_the_same_bits(
    llama: Any, session: Any, dtype: torch.dtype, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="megatron_edge")
    logging.getLogger("megatron_edge").propagate = True
    roles, quantise = [], kernels.fake_quantize

    def counted(args: dict[str, Any], *others: Any) -> Tensor:
        roles.append(args["role"])
        return quantise(args, *others)

    monkeypatch.setattr(kernels, "fake_quantize", counted)
    model = quantised(llama, session, RECIPES["nvfp4"], dtype).train()
    assert written_inputs.use(model) == 6
    assert "a norm or SwiGLU writes 6 of the inputs" in caplog.text
    roles.clear()
    losses, _, kinds = loss_and_gradients(model, session)
    assert kinds >= OURS and losses.isfinite().all()
    assert roles.count("input") == 2 * 8, "each once, in each micro-batch, by the norm, the SwiGLU or the layer"
    check_bits(model, session, linear="LinearOfValuesBackward")


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_weights_after_steps(llama: Any, session: Any, recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, written, write = [], [], kernels.rms_norm_values
    monkeypatch.setattr(kernels, "rms_norm_values", lambda *inputs: (written.append(1), write(*inputs))[1])
    for writes in (True, False):
        model = quantised(llama, session, RECIPES["nvfp4"], torch.float32)
        if recompute == "full":
            config = chunks_of(model)[0].config
            config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
        wrapped, optimizer = step.make_trainable(model, compose(["train.steps=8"]).train, torch.float32)
        if writes:
            assert written_inputs.use(wrapped) == 6
        results = [step.train_step(wrapped, optimizer, random_batches(), session, step.LABELS) for _ in range(3)]
        evaluated = step.evaluate(wrapped, random_batches(), session)
        weights = {name: param.detach().clone() for name, param in named_shards(wrapped).items()}
        found.append(([(one.loss, one.gradient_norm) for one in results], evaluated, weights))
    (ours, mine, weights), (plain, theirs, others) = found
    assert len(written) == (2 if recompute == "full" else 1) * 3 * 2 * 4, "steps, micro-batches, norms"
    assert ours == plain and mine == theirs and ours[0][0] != ours[2][0]
    assert all(weight.equal(others[name]) for name, weight in weights.items())


def test_only_where_the_layer_takes_them(llama: Any, session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantised(llama, session, RECIPES["nvfp4"], torch.float32)
    written_inputs.use(model)

    def kinds() -> set[str]:
        return loss_and_gradients(model, session)[2] & OURS

    linears = [linear for _, _, linear in owners(model)]
    check_states(model, kinds, [linear.input_quantizer for linear in linears])
    for linear in linears:
        linear.input_quantizer.backend_extra_args = linear.input_quantizer.backend_extra_args | {"format": "int8"}
    assert not kinds(), "another format than it was told of"
    for linear in linears:
        linear.input_quantizer.backend_extra_args = linear.input_quantizer.backend_extra_args | {"format": "nvfp4"}
    for layer in chunks_of(model)[0].decoder.layers:
        layer.mlp.linear_fc2.weight.requires_grad_(False)
    assert kinds() == {"_RoundedRMSNormBackward"}, "the weight is frozen"
    monkeypatch.setattr(written_inputs, "VALUES_OF", ())
    assert written_inputs.use(model) == 0
    assert all(getattr(owner, name) in (fused.rms_norm, fused.swiglu) for owner, name, _ in owners(model))


@pytest.mark.parametrize("recipe", ["int4", "fp8", "int8"])
def test_other_formats_are_as_they_were(llama: Any, session: Any, recipe: str) -> None:
    """Without FP8 products."""
    model = quantised(llama, session, RECIPES[recipe], torch.float32).train()
    assert written_inputs.use(model) == 0
    assert all(getattr(owner, name) in (fused.rms_norm, fused.swiglu) for owner, name, _ in owners(model))


def test_adapters(llama: Any, session: Any) -> None:
    """They take modelopt's way, to lead on the gradient of the weight."""
    model = quantised(llama, session, RECIPES["nvfp4"], torch.float32).train()
    adapters.attach(model, session, rank=2, alpha=4.0, seed=1)
    written_inputs.use(model)
    assert not loss_and_gradients(model, session)[2] & OURS


def test_a_layer_that_would_round_again_says_so(llama: Any, session: Any) -> None:
    model = quantised(llama, session, RECIPES["nvfp4"], torch.float32).train()
    written_inputs.use(model)
    layer = chunks_of(model)[0].decoder.layers[0]
    value = layer.pre_mlp_layernorm(torch.randn(8, 2, layer.config.hidden_size))
    layer.mlp.linear_fc1.weight.requires_grad_(False)
    with pytest.raises(AssertionError, match="another value"):
        layer.mlp.linear_fc1(value)
