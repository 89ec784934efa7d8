"""The one home of numerics: scale and rounding of every weight, activation and KV format. Plain torch, CPU and CUDA.

In come high-precision tensors and calibrated maxima; out come codes and scales (`encode`), their values (`decode`) and
the same values without packing (`fake_quantize`). Training, export, verify and serve all call this and nothing else;
`scales` (maxima, scales, bytes) and `rounding` (arithmetic) are the files under it.

Arithmetic follows nvidia-modelopt 0.47 (torch/quantization/tensor_quant.py, qtensor/*.py), so that codes and scales are
those of modelopt. All of it is fp32, followed by ONE cast to the dtype asked for:

    fp8    scale = amax / 448, fp32, one per tensor      code = e4m3(x * (448 / amax))
    int4   scale = fp16(amax / 7), one per group         code = clamp(rint(x * (1 / scale)), -8, 7)
    int8   scale = fp16(amax / 127), one per row         code = clamp(rint(x * (1 / scale)), -127, 127)
    nvfp4  scale = e4m3(clamp(block amax / (6 g), 2^-9, 448)), one per 16 elements, 1.0 for a block of zeros,
           with global_scale g = amax / 2688, fp32       code = e2m1(x / (scale * g))
    value = code * scale (nvfp4: code * (scale * g))

Inputs and the KV cache are the same with one static amax for the tensor, but for int8:

    input int8   scale = amax / 127, fp32                code = clamp(rint(x * (127 / amax)), -128, 127)
    KV int8      scale = fp16(amax / 127), one per 32    code = rint(x * (127 / amax)), dynamic: llama.cpp's q8_0

An input beyond its calibrated maximum saturates at -128 as in compressed-tensors, vLLM and TensorRT; a weight never has
that code, so that a row of it is also a row of q8_0 blocks which repeat the row's scale.

Every rounding is to nearest, ties to even; everything saturates; a zero is always +0. `snap_amax` moves a calibrated
amax to the nearest one for which nothing is lost between scale and amax: see there.

Where modelopt differs from itself or from this, with an amax that is NOT snapped: Python's `448.0 / amax` is
`reciprocal(amax) * 448` (fp8_eager on CPU, INT4QTensor) but a true division in its CUDA kernels; fake quantisation
returns `code / (7 / amax)`. FP8QTensor and INT8QTensor divide, `x / scale`, which no snapping reconciles with
`x * (448 / amax)`: a few codes in a million differ where x sits on a rounding boundary; the fake-quantised model is the
one to reproduce.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_edge.artifact import scales
from megatron_edge.artifact.rounding import block_amax, by_parts, divide, round_e2m1, round_e4m3
from megatron_edge.artifact.scales import (
    ACTIVATION_FORMATS,
    FP8_MAX,
    INT4_MAX,
    INT8_BLOCK,
    INT8_MAX,
    KV_FORMATS,
    NVFP4_BLOCK,
    STATIC_KV_FORMATS,
    WEIGHT_FORMATS,
    ZERO_AMAX,
    amax_of_scale,
    effective_group_size,
    kv_storage_bytes,
    scales_per_row,
    snap_amax,
    snap_tensor_amax,
    storage_bytes,
    tensor_scale,
    weight_amax,
)
from megatron_edge.contracts import InputError

__all__ = [
    "ACTIVATION_FORMATS", "INT8_BLOCK", "KV_FORMATS", "NVFP4_BLOCK", "STATIC_KV_FORMATS", "WEIGHT_FORMATS", "Encoded",
    "amax_of_scale", "decode", "effective_group_size", "encode", "fake_quantize", "fake_quantize_input",
    "fake_quantize_kv", "fp8_operand", "fp8_values", "kv_storage_bytes", "pack_nibbles", "scales_per_row", "snap_amax",
    "snap_tensor_amax", "storage_bytes", "tensor_scale", "unpack_nibbles", "unpacked_codes", "weight_amax",
]  # fmt: skip


@dataclass(frozen=True)
class Encoded:
    """A weight as it is stored.

    Attributes:
        format: fp8 | int4 | int8 | nvfp4.
        codes: fp8: float8_e4m3fn [out, in]; int8: int8 [out, in]; int4, nvfp4: uint8 [out, in / 2], low nibble first
            (int4 holds code + 8, nvfp4 the e2m1 bits, sign << 3 | magnitude).
        scale: fp8: fp32 []; int4: fp16 [out, in / group_size]; int8: fp16 [out, 1]; nvfp4: e4m3 [out, in / 16].
        global_scale: nvfp4: fp32 []; else None.
        shape: (out, in).
        group_size: elements along `in` that share a scale; 0 where one scale serves the tensor or the row.
    """

    format: str
    codes: Tensor
    scale: Tensor
    global_scale: Tensor | None
    shape: tuple[int, int]
    group_size: int


# ---------------------------------------------------------------- encode and decode


@torch.no_grad()
def encode(fmt: str, weight: Tensor, amax: Tensor, group_size: int = 0) -> Encoded:
    """Quantise `weight` [out, in], any float dtype, as it will be stored.

    `amax` is calibrated (shape as `weight_amax` gives, or the same number of elements), snapped if the stored scale is
    to be exact. fp8 and int8 ignore `group_size`, nvfp4 takes 0 or 16.

    Raises:
        InputError: unknown format, a shape that the group does not divide, or a weight or amax that is not finite.
    """
    scales.check_format(fmt, WEIGHT_FORMATS)
    if weight.dim() != 2:
        raise InputError(f"weight of shape {tuple(weight.shape)}: encode takes [out, in]")
    scales.check_finite("weight", weight)
    amax = amax.detach().to(weight.device, torch.float32)
    scales.check_finite("amax", amax)
    out_features, in_features = weight.shape
    shape = (out_features, in_features)
    if fmt == "fp8":
        amax = scales.scalar_amax(fmt, amax)
        multiplier = scales.tensor_multiplier(fmt, amax)
        codes = by_parts(_fp8_codes, weight, in_features, multiplier, dtype=torch.float8_e4m3fn)
        return Encoded(fmt, codes, tensor_scale(fmt, amax), None, shape, 0)
    if fmt == "int8":
        amax = scales.column_amax(fmt, amax, weight)
        scale = scales.fp16_scale(fmt, amax)
        inverse = scales.inverse_of_scale(fmt, amax, scale)
        codes = by_parts(_int8_levels, weight, in_features, inverse, dtype=torch.int8)
        return Encoded(fmt, codes, scale, None, shape, 0)
    group_size = scales.block_size(fmt, weight.shape, group_size)
    blocks = weight.reshape(-1, group_size)
    if fmt == "int4":
        amax = scales.column_amax(fmt, amax, blocks)
        scale = scales.fp16_scale(fmt, amax)
        inverse = scales.inverse_of_scale(fmt, amax, scale)
        codes = by_parts(_int4_codes, weight, group_size, inverse, dtype=torch.uint8)
        return Encoded(fmt, pack_nibbles(codes), scale.view(out_features, -1), None, shape, group_size)
    amax = scales.scalar_amax(fmt, amax)
    global_scale = tensor_scale(fmt, amax)
    scale = scales.nvfp4_scale(blocks, global_scale)
    codes = by_parts(_nvfp4_codes, weight, group_size, scale * global_scale, amax, dtype=torch.uint8)
    scale = scale.to(torch.float8_e4m3fn).view(out_features, -1)
    return Encoded(fmt, pack_nibbles(codes), scale, global_scale, shape, group_size)


@torch.no_grad()
def decode(encoded: Encoded, dtype: torch.dtype) -> Tensor:
    """The values [out, in] of `encoded`: fp32 arithmetic, then one cast to `dtype`."""
    if encoded.format in ("fp8", "int8"):
        return (encoded.codes.float() * encoded.scale.float()).add_(0.0).to(dtype)
    table = _byte_values(encoded.format, encoded.codes.device)
    values = table.index_select(0, encoded.codes.flatten().int()).view(-1, encoded.group_size)
    return values.mul_(_value_scale(encoded).view(-1, 1)).view(encoded.shape).to(dtype)


def unpacked_codes(encoded: Encoded) -> Tensor:
    """uint8 [out, in]: int4's code + 8, nvfp4's e2m1 bits, the bytes of fp8 and int8."""
    if encoded.format in ("fp8", "int8"):
        return encoded.codes.view(torch.uint8)
    return unpack_nibbles(encoded.codes)


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [..., n] of values below 16 -> uint8 [..., n / 2]; the first of a pair is the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def _fp8_codes(x: Tensor, multiplier: Tensor) -> Tensor:
    return (x.float() * multiplier).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _int4_levels(x: Tensor, inverse: Tensor) -> Tensor:
    """[n, g] x, [n, 1] fp32 -> a new fp32 tensor of whole numbers -8 .. 7. `+ 0` turns -0 into +0."""
    return (x.float() * inverse).round_().clamp_(-INT4_MAX - 1, INT4_MAX).add_(0.0)


def _int8_levels(x: Tensor, inverse: Tensor) -> Tensor:
    return (x.float() * inverse).round_().clamp_(-INT8_MAX, INT8_MAX).add_(0.0)


def _int4_codes(x: Tensor, inverse: Tensor) -> Tensor:
    return _int4_levels(x, inverse).add_(8.0).to(torch.uint8)


def _nvfp4_scaled(x: Tensor, step: Tensor, amax: Tensor) -> Tensor:
    """x / step, fp32; zeros where the tensor's amax counts as zero, without asking the device for its value."""
    return (x.float() / step).masked_fill_(amax <= ZERO_AMAX["nvfp4"], 0.0)


