"""A job's training loop beside its bare step: the same model, weights, optimizer, windows and shapes, in turns.

The loop is train/loop.py's with what a job adds: windows read from memory-mapped files, metrics.jsonl and TensorBoard,
the progress bar, the memory of all ranks; at its end a held-out evaluation of data.eval_tokens. The bare step
(train_step alone) has its micro-batches ready. Each turn is train.steps steps; building, calibrating, recording a CUDA
graph and checkpoints are not in it. Called by jobs/bench.py.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_edge.config import RunConfig
from megatron_edge.jobs import contenders
from megatron_edge.jobs.contenders import Gradients
from megatron_edge.jobs.training import recorded_steps
from megatron_edge.runtime.session import Session
from megatron_edge.runtime.watchdog import mark
from megatron_edge.train import graph, step
from megatron_edge.train.data import BatchPlan, PackedDataset, Windows, pack
from megatron_edge.train.loop import fit
from megatron_edge.train.text import TokenisedDocument

log = logging.getLogger("megatron_edge")

HELDOUT_WINDOWS = 4  # of a micro-batch of the evaluation
DOCUMENT_TOKENS = 512  # mean length of a document, of an exponential distribution
WARM_UP_STEPS = 2 * (graph.EAGER_STEPS + 1)  # windows of one document have a graph of their own


def compare(config: RunConfig, session: Session, fmt: str, keep: Callable[[dict[str, Any]], None]) -> None:
    """`keep` gets a row for each shape and number of micro-batches. All ranks call it."""
    stream = torch.cuda.Stream() if session.device.type == "cuda" else None
    one = contenders.build(config, session, "ours", fmt, stream)
    hf_config = contenders.hf_config_of(config)
    recorded = contenders.launches(config, hf_config)[0] == "graph"
    for shape in config.bench.shapes:
        windows, length = contenders.shape_of(shape)
        data = _windows(config, session, hf_config["vocab_size"], length)
        heldout = data.evaluation(config.data.eval_tokens).split(HELDOUT_WINDOWS)
        heldout = [batch for batch in heldout if len(batch.tokens) == len(heldout[0].tokens)]
        for accumulate in config.bench.accumulate:
            plan = BatchPlan(data, windows * accumulate * session.plan.dp, windows)
            gradients: Gradients = contenders.one_by_one(stream)
            if recorded:
                assert stream is not None
                gradients = graph.StepGraph(stream)
            mark(f"whole job {fmt} {shape}")
            found = _turns(config, session, one, plan, heldout, gradients)
            tokens = plan.global_batch * length
            said = {
                "format": fmt, "shape": shape, "accumulate": accumulate,
                "launched": "graph" if recorded else "one by one",
                "steps": config.train.steps, "eval_tokens": sum(batch.tokens.numel() for batch in heldout),
                "tokens_per_second": tokens / found["bare_ms"] * 1e3, **found,
            }  # fmt: skip
            log.info("%s %s x%d: bare step %.1f ms, in the loop %.3f of it, in the job %.3f", fmt, shape, accumulate,
                     found["bare_ms"], found["loop_ratio"], found["job_ratio"])  # fmt: skip
            keep(said)


def _turns(
    config: RunConfig,
    session: Session,
    one: contenders.Contender,
    plan: BatchPlan,
    heldout: list[Any],
    gradients: Gradients,
) -> dict[str, float]:
    """Medians over the repeats: a bare step's milliseconds, and the ratios to it of the loop and of loop and
    evaluation, with the least and the most."""
    way = contenders.Way("ours", one, contenders.launches(config, contenders.hf_config_of(config))[0], gradients)
    count = config.train.steps
    done = WARM_UP_STEPS
    way.steps([plan.micro_batches(at, session.dp_rank, session.plan.dp) for at in range(done)], session)
    step.evaluate(one.chunks, heldout, session)
    bare, loops, jobs = [], [], []
    for _ in range(config.bench.repeats):
        ready = [plan.micro_batches(at, session.dp_rank, session.plan.dp) for at in range(done, done + count)]
        bare.append(sum(way.steps(ready, session)))
        train = replace(config.train, steps=done + count, warmup_steps=0, log_every_steps=1)
        began = time.perf_counter()
        with recorded_steps(config, session, done, done + count) as report:
            fit(
                one.chunks, one.optimizer, plan, train, session,
                start_step=done, save=lambda at: None, report=report, gradients=gradients,
            )  # fmt: skip
        loops.append(time.perf_counter() - began)
        step.evaluate(one.chunks, heldout, session)
        jobs.append(time.perf_counter() - began)
        done += count
    ratios = [job / base for job, base in zip(jobs, bare, strict=True)]
    return {
        "bare_ms": statistics.median(bare) / count * 1e3,
        "loop_ratio": statistics.median(loop / base for loop, base in zip(loops, bare, strict=True)),
        "job_ratio": statistics.median(ratios), "job_ratio_min": min(ratios), "job_ratio_max": max(ratios),
    }  # fmt: skip


def _windows(config: RunConfig, session: Session, vocab_size: int, length: int) -> PackedDataset:
    """Random documents, packed and memory-mapped as a job's text is."""
    directory = Path(config.run_dir) / "bench_data"
    count = max(256, -(-config.data.eval_tokens // length))

    def write() -> None:
        directory.mkdir(exist_ok=True)
        generator, left, documents = np.random.default_rng(config.train.seed), count * length, []
        while left > 0:
            size = min(left, 2 + int(generator.exponential(DOCUMENT_TOKENS)))
            ids = generator.integers(0, vocab_size, size, dtype=np.int32)
            documents.append(TokenisedDocument(ids, np.ones(size, dtype=np.bool_), str(left), size))
            left -= size
        for name, array in pack(documents, length, 0)._asdict().items():
            np.save(directory / f"{length}.{name}.npy", array)

    session.on_rank_0(write)
    files = (np.load(directory / f"{length}.{name}.npy", mmap_mode="r") for name in Windows._fields)
    return PackedDataset(Windows(*files), config.train.seed)


def table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    shown = Table(title="a job's loop beside its bare step")
    for heading in ("format", "launched", "micro-batch"):
        shown.add_column(heading)
    for heading in ("in a step", "steps", "bare ms", "tokens/s", "loop", "loop and evaluation", "spread"):
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(
            row["format"], row["launched"], row["shape"], str(row["accumulate"]), str(row["steps"]),
            f"{row['bare_ms']:.1f}", f"{row['tokens_per_second']:,.0f}", f"{row['loop_ratio']:.3f}",
            f"{row['job_ratio']:.3f}", f"{row['job_ratio_min']:.3f}-{row['job_ratio_max']:.3f}",
        )  # fmt: skip
    return shown
