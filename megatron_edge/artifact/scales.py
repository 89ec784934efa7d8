"""Which maxima and scales each format has, how they are snapped, and the bytes that a tensor takes in it.

`formats` is the public face of all of this; its head defines the arithmetic. Only `formats` imports this file, and
quantize's kernels for CUDA.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_edge.artifact.rounding import block_amax, divide, lossless_scale, round_e4m3, short_scale
from megatron_edge.contracts import InputError

# The formats there are. "none", which a config may also say, is the absence of one. int8 is three things: weights with
# a fp16 scale per row, inputs with one static fp32 scale, and llama.cpp's q8_0 in the KV cache.
WEIGHT_FORMATS = ("fp8", "int4", "int8", "nvfp4")
ACTIVATION_FORMATS = ("fp8", "int8", "nvfp4")
KV_FORMATS = ("fp8", "int8", "nvfp4")
STATIC_KV_FORMATS = ("fp8", "nvfp4")  # those with a calibrated scale for K and one for V in each layer

FP8_MAX = 448.0  # largest finite float8_e4m3fn
E2M1_MAX = 6.0
INT4_MAX = 7.0
INT8_MAX = 127.0
NVFP4_BLOCK = 16
INT8_BLOCK = 32  # llama.cpp's QK8_0
SMALLEST_GROUP = 32

# An amax up to here counts as zero: every code is 0. 2^-24 is modelopt's own bound for fp8, int4 and int8; modelopt has
# none for nvfp4, where this one keeps scale * g a normal number.
ZERO_AMAX = {"fp8": 2.0**-24, "int4": 2.0**-24, "int8": 2.0**-24, "nvfp4": 2.0**-64}
# What is stored for a zero amax: positive, a power of two, and small enough to read back as a zero amax.
ZERO_SCALE = {"fp8": 2.0**-33, "int8": 2.0**-33, "nvfp4": 2.0**-76}
AMAX_PER_SCALE = {"fp8": FP8_MAX, "int4": INT4_MAX, "int8": INT8_MAX, "nvfp4": E2M1_MAX * FP8_MAX}
FP16_SMALLEST, FP16_LARGEST = 2.0**-24, 65504.0

_BITS_PER_ELEMENT = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4, "nvfp4": 4}


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


def scales_per_row(fmt: str, in_features: int, group_size: int = 0) -> int:
    """Calibrated maxima of one row of a weight: int4 one per group, int8 one; 0 where the tensor has one in all."""
    check_format(fmt, WEIGHT_FORMATS)
    return {"int4": in_features // max(group_size, 1), "int8": 1}.get(fmt, 0)


def storage_bytes(fmt: str, shape: tuple[int, ...], group_size: int = 0) -> int:
    """Bytes of a tensor of `shape` in `fmt` (fp32, bf16, fp16, fp8, int4, int8, nvfp4), its weight scales included.

    `group_size` matters to int4 alone. int8 has one fp16 scale for each row (all dims but the last).
    """
    if fmt not in _BITS_PER_ELEMENT:
        raise InputError(f"format={fmt!r}: allowed are {sorted(_BITS_PER_ELEMENT)}")
    code_bytes = -(-math.prod(shape) * _BITS_PER_ELEMENT[fmt] // 8)
    if fmt == "int8":
        return code_bytes + 2 * math.prod(shape[:-1])
    if fmt == "int4":
        check_blocks(fmt, shape, group_size)
        return code_bytes + math.prod(shape) // group_size * 2
    if fmt == "nvfp4":
        check_blocks(fmt, shape, NVFP4_BLOCK)
        return code_bytes + math.prod(shape) // NVFP4_BLOCK + 4
    return code_bytes + (4 if fmt == "fp8" else 0)


def kv_storage_bytes(fmt: str, shape: tuple[int, ...]) -> int:
    """Bytes of keys or values [..., head_dim] in a cache of `fmt` ("none" is bf16); static scales count as weights.

    int8 has 34 bytes per 32 elements (llama.cpp's block_q8_0), nvfp4 9 bytes per 16.
    """
    if fmt == "none":
        return storage_bytes("bf16", shape)
    check_format(fmt, KV_FORMATS)
    block, block_bytes = {"fp8": (1, 1), "int8": (INT8_BLOCK, 34), "nvfp4": (NVFP4_BLOCK, 9)}[fmt]
    if block > 1:
        check_blocks(fmt, shape, block)
    return math.prod(shape) // block * block_bytes


@torch.no_grad()
def weight_amax(fmt: str, weight: Tensor, group_size: int = 0) -> Tensor:
    """Largest magnitude, fp32: [] for fp8 and nvfp4, [out, in / group_size] for int4, [out, 1] for int8. Unsnapped."""
    check_format(fmt, WEIGHT_FORMATS)
    if weight.numel() == 0:
        raise InputError(f"weight of shape {tuple(weight.shape)} is empty")
    if fmt == "int8":
        low, high = torch.aminmax(weight.detach(), dim=-1, keepdim=True)
    elif fmt == "int4":
        group_size = block_size(fmt, weight.shape, group_size)
        return weight.detach().unflatten(-1, (-1, group_size)).abs().amax(-1).float()
    else:
        low, high = torch.aminmax(weight.detach())
    return torch.maximum(high, -low).float() + 0.0  # of two zeros devices choose either: + 0 makes it +0


@torch.no_grad()
def snap_amax(fmt: str, amax: Tensor) -> Tensor:
    """The amax of a weight, fp32, next to `amax` that its stored scale expresses without loss. Idempotent; zeros stay.

    The scale is rounded to few bits (int4, int8: fp16; else 13 significant bits), so that both
      - amax = 448 * scale (int4: 7, int8: 127, nvfp4: 2688) is exact, and dividing it again gives the scale;
      - code * scale is exact, so the cast to the training dtype is the only rounding of a dequantised value and no
        runtime's order of multiplication matters;
    and, but for int8, walks down from there, in 6 cases of 10 not at all and never by more than 0.7% (20% among int4
    subnormals), to the first for which this holds as well:
      - dividing by 1 / scale, as modelopt's fake quantisation does, gives the very same values, and its two ways to
        compute 448 / amax (7 / amax) agree.
    Among 127 levels that would cost up to 1.3%, three steps of the largest weight, to agree with modelopt's simulation
    in the last bit of fp32; what is stored, code and scale, agrees all the same.
    Snap after calibration, before training: the scale trained with is then the one stored.
    """
    check_format(fmt, WEIGHT_FORMATS)
    amax = amax.detach().float()
    scale = fp16_scale(fmt, amax) if fmt in ("int4", "int8") else divide(amax, AMAX_PER_SCALE[fmt])
    return _snapped(fmt, amax, scale)


@torch.no_grad()
def snap_tensor_amax(fmt: str, amax: Tensor) -> Tensor:
    """`snap_amax` for what has one static fp32 scale for a whole tensor: inputs of linears, and the KV cache.

    Differs from `snap_amax` for int8 alone, whose weights have fp16 scales.
    """
    check_format(fmt, ACTIVATION_FORMATS)
    amax = amax.detach().float()
    return _snapped(fmt, amax, divide(amax, AMAX_PER_SCALE[fmt]))


def _snapped(fmt: str, amax: Tensor, scale: Tensor) -> Tensor:
    scale = short_scale(scale) if fmt == "int8" else lossless_scale(scale)
    snapped = amax_of_scale(fmt, scale).where(amax > ZERO_AMAX[fmt], 0.0)
    return snapped.where(amax.isfinite(), amax)  # what is not finite stays so: encode names it


def tensor_scale(fmt: str, amax: Tensor) -> Tensor:
    """The per-tensor scale that is stored for `amax`, fp32: amax / 448 (fp8), 127 (int8), 2688 (nvfp4's global one).

    Also the `input_scale`, `k_scale` and `v_scale` of an artifact. A zero amax gives a tiny positive number.
    """
    check_format(fmt, ACTIVATION_FORMATS)
    amax = amax.detach().float()
    return divide(amax, AMAX_PER_SCALE[fmt]).where(amax > ZERO_AMAX[fmt], ZERO_SCALE[fmt])


def amax_of_scale(fmt: str, scale: Tensor) -> Tensor:
    """The amax, fp32, behind a stored scale of any format; the inverse of snapping: exact for a snapped amax."""
    check_format(fmt, WEIGHT_FORMATS)
    amax = scale.detach().float() * AMAX_PER_SCALE[fmt]
    return amax.where(amax > ZERO_AMAX[fmt], 0.0)


def fp16_scale(fmt: str, amax: Tensor) -> Tensor:
    """fp32 amax -> fp16 scale, kept inside fp16's positive range: never 0, never infinite."""
    return divide(amax, AMAX_PER_SCALE[fmt]).clamp(FP16_SMALLEST, FP16_LARGEST).to(torch.float16)


def inverse_of_scale(fmt: str, amax: Tensor, scale: Tensor) -> Tensor:
    """What x is multiplied by: 1 / scale, which is 7 / (7 * scale); 0 where amax counts as zero."""
    return scale.float().reciprocal().where(amax > ZERO_AMAX[fmt], 0.0)


def tensor_multiplier(fmt: str, amax: Tensor) -> Tensor:
    """448 / amax (int8: 127), what the elements of a whole tensor are multiplied by; 0 where amax counts as zero."""
    return divide(AMAX_PER_SCALE[fmt], amax).where(amax > ZERO_AMAX[fmt], 0.0)


def nvfp4_scale(x: Tensor, global_scale: Tensor) -> Tensor:
    """[n, 16] -> the block scales [n, 1], fp32 values of e4m3."""
    scale = block_amax(x).div_(global_scale * E2M1_MAX)
    scale.masked_fill_(scale == 0, 1.0).clamp_(2.0**-9, FP8_MAX)
    return round_e4m3(scale)


# ---------------------------------------------------------------- checks


def check_format(fmt: str, allowed: tuple[str, ...]) -> None:
    if fmt not in allowed:
        raise InputError(f"format={fmt!r}: allowed are {', '.join(allowed)}")


def check_finite(name: str, x: Tensor) -> None:
    if x.numel() == 0:
        raise InputError(f"{name} of shape {tuple(x.shape)} is empty")
    if not bool(torch.stack(torch.aminmax(x.detach())).isfinite().all()):
        raise InputError(f"{name} of shape {tuple(x.shape)} holds infinities or NaN; allowed are finite numbers")


def check_blocks(fmt: str, shape: tuple[int, ...] | torch.Size, block: int) -> None:
    if block <= 0 or not len(shape) or shape[-1] % block or shape[-1] % 2:
        raise InputError(f"{fmt}: a last dim of {tuple(shape)} is no multiple of the block of {block} elements")


def block_size(fmt: str, shape: torch.Size, group_size: int) -> int:
    if fmt == "nvfp4":
        if group_size not in (0, NVFP4_BLOCK):
            raise InputError(f"group_size={group_size}: nvfp4 allows {NVFP4_BLOCK} only")
        group_size = NVFP4_BLOCK
    check_blocks(fmt, shape, group_size)
    return group_size


def scalar_amax(fmt: str, amax: Tensor) -> Tensor:
    if amax.numel() != 1:
        raise InputError(f"amax of shape {tuple(amax.shape)}: {fmt} takes one amax for the whole tensor")
    return amax.reshape(())


def column_amax(fmt: str, amax: Tensor, blocks: Tensor) -> Tensor:
    """[n, 1], one for each row of `blocks` [n, g]: a group of int4, a row of int8."""
    if amax.numel() != blocks.shape[0]:
        part = "groups" if fmt == "int4" else "rows"
        raise InputError(f"amax of shape {tuple(amax.shape)}: {fmt} takes one for each of the {blocks.shape[0]} {part}")
    return amax.reshape(-1, 1)
