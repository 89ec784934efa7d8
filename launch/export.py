"""Gather a run's checkpoint, of any layout, into the canonical artifact, and convert it to targets.

One process does it, a layer's memory at most; the same command goes on where it was interrupted.

Run: python launch/export.py run_dir=runs/... export.targets=[modelopt]
"""

from __future__ import annotations

from megatron_edge.config import RunConfig
from megatron_edge.runtime.launcher import Launch, launch


def main(config: RunConfig, started: Launch) -> int | None:
    from megatron_edge.jobs import delivery  # heavy imports: not before the input is known to be good

    return delivery.export(config, started)


if __name__ == "__main__":
    launch(main, reads_run=True)
