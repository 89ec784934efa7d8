"""What rank 0 checks before a process group exists: model, layout, device budget, run directory."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import psutil

from megatron_edge import checks, memory
from megatron_edge import config as configuration
from megatron_edge.config import RunConfig
from megatron_edge.contracts import InputError, ParallelPlan
from megatron_edge.families import dims_of
from megatron_edge.jobs import layouts
from megatron_edge.jobs.teacher import check_teacher, teacher_source
from megatron_edge.model.source import ModelSource, open_model
from megatron_edge.runtime.launcher import Launch
from megatron_edge.tracking import check_tracker
from megatron_edge.train.data import load_data

log = logging.getLogger("megatron_edge")

CONFIG_FILE = "config.yaml"
PLAN_FILE = "plan.json"
_held_locks: list[Any] = []  # open files: the lock lives as long as the process


def prepare(config: RunConfig, layout: ParallelPlan) -> RunConfig:
    """Rank 0, before the others get the configuration: the model is there and fits layout and device, the run
    directory is ours, and the text can be read (it is kept there, tokenised). Writes config.yaml and plan.json.

    Raises:
        InputError: any of it is not so.
    """
    config = replace(config, train=replace(config.train, precision=native_precision(config.train.precision)))
    check_backend(config)
    check_tracker(config)
    source = open_model(config.model)
    teacher = teacher_source(config, source)
    config, layout = _chosen(config, layout, source, teacher)
    _check_model(config, source, teacher, layout)
    checks.layers_per_chunk(source.hf_config["num_hidden_layers"], layout)
    memory.refuse_if_over(memory.plan(config, source.hf_config), config.device)
    _take_run_directory(config)
    seq_length, seed = config.train.seq_length_tokens, config.train.seed
    load_data(config.data, source.tokenizer(), seq_length, seed, Path(config.run_dir) / "data")
    if config.resume == "never":
        _clear(Path(config.run_dir))
    _write_config(config)
    _write_plan(config, source.hf_config, layout, teacher.hf_config if teacher else None)
    return config


def native_precision(precision: Literal["auto", "bf16", "fp32"]) -> Literal["bf16", "fp32"]:
    """bf16 | fp32; "auto" is bf16 where the hardware multiplies it, else fp32: emulated bf16 is 20 times slower."""
    if precision != "auto":
        return precision
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def _chosen(
    config: RunConfig, layout: ParallelPlan, source: ModelSource, teacher: ModelSource | None
) -> tuple[RunConfig, ParallelPlan]:
    """parallel=auto: the layout that is chosen for the processes of `layout`; else as they are."""
    if not config.parallel.auto:
        return config, layout
    size = rank_memory_bytes(config)
    taught = teacher.hf_config if teacher else None
    found = layouts.choose(config, source.hf_config, layout.world_size, local_world_size(), size, taught)
    log.info("%s", found.reason)
    return replace(config, parallel=found.parallel), found.plan


_ACCELERATORS: dict[str, dict[str, tuple[str, ...]]] = {
    "te": {"TransformerEngine": ("transformer_engine",)},
    "apex": {"NVIDIA's apex (PyPI's is another package)": ("fused_layer_norm_cuda", "amp_C")},
}


def check_backend(config: RunConfig) -> None:
    """Asking for an accelerator that is absent is an error, never a silent fallback."""
    import torch

    backend = config.model.backend
    wanted = _ACCELERATORS.get(backend, {})
    missing = [name for name, modules in wanted.items() if not all(map(find_spec, modules))]
    if wanted and not torch.cuda.is_available():
        missing.append("a CUDA device")
    if missing:
        raise InputError(
            f"model.backend={config.model.backend}: {' and '.join(missing)} is missing here; allowed: local"
        )


def records_steps(config: RunConfig, hf_config: dict) -> bool:
    """Whether forward and backward become a CUDA graph (train/graph.py): as train.cuda_graph says, or where it can be.

    Raises:
        InputError: train.cuda_graph=true where it cannot be.
    """
    import torch

    parallel, wanted = config.parallel, config.train.cuda_graph
    obstacles = [
        f"parallel.{name}={getattr(parallel, name)} exchanges inside of the step (1 is allowed)"
        for name in ("tensor", "pipeline", "context")
        if getattr(parallel, name) > 1
    ]
    if not torch.cuda.is_available():
        obstacles.append("there is no CUDA device")
    if dims_of(hf_config).num_experts:
        obstacles.append("the inputs of experts change their shapes")
    if parallel.recompute != "none":
        obstacles.append(f"parallel.recompute={parallel.recompute} keeps random states on the host (none is allowed)")
    if wanted and obstacles:
        raise InputError(f"train.cuda_graph=true: {'; '.join(obstacles)}; allowed here: null, false")
    return wanted is not False and not obstacles


def _check_model(config: RunConfig, source: ModelSource, teacher: ModelSource | None, layout: ParallelPlan) -> None:
    checks.check_model_dims(config, source.hf_config)
    records_steps(config, source.hf_config)
    source.tokenizer()
    if teacher is not None:
        check_teacher(config, source, teacher, layout)


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank_memory_bytes(config: RunConfig) -> int:
    """What a rank may use: parallel.memory_bytes, else its GPU's memory, else its share of what this host has free."""
    if config.parallel.memory_bytes is not None:
        return config.parallel.memory_bytes
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return int(psutil.virtual_memory().available) // local_world_size()