def _nvfp4_codes(x: Tensor, step: Tensor, amax: Tensor) -> Tensor:
    """{0, .5, 1, 1.5, 2, 3, 4, 6} -> 0 .. 7: three straight lines, of which the lowest holds; and the sign's bit."""
    scaled = _nvfp4_scaled(x, step, amax)
    sign = (scaled < 0).to(torch.uint8).mul_(8)
    magnitude = round_e2m1(scaled).abs_()
    bits = torch.minimum(torch.minimum(magnitude * 2, magnitude + 2), magnitude.div_(2).add_(4))
    return bits.to(torch.uint8).add_(sign)


def _byte_values(fmt: str, device: torch.device) -> Tensor:
    """fp32 [256, 2]: what the two nibbles of each byte stand for, before the scale."""
    if fmt == "int4":
        values = [float(code - 8) for code in range(16)]
    else:
        magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        values = magnitudes + [0.0 - magnitude for magnitude in magnitudes]
    nibbles = torch.tensor(values, dtype=torch.float32, device=device)
    return torch.stack((nibbles.repeat(16), nibbles.repeat_interleave(16)), dim=-1)


def _value_scale(encoded: Encoded) -> Tensor:
    """fp32: what a code is multiplied by."""
    scale = encoded.scale.float()
    return scale if encoded.global_scale is None else scale * encoded.global_scale


