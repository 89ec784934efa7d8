"""A step's forward and backward recorded once as a CUDA graph and replayed: a small model's step is bound by launching
its thousands of kernels, not by running them.

In: this rank's micro-batches; out: what `step.forward_backward` gives, the same arithmetic. The sums over replicas and
the optimizer stay outside. Called by train/loop.py, made by jobs.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from megatron_edge.model.build import chunks_of
from megatron_edge.runtime.session import Session
from megatron_edge.train.data import Batch
from megatron_edge.train.placement import Attends, DeviceBatch, place
from megatron_edge.train.step import Objective, forward_backward

EAGER_STEPS = 2  # libraries and communicators set themselves up at their first use, which must not be recorded


@dataclass
class _Recording:
    """What a graph reads and writes: its inputs, what the objective reports, the number of tokens, and the buffers that
    sequence parallelism gathers into, which Megatron replaces where a larger forward pass comes by."""

    graph: torch.cuda.CUDAGraph
    inputs: list[DeviceBatch]
    found: list[dict[str, Tensor]]
    num_tokens: Tensor
    buffers: list[Tensor]


class StepGraph:
    """Takes the place of `step.forward_backward` for steps of one shape. The model's DistributedDataParallel must have
    been made on `stream`: autograd accumulates gradients where the accumulators were made.

    Each way to attend (placement.Attends: windows of several documents have another than those of one) has a graph of
    its own; they use the same memory, as do all graphs of one `pool` (None: of its own), of which no two may run at a
    time."""

    def __init__(self, stream: torch.cuda.Stream, pool: Any = None) -> None:
        self._stream, self._pool = stream, pool or torch.cuda.graph_pool_handle()
        self._seen: Counter[Attends] = Counter()
        self._recorded: dict[Attends, _Recording] = {}

    def __call__(
        self, model: nn.ModuleList, batches: list[Batch], session: Session, objective: Objective
    ) -> list[dict[str, Tensor]]:
        way, placed = place(batches, session)
        if self._seen[way] < EAGER_STEPS:
            self._seen[way] += 1
            return launched_one_by_one(model, placed, session, objective, self._stream)
        if way not in self._recorded:
            self._recorded[way] = self._record(model, placed, session, objective)
        else:
            for kept, new in zip(self._recorded[way].inputs, placed, strict=True):
                _copy(new, kept)
        recorded = self._recorded[way]
        recorded.graph.replay()
        config = chunks_of(model)[0].config
        config.finalize_model_grads_func(list(model), recorded.num_tokens)
        return recorded.found

    def _record(
        self, model: nn.ModuleList, inputs: list[DeviceBatch], session: Session, objective: Objective
    ) -> _Recording:
        from megatron.core.parallel_state import get_global_memory_buffer

        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with (
            finalizing_later(chunks_of(model)[0].config) as counted,
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            found = forward_backward(model, inputs, session, objective)
        return _Recording(graph, inputs, found, counted[0], list(get_global_memory_buffer().buffer.values()))


def launched_one_by_one(
    model: nn.ModuleList,
    batches: Sequence[Batch | DeviceBatch],
    session: Session,
    objective: Objective,
    stream: torch.cuda.Stream,
) -> list[dict[str, Tensor]]:
    """`step.forward_backward` on `stream`."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = forward_backward(model, batches, session, objective)
    torch.cuda.current_stream().wait_stream(stream)
    return found


@contextlib.contextmanager
def finalizing_later(config: Any) -> Iterator[list[Tensor]]:
    """Inside, gradients are not summed over replicas nor divided by their tokens, whose number is kept instead."""
    finalize, counted = config.finalize_model_grads_func, []
    config.finalize_model_grads_func = lambda model, num_tokens, **_: counted.append(num_tokens)
    try:
        yield counted
    finally:
        config.finalize_model_grads_func = finalize


def _copy(new: DeviceBatch, kept: DeviceBatch) -> None:
    for field in fields(new):
        value = getattr(new, field.name)
        if isinstance(value, Tensor):
            getattr(kept, field.name).copy_(value)
