"""From degrees of parallelism and a world size to a ParallelPlan. Pure arithmetic; no process group."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_edge.config import ParallelConfig
from megatron_edge.contracts import InputError, ParallelPlan


def make_plan(
    world_size: int,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    virtual_pipeline: int = 1,
    expert: int = 1,
    expert_tensor: int = 1,
    context: int = 1,
    sequence: bool = False,
    stage_layers: Sequence[int] | None = None,
) -> ParallelPlan:
    """Data parallelism is what tensor x pipeline x context leave of the world.

    Raises:
        InputError: the product does not divide the world.
    """
    model_ranks = tensor * pipeline * context
    if model_ranks < 1 or world_size % model_ranks:
        raise InputError(
            f"parallel: tensor={tensor} x pipeline={pipeline} x context={context} = {model_ranks} does not divide "
            f"the {world_size} processes of this launch; start a multiple of {model_ranks} processes or lower a degree"
        )
    expert_ranks = expert * expert_tensor
    if world_size // pipeline % expert_ranks:
        raise InputError(
            f"parallel: expert={expert} x expert_tensor={expert_tensor} = {expert_ranks} does not divide the "
            f"{world_size // pipeline} processes of a pipeline stage; allowed: a product that divides them"
        )
    if virtual_pipeline > 1 and pipeline == 1:
        raise InputError(
            f"parallel.virtual_pipeline={virtual_pipeline}: interleaves the stages of a pipeline; "
            "allowed with parallel.pipeline=1 is 1"
        )
    return ParallelPlan(
        tp=tensor,
        pp=pipeline,
        vpp=virtual_pipeline,
        ep=expert,
        etp=expert_tensor,
        cp=context,
        dp=world_size // model_ranks,
        world_size=world_size,
        sequence_parallel=sequence and tensor > 1,
        stage_layers=tuple(stage_layers or ()),
    )


def plan_of(parallel: ParallelConfig, world_size: int) -> ParallelPlan:
    """The plan of a configuration; raises as `make_plan`."""
    return make_plan(
        world_size,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
        context=parallel.context,
        sequence=parallel.sequence,
        stage_layers=parallel.stage_layers,
    )


def describe(plan: ParallelPlan) -> str:
    """One short line for logs: `TP1 PP2 DP1 on 2 processes`."""
    degrees = [("TP", plan.tp), ("PP", plan.pp), ("VPP", plan.vpp), ("EP", plan.ep), ("ETP", plan.etp)]
    degrees += [("CP", plan.cp), ("DP", plan.dp)]
    shown = [f"{name}{degree}" for name, degree in degrees if degree > 1 or name in ("TP", "PP", "DP")]
    shown += ["SP"] if plan.sequence_parallel else []
    return " ".join(shown) + f" on {plan.world_size} process" + ("es" if plan.world_size > 1 else "")


def fewest_ranks(parallel: ParallelConfig) -> int:
    """The fewest processes that the layout needs."""
    of_stage = math.lcm(parallel.tensor * parallel.context, parallel.expert * parallel.expert_tensor)
    return parallel.pipeline * of_stage
