"""How a job ended, kept in its run directory: outcome.json and report.html, whatever the outcome.

In: a job of the launcher. Out: the same job, which on rank 0 leaves both behind. A process that is killed leaves
neither; launch/report.py then says so.
"""

from __future__ import annotations

import functools
import json
import logging
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from megatron_edge.config import RunConfig
from megatron_edge.contracts import InputError
from megatron_edge.report.facts import OUTCOME_FILE, write_text
from megatron_edge.report.page import write_report
from megatron_edge.runtime.launcher import OUTCOMES, Launch

log = logging.getLogger("megatron_edge")

Job = Callable[[RunConfig, Launch], None]


def recorded(job: Job) -> Job:
    """`job`, with its outcome on rank 0: label and exit code as the launcher has them, reason, seconds. What the job
    raises is raised on; a page that then cannot be written is only told of."""

    @functools.wraps(job)
    def run(config: RunConfig, launch: Launch) -> None:
        if launch.rank != 0:
            return job(config, launch)
        directory, began = Path(config.run_dir), time.monotonic()
        earlier = directory / OUTCOME_FILE
        before = earlier.read_text() if earlier.is_file() else None
        earlier.unlink(missing_ok=True)
        try:
            job(config, launch)
        except BaseException as error:
            if isinstance(error, InputError) and before is not None:
                write_text(earlier, before)  # this command was refused: what is there is what it was
            else:
                _record_failure(directory, error, began)
            raise
        _record(directory, "done", 0, "", began)
        log.info("report: %s", write_report(directory))

    return run


def _record(directory: Path, label: str, exit_code: int, reason: str, began: float) -> None:
    found = {
        "label": label,
        "exit_code": exit_code,
        "reason": reason,
        "seconds": round(time.monotonic() - began, 3),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_text(directory / OUTCOME_FILE, json.dumps(found, indent=1) + "\n")


def _record_failure(directory: Path, error: BaseException, began: float) -> None:
    # Other ranks leave meanwhile, at which torchrun sends SIGTERM here; it waits long enough for this and for our code.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    label, exit_code = label_of(error)
    reason = str(error) if exit_code not in (1, 130) else f"{type(error).__name__}: {error}".rstrip(": ")
    try:
        _record(directory, label, exit_code, reason, began)
        log.info("report: %s", write_report(directory))
    except Exception as failed:  # noqa: BLE001 - the job's own error is what its user must see
        log.warning("no report: %s: %s", type(failed).__name__, failed)


def label_of(error: BaseException) -> tuple[str, int]:
    """("diverged", 4) for Diverged, as the launcher says and exits; ("crashed", 1) for what is an error of ours."""
    for kind, (exit_code, label) in OUTCOMES.items():
        if isinstance(error, kind):
            return label, exit_code
    return ("interrupted", 130) if isinstance(error, KeyboardInterrupt) else ("crashed", 1)