# ---------------------------------------------------------------- fake quantisation


@torch.no_grad()
def fake_quantize(fmt: str, x: Tensor, amax: Tensor, group_size: int = 0) -> Tensor:
    """What the weight `x` becomes by being stored: bit-equal to `decode(encode(...), x.dtype)`, without packing.

    `x` has any leading dims. int4's `amax` has one element per group, in order ([..., in / group_size], or [n, 1] for
    x of [n, group_size]), int8's one per row; else one element. Returns a new tensor of x's shape and dtype, without
    gradient: the caller decides what passes backward. Does not check that x is finite, nor wait for the device.
    """
    scales.check_format(fmt, WEIGHT_FORMATS)
    amax = amax.detach().to(x.device, torch.float32)
    if fmt == "fp8":
        amax = scales.scalar_amax(fmt, amax)
        multiplier = scales.tensor_multiplier(fmt, amax)
        return by_parts(_fp8_part, x, x.shape[-1] if x.dim() else 1, multiplier, tensor_scale(fmt, amax))
    group_size = x.shape[-1] if fmt == "int8" else scales.block_size(fmt, x.shape, group_size)
    if fmt in ("int4", "int8"):
        amax = scales.column_amax(fmt, amax, x.reshape(-1, group_size))
        scale = scales.fp16_scale(fmt, amax)
        part = _int4_part if fmt == "int4" else _int8_part
        return by_parts(part, x, group_size, scales.inverse_of_scale(fmt, amax, scale), scale.float())
    amax = scales.scalar_amax(fmt, amax)
    return by_parts(_nvfp4_part, x, group_size, tensor_scale(fmt, amax), amax)


