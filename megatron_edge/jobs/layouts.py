"""parallel=auto: degrees of parallelism for a world, a model and the memory of a rank, and the reason in words.

The fewest ranks per model that fit: what data parallelism gets costs one reduction a step, tensor parallelism four
exchanges a layer, a pipeline its idle ends. Experts are spread before anything is cut, because that splits no matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_edge import checks, memory
from megatron_edge.config import ParallelConfig, RunConfig
from megatron_edge.contracts import InputError, ParallelPlan
from megatron_edge.families import dims_of
from megatron_edge.runtime.topology import describe, plan_of

USABLE = 0.9  # of a rank's memory: communication buffers and fragments take the rest
LARGEST_DEGREE = 64


@dataclass(frozen=True)
class Choice:
    """`reason` says what was chosen, what it needs, and why nothing simpler does."""

    parallel: ParallelConfig
    plan: ParallelPlan
    reason: str


def choose(
    config: RunConfig,
    hf_config: Mapping[str, Any],
    world_size: int,
    local_world_size: int,
    memory_bytes: int,
    teacher: Mapping[str, Any] | None = None,
) -> Choice:
    """The layout with the least model parallelism that fits `memory_bytes` per rank.

    Args:
        local_world_size: ranks of one host; tensor parallelism stays inside of it.
        teacher: the teacher's config.json, where there is one.

    Raises:
        InputError: no layout of this world fits, with what the best one would need.
    """
    budget, tried = int(memory_bytes * USABLE), []
    for parallel in _candidates(config.parallel, hf_config, world_size, local_world_size):
        candidate = replace(config, parallel=parallel)
        try:
            plan = plan_of(parallel, world_size)
            checks.check_config(candidate)
            checks.check_batches(candidate, plan)
            checks.check_model_dims(candidate, dict(hf_config))
            if teacher is not None:
                checks.check_teacher_dims(candidate, teacher)
            needed = max(stage.total_bytes for stage in memory.training_plan(candidate, hf_config, plan, teacher))
        except InputError:
            continue
        tried.append((needed, plan, parallel))
        if needed <= budget:
            return Choice(parallel, plan, _reason(tried, budget))
    if not tried:
        raise InputError(
            f"parallel=auto: no layout of {world_size} processes suits the model, train.global_batch="
            f"{config.train.global_batch} and train.micro_batch={config.train.micro_batch}; "
            "allowed: another number of processes, or a global batch that they divide"
        )
    needed, plan, _ = min(tried, key=lambda one: one[0])
    raise InputError(
        f"parallel=auto: none of {len(tried)} layouts of {world_size} processes fits {_gib(budget)} per rank; "
        f"{describe(plan)} comes nearest with {_gib(needed)}; allowed: more processes, or a smaller train.micro_batch "
        "or train.seq_length_tokens"
    )


def _candidates(
    given: ParallelConfig, hf_config: Mapping[str, Any], world_size: int, local_world_size: int
) -> Iterator[ParallelConfig]:
    """Simplest first: fewer ranks per model, then tensor before pipeline; recomputation only where all else fails."""
    dims = dims_of(hf_config)
    degrees = [degree for degree in range(1, LARGEST_DEGREE + 1) if world_size % degree == 0]
    pairs = [(t, p) for t in degrees for p in degrees if world_size % (t * p) == 0 and t <= local_world_size]
    pairs = [(t, p) for t, p in pairs if p <= dims.num_layers]
    for recompute in ("none", "selective", "full"):
        for tensor, pipeline in sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[1])):
            ranks = world_size // pipeline
            experts = max((e for e in degrees if ranks % e == 0 and dims.num_experts % e == 0), default=1)
            yield replace(
                given,
                auto=False,
                tensor=tensor,
                pipeline=pipeline,
                expert=experts if dims.num_experts else 1,
                sequence=tensor > 1,
                distributed_optimizer=world_size > tensor * pipeline,
                recompute=recompute,
            )


def _reason(tried: list[tuple[int, ParallelPlan, ParallelConfig]], budget: int) -> str:
    needed, plan, parallel = tried[-1]
    words = f"parallel=auto: {describe(plan)}"
    words += f", recompute={parallel.recompute}" if parallel.recompute != "none" else ""
    words += f": {_gib(needed)} of {_gib(budget)} per rank"
    if len(tried) > 1:
        before, simpler, _ = tried[-2]
        words += f"; {describe(simpler)} would need {_gib(before)}"
    return words


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
