"""The bench job: optimiser steps of one model without quantizers, with ours, and with modelopt's own, in turns.

The timed region is a whole step: the batch onto the device, forward and backward of every micro-batch, the optimiser,
and quantising the changed weights. Each contender runs launched kernel by kernel and as a CUDA graph, where that can
be, and each ratio is to the plain model run in the same way. All are resident together; memory is each one's own.
Rows are printed and written as they come. AWQ folds its scales before training, so our steps of it are those of int4.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_edge import checks, devices
from megatron_edge.config import RunConfig
from megatron_edge.contracts import InputError, ParallelPlan
from megatron_edge.jobs import contenders, profiling, whole_job
from megatron_edge.jobs.contenders import PLAIN, UNCACHED, Contender, Way
from megatron_edge.jobs.preflight import check_backend, native, records_steps
from megatron_edge.jobs.training import job_session
from megatron_edge.leaves import expected, refuse_unknown
from megatron_edge.log import console
from megatron_edge.quantize import plain_modelopt, policy
from megatron_edge.runtime.launcher import Launch
from megatron_edge.runtime.session import Session
from megatron_edge.runtime.watchdog import mark
from megatron_edge.train.data import Batch

log = logging.getLogger("megatron_edge")


@dataclass(frozen=True)
class Row:
    """Medians over the timed steps. `ratio` is to the plain model launched in the same way, in the same repeat: its
    median, least and most over the repeats. `bound` is contenders.bound, `of_bound` how much of this row's time the
    bound is. None: not known of this device, and bounds of the plain model."""

    format: str
    contender: str
    launched: str
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
    of_bound: float | None


def prepare(config: RunConfig, layout: ParallelPlan) -> RunConfig:
    """Rank 0, before anything is built: sizes, formats and shapes are possible here.

    Raises:
        InputError: one that is not.
    """
    checks.check_run_dir(config)
    check_backend(config)
    config = replace(config, train=native(config.train))
    bench, hf_config = config.bench, contenders.hf_config_of(config)
    checks.check_model_dims(config, hf_config)
    records_steps(config, hf_config)
    presets = devices.presets("quant")
    for name in bench.formats:
        if name not in presets:
            raise refuse_unknown(f"bench.formats: {name}", name, presets)
        policy.make_plan(contenders.quant_of(config, name), config.kv, hf_config)
        if "modelopt" in bench.against and config.job == "qat_step":
            _check_modelopt(name)
    for shape in bench.shapes:
        _check_shape(shape, hf_config["max_position_embeddings"])
    if not bench.formats or not bench.shapes or not bench.accumulate or min(bench.accumulate) < 1:
        raise expected("bench.accumulate", bench.accumulate, "at least one number from 1 up, one format and one shape")
    if config.job == "whole_job" and config.train.steps < 1:
        raise expected("train.steps", config.train.steps, "at least 1 with job=whole_job")
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    return config


def _check_modelopt(name: str) -> None:
    if name not in plain_modelopt.CONFIGURATIONS:
        raise refuse_unknown(f"bench.formats: {name} with bench.against=modelopt", name, plain_modelopt.CONFIGURATIONS)
    if name in plain_modelopt.NEEDS_CUDA and not torch.cuda.is_available():
        raise InputError(f"bench.formats: modelopt's {name} needs CUDA; allowed here: others, or bench.against=[ours]")


def _check_shape(shape: str, longest: int) -> None:
    parts = shape.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts) or int(parts[1]) > longest:
        raise expected("bench.shapes", shape, f"windows x tokens, such as 4x2048, of at most {longest} tokens")


def run(config: RunConfig, launch: Launch) -> None:
    """What `job` says. Every rank calls it; rank 0 writes the JSON file and prints the table."""
    found = _report(config, launch)
    with job_session(config, launch) as session:
        for name in config.bench.formats:
            if config.job == "whole_job":
                whole_job.compare(config, session, name, lambda row: _keep(config, session, found, [row]))
            else:
                _races(config, session, name, found)
            free_memory()
    if launch.rank == 0:
        console().print(whole_job.table(found["rows"]) if config.job == "whole_job" else _table(config, found["rows"]))
        for note in found["notes"]:
            console().print(note, soft_wrap=True, markup=False, highlight=False)
        for one in found["profiles"]:
            console().print(profiling.table(one))
        log.info("wrote %s", _output(config))


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _races(config: RunConfig, session: Session, fmt: str, found: dict[str, Any]) -> None:
    """All contenders of a format, on every shape of a step."""
    stream = torch.cuda.Stream() if session.device.type == "cuda" else None
    names = list(dict.fromkeys(name.removesuffix("_uncached") for name in config.bench.against))
    if "modelopt" in names:
        _load_modelopts_kernels(fmt, found)
    built = {name: contenders.build(config, session, name, fmt, stream) for name in (PLAIN, *names)}
    obstacles: dict[str, str] = {}
    for shape in config.bench.shapes:
        for accumulate in config.bench.accumulate:
            windows, length = contenders.shape_of(shape)
            hf_config = contenders.hf_config_of(config)
            batches = contenders.random_batches(config, hf_config, windows, length, accumulate, session)
            ways = _ways(config, session, built, batches, stream, obstacles)
            known = {note.split(":")[0] for note in found["notes"]}
            said = [f"{fmt} {name}: no CUDA graph: {why}" for name, why in obstacles.items()]
            found["notes"] += [note for note in said if note.split(":")[0] not in known]
            rows = _race(config, session, ways, batches, (fmt, shape, accumulate))
            launched = contenders.one_by_one(stream)
            found["attention"][shape] = profiling.attention_kernel(built[PLAIN].chunks, launched, batches[:1], session)
            for way in ways:
                found["first_step_seconds"].setdefault(f"{fmt} {way.name} {way.launched}", way.first_seconds)
            if config.bench.profile:
                what = {"format": fmt, "shape": shape, "accumulate": accumulate}
                found["profiles"] += [what | profiling.profile(way, batches, session) for way in ways]
            found["notes"] += _memory_notes(rows)
            _keep(config, session, found, [asdict(row) for row in rows])
            del ways
            free_memory()


def _memory_notes(rows: list[Row]) -> list[str]:
    """What the cache of weights costs, and the peak without it beside modelopt's; each with the same launches."""
    peaks = {(row.launched, row.contender): row.peak_gib for row in rows}
    notes = []
    for (launched, name), without in peaks.items():
        cached, theirs = peaks.get((launched, "ours")), peaks.get((launched, "modelopt"))
        if name != UNCACHED or without is None:
            continue
        what = f"{rows[0].format} {rows[0].shape} x{rows[0].accumulate}, {launched}: peak without cached weights"
        beside = f", {without / theirs:.3f} of modelopt's" if theirs else ""
        notes.append(
            f"{what} {without:.2f} GiB{beside}" + (f"; the cache adds {cached - without:.2f}" if cached else "")
        )
    return notes


