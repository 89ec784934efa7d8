"""The page of a run, made again from its directory; or the comparison of a sweep's runs.

Run: python launch/report.py run_dir=runs/...      (or sweep=DIR)
"""

from __future__ import annotations

from megatron_edge.config import RunConfig
from megatron_edge.runtime.launcher import Launch, launch


def main(config: RunConfig, started: Launch) -> int | None:
    from megatron_edge.jobs import reporting  # heavy imports: not before the input is known to be good

    return reporting.report(config, started)


if __name__ == "__main__":
    launch(main)
