"""Held-out loss and perplexity of an artifact, or of a run's checkpoint.

Run: python launch/evaluate.py artifact=DIR data.heldout=FILE      (or run_dir=runs/...)
"""

from __future__ import annotations

from megatron_edge.config import RunConfig
from megatron_edge.runtime.launcher import Launch, launch


def main(config: RunConfig, started: Launch) -> int | None:
    from megatron_edge.jobs import delivery  # heavy imports: not before the input is known to be good

    return delivery.evaluate(config, started)


if __name__ == "__main__":
    launch(main, reads_run=True)
