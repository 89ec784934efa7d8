"""The one home of numerics: scale and rounding of every weight, activation and KV format. Plain torch, CPU and CUDA.

In come high-precision tensors and calibrated maxima; out come codes and scales (`encode`), their values (`decode`) and
the same values without packing (`fake_quantize`). Training, export, verify and serve all call this and nothing else.

Arithmetic follows nvidia-modelopt 0.47 (torch/quantization/tensor_quant.py, qtensor/*.py), so that codes and scales are
those of modelopt. All of it is fp32, followed by ONE cast to the dtype asked for:

    fp8    scale = amax / 448, fp32, one per tensor      code = e4m3(x * (448 / amax))
    int4   scale = fp16(amax / 7), one per group         code = clamp(rint(x * (1 / scale)), -8, 7)
    nvfp4  scale = e4m3(clamp(block amax / (6 g), 2^-9, 448)), one per 16 elements, 1.0 for a block of zeros,
           with global_scale g = amax / 2688, fp32       code = e2m1(x / (scale * g))
    int8   scale = fp16(amax / 127), one per 32          code = rint(x * (127 / amax)), dynamic: llama.cpp's q8_0
    value = code * scale (nvfp4: code * (scale * g))

Every rounding is to nearest, ties to even; everything saturates; a zero is always +0. `snap_amax` moves a calibrated
amax to the nearest one for which nothing is lost between scale and amax: see there.

Where modelopt differs from itself or from this, with an amax that is NOT snapped: Python's `448.0 / amax` is
`reciprocal(amax) * 448` (fp8_eager on CPU, INT4QTensor) but a true division in its CUDA kernels; fake quantisation
returns `code / (7 / amax)`. FP8QTensor divides, `x / scale`, which no snapping reconciles with `x * (448 / amax)`: a
few codes in a million differ where x sits on a rounding boundary; the fake-quantised model is the one to reproduce.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_edge.artifact.rounding import block_amax, by_parts, divide, lossless_scale, round_e2m1, round_e4m3
from megatron_edge.contracts import InputError

# The formats there are. "none", which a config may also say, is the absence of one.
WEIGHT_FORMATS = ("fp8", "int4", "nvfp4")
ACTIVATION_FORMATS = ("fp8", "nvfp4")
KV_FORMATS = ("fp8", "int8")

FP8_MAX = 448.0  # largest finite float8_e4m3fn
E2M1_MAX = 6.0
INT4_MAX = 7.0
NVFP4_BLOCK = 16
INT8_BLOCK = 32  # llama.cpp's QK8_0
SMALLEST_GROUP = 32

# An amax up to here counts as zero: every code is 0. 2^-24 is modelopt's own bound for fp8 and int4; modelopt has none
# for nvfp4, where this one keeps scale * g a normal number.
ZERO_AMAX = {"fp8": 2.0**-24, "int4": 2.0**-24, "nvfp4": 2.0**-64}
# What is stored for a zero amax: positive, a power of two, and small enough to read back as a zero amax.
_ZERO_SCALE = {"fp8": 2.0**-33, "nvfp4": 2.0**-76}
_AMAX_PER_SCALE = {"fp8": FP8_MAX, "int4": INT4_MAX, "nvfp4": E2M1_MAX * FP8_MAX}
_FP16_SMALLEST, _FP16_LARGEST = 2.0**-24, 65504.0

_BITS_PER_ELEMENT = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4, "nvfp4": 4}


@dataclass(frozen=True)
class Encoded:
    """A weight as it is stored.

    Attributes:
        format: fp8 | int4 | nvfp4.
        codes: fp8: float8_e4m3fn [out, in]; int4, nvfp4: uint8 [out, in / 2], low nibble first
            (int4 holds code + 8, nvfp4 the e2m1 bits, sign << 3 | magnitude).
        scale: fp8: fp32 []; int4: fp16 [out, in / group_size]; nvfp4: float8_e4m3fn [out, in / 16].
        global_scale: nvfp4: fp32 []; else None.
        shape: (out, in).
        group_size: elements along `in` that share a scale; 0 where one scale serves the tensor.
    """

    format: str
    codes: Tensor
    scale: Tensor
    global_scale: Tensor | None
    shape: tuple[int, int]
    group_size: int


def effective_group_size(in_features: int, group_size: int) -> int:
    """The int4 group of one tensor: `group_size` halved until it divides `in_features` (576 with 128 -> 64).

    Raises:
        InputError: the group would fall below 32, or `group_size` is not positive.
    """
    size = group_size
    while size >= SMALLEST_GROUP:
        if in_features % size == 0:
            return size
        if size % 2:
            break
        size //= 2
    raise InputError(
        f"quant.group_size={group_size}: neither it nor a half of it down to {SMALLEST_GROUP} divides "
        f"in_features={in_features}"
    )


def storage_bytes(fmt: str, shape: tuple[int, ...], group_size: int = 0) -> int:
    """Bytes of a tensor of `shape` in `fmt` (fp32, bf16, fp16, fp8, int4, nvfp4, int8), its weight scales included.

    `group_size` matters to int4 alone. int8 is the KV format: 34 bytes per block of 32 along the last dim.
    """
    if fmt not in _BITS_PER_ELEMENT:
        raise InputError(f"format={fmt!r}: allowed are {sorted(_BITS_PER_ELEMENT)}")
    code_bytes = -(-math.prod(shape) * _BITS_PER_ELEMENT[fmt] // 8)
    tensor_scale_bytes = 4 if fmt in ACTIVATION_FORMATS else 0
    if fmt not in ("int4", "nvfp4", "int8"):
        return code_bytes + tensor_scale_bytes
    block, scale_bytes = {"int4": (group_size, 2), "nvfp4": (NVFP4_BLOCK, 1), "int8": (INT8_BLOCK, 2)}[fmt]
    _check_blocks(fmt, shape, block)
    return code_bytes + math.prod(shape) // block * scale_bytes + tensor_scale_bytes


# ---------------------------------------------------------------- maxima and scales


@torch.no_grad()
def weight_amax(fmt: str, weight: Tensor, group_size: int = 0) -> Tensor:
    """Largest magnitude, fp32: [] for fp8 and nvfp4, [out, in / group_size] for int4. Not snapped."""
    _check_format(fmt, WEIGHT_FORMATS)
    if weight.numel() == 0:
        raise InputError(f"weight of shape {tuple(weight.shape)} is empty")
    if fmt != "int4":
        low, high = torch.aminmax(weight.detach())
        return torch.maximum(high, -low).float()
    group_size = _block_size(fmt, weight.shape, group_size)
    return weight.unflatten(-1, (-1, group_size)).abs().amax(-1).float()


@torch.no_grad()
def snap_amax(fmt: str, amax: Tensor) -> Tensor:
    """The amax, fp32, next to `amax` that its stored scale expresses without loss. Idempotent; zeros stay zero.

    The scale is rounded to few bits (int4: fp16; else 13 significant bits) and walks down from there, in 6 cases of 10
    not at all and never by more than 0.7% (20% among int4 subnormals), to the first for which all of this holds:
      - amax = 448 * scale (int4: 7, nvfp4: 2688) is exact, and dividing it again gives the scale;
      - code * scale is exact, so the cast to the training dtype is the only rounding of a dequantised value and no
        runtime's order of multiplication matters;
      - dividing by 1 / scale, as modelopt's fake quantisation does, gives the very same values, and its two ways to
        compute 448 / amax (7 / amax) agree.
    Snap after calibration, before training: the scale trained with is then the one stored.
    """
    _check_format(fmt, WEIGHT_FORMATS)
    amax = amax.detach().float()
    scale = lossless_scale(_int4_scale(amax) if fmt == "int4" else divide(amax, _AMAX_PER_SCALE[fmt]))
    snapped = amax_of_scale(fmt, scale).where(amax > ZERO_AMAX[fmt], 0.0)
    return snapped.where(amax.isfinite(), amax)  # what is not finite stays so: encode names it


def tensor_scale(fmt: str, amax: Tensor) -> Tensor:
    """The per-tensor scale that is stored for `amax`, fp32: fp8 amax / 448; nvfp4 (its global scale) amax / 2688.

    Also the `input_scale`, `k_scale` and `v_scale` of an artifact. A zero amax gives a tiny positive number.
    """
    _check_format(fmt, ACTIVATION_FORMATS)
    amax = amax.detach().float()
    return divide(amax, _AMAX_PER_SCALE[fmt]).where(amax > ZERO_AMAX[fmt], _ZERO_SCALE[fmt])


def amax_of_scale(fmt: str, scale: Tensor) -> Tensor:
    """The amax, fp32, behind a stored scale of any format; the inverse of snapping: exact for a snapped amax."""
    _check_format(fmt, WEIGHT_FORMATS)
    amax = scale.detach().float() * _AMAX_PER_SCALE[fmt]
    return amax.where(amax > ZERO_AMAX[fmt], 0.0)


def _int4_scale(amax: Tensor) -> Tensor:
    """fp32 amax -> fp16 scale, kept inside fp16's positive range: never 0, never infinite."""
    return divide(amax, INT4_MAX).clamp(_FP16_SMALLEST, _FP16_LARGEST).to(torch.float16)


