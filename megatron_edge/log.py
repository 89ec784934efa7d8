"""What a job says while it runs: the logger of each rank, progress bars, metrics.jsonl and TensorBoard.

In: records of the logger "megatron_edge" and one dict of numbers per step. Out: stderr (a bar where it is a terminal,
plain lines elsewhere, so that a CI log stays readable), and files in the run directory. The launcher calls `setup`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

NAME = "megatron_edge"
METRICS_FILE = "metrics.jsonl"
PLAIN_LINE_SECONDS = 15.0  # at least this long between two plain progress lines of `track`
Item = TypeVar("Item")

_console: Console | None = None  # shared by handler and bars: a record then appears above the bar, not inside it


def console() -> Console:
    global _console
    if _console is None:
        from rich.console import Console

        _console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)
    return _console


def setup(rank: int, world_size: int) -> logging.Logger:
    """Rank 0 says everything from INFO, the others from WARNING with their rank. A second call replaces the first."""
    logger = logging.getLogger(NAME)
    logger.propagate = False
    for old in list(logger.handlers):
        logger.removeHandler(old)
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.logging import RichHandler

        handler = RichHandler(console=console(), show_path=False, omit_repeated_times=False, log_time_format="%H:%M:%S")
        handler.setFormatter(logging.Formatter(f"{_rank_label(rank, world_size)}%(message)s"))
    else:
        handler = logging.StreamHandler()
        line = f"%(asctime)s {_rank_label(rank, world_size)}%(levelname)s %(message)s"
        handler.setFormatter(logging.Formatter(line, datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    return logger


def _rank_label(rank: int, world_size: int) -> str:
    return f"[rank {rank} of {world_size}] " if rank else ""


@contextmanager
def quiet(message: str, category: type[Warning] = Warning, module: str = "") -> Iterator[None]:
    """Silence one warning that a user cannot act on, around the call that gives it.

    Args:
        message, module: regular expressions for its start and for the module that it names; never empty ones alone.
    """
    assert message, "a blanket filter would also hide what matters"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=message, category=category, module=module)
        yield


class MetricsWriter:
    """Appends one JSON line per step to run_dir/metrics.jsonl and the same numbers to run_dir/tensorboard.

    Rank 0 writes; on other ranks every call does nothing. Each step stands there once: opening drops the lines after
    `after_step` (which a crash left behind the checkpoint that is resumed) and a torn last line.
    """

    def __init__(self, run_dir: str | os.PathLike[str], rank: int, after_step: int = 0) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        self._writes = rank == 0
        self._file: Any = None
        self._board: Any = None
        if self._writes:
            truncate_after(self.path, after_step)
            self._file = self.path.open("a", encoding="utf-8")
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=after_step + 1)

    def write(self, values: dict[str, float]) -> None:
        """`values` holds "step" and numbers with their units in the keys; one that is not finite is written as null."""
        if not self._writes:
            return
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        try:
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()  # a killed process must not cost lines of steps that are in a checkpoint
            for key, value in values.items():
                if key != "step":
                    self._board.add_scalar(key, value, int(values["step"]))
        except OSError as error:  # of this write, or of one that TensorBoard's thread did before
            raise OSError(error.errno, error.strerror, str(self.path.parent)) from None  # Python does not say where

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._writes:
            return
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():  # said already
            self._file.close()
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, in order; a torn last line (a crash while writing) is not one."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(record, dict) or "step" not in record:
            break
        records.append(record)
    return records


def truncate_after(path: Path, step: int) -> None:
    """Keep the lines up to `step`; atomic. Creates the file, and its directory, where there is none."""
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    scratch.replace(path)


class TrainingProgress:
    """A bar with loss, tokens/s and time left on a terminal; else a line every `log_every_steps` steps. Rank 0 only."""

    def __init__(self, steps: int, start_step: int, rank: int, log_every_steps: int = 1) -> None:
        self._steps, self._start, self._every = steps, start_step, log_every_steps
        self._shows = rank == 0
        self._bar: Progress | None = None
        self._task: Any = None
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        if self._shows and sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[numbers]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=console())
            self._task = self._bar.add_task("train", total=self._steps, completed=self._start, numbers="")
            self._bar.start()
        return self

    def update(self, values: dict[str, float]) -> None:
        """`values` as for `MetricsWriter.write`; shows loss_nats_per_token and tokens_per_second."""
        step = int(values["step"])
        numbers = f"loss {values['loss_nats_per_token']:.4f} nats/token  {values['tokens_per_second']:.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif self._shows and (step % self._every == 0 or step == self._steps):
            seconds_left = (time.monotonic() - self._began) / max(1, step - self._start) * (self._steps - step)
            logging.getLogger(NAME).info("step %d/%d  %s  %s left", step, self._steps, numbers, _duration(seconds_left))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def track(items: Iterable[Item], what: str, total: int, rank: int = 0) -> Iterator[Item]:
    """`items`, with a bar on a terminal and a plain line now and then elsewhere. Only rank 0 shows anything."""
    if rank == 0 and sys.stderr.isatty():
        from rich.progress import track as rich_track

        yield from rich_track(items, description=what, total=total, console=console())
        return
    said = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if rank == 0 and time.monotonic() - said > PLAIN_LINE_SECONDS:
            said = time.monotonic()
            logging.getLogger(NAME).info("%s: %d/%d", what, done, total)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
