"""What a step of quantisation-aware training costs beside the same step of the plain model: a table and a JSON file.

Run: python launch/bench.py job=qat_step bench.formats=[int4,fp8] bench.shapes=[4x2048] bench.profile=true
     python launch/bench.py job=whole_job bench.formats=[int4] train.steps=100: a job's loop beside its bare step
"""

from __future__ import annotations

from megatron_edge.config import RunConfig
from megatron_edge.contracts import ParallelPlan
from megatron_edge.runtime.launcher import Launch, launch


def prepare(config: RunConfig, layout: ParallelPlan) -> RunConfig:
    from megatron_edge.jobs import bench

    return bench.prepare(config, layout)


def main(config: RunConfig, started: Launch) -> int | None:
    from megatron_edge.jobs import bench  # heavy imports: not before the input is known to be good

    return bench.run(config, started)


if __name__ == "__main__":
    launch(main, prepare=prepare)
