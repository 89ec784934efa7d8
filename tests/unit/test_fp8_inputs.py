"""Norms and SwiGLU that write the operand of the linear layer after them, against the plain function followed by that
layer's own rounding: the same bits, forward and backward. CUDA has tests/gpu/test_inputs_cuda.py.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_direct import RECIPES, loss_and_gradients, quantised
from test_fp8_gemm import awkward
from torch import Tensor, nn

from megatron_edge.artifact import formats
from megatron_edge.model import fused
from megatron_edge.model.build import chunks_of
from megatron_edge.model.fp8_linear import linear_of_codes
from megatron_edge.model.layers import read_by_one
from megatron_edge.quantize import apply, fp8_gemm, kernels, written_inputs

EPS = 1e-6
OURS = {"_RoundedRMSNormBackward", "_RoundedSwiGLUBackward"}
NO_SETTINGS = (None, False, False, False, None, None, None)
INPUT = {"role": "input", "format": "fp8", "group_size": 0}


def calibrated(amax: float, fmt: str = "fp8") -> Any:
    from modelopt.torch.quantization.nn import TensorQuantizer

    quantizer = TensorQuantizer()
    quantizer.backend_extra_args = INPUT | {"format": fmt}
    apply.set_amax(quantizer, torch.tensor(amax))
    return quantizer


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Bits, a NaN being equal to a NaN."""
    assert ours.dtype is theirs.dtype and ours.shape == theirs.shape
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[ours.element_size()]
    equal = ours.contiguous().view(integer) == theirs.contiguous().view(integer)
    return bool((equal | (ours.float().isnan() & theirs.float().isnan())).all())


def written_by(what: str, quantizer: Any) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """(ours, the plain one) of the same inputs."""
    if what == "norm":
        return lambda x, w: written_inputs.rms_norm(quantizer, x, w, EPS), lambda x, w: fused.rms_norm(x, w, EPS)
    return lambda x: written_inputs.swiglu(quantizer, x), fused.swiglu


def inputs_of(what: str, dtype: torch.dtype, spoilt: bool) -> list[Tensor]:
    x = awkward(24, 2, 96)
    if spoilt:
        x[4, 0, 3], x[5, 1, 7], x[6, 0, 50], x[7, 0, 90] = torch.nan, torch.inf, -torch.inf, torch.nan
    inputs = [x, 1 + torch.linspace(-0.5, 0.5, 96)] if what == "norm" else [x]
    return [one.to(dtype).requires_grad_() for one in inputs]


