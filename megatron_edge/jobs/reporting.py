"""The report job: a run's page made again, or the comparison of a sweep. One process, nothing is run or trained."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_edge.config import RunConfig
from megatron_edge.contracts import InputError
from megatron_edge.log import console
from megatron_edge.report.comparison import table, write_comparison
from megatron_edge.report.page import write_report
from megatron_edge.runtime.launcher import Launch

log = logging.getLogger("megatron_edge")


def report(config: RunConfig, launch: Launch) -> None:
    """Writes report.html of run_dir, or comparison.html, .png and .csv of sweep and the pages of its runs. Rank 0 does.

    Raises:
        InputError: no run there, or no sweep.
    """
    if launch.rank != 0:
        return
    if config.sweep is None:
        log.info("report: %s", write_report(Path(config.run_dir)))
        return
    if not Path(config.sweep).is_dir():
        raise InputError(f"sweep={config.sweep!r}: no directory; allowed: one with a sweep.json")
    comparison = write_comparison(Path(config.sweep))
    console().print(table(comparison))
    log.info("comparison: %s", comparison.page)
