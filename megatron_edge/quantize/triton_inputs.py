"""RMSNorm and SwiGLU on CUDA that write, in their one pass over memory, the fake-quantised value of their result in
place of the result itself; of fp8 with its E4M3 codes.

The result is rounded to its dtype first, so that the bits are those of model/triton_layers.py's kernels followed by
triton_kernels.py's. Only kernels.py imports this: it needs Triton. tests/gpu/test_inputs_cuda.py compares the bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_edge.artifact import scales
from megatron_edge.model import triton_layers
from megatron_edge.model.triton_layers import rms_norm_rows, swiglu_tile
from megatron_edge.quantize.triton_kernels import fp8_level, nvfp4_values, static_scale


@triton.jit
def _rms_norm_codes_kernel(
    x, weight, out, inverse, rows, heads, size, stride_token, stride_head, eps, amax, codes, scale,
    divisor: tl.constexpr, zero: tl.constexpr, zero_scale: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    result, place, inside = rms_norm_rows(
        x, weight, inverse, rows, heads, size, stride_token, stride_head, eps, ROWS, SIZE
    )
    multiplier, step = static_scale(amax, divisor, zero, zero_scale)
    if tl.program_id(0) == 0:
        tl.store(scale, step)
    level = fp8_level(result.to(out.dtype.element_ty), multiplier)
    # A thread takes as many columns of all tensors as the widest store allows. Of codes that would be twice as many,
    # and the squares of x would be added up in another order than in the plain norm.
    WIDTH: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    tl.store(tl.max_contiguous(codes + place, [1, WIDTH]), level.to(tl.float8e4nv), mask=inside)
    tl.store(out + place, (level * step).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_codes_kernel(
    x, out, size, column_tiles, stride, amax, codes, scale,
    divisor: tl.constexpr, zero: tl.constexpr, zero_scale: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    result, place, inside = swiglu_tile(x, size, column_tiles, stride, TILE)
    multiplier, step = static_scale(amax, divisor, zero, zero_scale)
    if tl.program_id(0) == 0:
        tl.store(scale, step)
    level = fp8_level(result.to(out.dtype.element_ty), multiplier)
    tl.store(codes + place, level.to(tl.float8e4nv), mask=inside)
    tl.store(out + place, (level * step).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_nvfp4_kernel(
    x, weight, out, inverse, rows, heads, size, stride_token, stride_head, eps, amax,
    zero: tl.constexpr, zero_scale: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    result, place, inside = rms_norm_rows(
        x, weight, inverse, rows, heads, size, stride_token, stride_head, eps, ROWS, SIZE
    )
    blocks = tl.reshape(result.to(out.dtype.element_ty).to(tl.float32), (ROWS * SIZE // BLOCK, BLOCK))
    value = tl.reshape(nvfp4_values(blocks, amax, zero, zero_scale), (ROWS, SIZE))
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_nvfp4_kernel(
    x, out, size, column_tiles, stride, amax,
    zero: tl.constexpr, zero_scale: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    result, place, inside = swiglu_tile(x, size, column_tiles, stride, TILE)
    blocks = tl.reshape(result.to(out.dtype.element_ty).to(tl.float32), (TILE // BLOCK, BLOCK))
    value = tl.reshape(nvfp4_values(blocks, amax, zero, zero_scale), (TILE,))
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


def rms_norm_operand(amax: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See kernels.rms_norm_operand. x is not empty; the current device is x's, of compute capability 8.9 or higher."""
    codes, scale = _operand(x, x.shape[-1])
    more = _of_codes(amax, codes, scale)
    values, inverse = triton_layers.rms_norm(x, weight, eps, _rms_norm_codes_kernel, more)
    return codes, scale, values, inverse


def swiglu_operand(amax: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See kernels.swiglu_operand; as above."""
    codes, scale = _operand(x, x.shape[-1] // 2)
    return codes, scale, triton_layers.swiglu(x, _swiglu_codes_kernel, _of_codes(amax, codes, scale))


def rms_norm_values(amax: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See kernels.rms_norm_values. x is not empty; the current device is x's."""
    return triton_layers.rms_norm(x, weight, eps, _rms_norm_nvfp4_kernel, _of_nvfp4(amax, x, x.shape[-1]))


def swiglu_values(amax: Tensor, x: Tensor) -> Tensor:
    """See kernels.swiglu_values; as above."""
    return triton_layers.swiglu(x, _swiglu_nvfp4_kernel, _of_nvfp4(amax, x, x.shape[-1] // 2))


def _of_nvfp4(amax: Tensor, x: Tensor, columns: int) -> tuple[Any, ...]:
    """Blocks lie within a row, and so within a program's tile."""
    scales.check_blocks("nvfp4", (columns,), scales.NVFP4_BLOCK)
    if amax.dtype is not torch.float32 or amax.device != x.device:
        amax = amax.to(x.device, torch.float32)
    numbers = scales.ZERO_AMAX["nvfp4"], scales.ZERO_SCALE["nvfp4"], scales.NVFP4_BLOCK
    return scales.scalar_amax("nvfp4", amax), *numbers


def _operand(x: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    codes = torch.empty((*x.shape[:-1], columns), dtype=torch.float8_e4m3fn, device=x.device)
    return codes, torch.empty((), dtype=torch.float32, device=x.device)


def _of_codes(amax: Tensor, codes: Tensor, scale: Tensor) -> tuple[Any, ...]:
    if amax.dtype is not torch.float32 or amax.device != codes.device:
        amax = amax.to(codes.device, torch.float32)
    numbers = scales.AMAX_PER_SCALE["fp8"], scales.ZERO_AMAX["fp8"], scales.ZERO_SCALE["fp8"]
    return scales.scalar_amax("fp8", amax), codes, scale, *numbers