@pytest.mark.parametrize("maximum", [4.0, 0.3, 0.0], ids=["ordinary", "saturated", "zero"])
@pytest.mark.parametrize("spoilt", [False, True], ids=["finite", "not finite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["norm", "swiglu"])
def test_bits_of_the_two_steps(what: str, dtype: torch.dtype, spoilt: bool, maximum: float) -> None:
    quantizer = calibrated(maximum)
    ours, plain = written_by(what, quantizer)
    inputs, again = (inputs_of(what, dtype, spoilt) for _ in range(2))
    value, result = ours(*inputs), plain(*again)
    codes, scale, expected = kernels.fp8_operand(INPUT, result.detach(), quantizer._buffers["_amax"], with_values=True)
    assert expected is not None
    written = written_inputs.taken(value, quantizer)
    assert written is not None and written_inputs.taken(value, quantizer) is None
    assert same(written[0], codes) and same(written[1], scale) and same(value, expected)
    assert same(kernels.fp8_values(codes, scale, dtype), expected), "what backward made of codes"
    gradient = awkward(*value.shape).to(dtype)
    for mine, theirs in zip(
        torch.autograd.grad(value, inputs, gradient), torch.autograd.grad(result, again, gradient), strict=True
    ):
        assert same(mine, theirs)
    assert spoilt == bool(value.isnan().any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_rounded_again_is_itself(dtype: torch.dtype) -> None:
    """What happens to one that reaches its layer without its codes."""
    x = torch.arange(-448, 449, dtype=torch.float32) * torch.logspace(-4, 4, 97, base=2)[:, None]
    for maximum in torch.logspace(-3, 3, 41).tolist():
        for amax in (formats.snap_tensor_amax("fp8", torch.tensor(maximum)), torch.tensor(maximum)):
            codes, _, value = kernels.fp8_operand(INPUT, (x * maximum / 448).to(dtype), amax, with_values=True)
            assert value is not None
            twice, _, again = kernels.fp8_operand(INPUT, value, amax, with_values=True)
            assert again is not None and same(twice, codes) and same(again, value)


def test_codes_of_another_quantizer_are_not_taken() -> None:
    mine, other = calibrated(4.0), calibrated(4.0)
    value = written_inputs.swiglu(mine, awkward(8, 32))
    assert written_inputs.taken(value, other) is None and written_inputs.taken(value, mine) is None, "and do not stay"
    assert written_inputs.taken(torch.zeros(2), mine) is None


@pytest.mark.parametrize("what", ["norm", "swiglu"])
def test_codes_live_until_the_product(what: str) -> None:
    """Backward keeps the value, in the layer's dtype, and nothing of one byte."""
    quantizer, kept = calibrated(4.0), []
    of_weight = {"role": "weight", "format": "fp8", "group_size": 0}
    inputs = inputs_of(what, torch.bfloat16, False)
    weight = torch.randn(16, 96 if what == "norm" else 48).bfloat16().requires_grad_()
    operand = kernels.fp8_operand(of_weight, weight.detach(), weight.detach().abs().max().float(), with_values=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        value = written_by(what, quantizer)[0](*inputs)
        written = written_inputs.taken(value, quantizer)
        assert written is not None
        seen = weakref.ref(written[0])
        out = linear_of_codes()(value, weight, *written, *operand, None, *NO_SETTINGS)
        del written
    assert seen() is None and out.requires_grad
    assert not any(x.dtype is torch.float8_e4m3fn for x in kept)
    assert sum(x.data_ptr() == value.data_ptr() for x in kept) == 1


def owners(model: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    for module in model.modules():
        yield from read_by_one(module)


def writing_nothing(model: nn.Module) -> nn.Module:
    for owner, name, _ in owners(model):
        setattr(owner, name, fused.rms_norm if name == "function" else fused.swiglu)
    return model


def check_bits(model: nn.Module, session: Any, linear: str) -> None:
    """`model`, told to write, beside itself without; `linear`: the node of its layers."""
    losses, gradients, kinds = loss_and_gradients(model, session)
    assert kinds >= OURS
    expected, theirs, kinds = loss_and_gradients(writing_nothing(model), session)
    assert not kinds & OURS and linear in kinds
    assert losses.equal(expected) and losses.isfinite().all()
    assert gradients.keys() == theirs.keys() and len(gradients) > 10
    for name, gradient in gradients.items():
        assert gradient.equal(theirs[name]), name


def check_states(model: nn.Module, kinds: Callable[[], set[str]], *more: list[nn.Module]) -> None:
    """Who looks at a layer's input, or has it take modelopt's way (a hook on each of `more` too), sees the plain
    result."""
    model.eval()
    assert not kinds()
    model.train()
    assert kinds() == OURS
    with apply.quantizers_off(model):
        assert not kinds()
    watched = [[linear for _, _, linear in owners(model)], [owner for owner, _, _ in owners(model)]]
    for modules in (*watched, [linear.output_quantizer for linear in watched[0]], *more):
        handles = [module.register_forward_hook(lambda *_: None) for module in modules]
        assert not kinds()
        for handle in handles:
            handle.remove()
    assert kinds() == OURS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_models_step_has_the_same_bits(
    llama: Any, session: Any, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="megatron_edge")
    logging.getLogger("megatron_edge").propagate = True
    model = quantised(llama, session, RECIPES["fp8"], dtype).train()
    fp8_gemm.use(model)
    written_inputs.use(model)
    assert "a norm or SwiGLU writes 6 of the inputs" in caplog.text
    check_bits(model, session, linear="LinearOfCodesBackward")


def test_a_value_without_its_codes(llama: Any, session: Any) -> None:
    """As a checkpoint of the layer alone would hand it on: the layer makes them again, and keeps them."""
    model = quantised(llama, session, RECIPES["fp8"], torch.float32).train()
    fp8_gemm.use(model)
    written_inputs.use(model)
    layer = chunks_of(model)[0].decoder.layers[0]
    x, found = torch.randn(8, 2, layer.config.hidden_size), []
    for is_whole in (True, False):
        value = layer.pre_mlp_layernorm(x)
        assert "_written" in value.__dict__
        out = layer.mlp.linear_fc1(value if is_whole else value.view_as(value))[0]
        assert ("_written" in value.__dict__) != is_whole and "_written" not in layer.mlp.linear_fc1.__dict__
        out.square().sum().backward()
        found.append((out.detach(), layer.mlp.linear_fc1.weight.grad, layer.pre_mlp_layernorm.weight.grad))
        model.zero_grad(set_to_none=True)
    assert all(mine.equal(theirs) for mine, theirs in zip(*found, strict=True))


def test_only_where_the_layer_takes_them(llama: Any, session: Any) -> None:
    model = quantised(llama, session, RECIPES["fp8"], torch.float32)
    fp8_gemm.use(model)
    written_inputs.use(model)

    def kinds() -> set[str]:
        return loss_and_gradients(model, session)[2] & OURS

    check_states(model, kinds)
    for layer in chunks_of(model)[0].decoder.layers:
        layer.mlp.linear_fc2.weight.requires_grad_(False)
    assert kinds() == {"_RoundedRMSNormBackward"}, "the weight is frozen"
    fp8_gemm.use(model)
    written_inputs.use(model)
    for owner, name, linear in owners(model):
        assert (getattr(owner, name) is fused.swiglu) == (linear is getattr(owner, "linear_fc2", None))
    empty = chunks_of(model)[0].decoder.layers[0].pre_mlp_layernorm(torch.empty(0, 2, llama.config.hidden_size))
    assert empty.shape == (0, 2, llama.config.hidden_size) and "_written" not in empty.__dict__
