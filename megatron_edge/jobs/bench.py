"""The bench job: optimiser steps of one model without quantizers, with ours, and with modelopt's own, in turns.

The timed region is a whole step: the batch onto the device, forward and backward of every micro-batch, the optimiser,
and quantising the changed weights. All contenders have the same layers, attention, loss, optimiser and data, and are
resident together; memory is each one's own. The plain model and ours run as a CUDA graph where a job's step would;
modelopt's, which users launch kernel by kernel, does so here: train.cuda_graph=false compares all three so. AWQ folds
its scales before training, so its steps are those of int4.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_edge import checks, devices, memory
from megatron_edge.config import RunConfig
from megatron_edge.contracts import InputError, ParallelPlan
from megatron_edge.families import dims_of
from megatron_edge.jobs.preflight import check_backend, native, records_steps
from megatron_edge.jobs.training import DTYPES, job_session
from megatron_edge.leaves import expected, refuse_unknown
from megatron_edge.log import console
from megatron_edge.model.build import build_model, named_shards
from megatron_edge.model.hf_config import checked_config
from megatron_edge.quantize import apply, fp8_gemm, plain_modelopt, policy
from megatron_edge.runtime.launcher import Launch
from megatron_edge.runtime.session import Session
from megatron_edge.runtime.watchdog import mark
from megatron_edge.train import graph, step
from megatron_edge.train.data import Batch

log = logging.getLogger("megatron_edge")

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32768,
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "llama_1b": _LLAMA,
    "tiny": _LLAMA | {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512,
    },
}  # fmt: skip
PLAIN = "plain"
WARM_UP_STEPS = graph.EAGER_STEPS + 1
# NVIDIA's data sheets of the SXM modules: dense bf16 FLOP/s, bytes/s of memory.
CHIPS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}


@dataclass(frozen=True)
class Row:
    """Medians over the timed steps. `ratio` is to the plain model in the same repeat: its median, least and most over
    the repeats. `bound` is the ratio if the bytes that fake quantisation must move were all it cost. None: not known
    of this device."""

    format: str
    contender: str
    shape: str
    accumulate: int
    step_ms: float
    ratio: float
    ratio_min: float
    ratio_max: float
    peak_gib: float | None
    tflops_per_rank: float
    mfu: float | None
    bound: float | None


@dataclass
class _Contender:
    """`resident_bytes`: weights, gradients and what the optimiser holds before its first step."""

    name: str
    chunks: nn.ModuleList
    optimizer: Any
    resident_bytes: int
    stream: torch.cuda.Stream | None


def prepare(config: RunConfig, layout: ParallelPlan) -> RunConfig:
    """Rank 0, before anything is built: sizes, formats and shapes are possible here.

    Raises:
        InputError: one that is not.
    """
    config = replace(config, train=native(config.train))
    checks.check_run_dir(config)
    check_backend(config)
    bench, hf_config = config.bench, _hf_config(config)
    checks.check_model_dims(config, hf_config)
    presets = devices.presets("quant")
    for name in bench.formats:
        if name not in presets:
            raise refuse_unknown(f"bench.formats: {name}", name, presets)
        policy.make_plan(_quant(config, name), config.kv, hf_config)
        if "modelopt" not in bench.against:
            continue
        if name not in plain_modelopt.CONFIGURATIONS:
            raise refuse_unknown(
                f"bench.formats: {name} with bench.against=modelopt", name, plain_modelopt.CONFIGURATIONS
            )
        if name in plain_modelopt.NEEDS_CUDA and not torch.cuda.is_available():
            raise InputError(
                f"bench.formats: modelopt's {name} needs CUDA; allowed here: others, or bench.against=[ours]"
            )
    for shape in bench.shapes:
        _windows(shape, hf_config["max_position_embeddings"])
    if not bench.formats or not bench.shapes or not bench.accumulate or min(bench.accumulate) < 1:
        raise expected("bench.accumulate", bench.accumulate, "at least one number from 1 up, one format and one shape")
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    return config


def _windows(shape: str, longest: int) -> tuple[int, int]:
    parts = shape.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts) or int(parts[1]) > longest:
        raise expected("bench.shapes", shape, f"windows x tokens, such as 4x2048, of at most {longest} tokens")
    return int(parts[0]), int(parts[1])


def _hf_config(config: RunConfig) -> dict[str, Any]:
    return checked_config(SIZES[config.bench.size], f"bench.size={config.bench.size}")


def _quant(config: RunConfig, name: str) -> Any:
    preset = devices.presets("quant")[name]
    chosen = {key: preset[key] for key in ("name", "weight", "activation", "group_size")}
    return replace(config.quant, **chosen, recipe=[], overrides=[], algorithm="max", calibration="max")


def qat_step(config: RunConfig, launch: Launch) -> None:
    """Every rank calls it; rank 0 writes the JSON file and prints the table."""
    rows: list[Row] = []
    with job_session(config, launch) as session:
        for name in config.bench.formats:
            contenders = [_contender(config, session, one, name) for one in (PLAIN, *config.bench.against)]
            for shape in config.bench.shapes:
                for accumulate in config.bench.accumulate:
                    rows += _race(config, session, contenders, name, shape, accumulate)
            del contenders
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    if launch.rank == 0:
        path = Path(config.bench.output or Path(config.run_dir) / "bench_qat_step.json")
        path.write_text(json.dumps(_report(config, launch, rows), indent=1) + "\n")
        console().print(_table(config, rows))
        log.info("wrote %s", path)


def _contender(config: RunConfig, session: Session, name: str, fmt: str) -> _Contender:
    """One model with its optimiser. All ranks call it."""
    mark(f"building {name} {fmt}")
    before, hf_config, dtype = _allocated(), _hf_config(config), DTYPES[config.train.precision]
    model = build_model(hf_config, session.plan, dtype, session.device, config.parallel.recompute, config.model.backend)
    generator = torch.Generator(session.device).manual_seed(config.train.seed)
    for param in named_shards(model).values():
        param.data.fill_(1.0) if param.dim() == 1 else param.data.normal_(0, 0.02, generator=generator)
    windows, length = _windows(config.bench.shapes[0], hf_config["max_position_embeddings"])
    batches = _batches(config, hf_config, windows, length, 2, session)

    def run_data(_: nn.Module) -> None:
        step.run_forward(model, batches, session)

    if name == "ours":
        plan = policy.make_plan(_quant(config, fmt), config.kv, hf_config)
        matches = apply.insert_quantizers(model, plan)
        apply.calibrate(model, plan, matches, run_data)
        if config.train.fp8_gemm:
            fp8_gemm.use(model)
    elif name == "modelopt":
        plain_modelopt.quantize(model, fmt, run_data)
    train = replace(config.train, steps=10_000, warmup_steps=0)
    stream = torch.cuda.Stream() if name != "modelopt" and records_steps(config, hf_config) else None
    chunks, optimizer = step.make_trainable(
        model, train, dtype, distributed_optimizer=config.parallel.distributed_optimizer, stream=stream
    )
    step.learning_rate_schedule(optimizer, train).step(1)
    return _Contender(name, chunks, optimizer, _allocated() - before, stream)


def _batches(
    config: RunConfig, hf_config: Mapping[str, Any], windows: int, length: int, count: int, session: Session
) -> list[Batch]:
    """`count` micro-batches of this rank: random tokens, one document a window."""
    generator = torch.Generator().manual_seed(config.train.seed + session.dp_rank)
    ids = torch.randint(0, hf_config["vocab_size"], (windows * count, length), generator=generator)
    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[:, -1] = False
    places = torch.arange(length).expand_as(ids).contiguous()
    return Batch(ids, torch.zeros_like(ids, dtype=torch.int32), places, counted, ids.roll(-1, 1)).split(windows)


def _race(
    config: RunConfig, session: Session, contenders: list[_Contender], fmt: str, shape: str, accumulate: int
) -> list[Row]:
    """All contenders on one kind of step, taking turns; every second round in the opposite order."""
    hf_config = _hf_config(config)
    windows, length = _windows(shape, hf_config["max_position_embeddings"])
    batches = _batches(config, hf_config, windows, length, accumulate, session)
    seconds: dict[str, list[list[float]]] = {one.name: [] for one in contenders}
    peaks = {one.name: 0 for one in contenders}
    gradients = {
        one.name: graph.StepGraph(one.stream) if one.stream is not None else step.forward_backward for one in contenders
    }
    for repeat in range(config.bench.repeats + 1):
        for one in contenders if repeat % 2 else reversed(contenders):
            mark(f"{fmt} {shape} {one.name}")
            is_warm_up = repeat == 0
            count = WARM_UP_STEPS if is_warm_up else config.bench.steps
            timed, peak = _steps(one, batches, count, session, gradients[one.name])
            peaks[one.name] = max(peaks[one.name], peak)  # a replayed graph allocates nothing
            if not is_warm_up:
                seconds[one.name].append(timed)
    plain = [statistics.median(part) for part in seconds[PLAIN]]
    flops = accumulate * windows * length * _flops_per_token(hf_config, length) * session.plan.dp
    rows = []
    for one in contenders:
        ratios = [statistics.median(part) / base for part, base in zip(seconds[one.name], plain, strict=True)]
        median = statistics.median(second for part in seconds[one.name] for second in part)
        speed, chip = flops / median / session.plan.world_size, _chip()
        moved = 0.0 if one.name == PLAIN else _moved_bytes(_quant(config, fmt), hf_config, windows * length, accumulate)
        rows.append(Row(
            fmt, one.name, shape, accumulate, median * 1e3, statistics.median(ratios), min(ratios), max(ratios),
            max(session.gather(peaks[one.name])) / 2**30 if session.device.type == "cuda" else None,
            speed / 1e12, speed / chip[0] if chip else None,
            1 + moved / chip[1] / statistics.median(plain) if chip and session.plan.world_size == 1 else None,
        ))  # fmt: skip
    log.info(
        "%s", "; ".join(f"{fmt} {shape} x{accumulate} {r.contender} {r.step_ms:.1f} ms {r.ratio:.3f}" for r in rows)
    )
    return rows


def _steps(
    one: _Contender, batches: list[Batch], count: int, session: Session, gradients: Any
) -> tuple[list[float], int]:
    """Seconds of each of `count` steps, and the peak of bytes that this contender alone accounts for."""
    before, on_cuda = _allocated(), session.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        step.train_step(one.chunks, one.optimizer, batches, session, gradients=gradients)
        if on_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    grown = _allocated() - before  # the optimiser's state, made at its first step
    peak = (torch.cuda.max_memory_allocated() if on_cuda else 0) - before + one.resident_bytes
    one.resident_bytes += grown
    return seconds, peak


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _chip() -> tuple[float, float] | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((figures for chip, figures in CHIPS.items() if chip in name), None)


def _flops_per_token(hf_config: Mapping[str, Any], length: int) -> float:
    """6 per parameter that multiplies a token, and attention's scores (Chowdhery et al. 2022, appendix B), causal."""
    dims, count = dims_of(hf_config), memory.count_parameters(hf_config)
    used = count.linears + dims.vocab_size * dims.hidden_size
    return 6 * used + 6 * dims.num_layers * dims.num_heads * dims.head_dim * length


