"""Held-out loss and perplexity of an artifact, or of a run's checkpoint.

Run: python launch/evaluate.py artifact=DIR data.heldout=FILE
     torchrun --nproc-per-node 2 launch/evaluate.py run_dir=runs/... parallel.tensor=2
"""

from __future__ import annotations

from megatron_edge.config import RunConfig
from megatron_edge.runtime.launcher import Launch, launch


def main(config: RunConfig, started: Launch) -> int | None:
    # heavy imports: not before the input is known to be good
    if config.artifact:
        from megatron_edge.jobs import delivery

        return delivery.evaluate(config, started)
    from megatron_edge.jobs import training

    return training.evaluate(config, started)


if __name__ == "__main__":
    launch(main, reads_run=True)
