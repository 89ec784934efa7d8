"""From degrees of parallelism and a world size to a ParallelPlan. Pure arithmetic; no process group."""

from __future__ import annotations

from megatron_edge.contracts import InputError, ParallelPlan


def make_plan(
    world_size: int, *, tensor: int = 1, pipeline: int = 1, expert: int = 1, context: int = 1, sequence: bool = False
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
    return ParallelPlan(
        tp=tensor,
        pp=pipeline,
        ep=expert,
        cp=context,
        dp=world_size // model_ranks,
        world_size=world_size,
        sequence_parallel=sequence and tensor > 1,
    )


def describe(plan: ParallelPlan) -> str:
    """One short line for logs: `TP1 PP2 DP1 on 2 processes`."""
    degrees = [("TP", plan.tp), ("PP", plan.pp), ("EP", plan.ep), ("CP", plan.cp), ("DP", plan.dp)]
    shown = [f"{name}{degree}" for name, degree in degrees if degree > 1 or name in ("TP", "PP", "DP")]
    return " ".join(shown) + f" on {plan.world_size} process" + ("es" if plan.world_size > 1 else "")
