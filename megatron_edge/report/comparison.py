"""A sweep's runs side by side, and the front of those that no other beats in loss, bytes and time per token.

In: a directory with sweep.json, as the launcher of a sweep leaves it, and the run directories that it names. Out:
comparison.html, .png and .csv beside it, and a table for a terminal. Only runs whose artifact holds all of verify's
checks can be on the front; the others are listed with what happened.

    sweep.json: {"jobs": [{"overrides": ["quant=fp8"], "run_dir": "...", "status": "done|failed|skipped|cancelled",
                           "exit_code": 0, "reason": null, "seconds": 12.5}]}      skipped: it was done before
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_edge.contracts import InputError
from megatron_edge.report.facts import RunFacts, heldout_losses, read_json, read_run
from megatron_edge.report.verdict import Verdict, verdict_of
from megatron_edge.runtime.sweep import front_of
from megatron_edge.verify.statistics import Difference, paired_means

if TYPE_CHECKING:
    from rich.table import Table

SWEEP_FILE = "sweep.json"
STATUSES = ("done", "failed", "skipped", "cancelled")
_JOB = {"overrides": list, "run_dir": str, "status": str}


@dataclass(frozen=True)
class Row:
    """One job. `label` is what it does not share with all others; what a run did not come to is None.

    `loss` is the artifact's on held-out text (nats per token), `loss_error` its standard error over windows, and
    `difference` what it is above the best of the front on the same windows. `predicted_ms` is per token on `device`,
    `measured_tokens_per_second` of the runtime `measured_in` on the machine that verified it.
    """

    number: int
    label: str
    overrides: tuple[str, ...]
    run_dir: Path
    status: str
    exit_code: int | None
    reason: str
    seconds: float | None
    verdict: Verdict | None = None
    holds: bool = False
    loss: float | None = None
    loss_error: float | None = None
    difference: Difference | None = None
    size_bytes: int | None = None
    predicted_ms: float | None = None
    measured_tokens_per_second: float | None = None
    measured_in: str = ""
    device: str = ""
    on_front: bool = False

    @property
    def is_comparable(self) -> bool:
        return self.holds and self.loss is not None and self.size_bytes is not None


@dataclass(frozen=True)
class Comparison:
    """`time_name` says which time the front counts: predicted, measured, or none ("") and `time_missing` why."""

    directory: Path
    rows: tuple[Row, ...]
    time_name: str
    time_missing: str

    @property
    def page(self) -> Path:
        return self.directory / "comparison.html"

    def ms(self, row: Row) -> float | None:
        """The row's time per token, of the kind that all rows of the front have."""
        if not self.time_name:
            return None
        if self.time_name.startswith("predicted"):
            return row.predicted_ms
        return 1e3 / row.measured_tokens_per_second if row.measured_tokens_per_second else None


def write_comparison(sweep_dir: Path) -> Comparison:
    """Writes comparison.html, .png and .csv of a sweep, and report.html of runs that have none. One process.

    Raises:
        InputError: no sweep.json, or one that is damaged.
    """
    from megatron_edge.report import sweep_page  # draws

    comparison = compare(sweep_dir)
    sweep_page.write(comparison)
    return comparison


def compare(sweep_dir: Path) -> Comparison:
    """Reads a sweep. Raises InputError as `write_comparison`."""
    jobs = read_sweep(sweep_dir)
    shared = set.intersection(*(set(job["overrides"]) for job in jobs)) if len(jobs) > 1 else set()
    found = [_row(number, job, shared, sweep_dir) for number, job in enumerate(jobs, start=1)]
    rows, losses = [row for row, _ in found], [losses for _, losses in found]
    time_name, time_missing = _time(rows)
    comparison = Comparison(sweep_dir, tuple(rows), time_name, time_missing)
    front = front_of([(row.number, _objectives(comparison, row)) for row in rows if row.is_comparable])
    best = min((row for row in rows if row.is_comparable), key=lambda row: row.loss or 0.0, default=None)
    finished = []
    for row, said in zip(rows, losses, strict=True):
        difference = None
        if best is not None and row is not best:
            difference = _difference(said, losses[best.number - 1])
        finished.append(replace(row, on_front=row.number in front, difference=difference))
    return replace(comparison, rows=tuple(finished))


def read_sweep(sweep_dir: Path) -> list[dict[str, Any]]:
    """The jobs of sweep.json. Raises InputError naming the file and the job at fault."""
    file = sweep_dir / SWEEP_FILE
    data = read_json(file)
    if data is None:
        raise InputError(f"sweep={sweep_dir}: no {SWEEP_FILE}; allowed: the directory of a sweep")
    jobs = data.get("jobs")
    if not isinstance(jobs, list) or not jobs:
        raise InputError(f"{file}: jobs={jobs!r}; allowed is a list with a job or more")
    for index, job in enumerate(jobs):
        for key, kind in _JOB.items():
            if not isinstance(job, dict) or not isinstance(job.get(key), kind):
                raise InputError(f"{file}: jobs[{index}].{key} is missing or no {kind.__name__}")
        if job["status"] not in STATUSES:
            raise InputError(f"{file}: jobs[{index}].status={job['status']!r}; allowed: {', '.join(STATUSES)}")
    return jobs


