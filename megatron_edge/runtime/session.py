"""Process groups, device and seeds of one job: opened once, torn down once."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist

from megatron_edge.contracts import InputError, ParallelPlan
from megatron_edge.runtime import compat
from megatron_edge.runtime.topology import describe
from megatron_edge.runtime.watchdog import watching

log = logging.getLogger("megatron_edge")

# What a collective waits beyond the watchdog, which names the rank that is at fault and speaks first.
COLLECTIVE_GRACE_SECONDS = 60

PACKAGES = ("torch", "megatron-core", "nvidia-modelopt", "transformers")


def compute_device() -> torch.device:
    """Where this process computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def tensor_group() -> Any:
    """Process group of the ranks that share this rank's layers."""
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def data_group() -> Any:
    """Process group of the replicas of this rank's shard."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def context_group() -> Any:
    """Process group of the ranks that share this rank's windows, each with a part of their text."""
    from megatron.core import parallel_state

    return parallel_state.get_context_parallel_group()


def expert_groups() -> tuple[Any, Any, Any]:
    """Process groups of the ranks that share this rank's experts, that hold the other experts of its layers, and that
    hold the same experts."""
    from megatron.core import parallel_state

    return (
        parallel_state.get_expert_tensor_parallel_group(),
        parallel_state.get_expert_model_parallel_group(),
        parallel_state.get_expert_data_parallel_group(),
    )


def gather_sequence(x: torch.Tensor) -> torch.Tensor:
    """[s / tp, ...] of each rank of `tensor_group` -> [s, ...] on all of them."""
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    return gather_from_sequence_parallel_region(x)


def gather_context(x: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """[..., s / cp, ...] of each context-parallel rank -> [..., s, ...] in the order of the text, on all of them."""
    from megatron.core import parallel_state

    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(parts, x.contiguous(), group=parallel_state.get_context_parallel_group())
    gathered = torch.cat(parts, dim)
    order = torch.cat([context_positions(gathered.shape[dim], rank, size) for rank in range(size)])
    return gathered.index_select(dim, order.argsort().to(x.device))


def context_positions(seq_length: int, rank: int, size: int) -> torch.Tensor:
    """Positions of the text that context-parallel rank `rank` of `size` holds: one piece from the front, one from the
    back, so that causal attention is the same work everywhere."""
    pieces = torch.arange(seq_length).chunk(2 * size)
    return torch.cat((pieces[rank], pieces[2 * size - 1 - rank]))


@dataclass(frozen=True)
class Session:
    """Where this process stands in the job."""

    plan: ParallelPlan
    device: torch.device
    rank: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int
    ep_rank: int
    etp_rank: int
    edp_rank: int

    @property
    def holds_first_copy(self) -> bool:
        """Of all replicas of this rank's shard (but for its experts) this is the one that speaks for it."""
        return self.dp_rank == 0 and self.cp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.plan.pp - 1

    def on_rank_0(self, action: Callable[[], Any]) -> Any:
        """Runs `action` on rank 0 alone and gives its result to every rank; its failure is everybody's.
        All ranks call it.

        Raises:
            OSError, InputError: what `action` raised, on every rank.
        """
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = action()
            except (OSError, InputError) as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def gather(self, mine: Any) -> list[Any]:
        """What every rank holds, in rank order, on every rank. All ranks call it."""
        everyone: list[Any] = [None] * self.plan.world_size
        dist.all_gather_object(everyone, mine)
        return everyone


@contextlib.contextmanager
def open_session(
    plan: ParallelPlan, *, rank: int, local_rank: int, store: Any, timeout_seconds: int, seed: int
) -> Iterator[Session]:
    """Starts NCCL where there is a GPU and gloo otherwise, and Megatron's groups for `plan`. All ranks call it.

    `store` is this start's store of the launch; None for a single process. After `timeout_seconds` without progress
    the watchdog ends all ranks.

    Raises:
        RankLost: another rank is gone.
    """
    # Megatron wants one queue per device, so that tensor-parallel communication starts before the work it hides behind.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    compat.install()
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    store = store if store is not None else dist.HashStore()
    with watching(store, rank, plan.world_size, timeout_seconds):
        failed = True
        try:
            session = _open_groups(plan, rank, device, store, timeout_seconds + COLLECTIVE_GRACE_SECONDS, seed)
            log.info("%s, %s, %s; %s", describe(plan), device.type, dist.get_backend(), _accelerators())
            log.info("%s", ", ".join(f"{name} {version(name)}" for name in PACKAGES))
            yield session
            dist.barrier()
            failed = False
        finally:
            # To close the groups under a failure would fail the other ranks before this one has said why: there they
            # are left to the end of the process, which is near.
            if dist.is_initialized() and (not failed or plan.world_size == 1):
                _close_groups()


def _open_groups(
    plan: ParallelPlan, rank: int, device: torch.device, store: Any, timeout_seconds: int, seed: int
) -> Session:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=plan.world_size,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if cuda else None,
    )
    parallel_state.initialize_model_parallel(
        plan.tp,
        plan.pp,
        context_parallel_size=plan.cp,
        virtual_pipeline_model_parallel_size=plan.vpp if plan.vpp > 1 else None,
        expert_model_parallel_size=plan.ep,
        expert_tensor_parallel_size=plan.etp,
        distributed_timeout_minutes=math.ceil(timeout_seconds / 60),
    )
    random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return Session(
        plan=plan,
        device=device,
        rank=rank,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        edp_rank=parallel_state.get_expert_data_parallel_rank(),
    )


def _close_groups() -> None:
    """NCCL takes half a second for a group. Most of Megatron's have one rank and close at the same time; the others in
    torch's order, which is that of all ranks."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    mine = dist.distributed_c10d._world.pg_names
    alone = [group for group in mine if group.size() == 1 and group is not dist.group.WORLD]
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda group: group.shutdown(), alone))
    dist.destroy_process_group()


def _accelerators() -> str:
    """What Megatron finds: it takes Adam from the first of these that is there, else torch's."""
    names = {"TransformerEngine": "transformer_engine", "apex": "amp_C"}  # PyPI's apex is another package
    found = [name for name, module in names.items() if find_spec(module) is not None and torch.cuda.is_available()]
    return f"Adam of {found[0] if found else 'torch'}; " + "; ".join(
        f"{name} {'found' if name in found else 'absent'}" for name in names
    )
