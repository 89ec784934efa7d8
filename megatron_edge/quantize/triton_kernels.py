"""Fake quantisation on CUDA in one pass over memory: x is read once, its quantised value written once.

The arithmetic is artifact/formats.py's, operation for operation, so that results are the same bits: fp32 throughout and
one cast at the end, IEEE divisions (`/` is approximate in Triton), no fused multiply-adds but two that are written
(each launch turns all others off), NaN kept by every clamp. Roundings add and subtract a multiple of the grid, as
artifact/rounding.py does. Scales come from the amax on the device, which is never waited for. It needs Triton, so that
kernels.py alone imports it, and triton_inputs.py, whose kernels go on with three of its functions.
tests/gpu/test_kernels_cuda.py compares the bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_edge.artifact import scales
from megatron_edge.contracts import InputError

_TILE = 4096  # elements of one program
_SETTINGS: dict[str, Any] = {"enable_fp_fusion": False, "num_warps": 4}
# Format of weights with a scale per group -> (highest code, lowest).
_LEVELS = {"int4": (scales.INT4_MAX, -scales.INT4_MAX - 1), "int8": (scales.INT8_MAX, -scales.INT8_MAX)}


@triton.jit
def _clamp(x, low, high):
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _round_to_float(x, largest, smallest_normal, steps):
    """rounding.round_to_float; `steps` is 1.5 * 2^(23 - mantissa bits)."""
    return _to_grid(_clamp(x, -largest, largest), smallest_normal, steps)


@triton.jit
def _to_grid(x, smallest_normal, steps):
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    shift = tl.maximum(power, smallest_normal, propagate_nan=tl.PropagateNan.ALL) * steps
    return (x + shift) - shift


@triton.jit
def _round(x):
    """To whole numbers, ties to even, -0 to +0; |x| below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _largest_magnitude(x):
    """[n, g] -> [n, 1]. Magnitudes are ordered as their bits are, and NaN is above all."""
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1, keep_dims=True)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def static_scale(amax, divisor: tl.constexpr, zero: tl.constexpr, zero_scale: tl.constexpr):
    """(1 / scale, scale) of a tensor that has one."""
    maximum = tl.load(amax)
    multiplier = tl.where(maximum > zero, tl.div_rn(divisor, maximum), 0.0)
    return multiplier, tl.where(maximum > zero, tl.div_rn(maximum, divisor), zero_scale)


@triton.jit
def fp8_level(x, multiplier):
    """E4M3 codes as fp32: rounded before the conversion, which on some chips rounds twice."""
    return _round_to_float(x.to(tl.float32) * multiplier, 448.0, 0.015625, 1572864.0)


@triton.jit
def nvfp4_values(value, amax, zero: tl.constexpr, zero_scale: tl.constexpr):
    """What fp32 [blocks, 16] is as E2M1 with an E4M3 scale for each block, which its values give, times one scale for
    the tensor. Quotients are rounded to nearest, as by a division of each value: what a first guess, by a block's
    `inverse`, leaves of the value is exact (Markstein 1990)."""
    maximum = tl.load(amax)
    global_scale = tl.where(maximum > zero, tl.div_rn(maximum, 2688.0), zero_scale)
    scale = tl.div_rn(_largest_magnitude(value), global_scale * 6.0)
    scale = _clamp(tl.where(scale == 0, 1.0, scale), 0.001953125, 448.0)
    step = _round_to_float(scale, 448.0, 0.015625, 1572864.0) * global_scale
    inverse = tl.where(maximum <= zero, 0.0, tl.div_rn(1.0, step))
    value = _clamp(value, -6.0 * step, 6.0 * step)
    guess = value * inverse
    scaled = tl.fma(tl.fma(-guess, step, value), inverse, guess)
    return _to_grid(scaled, 1.0, 6291456.0) * step


