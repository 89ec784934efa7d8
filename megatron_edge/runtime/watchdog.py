"""Tells the rank that hangs or is gone from the ranks that wait for it, names it, and ends the job in every process.

In: the store of this start. Out: nothing while all is well; else one line on stderr that names the rank and where it
stands, and exit code 5 everywhere, a few seconds after `timeout_seconds` without progress. session.py opens it around
everything that ranks do together; whoever works through a long stage calls `mark`.

A daemon thread in each process looks once a second at its main thread: progress is a `mark`, or a main thread that
stands elsewhere than before. It puts its sign of life into the store, with where the main thread stands and whether it
waits there for other ranks. Nobody reads that until a process has itself made no progress for half the time allowed.
A process that is stopped as a whole (SIGSTOP) cannot end itself, and where it is alone on its node nobody else can: a
guard, a small process of its own, does.
"""

from __future__ import annotations

import contextlib
import json
import linecache
import math
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import psutil
import torch.distributed as dist

from megatron_edge.contracts import RankLost

BEAT_SECONDS = 1.0
EXIT_CODE = 5
LISTED_RANKS = 16

# Reads a byte per beat; kills its parent after `sys.argv[1]` seconds without one. It counts selects, not the clock:
# stopped and continued together with its parent, it has lost no time. Standard library alone: there at once, and small.
_GUARD = """
import os, select, signal, sys
limit, parent, quiet = int(sys.argv[1]), os.getppid(), 0
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
while quiet < limit:
    if select.select([0], [], [], 1.0)[0]:
        if not os.read(0, 4096):
            sys.exit()
        quiet = 0
    else:
        quiet += 1
if os.getppid() == parent:
    os.kill(parent, signal.SIGKILL)
"""
GUARD_GRACE_SECONDS = 10  # beyond the other ranks' verdict, which names this one

Sign = dict[str, Any]  # what `_Watch._beat` writes

_marks = 0
_doing = "starting"


def mark(doing: str | None = None) -> None:
    """Progress. `doing` says what comes now, for the message, and holds until the next one."""
    global _marks, _doing
    _marks, _doing = _marks + 1, doing or _doing


@contextlib.contextmanager
def watching(store: Any, rank: int, world_size: int, timeout_seconds: float) -> Iterator[None]:
    """Watches this process and the others until the end of the block. All ranks open it.

    Raises:
        RankLost: in the block another rank's connection broke, and that rank shows no sign of life any more.
    """
    watch = _Watch(store.clone() if world_size > 1 else store, rank, world_size, timeout_seconds)
    watch.start()
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            watch.explain(error)
        raise
    finally:
        watch.ended.set()
        watch.join(5 * BEAT_SECONDS)
        watch.close_guard()


class _Watch(threading.Thread):
    def __init__(self, store: Any, rank: int, world_size: int, timeout_seconds: float) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.store, self.rank, self.world_size, self.timeout_seconds = store, rank, world_size, timeout_seconds
        self.ended = threading.Event()
        self._beats = 0
        self._guard = _start_guard(timeout_seconds) if world_size > 1 else None

    def run(self) -> None:
        quiet, before, last = 0.0, None, None
        with contextlib.suppress(RuntimeError):  # a store that is gone is told of below
            self._beat(quiet, _look())
        while not self.ended.wait(BEAT_SECONDS):
            seen = _look()
            position = (_marks, *seen.position)
            # Counted in beats, not by the clock: a process that was stopped and continued has lost no time.
            quiet = quiet + BEAT_SECONDS if position == last and sys.gettrace() is None else 0.0
            last = position
            try:
                self._beat(quiet, seen)
                if self.store.check(["hung"]):
                    self._leave(json.loads(self.store.get("hung")))
                if quiet < self.timeout_seconds / 2:
                    before = None
                elif before is None:
                    before = self._signs()
                elif quiet >= self.timeout_seconds:
                    self._judge(before, self._signs(), quiet)
            except RuntimeError as error:
                if not self.ended.is_set():
                    self._say(f"lost: rank {self.rank} has lost the launcher's store, and with it all others ({error})")
                    os._exit(EXIT_CODE)

    def close_guard(self) -> None:
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
            self._guard.wait()

    def _beat(self, quiet: float, seen: _Seen) -> None:
        self._beats += 1
        if self._guard is not None and self._guard.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # somebody ended the guard: the job goes on without
                self._guard.stdin.write(b".")
        sign = {
            "beat": self._beats, "pid": os.getpid(), "node": os.environ.get("GROUP_RANK"), "quiet_seconds": quiet,
            "waits": seen.waits, "where": seen.where, "doing": _doing,
        }  # fmt: skip
        self.store.set(f"alive/{self.rank}", json.dumps(sign))

    def _signs(self) -> list[Sign | None]:
        """The last sign of each rank; None for one that never gave any."""
        keys = [f"alive/{rank}" for rank in range(self.world_size)]
        return [json.loads(self.store.get(key)) if self.store.check([key]) else None for key in keys]

    def _judge(self, before: list[Sign | None], now: list[Sign | None], quiet: float) -> None:
        culprits, message = verdict(before, now, self.timeout_seconds)
        # The launcher asks for this key too: whatever fails from now on is a consequence.
        first = self.store.add("said/crash", 1) == 1
        if first or quiet >= 2 * self.timeout_seconds:  # another crash was said, and yet nobody has ended this process
            self.store.set("said", "1")
            self._say(message)
            self.store.set("hung", json.dumps(culprits))
            for rank in culprits:
                self._end_silent(before[rank], now[rank])
            self._leave(culprits)

    def _end_silent(self, before: Sign | None, now: Sign | None) -> None:
        """A stopped process cannot end itself. One of this node, under the same torchrun, is ended from here."""
        if now is None or before is None or before["beat"] != now["beat"] or now["node"] is None:
            return
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(now["pid"])
            if now["node"] == os.environ.get("GROUP_RANK") and process.ppid() == os.getppid():
                process.send_signal(signal.SIGKILL)

    def _leave(self, culprits: list[int]) -> None:
        """Ends this process. The culprit goes first: torchrun calls what it sees ended first the root cause."""
        if self.rank in culprits:
            label = f"[rank {self.rank} of {self.world_size}] "
            stack = traceback.format_stack(_main_frames()[0])
            self._say("".join(f"{label}{line}\n" for line in "".join(stack).splitlines()).rstrip())
        else:
            time.sleep(2 * BEAT_SECONDS)
        sys.stdout.flush()
        os._exit(EXIT_CODE)

    def _say(self, text: str) -> None:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def explain(self, error: RuntimeError) -> None:
        """In the main thread, after a connection broke: returns where another rank has said why, or all live.

        Raises:
            RankLost: ranks that show no sign of life any more.
        """
        # torchrun, which has seen the same, now sends this signal; it must not cut short what is said here.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            before = self._signs()
            time.sleep(2.5 * BEAT_SECONDS)
            if self.store.check(["hung"]):
                time.sleep(10 * BEAT_SECONDS)  # the thread ends this process
            if self.store.check(["said"]):
                return
            gone = [rank for rank, sign in silent(before, self._signs()).items() if rank != self.rank]
        except RuntimeError:
            return  # the store is gone too; the thread says so
        if gone:
            raise RankLost(
                f"{_ranks(gone)} ended without a word (killed, out of memory, or its host is gone); "
                "the same command continues from the last checkpoint"
            ) from error


