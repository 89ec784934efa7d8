"""formats against modelopt's CPU paths, codes, scales and values bit for bit: fake quantisers and packed tensors."""

from __future__ import annotations

import pytest
import torch
from format_cases import DTYPES, amax_of, equal_bits, weight_of_every_kind

from megatron_edge.artifact import formats


@pytest.fixture(scope="module")
def modelopt():
    """Importing it takes about 15 s."""
    from modelopt.torch.quantization import tensor_quant
    from modelopt.torch.quantization.qtensor import FP8QTensor, INT4QTensor, INT8QTensor, NVFP4QTensor

    class Paths:
        int_fake = staticmethod(tensor_quant._tensor_quant)
        fp8_fake = staticmethod(tensor_quant.fp8_eager)
        int4, int8, fp8, nvfp4 = INT4QTensor, INT8QTensor, FP8QTensor, NVFP4QTensor

    return Paths


@pytest.mark.parametrize("clip", [1.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int4_equals_modelopts_fake_quantiser(modelopt, dtype, clip):
    weight = weight_of_every_kind(dtype)
    amax = amax_of("int4", weight, clip)
    theirs = modelopt.int_fake(weight.view(-1, 64), amax.view(-1, 1), 4, False, False).view_as(weight)
    encoded = formats.encode("int4", weight, amax, 64)
    assert torch.equal(formats.fake_quantize("int4", weight, amax, 64), theirs)
    scale = encoded.scale.float().repeat_interleave(64, 1)
    fp32 = modelopt.int_fake(weight.float().view(-1, 64), amax.view(-1, 1), 4, False, False).view_as(weight)
    codes = formats.unpacked_codes(encoded).float() - 8
    assert torch.equal(fp32 / scale, codes)
    assert codes.min() == (-8 if clip < 1 else -7)


def test_int4_codes_equal_modelopts_int4_tensor(modelopt):
    weight = weight_of_every_kind(torch.float32)[20:]
    weight[:, ::64] = amax_of("int4", weight, 1.02)  # its scale comes from the group's maximum: make that a snapped one
    amax = formats.weight_amax("int4", weight, 64)
    assert torch.equal(formats.snap_amax("int4", amax), amax)
    theirs, inverse = modelopt.int4.quantize(weight, 64)
    high_first = formats.unpack_nibbles(theirs._quantized_data).view(-1, 2).flip(1).view_as(weight)
    ours = formats.encode("int4", weight, amax, 64)
    assert torch.equal(formats.unpacked_codes(ours), high_first)
    assert torch.equal(ours.scale.float().reciprocal().view(-1), inverse.view(-1))


@pytest.mark.parametrize("clip", [1.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_codes_are_those_of_modelopts_fake_quantiser(modelopt, dtype, clip):
    """Its values are code / (127 / amax), the last bit of which differs from code * scale: see `snap_amax`."""
    weight = weight_of_every_kind(dtype)
    amax = amax_of("int8", weight, clip)
    encoded = formats.encode("int8", weight, amax)
    scale = encoded.scale.float()
    theirs = modelopt.int_fake(weight.float(), amax, 8, False, True)
    assert torch.equal((theirs / scale).round(), encoded.codes.float())
    assert encoded.codes.min() == -127
    assert ((formats.decode(encoded, torch.float32) - theirs).abs() <= 2.0**-23 * theirs.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_tensors_of_modelopt_decode_the_same_and_differ_only_on_rounding_boundaries(modelopt, dtype):
    """INT8QTensor divides by the scale: see the head of formats.py."""
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = formats.encode("int8", weight, amax_of("int8", weight))
    theirs, scale = modelopt.int8.quantize(weight.float(), scales=ours.scale.float())
    differing = theirs._quantized_data != ours.codes
    position = weight.double() / ours.scale.double()
    assert ((position[differing].abs() % 1 - 0.5).abs() < 1e-4).all() and differing.sum() <= 5e-5 * weight.numel()
    same = modelopt.int8(weight.shape, torch.float32, ours.codes)
    assert equal_bits(same.dequantize(torch.float32, scale=scale), formats.decode(ours, torch.float32) - 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_inputs_have_the_codes_of_modelopts_input_quantiser(modelopt, dtype):
    x = weight_of_every_kind(dtype)
    amax = formats.snap_tensor_amax("int8", x.abs().max().float() * 0.5)
    theirs = modelopt.int_fake(x.float(), amax, 8, False, False)
    scale = formats.tensor_scale("int8", amax)
    ours = formats.fake_quantize_input("int8", x.float(), amax)
    assert torch.equal((theirs / scale).round(), (ours / scale).round()) and (ours / scale).round().max() == 127


@pytest.mark.parametrize("dtype", DTYPES)
def test_kv_nvfp4_equals_modelopts_tensor(modelopt, dtype):
    keys = weight_of_every_kind(dtype).view(4, 24, 4, 64)
    amax = formats.snap_tensor_amax("nvfp4", keys.abs().max())
    theirs, scale, double_scale = modelopt.nvfp4.quantize(keys.reshape(-1, 64), 16, None, amax / 2688)
    values = theirs.dequantize(dtype, scale=scale, double_scale=double_scale, block_sizes={-1: 16})
    assert torch.equal(formats.fake_quantize_kv("nvfp4", keys, amax).view(-1, 64), values)
    assert torch.equal(formats.tensor_scale("nvfp4", amax), double_scale)


@pytest.mark.parametrize("clip", [1.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_equals_modelopts_eager_path(modelopt, dtype, clip):
    weight = weight_of_every_kind(dtype)
    amax = amax_of("fp8", weight, clip)
    theirs = modelopt.fp8_fake(weight, amax)
    assert torch.equal(formats.fake_quantize("fp8", weight, amax), theirs)
    encoded = formats.encode("fp8", weight, amax)
    multiplier = 448.0 / amax  # what fp8_eager computes
    codes = (weight.float() * multiplier).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert equal_bits(encoded.codes, codes)
    assert torch.equal(encoded.scale, amax / 448)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_tensors_of_modelopt_differ_only_on_rounding_boundaries(modelopt, dtype):
    """FP8QTensor divides by the scale: see the head of formats.py."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1)).to(dtype)
    amax = amax_of("fp8", weight)
    scale = amax / 448
    theirs, _ = modelopt.fp8.quantize(weight.float(), scales=scale)
    ours = formats.encode("fp8", weight, amax)
    assert torch.equal(ours.scale, scale)
    differing = (theirs._quantized_data.view(torch.uint8) != ours.codes.view(torch.uint8)).nonzero().tolist()
    exact = weight.double() / scale.double()
    for row, column in differing:
        middle = (theirs._quantized_data[row, column].double() + ours.codes[row, column].double()) / 2
        assert abs(exact[row, column] / middle - 1) < 2.0**-23, (row, column)
    assert len(differing) <= 5e-5 * weight.numel()


@pytest.mark.parametrize("clip", [1.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nvfp4_equals_modelopts_tensor(modelopt, dtype, clip):
    weight = weight_of_every_kind(dtype)
    amax = amax_of("nvfp4", weight, clip)
    ours = formats.encode("nvfp4", weight, amax, 16)
    theirs, scale, double_scale = modelopt.nvfp4.quantize(weight, 16, None, amax / 2688)
    assert torch.equal(ours.global_scale, double_scale)
    assert equal_bits(ours.scale, scale)
    assert torch.equal(ours.codes, theirs._quantized_data)
    values = theirs.dequantize(torch.float32, scale=scale, double_scale=double_scale, block_sizes={-1: 16})
    assert equal_bits(formats.decode(ours, torch.float32), values)
    assert torch.equal(formats.fake_quantize("nvfp4", weight, amax, 16), values.to(dtype))


def test_nvfp4_equals_modelopt_down_to_tiny_tensors(modelopt):
    weight = weight_of_every_kind(torch.float32) * 2.0**-40
    amax = amax_of("nvfp4", weight)
    ours = formats.encode("nvfp4", weight, amax, 16)
    theirs, scale, _ = modelopt.nvfp4.quantize(weight, 16, None, amax / 2688)
    assert equal_bits(ours.scale, scale) and torch.equal(ours.codes, theirs._quantized_data)
