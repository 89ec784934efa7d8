"""Import, calibrate, fine-tune with fake quantisation, export and verify: the whole job.

Run: torchrun --nproc-per-node 2 launch/qat.py +scenario=gateway parallel.pipeline=2
"""

from __future__ import annotations

from megatron_edge.config import RunConfig
from megatron_edge.contracts import ParallelPlan
from megatron_edge.runtime.launcher import Launch, launch


def prepare(config: RunConfig, layout: ParallelPlan) -> RunConfig:
    from megatron_edge.jobs import preflight

    return preflight.prepare(config, layout)


def main(config: RunConfig, started: Launch) -> int | None:
    from megatron_edge.jobs import training  # imports torch and megatron-core: not before the input is known to be good

    return training.qat(config, started)


if __name__ == "__main__":  # the checkpoint's writers are spawned and import this file again
    launch(main, prepare=prepare, trains=True)
