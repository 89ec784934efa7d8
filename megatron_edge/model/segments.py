"""Attention within the segments of packed windows, on torch's flash attention: no mask, no keys of other segments.

In: where segments begin (train/data.py: segment_starts), a tensor of fixed size, so that a CUDA graph can take steps
with other segments. Under context parallelism a rank has two pieces of the text (runtime/session.py:
context_positions), and each needs the keys from the beginning of the text to the piece's own end: `keys_of_part` lays
them one after the other, of one piece and then of the other, and `starts_of_part` cuts both into sequences whose
queries are the last tokens of their keys, which is what flash attention takes as causal (2.1 and later align queries
and keys at their ends). Called by model/layers.py and train/placement.py.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

LARGEST_HEAD = 256  # of flash attention; and a multiple of 8


def takes(query: Tensor) -> bool:
    """Whether flash attention takes such heads here."""
    size = query.shape[-1]
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    return size <= LARGEST_HEAD and size % 8 == 0 and _has_flash_attention(query.device)


@functools.cache
def _has_flash_attention(device: torch.device) -> bool:
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def attention(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float) -> Tensor:
    """query [s, b, heads, d], key and value [t, b, kv_heads, d] -> [s, b, heads * d]. `starts`: int32 [segments + 1] of
    queries and keys alike, or [2, segments + 1] of queries and of keys, window after window."""
    length, windows = query.shape[:2]
    rows = (x.transpose(0, 1).reshape(-1, *x.shape[2:]) for x in (query, key, value))
    out = _Attention.apply(*rows, *_both(starts), length, key.shape[0], scale)
    return out.view(windows, length, -1).transpose(0, 1).contiguous()


def mask(starts: Tensor, windows: int, queries: int, keys: int) -> Tensor:
    """bool [b, 1, s, t], True where attention is not allowed, of b windows with s queries and t keys each."""
    segments, remaining = [], []  # of each query and key: its segment, and how many tokens of that begin at it
    for bounds, length in zip(_both(starts), (queries, keys), strict=True):
        places = torch.arange(windows * length, device=starts.device, dtype=starts.dtype)
        segment = torch.bucketize(places, bounds, right=True)
        segments.append(segment.view(windows, length))
        remaining.append((bounds[segment] - places).view(windows, length))
    other = segments[0][:, :, None] != segments[1][:, None, :]
    return (other | (remaining[0][:, :, None] > remaining[1][:, None, :]))[:, None]


def _both(starts: Tensor) -> tuple[Tensor, Tensor]:
    return (starts, starts) if starts.dim() == 1 else (starts[0], starts[1])


def starts_of_part(starts: Tensor, length: int, rank: int, size: int) -> Tensor:
    """Where segments begin, int32 [n + 1], in windows of `length` tokens -> int32 [2, 2 n + 1]: where those of the
    queries and those of the keys begin that context-parallel rank `rank` of `size` has, window after window in each its
    first piece and then its second. Before a piece lie segments without queries, and behind it empty ones."""
    piece, windows = length // (2 * size), int(starts[-1]) // length
    window, place = starts // length, starts % length
    queries, keys, keys_before = [], [], 0
    for index, end in enumerate(_ends(rank, size)):
        in_piece = (place - (end - 1) * piece).clamp(0, piece)
        queries.append((2 * window + index) * piece + in_piece)
        keys.append((window * (2 * size + 1) + keys_before) * piece + place.clamp(max=end * piece))
        keys_before = end
    # Both grow with the window, the piece and the place: sorted alone, they stay side by side.
    found = torch.stack((torch.cat(queries), torch.cat(keys))).sort(dim=1).values
    totals = windows * piece * torch.tensor([[2], [2 * size + 1]], dtype=starts.dtype, device=starts.device)
    return torch.minimum(found, totals)[:, :-1].contiguous()


def keys_of_part(gathered: Tensor, rank: int, size: int) -> tuple[Tensor, Tensor]:
    """What each rank has, key [s / size, ...] and value after it, rank after rank -> key and value for the two pieces
    of `rank`, [s + s / (2 size), ...] each."""
    pieces = gathered.chunk(4 * size)  # of each rank: key of its first and of its second piece, value of both

    def of(place: int, number: int) -> Tensor:
        owner, second = (place, 0) if place < size else (2 * size - 1 - place, 1)
        return pieces[4 * owner + 2 * number + second]

    key, value = (
        torch.cat([of(place, number) for end in _ends(rank, size) for place in range(end)]) for number in (0, 1)
    )
    return key, value


def _ends(rank: int, size: int) -> tuple[int, int]:
    """Where the two pieces of a rank end, in pieces: 2 * size + 1 together."""
    return rank + 1, 2 * size - rank


class _Attention(torch.autograd.Function):
    """Of rows [n, heads, d]; no segment has more queries or keys than `most_queries` and `most_keys`. One without
    queries gives its keys a gradient of 0."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        queries: Tensor,
        keys: Tensor,
        most_queries: int,
        most_keys: int,
        scale: float,
    ) -> Tensor:
        out, log_sums, *state, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, queries, keys, most_queries, most_keys, 0.0, True, False, scale=scale
        )
        ctx.save_for_backward(query, key, value, out, log_sums, queries, keys, *state)
        ctx.most, ctx.scale = (most_queries, most_keys), scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, out, log_sums, queries, keys, *state = ctx.saved_tensors
        with _sums_in_order():
            found = torch.ops.aten._flash_attention_backward(
                gradient.contiguous(), query, key, value, out, log_sums, queries, keys, *ctx.most, 0.0, True, *state,
                scale=ctx.scale,
            )  # fmt: skip
        return *found, None, None, None, None, None


@contextlib.contextmanager
def _sums_in_order() -> Iterator[None]:
    """Flash attention adds up the gradient of queries in changing order unless torch asks for deterministic results;
    torch would then also fill each new tensor, for nothing here: all that is read has been written."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled
