"""Held-out loss, perplexity and multiple-choice accuracy of an artifact, or of a run's checkpoint.

Run: python launch/evaluate.py artifact=DIR data.heldout=FILE eval.tasks=[boolq,piqa] eval.limit=500
     torchrun --nproc-per-node 2 launch/evaluate.py run_dir=runs/... parallel.tensor=2
"""

from __future__ import annotations

from megatron_edge.config import RunConfig
from megatron_edge.contracts import ParallelPlan
from megatron_edge.runtime.launcher import Launch, launch


def prepare(config: RunConfig, layout: ParallelPlan) -> RunConfig:
    from megatron_edge.jobs import evaluation

    return evaluation.prepare(config, layout)


def main(config: RunConfig, started: Launch) -> int | None:
    # heavy imports: not before the input is known to be good
    if config.artifact:
        from megatron_edge.jobs import evaluation

        return evaluation.evaluate(config, started)
    from megatron_edge.jobs import training

    return training.evaluate(config, started)


if __name__ == "__main__":
    launch(main, prepare=prepare, reads_run=True)
