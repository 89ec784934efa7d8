"""RMSNorm, SwiGLU and rotary embedding on CUDA, one pass over memory each way.

The arithmetic is fused.py's: fp32, rounded to the tensor's dtype where forward's plain operations round, no fused
multiply-adds. Nothing is added up in an order that may change: a norm's weight gradient is summed by a fixed number of
programs, then over them. Block sizes follow from shapes alone, so that a CUDA graph can be captured at first use of a
shape. It needs Triton, so that fused.py alone imports it, and quantize/triton_inputs.py, whose kernels go on with what
a norm or SwiGLU gives. tests/gpu/test_layers_cuda.py compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048  # elements of one program of four warps
_WARPS_OF_SUM = 2048  # warps that sum a weight's gradient, all resident at once


def _settings(elements: int) -> dict[str, Any]:
    """Of a program on a tile of so many elements: 16 of each thread."""
    return {"enable_fp_fusion": False, "num_warps": min(16, max(1, elements // 512))}


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


@triton.jit
def rms_norm_rows(
    x, weight, inverse, rows, heads, size, stride_token, stride_head, eps, ROWS: tl.constexpr, SIZE: tl.constexpr
):
    """This program's (results in fp32, their places in a contiguous tensor, which of them there are)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    inside = (row < rows) & (column < size)
    place = (row // heads).to(tl.int64) * stride_token + (row % heads) * stride_head + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1, keep_dims=True) / size + eps)
    tl.store(inverse + row, scale, mask=row < rows)
    normed = (value * scale).to(x.dtype.element_ty).to(tl.float32)
    product = normed * tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    return product, row.to(tl.int64) * size + column, inside


@triton.jit
def _rms_norm_kernel(
    x, weight, out, inverse, rows, heads, size, stride_token, stride_head, eps,
    ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Rows are (token, head) of x [tokens, heads, size]; `inverse` is 1 / rms, fp32 [rows]."""
    result, place, inside = rms_norm_rows(
        x, weight, inverse, rows, heads, size, stride_token, stride_head, eps, ROWS, SIZE
    )
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward_kernel(
    gradient, x, weight, inverse, of_x, of_weight, rows, heads, size,
    gradient_token, gradient_head, stride_token, stride_head, tiles, programs,
    TRAINED: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Program p takes tiles p, p + programs, ...; of_weight is fp32 [programs, size], the sums of each."""
    program = tl.program_id(0)
    column = tl.arange(0, SIZE)[None, :]
    factor = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, SIZE), tl.float32)
    tile = program
    while tile < tiles:
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < size)
        token, head = (row // heads).to(tl.int64), row % heads
        value = tl.load(x + token * stride_token + head * stride_head + column, mask=inside, other=0.0).to(tl.float32)
        place = token * gradient_token + head * gradient_head + column
        of_out = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(inverse + row, mask=row < rows, other=0.0)
        normed, of_normed = value * scale, of_out * factor
        mean = tl.sum(normed * of_normed, axis=1, keep_dims=True) / size
        result = scale * (of_normed - normed * mean)
        tl.store(of_x + row.to(tl.int64) * size + column, result.to(of_x.dtype.element_ty), mask=inside)
        if TRAINED:
            total += of_out * normed.to(x.dtype.element_ty).to(tl.float32)
        tile += programs
    if TRAINED:
        sums = tl.sum(total, axis=0, keep_dims=True)
        tl.store(of_weight + program.to(tl.int64) * size + column, sums, mask=column < size)


@triton.jit
def swiglu_tile(x, size, column_tiles, stride, TILE: tl.constexpr):
    """This program's (results in fp32, their places in a contiguous tensor, which of them there are)."""
    program = tl.program_id(0)
    row = (program // column_tiles).to(tl.int64)
    column = (program % column_tiles) * TILE + tl.arange(0, TILE)
    inside = column < size
    gate = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * stride + size + column, mask=inside, other=0.0).to(tl.float32)
    opened = (gate / (1.0 + tl.exp(-gate))).to(x.dtype.element_ty).to(tl.float32)
    return opened * up, row * size + column, inside


@triton.jit
def _swiglu_kernel(x, out, size, column_tiles, stride, TILE: tl.constexpr):
    """x [rows, 2 size] with rows `stride` apart -> out [rows, size]."""
    result, place, inside = swiglu_tile(x, size, column_tiles, stride, TILE)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward_kernel(gradient, x, of_x, size, column_tiles, gradient_stride, stride, TILE: tl.constexpr):
    program = tl.program_id(0)
    row = (program // column_tiles).to(tl.int64)
    column = (program % column_tiles) * TILE + tl.arange(0, TILE)
    inside = column < size
    gate = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * stride + size + column, mask=inside, other=0.0).to(tl.float32)
    of_out = tl.load(gradient + row * gradient_stride + column, mask=inside, other=0.0).to(tl.float32)
    divisor = 1.0 + tl.exp(-gate)
    share = 1.0 / divisor
    opened = (gate / divisor).to(x.dtype.element_ty).to(tl.float32)
    of_gate = of_out * up * share * (1.0 + gate * (1.0 - share))
    place = of_x + row * 2 * size + column
    tl.store(place, of_gate.to(of_x.dtype.element_ty), mask=inside)
    tl.store(place + size, (of_out * opened).to(of_x.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_kernel(
    x, rotation, out, windows, heads, half, head_tiles, stride_place, stride_window, stride_head,
    BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One program turns HEADS heads at one position of one window."""
    program = tl.program_id(0)
    token = (program // head_tiles).to(tl.int64)
    head = (program % head_tiles) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    within = column < half
    inside = (head < heads) & within
    angle = rotation + token * 2 * half + column
    cos = tl.load(angle, mask=within, other=0.0).to(x.dtype.element_ty).to(tl.float32)
    sin = tl.load(angle + half, mask=within, other=0.0).to(x.dtype.element_ty).to(tl.float32)
    if BACK:
        sin = -sin
    place = x + (token // windows) * stride_place + (token % windows) * stride_window + head * stride_head + column
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    turned = (first * cos).to(x.dtype.element_ty).to(tl.float32) - (second * sin).to(x.dtype.element_ty).to(tl.float32)
    other = (second * cos).to(x.dtype.element_ty).to(tl.float32) + (first * sin).to(x.dtype.element_ty).to(tl.float32)
    result = out + (token * heads + head) * 2 * half + column
    tl.store(result, turned.to(out.dtype.element_ty), mask=inside)
    tl.store(result + half, other.to(out.dtype.element_ty), mask=inside)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, kernel: Any = _rms_norm_kernel, more: Sequence[Any] = ()
) -> tuple[Tensor, Tensor]:
    """(result, 1 / rms of each row, fp32 [..., 1]). x is not empty; the current device is x's. Another `kernel` takes
    `more` after what this one takes."""
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    inverse = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    flat = _by_head(x)
    tile, together = _tile_of_rows(x.shape[-1])
    kernel[(-(-inverse.numel() // together),)](
        flat, weight, out, inverse, inverse.numel(), flat.shape[1], flat.shape[2], flat.stride(0), flat.stride(1), eps,
        *more, ROWS=together, SIZE=tile, **_settings(together * tile),
    )  # fmt: skip
    return out, inverse


def rms_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, trained: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and, where it is trained, of the weight."""
    flat, flat_gradient, size = _by_head(x), _by_head(gradient), x.shape[-1]
    tile, together = _tile_of_rows(size)
    settings, tiles = _settings(together * tile), -(-inverse.numel() // together)
    programs = min(tiles, _WARPS_OF_SUM // settings["num_warps"])
    of_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = torch.empty((programs, size) if trained else (1,), dtype=torch.float32, device=x.device)
    _rms_norm_backward_kernel[(programs,)](
        flat_gradient, flat, weight, inverse, of_x, sums, inverse.numel(), flat.shape[1], size,
        flat_gradient.stride(0), flat_gradient.stride(1), flat.stride(0), flat.stride(1), tiles, programs,
        TRAINED=trained, ROWS=together, SIZE=tile, **settings,
    )  # fmt: skip
    return of_x, sums.sum(0).to(weight.dtype) if trained else None


def swiglu(x: Tensor, kernel: Any = _swiglu_kernel, more: Sequence[Any] = ()) -> Tensor:
    """Another `kernel` takes `more` after what this one takes."""
    rows, size = _rows(x), x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device)
    tile = min(_power_of_two(size), _TILE)
    tiles = -(-size // tile)
    kernel[(rows.shape[0] * tiles,)](rows, out, size, tiles, rows.stride(0), *more, TILE=tile, **_settings(tile))
    return out


def swiglu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    rows, of_out, size = _rows(x), _rows(gradient), x.shape[-1] // 2
    of_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = min(_power_of_two(size), _TILE)
    tiles = -(-size // tile)
    _swiglu_backward_kernel[(rows.shape[0] * tiles,)](
        of_out, rows, of_x, size, tiles, of_out.stride(0), rows.stride(0), TILE=tile, **_settings(tile)
    )
    return of_x


def rotate(x: Tensor, rotation: Tensor, back: bool) -> Tensor:
    """x [s, b, heads, d] of any strides -> contiguous; rotation fp32 [s, b, 1, d], see fused.rotate."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    places, windows, heads, size = x.shape
    half = _power_of_two(size // 2)
    together = min(_power_of_two(heads), max(1, _TILE // half))
    tiles = -(-heads // together)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rotate_kernel[(places * windows * tiles,)](
        x, rotation.contiguous(), out, windows, heads, size // 2, tiles, *x.stride()[:3],
        BACK=back, HEADS=together, HALF=half, **_settings(2 * together * half),
    )  # fmt: skip
    return out


def _tile_of_rows(size: int) -> tuple[int, int]:
    """(columns, rows) of a program on whole rows of `size`."""
    tile = _power_of_two(size)
    return tile, max(1, _TILE // tile)


def _by_head(x: Tensor) -> Tensor:
    """[tokens, heads, size]: a view wherever the dims before allow it, as they do of a part of Megatron's qkv."""
    x = x.reshape(-1, x.shape[-2] if x.dim() == 4 else 1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()
