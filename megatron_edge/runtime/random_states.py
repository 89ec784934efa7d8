"""Megatron's random states, which it keeps and sets also where nothing is drawn: a step of ours has no dropout.

A part of compat.py, which installs it. Tests: tests/unit/test_compat.py, tests/gpu/test_graph_cuda.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def keep_on_cpu() -> None:
    """random.py:235/248/423/447 keep CUDA random states, and `fork` runs even without dropout."""
    from megatron.core.tensor_parallel import random as upstream

    class CpuRandomStates(upstream.CudaRNGStatesTracker):
        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = upstream._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            outside = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outside)

    upstream._CUDA_RNG_STATE_TRACKER = CpuRandomStates()
    upstream._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    upstream._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    upstream._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    upstream.initialize_rng_tracker = lambda *args, **kwargs: None


def leave_out_of_graphs() -> None:
    """The states are the host's, and no CUDA graph can be recorded that reads or sets them: embeddings under sequence
    parallelism (random.py:243) and recomputation (random.py:444) do."""
    from megatron.core.tensor_parallel import random as upstream

    recording = torch.cuda.is_current_stream_capturing
    tracker = upstream.CudaRNGStatesTracker
    fork, get_all, set_all = tracker.fork, upstream._get_all_rng_states, upstream._set_all_rng_states

    def fork_outside(self: Any, *args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if recording() else fork(self, *args, **kwargs)

    def get_outside() -> tuple[Any, ...]:
        return () if recording() else get_all()

    def set_outside(*states: Any) -> None:
        if not recording():
            set_all(*states)

    tracker.fork = fork_outside
    upstream._get_all_rng_states, upstream._set_all_rng_states = get_outside, set_outside