def _start_guard(timeout_seconds: float) -> subprocess.Popen[bytes]:
    limit = math.ceil(timeout_seconds) + GUARD_GRACE_SECONDS
    command = [sys.executable, "-I", "-S", "-c", _GUARD, str(limit)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0)


def silent(before: list[Sign | None], now: list[Sign | None]) -> dict[int, Sign | None]:
    """Ranks without a new sign of life between two readings, each with its last one."""
    pairs = enumerate(zip(before, now, strict=True))
    return {rank: new for rank, (old, new) in pairs if new is None or (old is not None and old["beat"] == new["beat"])}


def verdict(before: list[Sign | None], now: list[Sign | None], timeout_seconds: float) -> tuple[list[int], str]:
    """Who is to blame, in words too. `before` was read half of `timeout_seconds` before `now`."""
    limit = f"no progress for {timeout_seconds:g} s (parallel.timeout_seconds)"
    gone = silent(before, now)
    if gone:
        never = [rank for rank, sign in gone.items() if sign is None]
        stopped = {rank: sign for rank, sign in gone.items() if sign is not None}
        parts = [f"{_ranks(never)} never arrived"] if never else []
        if stopped:
            last = "; ".join(_standing(rank, sign) for rank, sign in list(stopped.items())[:LISTED_RANKS])
            parts.append(f"{_ranks(list(stopped))} gave no sign of life (stopped, killed or cut off); last: {last}")
        return list(gone), f"hung: {'; '.join(parts)}; {limit}"
    signs = {rank: sign for rank, sign in enumerate(now) if sign is not None}
    busy = {rank: sign for rank, sign in signs.items() if not sign["waits"]}
    if busy and len(busy) < len(signs):
        standing = "; ".join(_standing(rank, sign) for rank, sign in list(busy.items())[:LISTED_RANKS])
        return list(busy), f"hung: {standing}, while the others wait for it; {limit}"
    standing = "; ".join(_standing(rank, sign) for rank, sign in list(signs.items())[:LISTED_RANKS])
    reason = "all ranks wait for one another: " if len(signs) > 1 and not busy else ""
    return list(signs), f"hung: {reason}{standing}; {limit}"


def _standing(rank: int, sign: dict[str, Any]) -> str:
    return f"rank {rank} stands in {sign['where']} ({sign['doing']})"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:LISTED_RANKS]))}"


class _Seen(NamedTuple):
    """Where the main thread stood. No frame of it: one that is kept outlives its function, and with it all that the
    function's names mean, which in training are activations, logits and gradients."""

    position: tuple[tuple[CodeType, int], ...]
    waits: bool
    where: str


def _look() -> _Seen:
    frames = _main_frames()
    position = tuple((frame.f_code, frame.f_lasti) for frame in frames)
    return _Seen(position, _waits(frames), _where(frames))


def _main_frames() -> list[FrameType]:
    """The main thread's frames, innermost first. Not to be kept."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _waits(frames: list[FrameType]) -> bool:
    """Whether the main thread waits for other ranks: in a collective, or for one that Megatron started before."""
    file = frames[0].f_code.co_filename
    if file.endswith("/torch/distributed/distributed_c10d.py"):
        return True
    return "/megatron/core/" in file and ".wait(" in linecache.getline(file, frames[0].f_lineno)


def _where(frames: list[FrameType]) -> str:
    """File, line and function of the innermost frame that is no library's, and the library's function under it."""
    frame = next((f for f in frames if _is_ours(f.f_code.co_filename)), frames[0])
    path = "/".join(Path(frame.f_code.co_filename).parts[-2:])
    inner = f", in {frames[0].f_code.co_name}" if frame is not frames[0] else ""
    return f"{path}:{frame.f_lineno} {frame.f_code.co_name}{inner}"


def _is_ours(file: str) -> bool:
    return "/megatron_edge/" in file or not ("/site-packages/" in file or "/lib/python" in file)
