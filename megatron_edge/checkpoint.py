"""Sharded checkpoints: Megatron dist_checkpointing underneath, atomic and checked on top.

A checkpoint is a directory `step_00000010` that appears by one rename, when all of it is on disk. Its
`manifest.json` lists every file with size and sha256; only a checkpoint that matches is trusted. It holds weights,
optimizer and quantizer state as global tensors, whatever the layout that saved them.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from megatron_edge.artifact.shards import sync
from megatron_edge.artifact.store import sha256_of_file
from megatron_edge.contracts import InputError, QuantPlan, WriteFailed, disk_error
from megatron_edge.model.build import chunks_of
from megatron_edge.quantize import adapters
from megatron_edge.quantize.state import (
    PREFIX,
    AmaxShard,
    prepare_quantizer_state,
    quantizer_shards,
    set_quantizer_state,
)
from megatron_edge.runtime import compat, optimizer_state
from megatron_edge.runtime.session import Session

log = logging.getLogger("megatron_edge")

_SAVING = ".saving-"


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint on disk: `extra` is what the job stored beside the tensors."""

    path: Path
    step: int
    extra: dict[str, Any]


def save_checkpoint(
    directory: Path,
    step: int,
    model: nn.Module,
    optimizer: Any | None,
    plan: QuantPlan,
    session: Session,
    *,
    extra: dict[str, Any],
    keep: int,
) -> Path:
    """Writes `directory/step_<step>`; then removes all but the newest `keep`. All ranks call it.

    Raises:
        WriteFailed: on every rank, where the disk refused one of them; earlier checkpoints are untouched.
    """
    final = directory / f"step_{step:08d}"
    saving = directory / f"{_SAVING}{final.name}"
    session.on_rank_0(lambda: _fresh(saving))
    state = _sharded_state(model, optimizer, plan, session, loading=False)
    reasons = _write(state, saving, session)
    if not reasons:
        try:
            session.on_rank_0(lambda: _publish(saving, final, step, extra, keep))
        except OSError as error:  # on every rank
            if disk_error(error) is None:
                raise
            reasons = [str(error)]
    if reasons:
        session.on_rank_0(lambda: shutil.rmtree(saving, ignore_errors=True))  # space is what is wanted
        raise WriteFailed(
            f"{final} cannot be written: {'; '.join(reasons)}; the checkpoints before it are untouched, "
            "and with room for it the same command continues from the last one"
        )
    return final


def _write(state: dict[str, Any], saving: Path, session: Session) -> list[str]:
    """What the disks of all ranks said against it, the same on every rank; empty where all is written."""
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint import CheckpointException

    problem = None
    try:
        dist_checkpointing.save(state, str(saving))
    except CheckpointException as error:  # no Exception to Python; raised by all ranks together
        problem = error
    refused = [error for error in map(disk_error, compat.take_refused_writes()) if error is not None]
    everyone = session.gather([str(error) for error in refused])
    if problem is not None and not any(everyone):
        raise RuntimeError(f"{saving} was not written: {problem}") from problem
    return [f"rank {rank}: {reason}" for rank, reasons in enumerate(everyone) for reason in reasons]


def find_newest(directory: Path, session: Session) -> CheckpointInfo | None:
    """The newest checkpoint whose files match their manifest; damaged ones are named in the log and passed over.
    All ranks call it and get the same answer."""
    return session.on_rank_0(lambda: newest_intact(directory))


def newest_intact(directory: Path) -> CheckpointInfo | None:
    """As `find_newest`, for one process without a process group."""
    for path in sorted(directory.glob("step_*"), reverse=True):
        problem = damage(path)
        if problem is None:
            manifest = json.loads((path / "manifest.json").read_text())
            return CheckpointInfo(path, manifest["step"], manifest["extra"])
        log.warning("checkpoint %s is damaged (%s): passing over it", path, problem)
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, None where they match the manifest."""
    try:
        files = json.loads((path / "manifest.json").read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"manifest.json cannot be read: {error}"
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, the manifest says {entry['bytes']}"
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:  # hashing lets other threads run
        found = dict(zip(files, pool.map(lambda name: sha256_of_file(path / name), files), strict=True))
    for name, entry in files.items():
        if found[name] != entry["sha256"]:
            return f"{name} does not match its sha256"
    return None


def load_checkpoint(
    info: CheckpointInfo, model: nn.Module, optimizer: Any | None, plan: QuantPlan, session: Session
) -> None:
    """Fills weights, quantizers and (where given) optimizer of this shard, in place, from a checkpoint of any layout.
    All ranks call it; quantizers must have been inserted.

    Raises:
        InputError: the checkpoint lacks a parameter of this model.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    prepare_quantizer_state(model, plan)
    state = _sharded_state(model, optimizer, plan, session, loading=True)
    try:
        loaded = dist_checkpointing.load(state, str(info.path), strict=StrictHandling.RAISE_UNEXPECTED)
    except dist_checkpointing.core.CheckpointingException as error:
        raise InputError(f"{info.path} does not hold this model's tensors: {error}") from error
    for index, chunk in enumerate(chunks_of(model)):
        result = chunk.load_state_dict(loaded[f"model{index}"], strict=False)
        missing = [key for key in result.missing_keys if "_quantizer" not in key and "_extra_state" not in key]
        assert not missing, f"{info.path}: parameters were not loaded: {missing}"
    set_quantizer_state(model, plan, loaded["quantizers"])
    if optimizer is not None:
        _set_optimizer(model, optimizer, loaded)