def _load_modelopts_kernels(fmt: str, found: dict[str, Any]) -> None:
    mark("compiling modelopt's kernels")
    for kernels in plain_modelopt.load_kernels(fmt):
        found["modelopt_kernels"].setdefault(kernels.name, asdict(kernels))
        said = f"in {kernels.seconds:.1f} s" if kernels.obstacle is None else f"missing ({kernels.obstacle})"
        note = f"modelopt's {kernels.name}: {said}"
        if not any(old.startswith(f"modelopt's {kernels.name}:") for old in found["notes"]):
            log.info("%s", note)
            found["notes"].append(note)


def _ways(
    config: RunConfig,
    session: Session,
    built: dict[str, Contender],
    batches: list[Batch],
    stream: torch.cuda.Stream | None,
    obstacles: dict[str, str],
) -> list[Way]:
    """Warm ways of taking this step. What cannot be recorded is added to `obstacles`, and not tried again."""
    modes = contenders.launches(config, contenders.hf_config_of(config))
    pool = torch.cuda.graph_pool_handle() if "graph" in modes else None
    launched: dict[str, Way] = {}
    recorded: dict[str, Way] = {}
    for name in (PLAIN, *config.bench.against):
        one = built[name.removesuffix("_uncached")]
        launched[name] = Way(name, one, "one by one", contenders.one_by_one(stream))
        launched[name].steps([batches], session)  # the first of all makes the optimizer's state
        if "graph" in modes and one.name not in obstacles:
            assert stream is not None
            mark(f"recording {name}")
            found = contenders.record(name, one, batches, session, stream, pool if name != "modelopt" else None)
            if isinstance(found, Way):
                recorded[name] = found
            else:
                obstacles[one.name] = found
                pool = torch.cuda.graph_pool_handle()  # one that a failed recording has touched is not used again
                log.warning("%s cannot be recorded as a CUDA graph: %s", name, found)
    if "one by one" not in modes:  # what cannot be recorded is compared all the same, with the plain model
        kept = {name for name, way in launched.items() if way.contender.name in obstacles}
        launched = {name: way for name, way in launched.items() if name in kept or (kept and name == PLAIN)}
    return [*recorded.values(), *launched.values()]


