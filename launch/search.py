"""Which format for which layer: the recipe that diverges least from the plain model within search.target_bits or
search.target_bytes, as a file for quant.recipe=.

Run: python launch/search.py search.target_bits=4.5 search.formats=[int4,nvfp4_w4a16,fp8]
"""

from __future__ import annotations

from megatron_edge.config import RunConfig
from megatron_edge.contracts import ParallelPlan
from megatron_edge.runtime.launcher import Launch, launch


def prepare(config: RunConfig, layout: ParallelPlan) -> RunConfig:
    from megatron_edge.jobs import search

    return search.prepare(config, layout)


def main(config: RunConfig, started: Launch) -> int | None:
    from megatron_edge.jobs import search  # heavy imports: not before the input is known to be good

    return search.search(config, started)


if __name__ == "__main__":
    launch(main, prepare=prepare)
