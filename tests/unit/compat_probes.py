"""For test_compat.py, under torchrun with two processes: what upstream does across ranks, without and with our patch.

Each probe does one thing with upstream's own function and says whether the result is plain torch's. Without the patch
it must fail on each rank before anything is sent, or the other rank would wait. Argument: the JSON file to write.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tiny_megatron import hf_config_of, random_llama
from torch.distributed import PrefixStore, rendezvous

from megatron_edge.contracts import ParallelPlan
from megatron_edge.model.build import build_model
from megatron_edge.runtime.session import Session, open_session


def whole_numbers(*shape: int) -> torch.Tensor:
    """The same on both ranks, and of a size that keeps every sum exact."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(sum(shape))).float()


def linear_backward(session: Session) -> bool:
    """A column-parallel linear under sequence parallelism: activations gathered forward, gradients scattered back."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import layers

    rank, group = session.tp_rank, parallel_state.get_tensor_model_parallel_group()
    x, weight, gradient = whole_numbers(8, 2, 16), whole_numbers(12, 16), whole_numbers(8, 2, 12)
    mine = x.chunk(2)[rank].clone().requires_grad_()
    my_weight = weight.chunk(2)[rank].clone().requires_grad_()
    out = layers.linear_with_grad_accumulation_and_async_allreduce(
        mine, my_weight, None, False, allreduce_dgrad=False, sequence_parallel=True, tp_group=group
    )
    out.backward(gradient.chunk(2, dim=-1)[rank])
    x.requires_grad_(), weight.requires_grad_()
    torch.nn.functional.linear(x, weight).backward(gradient)
    return torch.equal(mine.grad, x.grad.chunk(2)[rank]) and torch.equal(my_weight.grad, weight.grad.chunk(2)[rank])


def reduce_scatter(session: Session) -> bool:
    from megatron.core.tensor_parallel import mappings

    x = whole_numbers(8, 2, 16) + session.tp_rank
    mine = mappings.reduce_scatter_to_sequence_parallel_region(x)
    return torch.equal(mine, (2 * whole_numbers(8, 2, 16) + 1).chunk(2)[session.tp_rank])


def stage_to_stage(session: Session) -> bool:
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from megatron_edge.model.build import transformer_config

    config = transformer_config(hf_config_of(random_llama()), session.plan, torch.float32, session.device)
    between = P2PCommunicator(parallel_state.get_pipeline_model_parallel_group(), config)
    x = whole_numbers(8, 2, 16)
    if session.pp_rank == 0:
        between.send_forward(x, is_last_stage=False)
        return True
    return torch.equal(between.recv_forward(x.shape, is_first_stage=False), x)


def tied_embeddings(session: Session) -> bool:
    """Both stages' copies start off equal: upstream sums them up, the last stage's being zeros."""
    model = build_model(hf_config_of(random_llama()), session.plan, torch.float32, session.device)
    return model[0].shared_embedding_or_output_weight().device.type == "cpu"


@contextlib.contextmanager
def without(owner: Any, name: str, original: Any) -> Iterator[None]:
    patched = getattr(owner, name)
    setattr(owner, name, original)
    try:
        yield
    finally:
        setattr(owner, name, patched)


def outcome(probe: Callable[[Session], bool], session: Session) -> str:
    try:
        return "equals plain torch" if probe(session) else "differs from plain torch"
    except (AssertionError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def core(name: str) -> Any:
    return importlib.import_module("megatron.core." + name)


def run(session: Session) -> dict[str, tuple[str, str]]:
    """Name of the patch: what happens (without it, with it)."""
    from megatron.core.models.common.language_module.language_module import LanguageModule

    setup = "setup_embeddings_and_output_layer"
    probes: dict[str, tuple[Callable[[Session], bool], Any, str, Any]] = {
        "utils": (linear_backward, core("utils"), "torch", torch),  # first: it keeps the buffer that it once made
        "tensor_parallel.layers": (linear_backward, core("tensor_parallel.layers"), "torch", torch),
        "tensor_parallel.mappings": (reduce_scatter, core("tensor_parallel.mappings"), "torch", torch),
        "pipeline_parallel.p2p_communication": (
            stage_to_stage, core("pipeline_parallel.p2p_communication"), "torch", torch,
        ),
        setup: (tied_embeddings, LanguageModule, setup, getattr(LanguageModule, setup).__wrapped__),
    }  # fmt: skip
    names = list(probes)[:3] if session.plan.tp == 2 else list(probes)[3:]
    found = {}
    for name in names:
        probe, owner, attribute, original = probes[name]
        if name == "pipeline_parallel.p2p_communication" and session.pp_rank == 0:
            unpatched = ""  # the stage that sends makes no tensor: nobody would receive it
        else:
            with without(owner, attribute, original):
                unpatched = outcome(probe, session)
        found[name] = (unpatched, outcome(probe, session))
    return found


def main() -> None:
    store, rank, _ = next(iter(rendezvous("env://")))
    found = {}
    for plan in (ParallelPlan(tp=2, world_size=2, sequence_parallel=True), ParallelPlan(pp=2, world_size=2)):
        with open_session(
            plan,
            rank=rank,
            local_rank=int(os.environ["LOCAL_RANK"]),
            store=PrefixStore(f"pp{plan.pp}", store),
            timeout_seconds=60,
            seed=1,
        ) as session:
            found |= run(session)
    if rank == 1:  # the last stage, which receives
        Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
