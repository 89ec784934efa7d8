"""FP8 products in the forward pass: operands, values and gradients against plain fp32 of fake-quantised operands.

torch._scaled_mm runs on a CPU too, so that all but the speed and the grouped scales of int4 is tried here; CUDA has
tests/gpu/test_fp8_gemm_cuda.py.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from test_direct import RECIPES, loss_and_gradients, quantised, watched
from tiny_megatron import random_batches
from torch import Tensor

from megatron_edge.artifact import formats
from megatron_edge.compose import compose
from megatron_edge.contracts import InputError
from megatron_edge.model.build import chunks_of
from megatron_edge.model.fp8_linear import linear_of_codes, product
from megatron_edge.quantize import adapters, apply, fp8_gemm, kernels
from megatron_edge.train import step

# Relative differences in the norm. An FP8 product multiplies code x scale itself and is rounded to bf16 once (2^-8 at
# most, 1.7e-3 in the mean); fake quantisation rounds both operands to bf16 as well. Those roundings average out among
# many values, for which LIMIT is demanded. They do not where nearly all values are the one that saturates.
ROUNDED_ONCE = 2.0**-8
LIMIT = 4e-3
LIMIT_OF_ONE_VALUE = 3 * ROUNDED_ONCE
W4A8 = ["quant.weight=int4", "quant.activation=fp8", "quant.group_size=32"]


def relative(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


def awkward(*shape: int) -> Tensor:
    """Ordinary numbers, zeros of both signs, a row of zeros, numbers too small for a code, and others beyond 1."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    x[0] = 0.0
    x[1, ::3] = -0.0
    x[2, ::2] = -1e-7
    x[3] *= 30
    return x