def _int4_levels(x: Tensor, inverse: Tensor) -> Tensor:
    """[n, g] x, [n, 1] fp32 -> a new fp32 tensor of whole numbers -8 .. 7. `+ 0` turns -0 into +0."""
    return (x.float() * inverse).round_().clamp_(-INT4_MAX - 1, INT4_MAX).add_(0.0)


def _int4_inverse(amax: Tensor, scale: Tensor) -> Tensor:
    """What x is multiplied by: 1 / scale, which is 7 / (7 * scale); 0 where amax counts as zero."""
    return scale.float().reciprocal().where(amax > ZERO_AMAX["int4"], 0.0)


def _fp8_multiplier(amax: Tensor) -> Tensor:
    return divide(FP8_MAX, amax).where(amax > ZERO_AMAX["fp8"], 0.0)


def _nvfp4_scale(x: Tensor, global_scale: Tensor) -> Tensor:
    """[n, 16] -> the block scales [n, 1], fp32 values of e4m3."""
    scale = block_amax(x).div_(global_scale * E2M1_MAX)
    scale.masked_fill_(scale == 0, 1.0).clamp_(2.0**-9, FP8_MAX)
    return round_e4m3(scale)


def _nvfp4_scaled(x: Tensor, step: Tensor, amax: Tensor) -> Tensor:
    """x / step, fp32; zeros where the tensor's amax counts as zero, without asking the device for its value."""
    return (x.float() / step).masked_fill_(amax <= ZERO_AMAX["nvfp4"], 0.0)


