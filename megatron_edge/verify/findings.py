"""What a part of verify found, before report.py puts the parts together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_edge.contracts import Check


@dataclass
class Findings:
    """Checks that ran, what did not with the reason, and the losses measured on the way.

    `runtimes` says of each runtime by name what it really ran: recipe, tokens per second, resident memory.
    """

    checks: list[Check] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    runtimes: dict[str, dict[str, Any]] = field(default_factory=dict)
