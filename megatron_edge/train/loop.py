"""The training loop: steps, metrics, checkpoints, signals. What a step does is in step.py."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_edge.contracts import Diverged, StoppedBySignal
from megatron_edge.runtime.session import Session
from megatron_edge.runtime.signals import stop_on_signal
from megatron_edge.runtime.watchdog import mark
from megatron_edge.train.data import BatchPlan
from megatron_edge.train.step import LABELS, Objective, StepResult, forward_backward, learning_rate_schedule, train_step

log = logging.getLogger("megatron_edge")


def fit(
    model: nn.Module,
    optimizer: Any,
    batches: BatchPlan,
    train: Any,
    session: Session,
    *,
    start_step: int,
    save: Callable[[int], None],
    report: Callable[[dict[str, float]], None],
    objective: Objective = LABELS,
    gradients: Callable[..., list[dict[str, Tensor]]] = forward_backward,
) -> None:
    """Trains from `start_step` to `train.steps`, towards `objective`, whose gradients come from `gradients`. All ranks
    call it.

    `save(step)` writes a checkpoint of the state after `step` steps; `report` gets each step's metrics once.

    Raises:
        StoppedBySignal: SIGTERM or SIGINT arrived; the state was saved.
        Diverged: train.max_skipped_steps were skipped one after the other, and one more.
    """
    schedule = learning_rate_schedule(optimizer, train)
    schedule.step(start_step + 1)  # the first step already has a learning rate above zero
    saved, skipped = start_step, 0
    with stop_on_signal() as stop:
        for step in range(start_step, train.steps):
            mark(f"step {step + 1}")
            began = time.perf_counter()
            learning_rate = optimizer.param_groups[0]["lr"]
            mine = batches.micro_batches(step, session.dp_rank, session.plan.dp)
            result = train_step(model, optimizer, mine, session, objective, gradients, lambda: stop.requested)
            schedule.step(1)
            skipped = 0 if result.applied else skipped + 1
            report(_metrics(step + 1, result, learning_rate, time.perf_counter() - began, session))
            if skipped:
                _tell_skipped(step, result, batches, skipped, train.max_skipped_steps)
            done = step + 1
            stopping = result.stopping or (session.plan.world_size == 1 and stop.requested)
            every = train.checkpoint_every_steps
            if done == train.steps or stopping or (every and done % every == 0):
                save(done)
                saved = done
            if stopping and done < train.steps:
                raise StoppedBySignal(f"stopped by a signal after step {saved}; the same command continues there")


def _tell_skipped(step: int, result: StepResult, batches: BatchPlan, skipped: int, limit: int) -> None:
    """`step` counts from 0, as samples do in the order of training."""
    first = step * batches.global_batch
    text = (
        f"step {step + 1}: loss {result.loss}, gradient norm {result.gradient_norm}: not finite, nothing was updated "
        f"(samples {first} to {first + batches.global_batch - 1} in the order of training)"
    )
    log.warning("%s", text)
    if skipped > limit:
        raise Diverged(
            f"{text}; {skipped} steps in a row, train.max_skipped_steps={limit}. The last checkpoint is from before; "
            "allowed: a lower train.learning_rate, a lower train.clip_norm, or other data"
        )


def _metrics(step: int, result: StepResult, learning_rate: float, seconds: float, session: Session) -> dict[str, float]:
    metrics: dict[str, float] = {
        "step": step,
        "loss_nats_per_token": result.loss,
        "gradient_norm": result.gradient_norm,
        "learning_rate": learning_rate,
        "tokens": result.tokens,
        "tokens_per_second": result.tokens / seconds,
        "step_seconds": seconds,
        "skipped": float(not result.applied),
        **result.parts,
    }
    for rank, used in enumerate(memory_bytes_per_rank(session)):
        metrics[f"memory_bytes_rank{rank}"] = used
    return metrics


def memory_bytes_per_rank(session: Session) -> list[int]:
    """Peak device memory of each rank on CUDA, resident memory of its process on CPU. All ranks call it."""
    if session.device.type == "cuda":
        used = torch.cuda.max_memory_allocated()
    else:
        used = psutil.Process().memory_info().rss
    if session.plan.world_size == 1:
        return [used]  # without a wait for the device
    mine = torch.tensor([used], dtype=torch.int64, device=session.device)
    everyone = [torch.zeros_like(mine) for _ in range(session.plan.world_size)]
    dist.all_gather(everyone, mine)
    return [int(value) for value in everyone]