def _objectives(comparison: Comparison, row: Row) -> tuple[float, ...]:
    assert row.loss is not None and row.size_bytes is not None
    ms = comparison.ms(row)
    return (row.loss, float(row.size_bytes)) if ms is None else (row.loss, float(row.size_bytes), ms)


def _row(
    number: int, job: dict[str, Any], shared: set[str], sweep_dir: Path
) -> tuple[Row, dict[str, torch.Tensor] | None]:
    run_dir = Path(job["run_dir"])
    if not run_dir.is_absolute() and not run_dir.exists():  # relative to where the sweep was started, or to itself
        run_dir = sweep_dir / run_dir
    own = [one for one in job["overrides"] if one not in shared and not one.startswith("run_dir=")]
    row = Row(
        number=number,
        label=" ".join(own) or run_dir.name,
        overrides=tuple(job["overrides"]),
        run_dir=run_dir,
        status=job["status"],
        exit_code=job.get("exit_code"),
        reason=job.get("reason") or "",
        seconds=job.get("seconds"),
    )
    if not (run_dir / "config.yaml").is_file():
        return replace(row, reason=row.reason or "nothing was written: it was refused or never started"), None
    run = read_run(run_dir)
    return _with_run(row, run), heldout_losses(run_dir)


def _with_run(row: Row, run: RunFacts) -> Row:
    verdict, verify = verdict_of(run), run.verify or {}
    reason = row.reason
    if not reason and verdict.level == "no":
        reason = " ".join((verdict.why, *verdict.reasons))
    measured = next(((n, r) for n, r in verify.get("runtimes", {}).items() if r.get("tokens_per_second")), None)
    return replace(
        row,
        verdict=verdict,
        holds=verdict.level != "no" and not run.is_running,
        reason=reason,
        loss=run.losses.get("artifact"),
        loss_error=run.heldout.error if run.heldout else None,
        size_bytes=run.artifact.size_bytes if run.artifact else None,
        predicted_ms=((run.plan or {}).get("predicted") or {}).get("ms_per_token"),
        measured_tokens_per_second=measured[1]["tokens_per_second"] if measured else None,
        measured_in=measured[0] if measured else "",
        device=run.config["device"]["name"],
    )


def _time(rows: list[Row]) -> tuple[str, str]:
    """(which time can be compared over all runs that may be on the front, why none)."""
    able = [row for row in rows if row.is_comparable]
    devices, runtimes = {row.device for row in able}, {row.measured_in for row in able}
    if able and all(row.predicted_ms is not None for row in able) and len(devices) == 1:
        return f"predicted for {devices.pop()}", ""
    if able and all(row.measured_tokens_per_second for row in able) and len(runtimes) == 1:
        return f"measured in {runtimes.pop()}", ""
    reason = "not all runs have one, predicted or measured"
    if len(devices) > 1:
        reason = f"the runs are for different devices ({', '.join(sorted(devices))})"
    return "", f"Time per token is not part of the front: {reason}." if able else ""


def _difference(ours: dict[str, torch.Tensor] | None, best: dict[str, torch.Tensor] | None) -> Difference | None:
    """Of two trained models on the same windows; None where they read others."""
    if ours is None or best is None:
        return None
    if not all(torch.equal(ours[name], best[name]) for name in ("tokens", "documents", "loss_mask")):
        return None
    mask = best["loss_mask"]
    sums = [(said["nll"].double() * mask).sum(1).tolist() for said in (ours, best)]
    if int((mask.sum(1) > 0).sum()) < 2:
        return None
    return paired_means(sums[0], sums[1], mask.sum(1).tolist())


def table(comparison: Comparison) -> Table:
    """For a terminal: the front first, then the others by their loss, then what failed."""
    from rich.markup import escape
    from rich.table import Table

    time = f"ms/token, {comparison.time_name}" if comparison.time_name else "ms/token"
    shown = Table("", "run", "nats/token", "above the best (95%)", "MB", time, "", title="sweep", title_justify="left")
    for row in ordered(comparison):
        ms = comparison.ms(row)
        mark = "[green]on the front" if row.on_front else "[dim]beaten" if row.is_comparable else f"[red]{row.status}"
        reason = f"\n[dim]{escape(row.reason)}[/]" if row.reason and not row.is_comparable else ""
        shown.add_row(
            str(row.number),
            escape(row.label) + reason,
            "" if row.loss is None else f"{row.loss:.4f}",
            above_best(row),
            "" if row.size_bytes is None else f"{row.size_bytes / 1e6:,.2f}",
            "" if ms is None else f"{ms:.3g}",
            mark,
        )
    return shown


def ordered(comparison: Comparison) -> list[Row]:
    def place(row: Row) -> tuple[bool, bool, float, int]:
        loss = row.loss if row.is_comparable and row.loss is not None else 0.0
        return not row.on_front, not row.is_comparable, loss, row.number

    return sorted(comparison.rows, key=place)


def above_best(row: Row) -> str:
    """+0.0123 ± 0.0040; "same" where the interval holds 0."""
    if row.difference is None:
        return ""
    half = (row.difference.high - row.difference.low) / 2
    text = f"{row.difference.value:+.4f} ± {half:.4f}"
    return f"{text} (noise)" if row.difference.is_noise else text
