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
from typing import TYPE_CHECKING, Any, Literal

import psutil

from megatron_edge import checks, compose, deployment, memory
from megatron_edge import config as configuration
from megatron_edge.config import RunConfig, TrainConfig
from megatron_edge.contracts import InputError, ParallelPlan
from megatron_edge.deployment import Prediction
from megatron_edge.export.targets import gguf
from megatron_edge.families import dims_of
from megatron_edge.jobs import layouts
from megatron_edge.jobs.teacher import check_teacher, teacher_source
from megatron_edge.model.source import ModelSource, open_model
from megatron_edge.runtime.launcher import Launch
from megatron_edge.tracking import check_tracker
from megatron_edge.train.data import load_data

if TYPE_CHECKING:
    from rich.table import Table

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
    check_backend(config)
    config = replace(config, train=native(config.train))
    check_tracker(config)
    source = open_model(config.model)
    teacher = teacher_source(config, source)
    config, layout = _chosen(config, layout, source, teacher)
    _check_model(config, source, teacher, layout)
    checks.layers_per_chunk(source.hf_config["num_hidden_layers"], layout)
    taught = teacher.hf_config if teacher else None
    found = _assess(config, source.hf_config, layout, taught)
    _take_run_directory(config)
    seq_length, seed = config.train.seq_length_tokens, config.train.seed
    load_data(config.data, source.tokenizer(), seq_length, seed, Path(config.run_dir) / "data")
    if config.resume == "never":
        _clear(Path(config.run_dir))
    _write_config(config)
    _write_plan(config, source.hf_config, layout, taught, found)
    return config


def native_precision(precision: Literal["auto", "bf16", "fp32"]) -> Literal["bf16", "fp32"]:
    """bf16 | fp32; "auto" is bf16 where the hardware multiplies it, else fp32: emulated bf16 is 20 times slower."""
    if precision != "auto":
        return precision
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def native(train: TrainConfig) -> TrainConfig:
    """`train` with what follows from this machine filled in: precision, and whether products are of FP8 numbers.

    Raises:
        InputError: train.fp8_gemm=true where it cannot be.
    """
    train = replace(train, precision=native_precision(train.precision))
    return replace(train, fp8_gemm=uses_fp8_products(train))


def uses_fp8_products(train: TrainConfig) -> bool:
    """Whether layers with fp8 inputs multiply FP8 numbers (quantize/fp8_gemm.py): as train.fp8_gemm says, or where the
    device has such products. `train.precision` is settled.

    Raises:
        InputError: train.fp8_gemm=true where it cannot be.
    """
    if train.fp8_gemm is False:
        return False
    from megatron_edge.quantize import fp8_gemm

    obstacle = fp8_gemm.absent()
    if not obstacle and train.precision != "bf16":
        obstacle = f"train.precision={train.precision} rounds products less than FP8 ones are (bf16 is allowed)"
    if train.fp8_gemm and obstacle:
        raise InputError(f"train.fp8_gemm=true: {obstacle}; allowed here: null, false")
    return not obstacle


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

    backend, tensor = config.model.backend, config.parallel.tensor
    if backend == "te" and config.train.fp8_gemm and tensor > 1:
        raise InputError(
            f"train.fp8_gemm=true: TransformerEngine's layers have no FP8 products with parallel.tensor={tensor} (1 is "
            "allowed, or model.backend=local); allowed here: null, false"
        )
    wanted = _ACCELERATORS.get(backend, {})
    missing = [name for name, modules in wanted.items() if not all(map(find_spec, modules))]
    if wanted and not torch.cuda.is_available():
        missing.append("a CUDA device")
    if backend == "te" and not missing:
        from megatron_edge.quantize import direct

        if not direct.knows_transformer_engine():
            missing.append("ModelOpt's plugin for it (modelopt.torch.quantization.plugins.megatron)")
    if missing:
        raise InputError(
            f"model.backend={config.model.backend}: {' and '.join(missing)} is missing here; allowed: local"
        )


def records_steps(config: RunConfig, hf_config: dict) -> bool:
    """Whether forward and backward become a CUDA graph (train/graph.py): as train.cuda_graph says, or where it can be.
    Exchanges between tensor- and context-parallel ranks are then in the graph; those of both together, which were not
    tried, only where train.cuda_graph=true.

    Raises:
        InputError: train.cuda_graph=true where it cannot be.
    """
    import torch

    parallel, wanted = config.parallel, config.train.cuda_graph
    obstacles = []
    if parallel.pipeline > 1:
        obstacles.append(f"parallel.pipeline={parallel.pipeline}, whose recorded exchanges hung (1 is allowed)")
    if not torch.cuda.is_available():
        obstacles.append("there is no CUDA device")
    if dims_of(hf_config).num_experts:
        obstacles.append("the inputs of experts change their shapes")
    if config.model.backend == "te":  # whose layers exchange and keep random states by themselves
        obstacles += [
            f"parallel.{name}={value} with model.backend=te (local is allowed)"
            for name in ("tensor", "context", "recompute")
            for value in [getattr(parallel, name)]
            if value not in (1, "none")
        ]
    if wanted and obstacles:
        raise InputError(f"train.cuda_graph=true: {'; '.join(obstacles)}; allowed here: null, false")
    are_tried = parallel.tensor == 1 or parallel.context == 1
    return not obstacles and (are_tried if wanted is None else wanted)


def _check_model(config: RunConfig, source: ModelSource, teacher: ModelSource | None, layout: ParallelPlan) -> None:
    checks.check_model_dims(config, source.hf_config)
    records_steps(config, source.hf_config)
    source.tokenizer()
    if "gguf" in config.export.targets:
        gguf.check_model(source, configuration.weights_of(config.quant))
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


