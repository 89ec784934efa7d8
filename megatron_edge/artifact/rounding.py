"""The arithmetic under `formats` and `scales`, its only callers: roundings that give the same bits on CPU and CUDA.

Division is always by a tensor on the same device: CUDA turns division by a Python number into a multiplication by its
reciprocal, which rounds differently from the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_CPU_PART_ELEMENTS = 1 << 16  # temporaries of this size stay in a core's cache


def divide(numerator: Tensor | float, denominator: Tensor | float) -> Tensor:
    """A correctly rounded fp32 division whichever operand is a number (see the head of the file)."""
    if not isinstance(numerator, Tensor):
        assert isinstance(denominator, Tensor)
        numerator = torch.full((), numerator, dtype=torch.float32, device=denominator.device)
    if not isinstance(denominator, Tensor):
        denominator = torch.full((), denominator, dtype=torch.float32, device=numerator.device)
    return numerator / denominator


def short_scale(scale: Tensor) -> Tensor:
    """fp16 scales as they are; fp32 ones cut down to 13 significant bits, so that a product with a code is exact."""
    if scale.dtype == torch.float16:
        return scale
    return (scale.contiguous().view(torch.int32) & -(1 << 11)).view(torch.float32)


def lossless_scale(scale: Tensor) -> Tensor:
    """fp16 or fp32 scales -> the nearest ones, walking down, that pass the conditions of `snap_amax`."""
    integer, step = (torch.int16, 1) if scale.dtype == torch.float16 else (torch.int32, 1 << 11)
    # Bit patterns of positive floats are ordered as the floats are: an integer step is one in the last place kept.
    bits = short_scale(scale).contiguous().view(integer)
    for _ in range(9):  # no run of lossy scales is longer
        value = bits.view(scale.dtype).float()
        inverse = value.reciprocal()
        lossy = (value * 7.0).reciprocal() * 7.0 != inverse
        for level in (1.0, 3.0, 5.0, 7.0):
            lossy |= divide(level, inverse) != value * level
        bits = bits - lossy.to(integer) * step
    return bits.view(scale.dtype)


def round_to_float(x: Tensor, largest: float, smallest_normal: float, mantissa_bits: int) -> Tensor:
    """fp32 -> the nearest values of a small float format, ties to even, saturating. Overwrites and returns `x`.

    Adding and subtracting 1.5 * 2^23 grid steps leaves a multiple of the step: fp32's own rounding does the work. The
    step follows from the exponent of x. Five vectorised passes; no branch, table or gather. Zeros come out as +0.
    """
    x.clamp_(-largest, largest)
    power = x.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32).clamp_(min=smallest_normal)
    steps = 1.5 * 2.0 ** (23 - mantissa_bits)
    return x.add_(power, alpha=steps).sub_(power, alpha=steps)


def round_e4m3(x: Tensor) -> Tensor:
    return round_to_float(x, 448.0, 2.0**-6, 3)


def round_e2m1(x: Tensor) -> Tensor:
    return round_to_float(x, 6.0, 1.0, 1)


def block_amax(blocks: Tensor) -> Tensor:
    """[n, g] -> fp32 [n, 1]. max_pool1d is twice as fast on CPU as a reduction over so short a dim."""
    magnitude = blocks.abs().float()
    if magnitude.is_cuda:
        return magnitude.amax(-1, keepdim=True)
    return torch.nn.functional.max_pool1d(magnitude.view(1, 1, -1), blocks.shape[-1]).view(-1, 1)


def by_parts(
    quantize: Callable[..., Tensor], x: Tensor, block: int, *scales: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Apply `quantize(x [n, block], *scales)` to all of x; on CPU in parts that fit the cache (2 to 4 times faster).

    Scales of shape [n, 1] are cut along with x; scales of shape [] go to every part. The result has x's shape and, if
    no `dtype` is given, x's dtype.
    """
    dtype = dtype or x.dtype
    if x.numel() == 0:
        return torch.empty_like(x, dtype=dtype)
    blocks = x.detach().reshape(-1, block)
    if x.is_cuda or x.numel() <= _CPU_PART_ELEMENTS:
        return quantize(blocks, *scales).to(dtype).view(x.shape)
    out = torch.empty_like(blocks, dtype=dtype)
    rows = max(1, _CPU_PART_ELEMENTS // block)
    for start in range(0, blocks.shape[0], rows):
        part = slice(start, start + rows)
        out[part] = quantize(blocks[part], *(scale[part] if scale.dim() else scale for scale in scales))
    return out.view(x.shape)
