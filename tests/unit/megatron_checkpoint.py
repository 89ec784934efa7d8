"""Checkpoints as Megatron-LM writes them (torch_dist, layers stacked): megatron-core's own names, shapes and files."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_edge.model.build import build_model, chunks_of, load_weights
from megatron_edge.model.source import open_source
from megatron_edge.runtime.session import Session, open_session
from tools.layout_parity import layout_plan
from tools.random_models import RANDOM_MODELS, make_random_model


def model_of(source: Path, session: Session, dtype: torch.dtype = torch.float32) -> nn.ModuleList:
    """This rank's shard of a Hugging Face model."""
    opened = open_source(source)
    model = build_model(opened.hf_config, session.plan, dtype, session.device)
    load_weights(model, opened.read, opened.hf_config, session)
    return model


def save_as_megatron_lm(model: nn.ModuleList, directory: Path, iteration: int = 7, **metadata: Any) -> Path:
    """`directory`/iter_0000007 and its tracker, with what Megatron-LM's own call passes (training/checkpointing.py,
    core_v0.16: singleton_local_shards False). All ranks call it."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state

    inside = directory / f"iter_{iteration:07d}"
    if dist.get_rank() == 0:
        inside.mkdir(parents=True)
        (directory / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    dist.barrier()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state: dict[str, Any] = {"iteration": iteration, "checkpoint_version": 3.0, "args": argparse.Namespace(lr=1.0)}
    (chunk,) = chunks_of(model)
    chunk.config.hetereogenous_dist_checkpoint = False  # of our models' own checkpoints, not of Megatron-LM's
    settings = {"singleton_local_shards": False, "dp_cp_group": group, **metadata}
    dist_checkpointing.save({**state, "model": chunk.sharded_state_dict(metadata=settings)}, str(inside))
    return directory


def main() -> None:
    """torchrun megatron_checkpoint.py DIRECTORY NAME=LAYOUT ...: one checkpoint of each random model."""
    from torch.distributed import PrefixStore, rendezvous

    directory, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    store = next(iter(rendezvous("env://")))[0]
    for number, chosen in enumerate(sys.argv[2:]):
        name, layout = chosen.split("=")
        hf = directory / name / "hf"
        if rank == 0:
            make_random_model(RANDOM_MODELS[name], hf)
        plan = layout_plan(layout)
        own = PrefixStore(str(number), store)
        with open_session(plan, rank=rank, local_rank=rank, store=own, timeout_seconds=120, seed=1) as session:
            session.on_rank_0(lambda: None)
            save_as_megatron_lm(model_of(hf, session), directory / name / layout)


if __name__ == "__main__":
    main()