@torch.no_grad()
def fake_quantize_input(fmt: str, x: Tensor, amax: Tensor) -> Tensor:
    """The input of a linear layer [..., in] as its quantised product sees it, in x's dtype; `amax` has one element."""
    scales.check_format(fmt, ACTIVATION_FORMATS)
    if fmt != "int8":
        return fake_quantize(fmt, x, amax)
    amax = scales.scalar_amax(fmt, amax.detach().to(x.device, torch.float32))
    multiplier = scales.tensor_multiplier(fmt, amax)
    return by_parts(_int8_input_part, x, x.shape[-1] if x.dim() else 1, multiplier, tensor_scale(fmt, amax))


@torch.no_grad()
def fake_quantize_kv(fmt: str, x: Tensor, amax: Tensor | None = None) -> Tensor:
    """Keys or values [..., head_dim] as the cache gives them back, in x's dtype. fp8 and nvfp4 need the calibrated
    `amax`; nvfp4's blocks lie along head_dim and take their scales from the values."""
    scales.check_format(fmt, KV_FORMATS)
    if fmt in STATIC_KV_FORMATS:
        if amax is None:
            raise InputError(f"kv.format={fmt} needs a calibrated amax")
        return fake_quantize(fmt, x, amax)
    scales.check_blocks("int8", x.shape, INT8_BLOCK)
    return by_parts(_q8_0_part, x, INT8_BLOCK)


@torch.no_grad()
def fp8_operand(fmt: str, x: Tensor, amax: Tensor, group_size: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [out, in] or, of fp8, an input [..., in] as a matrix product of E4M3 numbers takes it.

    fp8's own codes, but for zeros, which are +0; int4's, -8 .. 7, which E4M3 holds exactly. Value = code * scale is
    that of `fake_quantize` before its cast. Does not check that x is finite, nor wait for the device.

    Returns:
        float8_e4m3fn of x's shape; its scale, fp32: [] of fp8, [in / group_size, out] of int4.
    """
    scales.check_format(fmt, ("fp8", "int4"))
    amax = amax.detach().to(x.device, torch.float32)
    if fmt == "fp8":
        amax = scales.scalar_amax(fmt, amax)
        codes = by_parts(_fp8_levels, x, x.shape[-1], scales.tensor_multiplier(fmt, amax), dtype=torch.float8_e4m3fn)
        return codes, tensor_scale(fmt, amax)
    group_size = scales.block_size(fmt, x.shape, group_size)
    amax = scales.column_amax(fmt, amax, x.reshape(-1, group_size))
    scale = scales.fp16_scale(fmt, amax)
    inverse = scales.inverse_of_scale(fmt, amax, scale)
    codes = by_parts(_int4_levels, x, group_size, inverse, dtype=torch.float8_e4m3fn)
    return codes, scale.float().view(x.shape[0], -1).t().contiguous()


@torch.no_grad()
def fp8_values(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `fp8_operand`'s codes with one scale stand for: the bits of `fake_quantize` in `dtype`."""
    return (codes.float() * scale).to(dtype)


def _fp8_levels(x: Tensor, multiplier: Tensor) -> Tensor:
    return round_e4m3(x.float() * multiplier)


def _fp8_part(x: Tensor, multiplier: Tensor, scale: Tensor) -> Tensor:
    return _fp8_levels(x, multiplier).mul_(scale)


def _int4_part(x: Tensor, inverse: Tensor, scale: Tensor) -> Tensor:
    return _int4_levels(x, inverse).mul_(scale)


def _int8_part(x: Tensor, inverse: Tensor, scale: Tensor) -> Tensor:
    return _int8_levels(x, inverse).mul_(scale)


def _int8_input_part(x: Tensor, multiplier: Tensor, scale: Tensor) -> Tensor:
    return (x.float() * multiplier).round_().clamp_(-INT8_MAX - 1, INT8_MAX).mul_(scale).add_(0.0)


def _nvfp4_part(x: Tensor, global_scale: Tensor, amax: Tensor) -> Tensor:
    step = scales.nvfp4_scale(x, global_scale).mul_(global_scale)
    return round_e2m1(_nvfp4_scaled(x, step, amax)).mul_(step)


def _q8_0_part(x: Tensor) -> Tensor:
    x = x.float()
    amax = block_amax(x)
    scale = divide(amax, INT8_MAX).clamp_(max=scales.FP16_LARGEST).half().float()
    # A scale that fp16 cannot hold is 0 and so is the value; 127 / amax may then be infinite.
    inverse = divide(INT8_MAX, amax).masked_fill_(scale == 0, 0.0)
    return (x * inverse).round_().mul_(scale).add_(0.0)
