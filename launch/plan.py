"""Whether a job fits its ranks and its device, before anything is spent.

Run: python launch/plan.py +scenario=gateway
"""

from __future__ import annotations

from megatron_edge.config import RunConfig
from megatron_edge.runtime.launcher import Launch, launch


def main(config: RunConfig, started: Launch) -> int | None:
    from megatron_edge.jobs import preflight  # heavy imports: not before the input is known to be good

    return preflight.plan(config, started)


if __name__ == "__main__":
    launch(main, any_world=True)
