"""A step's forward and backward recorded once as a CUDA graph and replayed: a small model's step is bound by launching
its thousands of kernels, not by running them.

In: this rank's micro-batches; out: what `step.forward_backward` gives, the same arithmetic. The sums over replicas and
the optimizer stay outside, as they ask the device for numbers. Called by train/loop.py, made by jobs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from megatron_edge.model.build import chunks_of
from megatron_edge.runtime.session import Session
from megatron_edge.train.data import Batch
from megatron_edge.train.step import DeviceBatch, Objective, forward_backward, to_device

EAGER_STEPS = 2  # libraries and communicators set themselves up at their first use, which must not be recorded


class StepGraph:
    """Takes the place of `step.forward_backward` for steps of one shape. The model's DistributedDataParallel must have
    been made on `stream`: autograd accumulates gradients where the accumulators were made."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream, self._seen = stream, 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[DeviceBatch] = []
        self._found: list[dict[str, Tensor]] = []
        self._num_tokens: Tensor | None = None

    def __call__(
        self, model: nn.ModuleList, batches: list[Batch], session: Session, objective: Objective
    ) -> list[dict[str, Tensor]]:
        placed = [to_device(batch, session) for batch in batches]
        if self._seen < EAGER_STEPS:
            self._seen += 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                found = forward_backward(model, placed, session, objective)
            torch.cuda.current_stream().wait_stream(self._stream)
            return found
        if self._graph is None:
            self._inputs = placed
            self._record(model, session, objective)
        else:
            for kept, new in zip(self._inputs, placed, strict=True):
                _copy(new, kept)
        assert self._graph is not None
        self._graph.replay()
        config = chunks_of(model)[0].config
        config.finalize_model_grads_func(list(model), self._num_tokens)
        return self._found

    def _record(self, model: nn.ModuleList, session: Session, objective: Objective) -> None:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with (
            _finalizing_later(chunks_of(model)[0].config) as counted,
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            self._found = forward_backward(model, self._inputs, session, objective)
        self._graph, self._num_tokens = graph, counted[0]


@contextlib.contextmanager
def _finalizing_later(config: Any) -> Iterator[list[Tensor]]:
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
