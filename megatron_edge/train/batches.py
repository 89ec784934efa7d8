"""Windows of text as the micro-batches of passes without gradient: evaluation, calibration, search."""

from __future__ import annotations

import torch

from megatron_edge.runtime.session import Session
from megatron_edge.train.data import Batch

WINDOWS = 4  # of a micro-batch on CPU, where more are no faster; and at least
CUDA_TOKENS = 8192  # of one on CUDA: fewer are calculated before their kernels are launched
CUDA_LOGITS_BYTES = 2**31  # what the fp32 logits of one may take there


def most_windows(seq_length_tokens: int, vocab_size: int, session: Session) -> int:
    """Windows of a micro-batch; `vocab_size` is the whole model's."""
    if session.device.type != "cuda":
        return WINDOWS
    plan = session.plan
    tokens = min(CUDA_TOKENS, CUDA_LOGITS_BYTES * plan.tp * plan.cp // (4 * vocab_size))
    return max(WINDOWS, tokens // seq_length_tokens)


def in_batches(windows: Batch, vocab_size: int, session: Session) -> list[Batch]:
    """Micro-batches of one size; the last is filled with repeated windows that do not count. On CUDA they are no larger
    than gives every data-parallel rank one."""
    count, length = windows.tokens.shape
    size = most_windows(length, vocab_size, session)
    if session.device.type == "cuda":
        parts = max(-(-count // size), session.plan.dp)
        size = -(-count // parts)
    return even_batches(windows, size)


def even_batches(windows: Batch, size: int) -> list[Batch]:
    """Batches of `size` windows; the last is filled with repeated windows that do not count."""
    missing = -windows.tokens.shape[0] % size
    if missing:
        fill = Batch(*(part[:1].repeat(missing, 1) for part in windows))
        fill = fill._replace(loss_mask=torch.zeros_like(fill.loss_mask))
        windows = Batch(*(torch.cat(parts) for parts in zip(windows, fill, strict=True)))
    return windows.split(size)
