"""The scenarios of conf/ as the table of README.md: python tools/scenario_table.py

A unit test compares README.md with what this prints.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_edge import compose
from megatron_edge.config import RunConfig

HEADER = (
    "scenario", "device, runtime", "weights", "activations", "embedding", "KV cache", "sequences x tokens", "memory",
    "power", "per token", "rise of the loss",
)  # fmt: skip


def main() -> None:
    print(table(), end="")


def table() -> str:
    rows = [row(compose.compose([f"+scenario={name}"])) for name in compose.options("scenario")]
    lines = [HEADER, tuple("---" for _ in HEADER), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def row(config: RunConfig) -> tuple[str, ...]:
    quant, export, budget = config.quant, config.export, config.budget
    group = f", group {quant.group_size}" if quant.weight == "int4" else ""
    cache = "int8 (q8_0)" if config.kv.format == "int8" else config.kv.format
    memory = f"{budget.memory_bytes / 2**30:g} GiB" if budget.memory_bytes is not None else "-"
    return (
        f"`{config.scenario}`",
        f"`{config.device.name}`, {config.device.runtime}",
        (quant.name if quant.algorithm != "max" else quant.weight) + group,
        quant.activation.replace("none", "–"),
        quant.embedding,
        cache,
        f"{export.max_batch_size} x {export.max_seq_len}",
        memory,
        f"{budget.power_w:g} W" if budget.power_w is not None else "-",
        f"{budget.latency_ms_per_token:g} ms" if budget.latency_ms_per_token is not None else "-",
        f"{export.max_loss_rise:g} nats",
    )


if __name__ == "__main__":
    main()