@triton.jit
def _static_kernel(
    x, amax, out, size, divisor: tl.constexpr, zero: tl.constexpr, zero_scale: tl.constexpr,
    IS_FP8: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One scale for the tensor: fp8, and int8 inputs. `divisor` is 448 or 127."""
    offsets = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = offsets < size
    multiplier, scale = static_scale(amax, divisor, zero, zero_scale)
    value = tl.load(x + offsets, mask=inside, other=0.0)
    if IS_FP8:
        value = fp8_level(value, multiplier)
    else:
        value = _round(_clamp(value.to(tl.float32) * multiplier, -divisor - 1.0, divisor))
    value = value * scale
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _grouped_kernel(
    x, amax, out, groups, columns, column_tiles, divisor: tl.constexpr, lowest: tl.constexpr, zero: tl.constexpr,
    GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A fp16 scale for each group [columns]: int4's groups, int8's rows."""
    program = tl.program_id(0)
    group = (program // column_tiles) * GROUPS + tl.arange(0, GROUPS)[:, None]
    column = (program % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    maximum = tl.load(amax + group, mask=group < groups, other=1.0)
    scale = _clamp(tl.div_rn(maximum, divisor), 5.9604644775390625e-08, 65504.0).to(tl.float16).to(tl.float32)
    inverse = tl.where(maximum > zero, tl.div_rn(1.0, scale), 0.0)
    offsets = group.to(tl.int64) * columns + column
    inside = (group < groups) & (column < columns)
    value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32) * inverse
    value = _round(_clamp(value, lowest, divisor)) * scale
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _nvfp4_kernel(
    x, amax, out, blocks, zero: tl.constexpr, zero_scale: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    offsets = block * SIZE + tl.arange(0, SIZE)[None, :]
    inside = block < blocks
    value = nvfp4_values(tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32), amax, zero, zero_scale)
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _q8_0_kernel(x, out, blocks, BLOCKS: tl.constexpr, SIZE: tl.constexpr):
    """int8 with a fp16 scale for each block of SIZE, which its values give."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    offsets = block * SIZE + tl.arange(0, SIZE)[None, :]
    inside = block < blocks
    value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    maximum = _largest_magnitude(value)
    scale = tl.minimum(tl.div_rn(maximum, 127.0), 65504.0, propagate_nan=tl.PropagateNan.ALL)
    scale = scale.to(tl.float16).to(tl.float32)
    inverse = tl.where(scale == 0, 0.0, tl.div_rn(127.0, maximum))
    value = _round(value * inverse) * scale
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _fp8_operand_kernel(
    x, amax, codes, scale, values, size, divisor: tl.constexpr, zero: tl.constexpr, zero_scale: tl.constexpr,
    WITH_VALUES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """E4M3 codes; values as _static_kernel's."""
    program = tl.program_id(0).to(tl.int64)
    offsets = program * TILE + tl.arange(0, TILE)
    inside = offsets < size
    multiplier, step = static_scale(amax, divisor, zero, zero_scale)
    if program == 0:
        tl.store(scale, step)
    level = fp8_level(tl.load(x + offsets, mask=inside, other=0.0), multiplier)
    tl.store(codes + offsets, level.to(tl.float8e4nv), mask=inside)
    if WITH_VALUES:
        tl.store(values + offsets, (level * step).to(values.dtype.element_ty), mask=inside)


@triton.jit
def _int4_operand_kernel(
    x, amax, codes, scale, values, groups, rows, zero: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr
):
    """int4's codes in E4M3, which holds them exactly; scales [groups of a row, rows]; values as _grouped_kernel's."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)[:, None]
    inside = group < groups
    maximum = tl.load(amax + group, mask=inside, other=1.0)
    step = _clamp(tl.div_rn(maximum, 7.0), 5.9604644775390625e-08, 65504.0).to(tl.float16).to(tl.float32)
    inverse = tl.where(maximum > zero, tl.div_rn(1.0, step), 0.0)
    in_row = groups // rows
    tl.store(scale + (group % in_row) * rows + group // in_row, step, mask=inside)
    offsets = group.to(tl.int64) * SIZE + tl.arange(0, SIZE)[None, :]
    level = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32) * inverse
    level = _round(_clamp(level, -8.0, 7.0))
    tl.store(codes + offsets, level.to(tl.float8e4nv), mask=inside)
    tl.store(values + offsets, (level * step).to(values.dtype.element_ty), mask=inside)


@triton.jit
def _fp8_values_kernel(codes, scale, out, size, TILE: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = offsets < size
    value = tl.load(codes + offsets, mask=inside).to(tl.float32) * tl.load(scale)
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=inside)


def fake_quantize(args: dict[str, Any], x: Tensor, amax: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See kernels.fake_quantize. x is not empty; the current device is x's."""
    fmt, role = args["format"], args["role"]
    x = x.detach().contiguous()
    out = torch.empty_like(x, dtype=dtype)
    if role == "kv" and fmt not in scales.STATIC_KV_FORMATS:
        scales.check_format(fmt, scales.KV_FORMATS)
        _q8_0(x, out)
        return out
    if amax is None:
        raise InputError(f"{role} of format={fmt} needs a calibrated amax")
    if amax.dtype is not torch.float32 or amax.device != x.device:
        amax = amax.to(x.device, torch.float32)
    if role == "weight" and fmt in _LEVELS:
        _grouped(fmt, x, amax, out, args["group_size"] if fmt == "int4" else x.shape[-1])
        return out
    scales.check_format(fmt, scales.ACTIVATION_FORMATS)
    amax = scales.scalar_amax(fmt, amax)
    if fmt == "nvfp4":
        _nvfp4(x, amax, out)
    else:
        _static(fmt, x, amax, out)
    return out


def fp8_operand(args: dict[str, Any], x: Tensor, amax: Tensor, with_values: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See kernels.fp8_operand. x is not empty; the current device is x's, of compute capability 8.9 or higher."""
    x = x.detach().contiguous()
    if amax.dtype is not torch.float32 or amax.device != x.device:
        amax = amax.to(x.device, torch.float32)
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    fmt, size = args["format"], x.numel()
    if fmt == "int4":
        group_size, rows = args["group_size"], x.shape[0]
        scales.check_blocks(fmt, x.shape, group_size)
        amax = scales.column_amax(fmt, amax, x.view(-1, group_size)).contiguous()
        scale = torch.empty(x.shape[1] // group_size, rows, dtype=torch.float32, device=x.device)
        values, groups, together = torch.empty_like(x), size // group_size, _TILE // group_size
        _int4_operand_kernel[(-(-groups // together),)](
            x, amax, codes, scale, values, groups, rows, scales.ZERO_AMAX[fmt],
            GROUPS=together, SIZE=group_size, **_SETTINGS,
        )  # fmt: skip
        return codes, scale, values
    scale = torch.empty((), dtype=torch.float32, device=x.device)
    values = torch.empty_like(x) if with_values else codes
    _fp8_operand_kernel[(-(-size // _TILE),)](
        x, scales.scalar_amax(fmt, amax), codes, scale, values, size,
        scales.AMAX_PER_SCALE[fmt], scales.ZERO_AMAX[fmt], scales.ZERO_SCALE[fmt],
        WITH_VALUES=with_values, TILE=_TILE, **_SETTINGS,
    )  # fmt: skip
    return codes, scale, values


def fp8_values(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See kernels.fp8_values."""
    out, size = torch.empty_like(codes, dtype=dtype), codes.numel()
    _fp8_values_kernel[(-(-size // _TILE),)](codes, scale, out, size, TILE=_TILE, **_SETTINGS)
    return out


def _static(fmt: str, x: Tensor, amax: Tensor, out: Tensor) -> None:
    size = x.numel()
    _static_kernel[(-(-size // _TILE),)](
        x, amax, out, size, scales.AMAX_PER_SCALE[fmt], scales.ZERO_AMAX[fmt], scales.ZERO_SCALE[fmt],
        IS_FP8=fmt == "fp8", TILE=_TILE, **_SETTINGS,
    )  # fmt: skip


def _grouped(fmt: str, x: Tensor, amax: Tensor, out: Tensor, columns: int) -> None:
    if fmt == "int4":
        scales.check_blocks(fmt, x.shape, columns)
    groups = x.numel() // columns
    amax = scales.column_amax(fmt, amax, x.view(groups, columns)).contiguous()
    tile = min(1 << (columns - 1).bit_length(), _TILE)
    rows, column_tiles = _TILE // tile, -(-columns // tile)
    divisor, lowest = _LEVELS[fmt]
    _grouped_kernel[(-(-groups // rows) * column_tiles,)](
        x, amax, out, groups, columns, column_tiles, divisor, lowest, scales.ZERO_AMAX[fmt],
        GROUPS=rows, COLUMNS=tile, **_SETTINGS,
    )  # fmt: skip


def _nvfp4(x: Tensor, amax: Tensor, out: Tensor) -> None:
    size = scales.NVFP4_BLOCK
    scales.check_blocks("nvfp4", x.shape, size)
    blocks, rows = x.numel() // size, _TILE // size
    _nvfp4_kernel[(-(-blocks // rows),)](
        x, amax, out, blocks, scales.ZERO_AMAX["nvfp4"], scales.ZERO_SCALE["nvfp4"],
        BLOCKS=rows, SIZE=size, **_SETTINGS,
    )  # fmt: skip


def _q8_0(x: Tensor, out: Tensor) -> None:
    size = scales.INT8_BLOCK
    scales.check_blocks("int8", x.shape, size)
    blocks, rows = x.numel() // size, _TILE // size
    _q8_0_kernel[(-(-blocks // rows),)](x, out, blocks, BLOCKS=rows, SIZE=size, **_SETTINGS)
