"""Prove that an artifact is the trained model: exit 0 only if every check holds, else 3.

Run: python launch/verify.py run_dir=runs/...      (or artifact=DIR reference=RUN_DIR)
"""

from __future__ import annotations

from megatron_edge.config import RunConfig
from megatron_edge.runtime.launcher import Launch, launch


def main(config: RunConfig, started: Launch) -> int | None:
    from megatron_edge.jobs import delivery  # heavy imports: not before the input is known to be good

    return delivery.verify(config, started)


if __name__ == "__main__":
    launch(main, reads_run=True)
