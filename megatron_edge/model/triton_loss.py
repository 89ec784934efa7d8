"""The two passes of the labels' cross-entropy on CUDA: each reads the logits once, backward writes their gradient.

The same as cross_entropy.py's in plain torch, in fp32. No two programs write to one place, so that a result is the same
at each run. Only cross_entropy.py imports this: it needs Triton. tests/gpu/test_loss_cuda.py compares with float64.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # columns that a program works on at once
_SETTINGS: dict[str, Any] = {"num_warps": 8}


@triton.jit
def _loss_rows_kernel(logits, local, largest, total, found, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    """One row: the maximum and the sum of exponentials as they are after each tile."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * COLUMNS
    maximum = -3.4028234663852886e38
    summed = 0.0
    for begin in range(0, COLUMNS, TILE):
        column = begin + tl.arange(0, TILE)
        x = tl.load(logits + column, mask=column < COLUMNS, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(maximum, tl.max(x, axis=0))
        summed = summed * tl.exp(maximum - higher) + tl.sum(tl.exp(x - higher), axis=0)
        maximum = higher
    label = tl.load(local + row)
    value = tl.load(logits + label, mask=(label >= 0) & (label < COLUMNS), other=0.0)
    tl.store(largest + row, maximum)
    tl.store(total + row, summed)
    tl.store(found + row, value.to(tl.float32))


@triton.jit
def _loss_gradient_kernel(
    logits, local, largest, inverse, weights, out, columns, column_tiles, TILE: tl.constexpr
):  # fmt: skip
    """A tile of a row, of which `out` may be the same place."""
    program = tl.program_id(0)
    row = (program // column_tiles).to(tl.int64)
    column = (program % column_tiles) * TILE + tl.arange(0, TILE)
    inside = column < columns
    x = tl.load(logits + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    share = tl.exp(x - tl.load(largest + row)) * tl.load(inverse + row)
    share = tl.where(column == tl.load(local + row), share - 1.0, share) * tl.load(weights + row)
    tl.store(out + row * columns + column, share.to(out.dtype.element_ty), mask=inside)


def _tile(columns: int) -> int:
    return min(_TILE, max(128, triton.next_power_of_2(columns)))


def row_sums(logits: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See cross_entropy.row_sums. logits are contiguous and not empty; the current device is theirs."""
    rows, columns = logits.shape
    largest, total, found = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3))
    _loss_rows_kernel[(rows,)](
        logits, local.contiguous(), largest, total, found, COLUMNS=columns, TILE=_tile(columns), **_SETTINGS
    )
    return largest, total, found


def write_gradient(
    logits: Tensor, local: Tensor, largest: Tensor, inverse: Tensor, weights: Tensor, out: Tensor
) -> None:
    """See cross_entropy.write_gradient. logits and out are contiguous and not empty; the current device is theirs."""
    rows, columns = logits.shape
    tile = _tile(columns)
    tiles = triton.cdiv(columns, tile)
    _loss_gradient_kernel[(rows * tiles,)](
        logits, local.contiguous(), largest, inverse, weights.float().contiguous(), out, columns, tiles, TILE=tile,
        **_SETTINGS,
    )  # fmt: skip