def has_quantizers(info: CheckpointInfo) -> bool:
    """Whether the checkpoint holds quantizer state."""
    from torch.distributed.checkpoint import FileSystemReader

    return any(key.startswith(PREFIX) for key in FileSystemReader(str(info.path)).read_metadata().state_dict_metadata)


def _sharded_state(
    model: nn.Module, optimizer: Any | None, plan: QuantPlan, session: Session, *, loading: bool
) -> dict[str, Any]:
    from megatron.core import parallel_state

    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "non_homogeneous_layers": True,
        "singleton_local_shards": True,  # gate and up rows of SwiGLU as two tensors, with quantizers and without
    }
    weights = {
        f"model{index}": {
            key: value
            for key, value in chunk.sharded_state_dict(metadata=metadata).items()
            if "_quantizer" not in key and not key.endswith("_extra_state") and not key.startswith(adapters.PREFIX)
        }
        for index, chunk in enumerate(chunks_of(model))
    }
    for index, chunk in enumerate(chunks_of(model)):
        weights[f"model{index}"] |= _adapter_state(chunk, weights[f"model{index}"], session)
    state: dict[str, Any] = {
        **weights,
        "quantizers": {
            key: _sharded_tensor(key, shard, session) for key, shard in quantizer_shards(model, plan).items()
        },
    }
    if optimizer is not None:
        state |= _optimizer_state(model, optimizer, weights, loading=loading)
    return state


def _adapter_state(chunk: Any, weights: dict[str, Any], session: Session) -> dict[str, Any]:
    """Adapters by their names in the chunk; the weights beside them are the merged ones."""
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

    state = {
        shard.parameter: _sharded_tensor(shard.key, AmaxShard(shard.data, shard.axis, shard.is_expert), session)
        for shard in adapters.adapter_shards(chunk)
    }
    for name, like, base in adapters.bases(chunk):
        state[name] = make_sharded_optimizer_tensor(weights[like], base, f"{adapters.KEY}base")
    return state


def _optimizer_state(model: nn.Module, optimizer: Any, weights: dict[str, Any], *, loading: bool) -> dict[str, Any]:
    """Adam's tensors of every trained parameter, cut as the parameter is, and the number of its steps."""
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

    params = _parameters(model)
    if loading:
        held, steps = optimizer_state.empty_state(list(params.values())), 0
    else:
        held, steps = optimizer_state.gather_state(optimizer, list(params.values()))
    tensors = {
        f"{name} {kind}": make_sharded_optimizer_tensor(_lookup(weights, name), tensor, f"optimizer.{kind}")
        for name, param in params.items()
        for kind, tensor in held[param].items()
    }
    return {"optimizer": tensors, "optimizer_steps": steps}


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by chunk and name: `model0 decoder.final_layernorm.weight`."""
    return {
        f"model{index} {name}": param
        for index, chunk in enumerate(chunks_of(model))
        for name, param in chunk.named_parameters()
        if hasattr(param, "main_grad")  # what Megatron's DistributedDataParallel has a place for
    }


def _lookup(weights: dict[str, Any], name: str) -> Any:
    chunk, parameter = name.split(" ")
    return weights[chunk][parameter]


def _set_optimizer(model: nn.Module, optimizer: Any, loaded: dict[str, Any]) -> None:
    found: dict[nn.Parameter, dict[str, Any]] = {}
    params = _parameters(model)
    for name, tensor in loaded["optimizer"].items():
        parameter, kind = name.rsplit(" ", 1)
        found.setdefault(params[parameter], {})[kind] = tensor
    optimizer_state.set_state(optimizer, found, loaded["optimizer_steps"])


def _sharded_tensor(key: str, shard: AmaxShard, session: Session) -> Any:
    from megatron.core.dist_checkpointing import ShardedTensor

    if shard.is_expert:
        rank, size, copy = session.etp_rank, session.plan.etp, session.edp_rank
    else:
        rank, size = session.tp_rank, session.plan.tp
        copy = session.dp_rank * session.plan.cp + session.cp_rank
    split = () if shard.axis is None else ((shard.axis, rank, size),)
    replica = (int(shard.is_copy), rank if shard.axis is None else 0, copy)
    return ShardedTensor.from_rank_offsets(key, shard.data, *split, replica_id=replica)


def _fresh(path: Path) -> None:
    for stale in path.parent.glob(f"{_SAVING}*"):
        shutil.rmtree(stale)
    path.mkdir(parents=True)


def _publish(saving: Path, final: Path, step: int, extra: dict[str, Any], keep: int) -> None:
    files = {
        str(file.relative_to(saving)): {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)}
        for file in sorted(saving.rglob("*"))
        if file.is_file()
    }
    manifest = saving / "manifest.json"
    manifest.write_text(json.dumps({"step": step, "extra": extra, "files": files}, indent=1))
    sync(manifest)
    sync(saving)
    if final.exists():
        shutil.rmtree(final)
    os.rename(saving, final)
    sync(final.parent)
    others = sorted((path for path in final.parent.glob("step_*") if path != final), reverse=True)
    passed_over = [path for path in others if path.name > final.name]  # damaged, or they would have been resumed
    for old in passed_over + others[len(passed_over) :][keep - 1 :]:
        shutil.rmtree(old)