# ---------------------------------------------------------------- encode and decode


@torch.no_grad()
def encode(fmt: str, weight: Tensor, amax: Tensor, group_size: int = 0) -> Encoded:
    """Quantise `weight` [out, in], any float dtype, as it will be stored.

    `amax` is calibrated (shape as `weight_amax` gives, or the same number of elements), snapped if the stored scale is
    to be exact. fp8 ignores `group_size`, nvfp4 takes 0 or 16.

    Raises:
        InputError: unknown format, a shape that the group does not divide, or a weight or amax that is not finite.
    """
    _check_format(fmt, WEIGHT_FORMATS)
    if weight.dim() != 2:
        raise InputError(f"weight of shape {tuple(weight.shape)}: encode takes [out, in]")
    _check_finite("weight", weight)
    amax = amax.detach().to(weight.device, torch.float32)
    _check_finite("amax", amax)
    out_features, in_features = weight.shape
    shape = (out_features, in_features)
    if fmt == "fp8":
        amax = _scalar_amax(fmt, amax)
        codes = by_parts(_fp8_codes, weight, in_features, _fp8_multiplier(amax), dtype=torch.float8_e4m3fn)
        return Encoded(fmt, codes, tensor_scale(fmt, amax), None, shape, 0)
    group_size = _block_size(fmt, weight.shape, group_size)
    blocks = weight.reshape(-1, group_size)
    if fmt == "int4":
        amax = _group_amax(amax, blocks)
        scale = _int4_scale(amax)
        codes = by_parts(_int4_codes, weight, group_size, _int4_inverse(amax, scale), dtype=torch.uint8)
        return Encoded(fmt, pack_nibbles(codes), scale.view(out_features, -1), None, shape, group_size)
    amax = _scalar_amax(fmt, amax)
    global_scale = tensor_scale(fmt, amax)
    scale = _nvfp4_scale(blocks, global_scale)
    codes = by_parts(_nvfp4_codes, weight, group_size, scale * global_scale, amax, dtype=torch.uint8)
    scale = scale.to(torch.float8_e4m3fn).view(out_features, -1)
    return Encoded(fmt, pack_nibbles(codes), scale, global_scale, shape, group_size)


@torch.no_grad()
def decode(encoded: Encoded, dtype: torch.dtype) -> Tensor:
    """The values [out, in] of `encoded`: fp32 arithmetic, then one cast to `dtype`."""
    if encoded.format == "fp8":
        return (encoded.codes.float() * encoded.scale).add_(0.0).to(dtype)
    table = _byte_values(encoded.format, encoded.codes.device)
    values = table.index_select(0, encoded.codes.flatten().int()).view(-1, encoded.group_size)
    return values.mul_(_value_scale(encoded).view(-1, 1)).view(encoded.shape).to(dtype)


