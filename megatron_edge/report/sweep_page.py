"""comparison.html, .png and .csv of a sweep. Called by comparison.py."""

from __future__ import annotations

import csv
import io
import os
from typing import Any

from markupsafe import Markup

from megatron_edge.report.comparison import Comparison, Row, above_best, ordered
from megatron_edge.report.facts import write_text
from megatron_edge.report.page import REPORT_FILE, render, write_report
from megatron_edge.report.pictures import Point, front, png, svg
from megatron_edge.report.tables import megabytes

SIZE = (8.6, 4.6)  # inches
MOST_NAMED = 12  # runs whose points have more than a number
COLUMNS = (
    "number", "label", "status", "exit_code", "reason", "seconds", "verdict", "on_front", "heldout_nats_per_token",
    "standard_error", "above_best", "above_best_low", "above_best_high", "weights_bytes", "predicted_ms_per_token",
    "device", "measured_tokens_per_second", "measured_in", "overrides", "run_dir",
)  # fmt: skip


def write(comparison: Comparison) -> None:
    """Raises OSError."""
    for row in comparison.rows:
        if (row.run_dir / "config.yaml").is_file() and not (row.run_dir / REPORT_FILE).is_file():
            write_report(row.run_dir)
    directory = comparison.directory
    write_text(directory / "comparison.csv", csv_text(comparison))
    draw = front(points_of(comparison))
    partial = directory / ".comparison.png.partial"
    partial.write_bytes(png(draw, SIZE))
    partial.replace(directory / "comparison.png")
    write_text(comparison.page, page_text(comparison))


def points_of(comparison: Comparison) -> list[Point]:
    """Of the runs that have a loss and bytes, also where a check failed. Many are named by their numbers alone."""
    return [
        Point(
            name=f"{row.number}  {row.label}" if len(comparison.rows) <= MOST_NAMED else str(row.number),
            size_mb=row.size_bytes / 1e6,
            loss=row.loss,
            half=(row.difference.high - row.difference.low) / 2 if row.difference else None,
            ms_per_token=comparison.ms(row),
            on_front=row.on_front,
            holds=row.holds,
        )
        for row in comparison.rows
        if row.loss is not None and row.size_bytes is not None
    ]


def csv_text(comparison: Comparison) -> str:
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(COLUMNS)
    for row in comparison.rows:
        difference = row.difference
        above = (difference.value, difference.low, difference.high) if difference else (None, None, None)
        values = (
            row.number, row.label, row.status, row.exit_code, row.reason, row.seconds,
            row.verdict.level if row.verdict else None, row.on_front, row.loss, row.loss_error, *above,
            row.size_bytes, row.predicted_ms, row.device, row.measured_tokens_per_second, row.measured_in,
            " ".join(row.overrides), row.run_dir,
        )  # fmt: skip
        lines.writerow(values)
    return out.getvalue()


def page_text(comparison: Comparison) -> str:
    points = points_of(comparison)
    title = "held-out loss over the bytes of the weights, a point for each run"
    failed = [row for row in comparison.rows if not row.is_comparable]
    return render(
        "sweep.html",
        directory=comparison.directory,
        name=comparison.directory.name,
        headline=_headline(comparison),
        why=_why(comparison),
        level=_level(comparison),
        choices=_choices(comparison),
        failed=[{"number": row.number, "label": row.label, "status": row.status, "reason": row.reason,
                 "exit_code": row.exit_code} for row in failed],
        picture=Markup(svg(front(points), SIZE, title)) if points else "",
        time_name=comparison.time_name,
        time_missing=comparison.time_missing,
        rows=[_shown(comparison, row) for row in ordered(comparison)],
    )  # fmt: skip


def _headline(comparison: Comparison) -> str:
    on_front, total = sum(row.on_front for row in comparison.rows), len(comparison.rows)
    if not on_front:
        return f"Nothing to choose from in {total} runs"
    return f"The best of {total} runs is one" if on_front == 1 else f"Choose among {on_front} of {total} runs"


def _why(comparison: Comparison) -> str:
    able = sum(row.is_comparable for row in comparison.rows)
    failed = len(comparison.rows) - able
    if not able:
        return "None has an artifact for which all checks hold."
    words = f"{able} brought an artifact for which all checks made here hold; no other beats those of the front."
    return f"{words} {failed} did not come through." if failed else words


def _level(comparison: Comparison) -> str:
    able = sum(row.is_comparable for row in comparison.rows)
    return "ship" if able == len(comparison.rows) else "wait" if able else "no"


def _choices(comparison: Comparison) -> list[str]:
    """What is best at what, in words."""
    able = [row for row in comparison.rows if row.is_comparable]
    found = []
    if able:
        best = min(able, key=lambda row: row.loss or 0.0)
        small = min(able, key=lambda row: row.size_bytes or 0)
        found.append(f"Lowest loss: run {best.number}, {best.label} ({best.loss:.4f} nats/token)")
        found.append(f"Smallest: run {small.number}, {small.label} ({megabytes(small.size_bytes or 0)})")
    timed = [(ms, row) for row in able if (ms := comparison.ms(row)) is not None]
    if timed:
        ms, fast = min(timed, key=lambda pair: (pair[0], pair[1].number))
        found.append(f"Fastest: run {fast.number}, {fast.label} ({ms:.3g} ms/token, {comparison.time_name})")
    return found


def _shown(comparison: Comparison, row: Row) -> dict[str, Any]:
    ms = comparison.ms(row)
    page = row.run_dir / REPORT_FILE
    return {
        "number": row.number,
        "label": row.label,
        "link": os.path.relpath(page, comparison.directory) if page.is_file() else "",
        "loss": "" if row.loss is None else f"{row.loss:.4f}",
        "error": "" if row.loss_error is None else f"{row.loss_error:.4f}",
        "above": above_best(row),
        "size": "" if row.size_bytes is None else megabytes(row.size_bytes),
        "ms": "" if ms is None else f"{ms:.3g}",
        "seconds": "" if row.seconds is None else f"{row.seconds:,.0f} s",
        "front": row.on_front,
        "mark": "ok" if row.on_front else "unknown" if row.is_comparable else "failed",
        "words": "on the front" if row.on_front else "beaten" if row.is_comparable else row.status,
        "verdict": row.verdict.headline if row.verdict else "",
        "reason": "" if row.is_comparable else row.reason,
    }