def _moved_bytes(quant: Any, hf_config: Mapping[str, Any], tokens: int, accumulate: int) -> float:
    """What fake quantisation must move in a step on one rank, at 2 bytes an element read and 2 written: each weight
    once, the input of each linear layer (q, k and v, gate and up share one) in each micro-batch."""
    layers, dims = dims_of(hf_config).num_layers, dims_of(hf_config)
    weights = 4.0 * memory.count_parameters(hf_config).linears if quant.weight != "none" else 0.0
    inputs = 2 * dims.hidden_size + dims.num_heads * dims.head_dim + dims.ffn_hidden_size
    return weights + (4.0 * layers * inputs * tokens * accumulate if quant.activation != "none" else 0.0)


def _report(config: RunConfig, launch: Launch, rows: list[Row]) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "job": "qat_step",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processes": launch.world_size, "layout": asdict(launch.plan), "precision": config.train.precision,
        "fp8_gemm": config.train.fp8_gemm,
        "backend": config.model.backend, "recompute": config.parallel.recompute, "model": _hf_config(config),
        "steps": config.bench.steps, "repeats": config.bench.repeats,
        "versions": {name: version(name) for name in ("torch", "megatron-core", "nvidia-modelopt")},
        "rows": [asdict(row) for row in rows],
    }  # fmt: skip


def _table(config: RunConfig, rows: list[Row]) -> Any:
    from rich.table import Table

    shown = Table(title=f"an optimiser step, {config.bench.size}, {config.train.precision}, {config.model.backend}")
    for heading in (
        "format",
        "",
        "micro-batch",
        "in a step",
        "ms",
        "ratio",
        "spread",
        "GiB",
        "TFLOP/s",
        "MFU",
        "bound",
    ):
        shown.add_column(heading, justify="left" if heading in ("format", "") else "right")
    for row in rows:
        shown.add_row(
            row.format, row.contender, row.shape, str(row.accumulate), f"{row.step_ms:.1f}", f"{row.ratio:.3f}",
            f"{row.ratio_min:.3f}-{row.ratio_max:.3f}", _shown(row.peak_gib, 2), f"{row.tflops_per_rank:.2f}",
            _shown(row.mfu, 3), _shown(row.bound, 3),
        )  # fmt: skip
    return shown


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"
