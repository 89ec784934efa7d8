"""Attention within the segments of packed windows, on torch's flash attention: no mask, no keys of other segments.

In: where segments begin (train/data.py: segment_starts), a tensor of fixed size, so that a CUDA graph can take steps
with other segments. Called by model/layers.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

LARGEST_HEAD = 256  # of flash attention; and a multiple of 8


def takes(query: Tensor) -> bool:
    """Whether flash attention takes such heads here."""
    size = query.shape[-1]
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and size <= LARGEST_HEAD and size % 8 == 0


def attention(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float) -> Tensor:
    """query [s, b, heads, d], key and value [s, b, kv_heads, d], starts int32 [segments + 1] -> [s, b, heads * d]."""
    length, windows = query.shape[:2]
    rows = (x.transpose(0, 1).reshape(windows * length, *x.shape[2:]) for x in (query, key, value))
    out = _Attention.apply(*rows, starts, length, scale)
    return out.view(windows, length, -1).transpose(0, 1).contiguous()


def mask(starts: Tensor, windows: int, length: int) -> Tensor:
    """bool [b, 1, s, s], True where attention is not allowed."""
    places = torch.arange(windows * length, device=starts.device, dtype=starts.dtype)
    segment = torch.bucketize(places, starts, right=True).view(windows, length)
    later = torch.ones(length, length, dtype=torch.bool, device=starts.device).triu(diagonal=1)
    return ((segment[:, :, None] != segment[:, None, :]) | later)[:, None]


class _Attention(torch.autograd.Function):
    """Of rows [n, heads, d]; no segment is longer than `longest`."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float
    ) -> Tensor:
        out, log_sums, *state, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, starts, starts, longest, longest, 0.0, True, False, scale=scale
        )
        ctx.save_for_backward(query, key, value, out, log_sums, starts, *state)
        ctx.longest, ctx.scale = longest, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, out, log_sums, starts, *state = ctx.saved_tensors
        with _sums_in_order():
            found = torch.ops.aten._flash_attention_backward(
                gradient.contiguous(), query, key, value, out, log_sums, starts, starts, ctx.longest, ctx.longest,
                0.0, True, *state, scale=ctx.scale,
            )  # fmt: skip
        return *found, None, None, None


@contextlib.contextmanager
def _sums_in_order() -> Iterator[None]:
    """Flash attention adds up the gradient of queries in changing order unless torch asks for deterministic results."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