def unpacked_codes(encoded: Encoded) -> Tensor:
    """uint8 [out, in]: int4's code + 8, nvfp4's e2m1 bits, fp8's bytes."""
    return encoded.codes.view(torch.uint8) if encoded.format == "fp8" else unpack_nibbles(encoded.codes)


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [..., n] of values below 16 -> uint8 [..., n / 2]; the first of a pair is the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def _fp8_codes(x: Tensor, multiplier: Tensor) -> Tensor:
    return (x.float() * multiplier).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _int4_codes(x: Tensor, inverse: Tensor) -> Tensor:
    return _int4_levels(x, inverse).add_(8.0).to(torch.uint8)


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
    """What `x` becomes by being stored: bit-equal to `decode(encode(...), x.dtype)`, without packing.

    `x` has any leading dims. int4's `amax` has one element per group, in order ([..., in / group_size], or [n, 1] for
    x of [n, group_size]); else one element. Returns a new tensor of x's shape and dtype, without gradient: the caller
    decides what passes backward. Does not check that x is finite, nor wait for the device.
    """
    _check_format(fmt, WEIGHT_FORMATS)
    amax = amax.detach().to(x.device, torch.float32)
    if fmt == "fp8":
        amax = _scalar_amax(fmt, amax)
        return by_parts(_fp8_part, x, x.shape[-1] if x.dim() else 1, _fp8_multiplier(amax), tensor_scale(fmt, amax))
    group_size = _block_size(fmt, x.shape, group_size)
    if fmt == "int4":
        amax = _group_amax(amax, x.reshape(-1, group_size))
        scale = _int4_scale(amax)
        return by_parts(_int4_part, x, group_size, _int4_inverse(amax, scale), scale.float())
    amax = _scalar_amax(fmt, amax)
    return by_parts(_nvfp4_part, x, group_size, tensor_scale(fmt, amax), amax)


@torch.no_grad()
def fake_quantize_kv(fmt: str, x: Tensor, amax: Tensor | None = None) -> Tensor:
    """Keys or values [..., head_dim] as the cache gives them back, in x's dtype. fp8 needs the calibrated `amax`."""
    _check_format(fmt, KV_FORMATS)
    if fmt == "fp8":
        if amax is None:
            raise InputError("kv.format=fp8 needs a calibrated amax")
        return fake_quantize(fmt, x, amax)
    _check_blocks("int8", x.shape, INT8_BLOCK)
    return by_parts(_int8_part, x, INT8_BLOCK)


def _fp8_part(x: Tensor, multiplier: Tensor, scale: Tensor) -> Tensor:
    return round_e4m3(x.float() * multiplier).mul_(scale)


def _int4_part(x: Tensor, inverse: Tensor, scale: Tensor) -> Tensor:
    return _int4_levels(x, inverse).mul_(scale)


def _nvfp4_part(x: Tensor, global_scale: Tensor, amax: Tensor) -> Tensor:
    step = _nvfp4_scale(x, global_scale).mul_(global_scale)
    return round_e2m1(_nvfp4_scaled(x, step, amax)).mul_(step)


def _int8_part(x: Tensor) -> Tensor:
    x = x.float()
    amax = block_amax(x)
    scale = divide(amax, 127.0).clamp_(max=_FP16_LARGEST).half().float()
    # A scale that fp16 cannot hold is 0 and so is the value; 127 / amax may then be infinite.
    inverse = divide(127.0, amax).masked_fill_(scale == 0, 0.0)
    return (x * inverse).round_().mul_(scale).add_(0.0)


# ---------------------------------------------------------------- checks


def _check_format(fmt: str, allowed: tuple[str, ...]) -> None:
    if fmt not in allowed:
        raise InputError(f"format={fmt!r}: allowed are {', '.join(allowed)}")


def _check_finite(name: str, x: Tensor) -> None:
    if x.numel() == 0:
        raise InputError(f"{name} of shape {tuple(x.shape)} is empty")
    if not bool(torch.stack(torch.aminmax(x.detach())).isfinite().all()):
        raise InputError(f"{name} of shape {tuple(x.shape)} holds infinities or NaN; allowed are finite numbers")


def _check_blocks(fmt: str, shape: tuple[int, ...] | torch.Size, block: int) -> None:
    if block <= 0 or not len(shape) or shape[-1] % block or shape[-1] % 2:
        raise InputError(f"{fmt}: a last dim of {tuple(shape)} is no multiple of the block of {block} elements")


def _block_size(fmt: str, shape: torch.Size, group_size: int) -> int:
    if fmt == "nvfp4":
        if group_size not in (0, NVFP4_BLOCK):
            raise InputError(f"group_size={group_size}: nvfp4 allows {NVFP4_BLOCK} only")
        group_size = NVFP4_BLOCK
    _check_blocks(fmt, shape, group_size)
    return group_size


def _scalar_amax(fmt: str, amax: Tensor) -> Tensor:
    if amax.numel() != 1:
        raise InputError(f"amax of shape {tuple(amax.shape)}: {fmt} takes one amax for the whole tensor")
    return amax.reshape(())


def _group_amax(amax: Tensor, blocks: Tensor) -> Tensor:
    if amax.numel() != blocks.shape[0]:
        raise InputError(f"amax of shape {tuple(amax.shape)}: int4 takes one for each of the {blocks.shape[0]} groups")
    return amax.reshape(-1, 1)
