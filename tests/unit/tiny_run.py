"""A run directory with all that a finished job leaves but its checkpoints, made in a second: artifact, reference and
verify.json by the product, metrics and plan written down. And what a page says, read as a browser does."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from tiny_artifact import make_tiny

from megatron_edge.compose import compose
from megatron_edge.config import to_yaml
from megatron_edge.verify.report import Limits, verify_artifact

GENEROUS, IMPOSSIBLE = 10.0, -10.0  # declared rise of the loss, nats/token
STEPS = 6


def make_tiny_run(directory: Path, *arguments: str, max_loss_rise: float = GENEROUS) -> Path:
    """`directory`, of a run that was verified against `max_loss_rise`."""
    make_tiny(directory, "int4")
    usual = ("+scenario=gateway", "quant=int4", f"train.steps={STEPS}", f"run_dir={directory}")
    config = compose([*usual, *arguments])
    (directory / "config.yaml").write_text(to_yaml(config))
    (directory / "plan.json").write_text(json.dumps(plan(config.device.name, config.device.runtime)))
    write_metrics(directory, STEPS)
    limits = Limits(device=config.device, max_loss_rise=max_loss_rise)
    verify_artifact(
        directory / "artifact" / "canonical", directory / "reference", limits, {}, directory / "verify.json"
    )
    write_outcome(directory, "done" if max_loss_rise == GENEROUS else "failed", 0 if max_loss_rise == GENEROUS else 3)
    return directory


def write_metrics(directory: Path, steps: int) -> None:
    lines = [
        {
            "step": step,
            "loss_nats_per_token": 5.0 - 0.1 * step,
            "gradient_norm": None if step == 3 else 1.0 / step,
            "learning_rate": 1e-4 * step,
            "tokens_per_second": 1000.0,
            "skipped": float(step == 3),
            "memory_bytes_rank0": 5 * 2**20 + step,
        }
        for step in range(1, steps + 1)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_outcome(directory: Path, label: str, exit_code: int, reason: str = "") -> None:
    found = {"label": label, "exit_code": exit_code, "reason": reason, "seconds": 1.0, "ended": "2026-01-01T00:00:00"}
    (directory / "outcome.json").write_text(json.dumps(found))


def plan(device: str, runtime: str) -> dict[str, Any]:
    sizes = {"weights_bytes": 1, "kv_bytes": 20 * 2**20, "activations_bytes": 2**20, "workspace_bytes": 150 * 2**20}
    limits = {"budget_bytes": 1536 * 2**20, "max_batch": 1, "max_seq_len": 2048}
    return {
        "device": {"name": device, "runtime": runtime, **sizes, **limits},
        "device_total_bytes": sum(sizes.values()),
        "training": [{"stage": 0, "total_bytes": 64 * 2**20}],
        "layout": {"tp": 1, "pp": 2, "dp": 1, "world_size": 2},
    }


class Page(HTMLParser):
    """The text of a page, its tables as rows of cells by the section's id, and every attribute."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.tables: dict[str, list[list[str]]] = {}
        self.attributes: list[tuple[str, str]] = []
        self.styles = ""
        self.headline = ""
        self._section, self._open, self._in_cell = "", "", False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        self._open = tag
        if tag == "section":
            self._section = dict(attrs).get("id") or ""
        rows = self.tables.setdefault(self._section, [])
        if tag == "tr":
            rows.append([])
        elif tag in ("td", "th"):
            rows[-1].append("")
            self._in_cell = True

    def handle_data(self, data: str) -> None:
        if self._open == "style":
            self.styles += data
            return
        self.text += data
        if self._open == "h1":
            self.headline += data.strip()
        if self._in_cell:
            self.tables[self._section][-1][-1] += data.strip()

    def handle_endtag(self, tag: str) -> None:
        self._open = ""
        if tag in ("td", "th"):
            self._in_cell = False

    @property
    def level(self) -> str:
        return next(value for name, value in self.attributes if name == "data-verdict")

    def row(self, section: str, start: str) -> list[str]:
        return next(row for row in self.tables[section] if row and row[0].startswith(start))