@pytest.mark.parametrize("maximum", [2.0, 0.05, 0.0, 448.0], ids=["ordinary", "saturated", "zero", "unit scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operands_are_the_stored_codes(maximum: float, dtype: torch.dtype) -> None:
    x = awkward(48, 64).to(dtype)
    amax = formats.snap_amax("fp8", torch.tensor(maximum))
    codes, scale = formats.fp8_operand("fp8", x, amax)
    stored = formats.encode("fp8", x, amax)
    assert codes.dtype is torch.float8_e4m3fn and scale.shape == ()
    assert codes.float().equal(stored.codes.float()) and scale.equal(stored.scale)
    assert not torch.signbit(codes.float()[codes.float() == 0]).any()
    for kind in (torch.float32, torch.bfloat16):
        value = formats.fp8_values(codes, scale, kind)
        expected = formats.decode(stored, kind)
        assert value.dtype is kind and value.equal(expected) and not torch.signbit(value[value == 0]).any()
    assert formats.fp8_values(codes, scale, dtype).equal(formats.fake_quantize_input("fp8", x, amax))


def test_int4s_codes_are_numbers_of_e4m3() -> None:
    weight = awkward(16, 96)
    amax = formats.snap_amax("int4", formats.weight_amax("int4", weight, 32))
    codes, scale = formats.fp8_operand("int4", weight, amax, 32)
    stored = formats.encode("int4", weight, amax, 32)
    assert codes.float().equal(formats.unpacked_codes(stored).float() - 8)
    assert scale.is_contiguous() and scale.equal(stored.scale.float().t())
    values = codes.float() * scale.t().repeat_interleave(32, dim=1)
    assert values.equal(formats.fake_quantize("int4", weight, amax, 32))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("maximum", "limit"),
    [(4.0, LIMIT), (1.0, LIMIT), (0.3, LIMIT_OF_ONE_VALUE)],
    ids=["ordinary", "a third saturated", "nearly all saturated"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradients(dtype: torch.dtype, maximum: float, limit: float, with_bias: bool, session: Any) -> None:
    """One layer, x [s, b, in], against fp32 products of the fake-quantised operands, straight through."""
    x, weight = awkward(24, 2, 64).to(dtype).requires_grad_(), (awkward(48, 64) * 0.1).to(dtype).requires_grad_()
    bias = torch.randn(48).to(dtype).requires_grad_() if with_bias else None
    x_amax = formats.snap_tensor_amax("fp8", torch.tensor(maximum))
    weight_amax = formats.snap_amax("fp8", weight.detach().abs().max() / 2)
    of_x, of_weight = ({"role": role, "format": "fp8", "group_size": 0} for role in ("input", "weight"))
    operand = kernels.fp8_operand(of_x, x.detach(), x_amax)[:2]
    of_weight_operand = kernels.fp8_operand(of_weight, weight.detach(), weight_amax, with_values=True)
    out = linear_of_codes()(
        x, weight, *operand, *of_weight_operand, kernels.fp8_values, bias, False, False, False, None, None, None
    )
    x_value = formats.fake_quantize_input("fp8", x.detach(), x_amax).float()
    weight_value = formats.fake_quantize("fp8", weight.detach(), weight_amax).float()
    expected = x_value @ weight_value.t() + (0 if bias is None else bias.detach().float())
    assert out.dtype is dtype and out.shape == expected.shape
    apart = relative(out, expected)
    if bias is None:
        whole = [formats.fp8_values(*one[:2], torch.float32) for one in (operand, of_weight_operand)]
        once = relative(out, whole[0] @ whole[1].t())
        print(f"from fake-quantised operands in {dtype} {apart:.2e}, from code x scale {once:.2e}")
        assert once < (1e-6 if dtype is torch.float32 else ROUNDED_ONCE)
    assert apart < (1e-6 if dtype is torch.float32 else limit)
    gradient = torch.randn(out.shape).to(dtype)
    out.backward(gradient)
    wide = gradient.float().flatten(0, 1)
    assert x.grad is not None and weight.grad is not None
    noise = 1e-6 if dtype is torch.float32 else ROUNDED_ONCE
    assert relative(x.grad.flatten(0, 1), wide @ weight_value) < noise
    assert relative(weight.grad, wide.t() @ x_value.flatten(0, 1)) < noise
    if bias is not None and bias.grad is not None:
        assert relative(bias.grad, wide.sum(0)) < noise


def test_zeros_and_a_dead_quantizer() -> None:
    codes, scale = formats.fp8_operand("fp8", torch.zeros(16, 32), torch.tensor(0.0))
    weight_codes, weight_scale = formats.fp8_operand("fp8", torch.randn(16, 32), torch.tensor(3.0))
    for dtype in (torch.float32, torch.bfloat16):
        assert product(codes, scale, weight_codes, weight_scale, dtype).equal(torch.zeros(16, 16, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_models_step(llama: Any, session: Any, dtype: torch.dtype) -> None:
    model = quantised(llama, session, RECIPES["fp8"], dtype).train()
    expected, theirs, kinds = loss_and_gradients(model, session)
    assert "LinearOfCodesBackward" not in kinds
    assert fp8_gemm.use(model) == {"used": 8}
    losses, gradients, kinds = loss_and_gradients(model, session)
    assert "LinearOfCodesBackward" in kinds and "LinearOfValuesBackward" in kinds  # the output layer has no such input
    again, _, _ = loss_and_gradients(model, session)
    assert losses.equal(again), "operands are made again in the next step"
    assert gradients.keys() == theirs.keys() and len(gradients) > 10
    if dtype is torch.float32:
        assert relative(losses, expected) < 1e-6
        assert max(relative(gradient, theirs[name]) for name, gradient in gradients.items()) < 1e-5
        return
    # In bf16 each layer's rounding moves the next one's codes: both are as far from fp32 as bf16 is.
    exact, of_exact, _ = loss_and_gradients(quantised(llama, session, RECIPES["fp8"], torch.float32).train(), session)

    def all_of(found: dict[str, Tensor]) -> Tensor:
        return torch.cat([found[name].flatten().float() for name in of_exact])

    apart, noise = relative(all_of(gradients), all_of(of_exact)), relative(all_of(theirs), all_of(of_exact))
    print(f"losses {relative(losses, exact):.1e}, noise {relative(expected, exact):.1e}")
    print(f"gradients {apart:.3f}, noise {noise:.3f}")
    assert relative(losses, exact) < 3 * relative(expected, exact)
    assert apart < 1.5 * noise


def test_only_while_a_quantised_layer_is_trained(llama: Any, session: Any) -> None:
    model = quantised(llama, session, RECIPES["fp8"], torch.float32)
    before = step.evaluate(model, random_batches(), session)
    fp8_gemm.use(model)
    model.train()
    assert step.evaluate(model, random_batches(), session) == before
    with apply.quantizers_off(model):
        assert "LinearOfCodesBackward" not in loss_and_gradients(model, session)[2]
    assert "LinearOfCodesBackward" in loss_and_gradients(model, session)[2]
    model.eval()
    assert "LinearOfCodesBackward" not in loss_and_gradients(model, session)[2]
    model.train()
    for quantizer in watched(model):  # as calibration does: modelopt's way
        quantizer.register_forward_hook(lambda *_: None)
    assert "LinearOfCodesBackward" not in loss_and_gradients(model, session)[2]


def test_what_is_not_covered_is_said(llama: Any, session: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="megatron_edge")
    logging.getLogger("megatron_edge").propagate = True
    model = quantised(llama, session, RECIPES["fp8"], torch.float32)
    chunks_of(model)[0].decoder.layers[0].mlp.linear_fc2.weight.requires_grad_(False)
    assert fp8_gemm.use(model) == {"used": 7, "the weight is frozen": 1}
    assert "of 7 linear layers of rank 0; 1 multiply fake-quantised values: the weight is frozen" in caplog.text
    assert "use_fast_accum=False" in caplog.text
    (reason,) = fp8_gemm.use(quantised(llama, session, W4A8, torch.float32))
    assert "int4 in groups of 32" in reason
    assert fp8_gemm.use(quantised(llama, session, RECIPES["int4"], torch.float32)) == {}
    adapted = quantised(llama, session, RECIPES["fp8"], torch.float32)
    adapters.attach(adapted, session, rank=2, alpha=4.0, seed=1)
    assert fp8_gemm.use(adapted) == {"adapters take the gradient of the weight": 8}


def test_forced_where_the_machine_has_none() -> None:
    from megatron_edge.jobs.preflight import uses_fp8_products

    def train(*arguments: str) -> Any:
        return compose(["train.precision=bf16", *arguments]).train

    assert not uses_fp8_products(train("train.fp8_gemm=false"))
    if torch.cuda.is_available():
        return
    assert not uses_fp8_products(train())
    with pytest.raises(InputError, match=r"train.fp8_gemm=true: there is no CUDA device; allowed here: null, false"):
        uses_fp8_products(train("train.fp8_gemm=true"))
