"""Gather a run's checkpoint into the canonical artifact, and convert it to targets.

Run: torchrun --nproc-per-node 2 launch/export.py run_dir=runs/... export.targets=[modelopt]
"""

from __future__ import annotations

from megatron_edge.config import RunConfig
from megatron_edge.runtime.launcher import Launch, launch


def main(config: RunConfig, started: Launch) -> int | None:
    from megatron_edge.jobs import delivery  # heavy imports: not before the input is known to be good

    return delivery.export(config, started)


if __name__ == "__main__":
    launch(main, reads_run=True)