def _race(
    config: RunConfig, session: Session, ways: list[Way], batches: list[Batch], what: tuple[str, str, int]
) -> list[Row]:
    """All ways of one kind of step (format, shape, micro-batches), taking turns step by step, every second round in the
    opposite order. A step of several micro-batches is as long as several: bench.steps counts micro-batches, at least a
    step."""
    count = max(1, config.bench.steps // what[2])
    seconds: list[list[list[float]]] = [[] for _ in ways]
    for repeat in range(config.bench.repeats):
        for timed in seconds:
            timed.append([])
        for at in range(count):
            for index in range(len(ways)) if (repeat + at) % 2 else reversed(range(len(ways))):
                mark(f"{what[0]} {what[1]} {ways[index].name}")
                seconds[index][repeat] += ways[index].steps([batches], session)
    bases = {
        way.launched: [statistics.median(part) for part in timed]
        for way, timed in zip(ways, seconds, strict=True)
        if way.name == PLAIN
    }
    rows = []
    for way, timed in zip(ways, seconds, strict=True):
        base = bases.get(way.launched)
        if base is not None:
            rows.append(_row(config, session, way, timed, base, what))
    return rows


def _row(
    config: RunConfig,
    session: Session,
    way: Way,
    seconds: list[list[float]],
    plain: list[float],
    what: tuple[str, str, int],
) -> Row:
    (fmt, shape, accumulate), hf_config = what, contenders.hf_config_of(config)
    windows, length = contenders.shape_of(shape)
    flops = accumulate * windows * length * contenders.flops_per_token(hf_config, length) * session.plan.dp
    ratios = [statistics.median(part) / base for part, base in zip(seconds, plain, strict=True)]
    ratio, median = statistics.median(ratios), statistics.median(second for part in seconds for second in part)
    speed, chip = flops / median / session.plan.world_size, contenders.chip()
    bound = None
    if chip and session.plan.world_size == 1 and way.name != PLAIN:
        quant, tokens = contenders.quant_of(config, fmt), windows * length
        bound = contenders.bound(quant, hf_config, tokens, accumulate, chip, statistics.median(plain))
    row = Row(
        fmt, way.name, way.launched, shape, accumulate, median * 1e3, ratio, min(ratios), max(ratios),
        max(session.gather(way.peak_bytes)) / 2**30 if session.device.type == "cuda" else None,
        speed / 1e12, speed / chip[0] if chip else None, bound, bound / ratio if bound else None,
    )  # fmt: skip
    log.info("%s %s x%d %s, %s: %.1f ms, ratio %.3f (%.3f to %.3f), %s GiB", fmt, shape, accumulate, way.name,
             way.launched, row.step_ms, ratio, row.ratio_min, row.ratio_max, _shown(row.peak_gib, 2))  # fmt: skip
    return row


def _report(config: RunConfig, launch: Launch) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "job": config.job,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processes": launch.world_size, "layout": asdict(launch.plan), "precision": config.train.precision,
        "fp8_gemm": config.train.fp8_gemm,
        "backend": config.model.backend, "recompute": config.parallel.recompute,
        "model": contenders.hf_config_of(config), "steps": config.bench.steps, "repeats": config.bench.repeats,
        "versions": {name: version(name) for name in ("torch", "megatron-core", "nvidia-modelopt")},
        "attention": {}, "modelopt_kernels": {}, "first_step_seconds": {}, "notes": [], "rows": [], "profiles": [],
    }  # fmt: skip


def _output(config: RunConfig) -> Path:
    return Path(config.bench.output or Path(config.run_dir) / f"bench_{config.job}.json")


def _keep(config: RunConfig, session: Session, found: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Adds rows to what is found, and writes it: a job that is cut off has what came before."""
    found["rows"] += rows
    if session.rank == 0:
        path = _output(config)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        partial.replace(path)


def _table(config: RunConfig, rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    shown = Table(title=f"an optimiser step, {config.bench.size}, {config.train.precision}, {config.model.backend}")
    words = ("format", "", "launched", "micro-batch")
    numbers = ("in a step", "ms", "ratio", "spread", "GiB", "TFLOP/s", "MFU", "bound", "of it")
    for heading in (*words, *numbers):
        shown.add_column(heading, justify="right" if heading in numbers else "left")
    for row in (Row(**one) for one in rows):
        shown.add_row(
            row.format, row.contender, row.launched, row.shape, str(row.accumulate), f"{row.step_ms:.1f}",
            f"{row.ratio:.3f}", f"{row.ratio_min:.3f}-{row.ratio_max:.3f}", _shown(row.peak_gib, 2),
            f"{row.tflops_per_rank:.2f}", _shown(row.mfu, 3), _shown(row.bound, 3), _shown(row.of_bound, 3),
        )  # fmt: skip
    return shown


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"