def _take_run_directory(config: RunConfig) -> None:
    """Raises InputError where it cannot be written, holds another run or nothing to resume, or has a job at work."""
    directory = Path(config.run_dir)
    saved = directory / CONFIG_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("a")
        _held_locks.append(lock)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if saved.exists() and config.resume != "never":
            configuration.check_same_run(configuration.from_yaml(saved.read_text()), config)
        saves = directory / "checkpoints"
        if config.resume == "must" and not any(saves.glob("step_*")):
            raise InputError(f"resume=must: no checkpoint in {saves}; allowed: auto, never")
    except BlockingIOError:
        raise InputError(
            f"run_dir={config.run_dir!r}: another job is at work there; allowed: another directory"
        ) from None
    except OSError as error:
        raise InputError(
            f"run_dir={config.run_dir!r} cannot be written: {error}; allowed: a writable directory"
        ) from None


def _clear(run_dir: Path) -> None:
    """Removes what another run left there, so that nothing of it is resumed, verified or believed."""
    for name in ("checkpoints", "reference", "artifact"):
        if (run_dir / name).exists():
            shutil.rmtree(run_dir / name)
    for name in ("verify.json", "weight_errors.json", "report.html", "outcome.json"):
        (run_dir / name).unlink(missing_ok=True)


def _write_config(config: RunConfig) -> None:
    saved = Path(config.run_dir) / CONFIG_FILE
    partial = saved.with_suffix(f".partial{os.getpid()}")
    partial.write_text(configuration.to_yaml(config))
    partial.replace(saved)


def _write_plan(
    config: RunConfig, hf_config: dict[str, Any], layout: ParallelPlan, teacher: dict[str, Any] | None
) -> None:
    device = memory.plan(config, hf_config)
    training = memory.training_plan(config, hf_config, layout, teacher)
    record = {
        "device": {"name": config.device.name, "runtime": config.device.runtime, **asdict(device)},
        "device_total_bytes": device.total_bytes,
        "training": [{**asdict(stage), "total_bytes": stage.total_bytes} for stage in training],
        "layout": asdict(layout),
    }
    (Path(config.run_dir) / PLAN_FILE).write_text(json.dumps(record, indent=1))


def plan(config: RunConfig, launch: Launch) -> None:
    """Prints what the job needs, per training rank and on the device; refuses what does not fit."""
    from rich.table import Table

    from megatron_edge.log import console

    config = replace(config, train=replace(config.train, precision=native_precision(config.train.precision)))
    source = open_model(config.model)
    teacher = teacher_source(config, source)
    config, layout = _chosen(config, replace(launch.plan, world_size=launch.world_size), source, teacher)
    _check_model(config, source, teacher, layout)
    hf_config = source.hf_config
    needed = memory.plan(config, hf_config)
    table = Table(
        "where",
        "weights (teacher's too)" if teacher else "weights",
        "KV / gradients",
        "activations",
        "runtime / optimizer",
        "total",
        "budget",
    )
    mib = 2**20
    for stage in memory.training_plan(config, hf_config, layout, teacher.hf_config if teacher else None):
        weights = stage.weights_bytes + stage.teacher_bytes
        parts = (weights, stage.gradients_bytes, stage.activations_bytes, stage.optimizer_bytes)
        table.add_row(
            f"training, stage {stage.stage}", *(f"{part / mib:,.0f}" for part in (*parts, stage.total_bytes)), ""
        )
    parts = (needed.weights_bytes, needed.kv_bytes, needed.activations_bytes, needed.workspace_bytes)
    totals = (needed.total_bytes, needed.budget_bytes)
    table.add_row(config.device.name, *(f"{part / mib:,.0f}" for part in (*parts, *totals)))
    table.title = f"MiB for {config.quant.name} on {config.device.name} ({config.device.runtime})"
    console().print(table)
    memory.refuse_if_over(needed, config.device)