def _assess(
    config: RunConfig, hf_config: dict[str, Any], layout: ParallelPlan, teacher: dict[str, Any] | None
) -> Prediction:
    """What is predicted of the device, with what may yet not hold in the log. Raises InputError where it cannot be."""
    found = deployment.predict(config, hf_config)
    deployment.refuse(config, hf_config, found)
    log.info("%s", summary(config, found))
    for doubt in (*found.doubts, *training_doubts(config, hf_config, layout, teacher)):
        log.warning("plan: %s", doubt)
    return found


def summary(config: RunConfig, found: Prediction) -> str:
    """One line of the log: what the device needs, what it allows, and how fast it is predicted to be."""
    needed = found.memory
    return (
        f"plan: {config.device.name} ({config.device.runtime}) needs {needed.total_bytes / 2**20:,.0f} of "
        f"{needed.budget_bytes / 2**20:,.0f} MiB for {needed.max_batch} x {needed.max_seq_len} tokens; allows batch "
        f"{found.largest_batch:,} or context {found.largest_seq_len:,}; predicted {found.ms_per_token:.2f} ms and "
        f"{found.joules_per_token:.3f} J per token at {found.mode.power_w:g} W"
    )


def training_doubts(
    config: RunConfig, hf_config: dict[str, Any], layout: ParallelPlan, teacher: dict[str, Any] | None
) -> tuple[str, ...]:
    """Where a rank is planned to need more than it has: not refused, as its activations are an estimate."""
    peak = max(stage.total_bytes for stage in memory.training_plan(config, hf_config, layout, teacher))
    has = rank_memory_bytes(config)
    if peak <= has:
        return ()
    return (
        f"training: a rank needs {peak / 2**30:.1f} GiB and has {has / 2**30:.1f} (parallel.memory_bytes); "
        "parallel=auto, parallel.recompute=full or a smaller train.micro_batch need less",
    )


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
            configuration.check_same_run(compose.of_run(directory), config)
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
    config: RunConfig,
    hf_config: dict[str, Any],
    layout: ParallelPlan,
    teacher: dict[str, Any] | None,
    found: Prediction,
) -> None:
    device, predicted = found.memory, asdict(found)
    del predicted["memory"]
    training = memory.training_plan(config, hf_config, layout, teacher)
    record = {
        "device": {"name": config.device.name, "runtime": config.device.runtime, **asdict(device)},
        "device_total_bytes": device.total_bytes,
        "predicted": {**predicted, "tokens_per_second": found.tokens_per_second},
        "training": [{**asdict(stage), "total_bytes": stage.total_bytes} for stage in training],
        "layout": asdict(layout),
    }
    (Path(config.run_dir) / PLAN_FILE).write_text(json.dumps(record, indent=1))


def plan(config: RunConfig, launch: Launch) -> None:
    """Prints what the job needs, per training rank and on the device, and what is predicted of it; refuses what does
    not fit."""
    from megatron_edge.log import console

    config = replace(config, train=native(config.train))
    source = open_model(config.model)
    teacher = teacher_source(config, source)
    taught = teacher.hf_config if teacher else None
    config, layout = _chosen(config, replace(launch.plan, world_size=launch.world_size), source, teacher)
    _check_model(config, source, teacher, layout)
    found = deployment.predict(config, source.hf_config)
    console().print(training_table(memory.training_plan(config, source.hf_config, layout, taught)))
    console().print(device_table(config, found))
    for doubt in (*found.doubts, *training_doubts(config, source.hf_config, layout, taught)):
        log.warning("plan: %s", doubt)
    deployment.refuse(config, source.hf_config, found)


def training_table(stages: tuple[memory.TrainingMemory, ...]) -> Table:
    """MiB of a rank of each stage."""
    from rich.table import Table

    parts = ("weights", "gradients", "optimizer", "activations", "quantizers", "teacher", "total")
    shown = Table("training", *parts, title="MiB on each rank", title_justify="left")
    for stage in stages:
        sizes = (getattr(stage, f"{part}_bytes") / 2**20 for part in parts)
        shown.add_row(f"stage {stage.stage}", *(f"{size:,.0f}" for size in sizes))
    return shown


def device_table(config: RunConfig, found: Prediction) -> Table:
    """What the device needs and allows, and what is predicted of it."""
    from rich.table import Table

    needed, device, mib = found.memory, config.device, 2**20
    shown = Table(
        f"{device.name} ({device.runtime})", "", title=f"predicted of {config.quant.name}, kv {config.kv.format}",
        title_justify="left",
    )  # fmt: skip
    for name, size in deployment.parts_of_plan(needed).items():
        if size:
            shown.add_row(name, f"{size / mib:,.0f} MiB")
    shown.add_row("needs, of its budget", f"{needed.total_bytes / mib:,.0f} of {needed.budget_bytes / mib:,.0f} MiB")
    shown.add_row("resident, with files that lie in memory unused", f"{needed.resident_bytes / mib:,.0f} MiB")
    shown.add_row(f"largest batch of {needed.max_seq_len} tokens", f"{found.largest_batch:,}")
    shown.add_row(f"largest context of {needed.max_batch} sequences", f"{found.largest_seq_len:,} tokens")
    shown.add_row("what limits", "\n".join(found.limits))
    shown.add_row("power mode", f"{found.mode.power_w:g} W")
    shown.add_row("time per token", f"{found.ms_per_token:.2f} ms (at the whole bandwidth {found.bound_ms:.2f})")
    shown.add_row("tokens per second, all sequences", f"{found.tokens_per_second:,.1f}")
    shown.add_row("energy per token, at most", f"{found.joules_per_token:.4f} J")
    return shown
