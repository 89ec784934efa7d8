"""A micro-batch on its rank's device: this rank's part of it, and how attention goes within its windows.

Three ways, each a kernel that rounds differently: causally over whole windows, within the segments of windows that hold
several documents (CUDA), or by a mask. Under context parallelism the first is the second with one segment a window
(CUDA), and the ranks of a window choose the same way, from the whole of it: each exchanges other tensors. Called by
train/step.py and train/graph.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from megatron_edge.model.segments import starts_of_part
from megatron_edge.runtime.session import Session, context_positions
from megatron_edge.runtime.watchdog import mark
from megatron_edge.train.data import Batch, attention_mask, segment_starts, several_documents

Attends = Literal["causally", "within segments", "by mask"]
TOKENS_OF_A_SEGMENT = 128  # on average at least: where there are more segments than that, a mask says which


@dataclass
class DeviceBatch:
    """This rank's part of a micro-batch on the device, with its attention mask (model/layers.py: PackedAttention).
    `target` is what an objective compares with, beside the labels."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    loss_mask: Tensor
    attention_mask: Tensor | None
    target: Any = None


def attends(batch: Batch, session: Session) -> Attends:
    """How attention within these windows goes, on this rank's part of them."""
    on_cuda = session.device.type == "cuda"  # elsewhere torch has no flash attention of segments
    if session.plan.cp > 1 and not on_cuda:
        return "by mask"
    if not several_documents(batch.documents):
        return "causally"
    return "within segments" if on_cuda and _segments(batch) is not None else "by mask"


def _segments(batch: Batch) -> Tensor | None:
    windows, length = batch.documents.shape
    return segment_starts(batch.documents, windows * max(8, length // TOKENS_OF_A_SEGMENT))


def _starts(batch: Batch, session: Session, way: Attends) -> Tensor | None:
    """Where the segments begin that attention stays within; under context parallelism those of this rank's part. None:
    whole windows, of one rank."""
    windows, length = batch.documents.shape
    plan = session.plan
    if way == "causally":
        starts = torch.arange(0, (windows + 1) * length, length, dtype=torch.int32) if plan.cp > 1 else None
    else:
        starts = _segments(batch)
        assert starts is not None
    if plan.cp > 1:
        assert starts is not None
        starts = starts_of_part(starts, length, session.cp_rank, plan.cp)
    return starts


def place(batches: Sequence[Batch], session: Session) -> tuple[Attends, list[DeviceBatch]]:
    """A step's micro-batches on the device, all with the way to attend that each of them can take: the ways are kernels
    that round differently."""
    ways = [attends(batch, session) for batch in batches]
    way = next(way for way in reversed(get_args(Attends)) if way in ways)
    return way, [to_device(batch, session, way) for batch in batches]


def to_device(batch: Batch | DeviceBatch, session: Session, way: Attends | None = None) -> DeviceBatch:
    """`way`: None: its own."""
    if isinstance(batch, DeviceBatch):
        return batch
    mark()
    plan, length = session.plan, batch.tokens.shape[1]
    way = way or attends(batch, session)
    if way == "by mask":
        mask = attention_mask(_sent(batch.documents, session.device))
    else:
        mask = _starts(batch, session, way)
        mask = None if mask is None else _sent(mask, session.device)
    if plan.cp > 1:
        parts = [context_positions(length, rank, plan.cp) for rank in range(plan.cp)]
        mine = parts[session.cp_rank]
        if way == "by mask":
            assert mask is not None
            mask = mask[:, :, mine.to(mask.device)][..., torch.cat(parts).to(mask.device)]
        batch = Batch(*(part[:, mine] for part in batch))
    return DeviceBatch(
        tokens=_sent(batch.tokens, session.device),
        labels=_sent(batch.labels, session.device),
        positions=_sent(batch.positions, session.device),
        loss_mask=_sent(batch.loss_mask, session.device),
        attention_mask=mask,
    )


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """Behind what the device has still to do: a copy from memory that is not pinned would wait for that."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
