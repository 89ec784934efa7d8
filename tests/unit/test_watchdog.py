"""Who is to blame, from the ranks' signs of life."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from megatron_edge.runtime.watchdog import silent, verdict

LIMIT = "; no progress for 60 s (parallel.timeout_seconds)"


def sign(beat: int, waits: bool, where: str = "train/step.py:140 train_step, in all_reduce") -> dict[str, Any]:
    return {
        "beat": beat,
        "pid": 1,
        "node": "0",
        "quiet_seconds": 60.0,
        "waits": waits,
        "where": where,
        "doing": "step 7",
    }


def test_ranks_that_give_no_new_sign_are_silent() -> None:
    before = [sign(10, True), sign(10, False), None]
    assert list(silent(before, [sign(40, True), sign(10, False), None])) == [1, 2]
    assert list(silent(before, [sign(40, True), sign(41, False), sign(1, False)])) == []


def test_a_stopped_rank_is_to_blame_before_all_others() -> None:
    culprits, text = verdict([sign(1, True), sign(1, True)], [sign(31, True), sign(1, True)], 60)
    assert culprits == [1]
    assert text == (
        "hung: rank 1 gave no sign of life (stopped, killed or cut off); last: rank 1 stands in "
        "train/step.py:140 train_step, in all_reduce (step 7)" + LIMIT
    )


def test_a_rank_that_never_arrived_is_named() -> None:
    culprits, text = verdict([sign(1, True), None], [sign(31, True), None], 60)
    assert culprits == [1] and text == "hung: rank 1 never arrived" + LIMIT


def test_the_one_that_others_wait_for_is_named_with_its_place() -> None:
    before = [sign(1, True), sign(1, False), sign(1, True)]
    now = [sign(31, True), sign(31, False, "train/data.py:99 samples"), sign(31, True)]
    culprits, text = verdict(before, now, 60)
    assert culprits == [1]
    assert text == "hung: rank 1 stands in train/data.py:99 samples (step 7), while the others wait for it" + LIMIT


def test_where_all_wait_for_one_another_all_are_named() -> None:
    culprits, text = verdict([sign(1, True)] * 2, [sign(31, True)] * 2, 60)
    assert culprits == [0, 1] and text.startswith("hung: all ranks wait for one another: rank 0 stands in ")


BEATING = """
import sys, time
from megatron_edge.runtime import watchdog
watchdog.GUARD_GRACE_SECONDS = 0
watch = watchdog._Watch(dist.HashStore(), 0, 2, float(sys.argv[1]))
print(watch._guard.pid, flush=True)
for _ in range(int(sys.argv[2])):
    watch._beat(0.0, watchdog._look())
    time.sleep(0.2)
watch.close_guard()
"""


def beating(seconds: float, beats: int) -> tuple[subprocess.Popen[str], int]:
    """A process that gives signs of life, and its guard's pid."""
    command = [sys.executable, "-c", "import torch.distributed as dist\n" + BEATING, str(seconds), str(beats)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_a_stopped_process_is_ended_by_its_guard() -> None:
    process, guard = beating(2, 1000)
    process.send_signal(signal.SIGSTOP)
    assert process.wait(timeout=30) == -signal.SIGKILL
    gone(guard)


def test_the_guard_leaves_a_process_alone_and_goes_with_it() -> None:
    process, guard = beating(1, 20)  # four times as long as it may be silent
    assert process.wait(timeout=60) == 0
    gone(guard)
    process, guard = beating(60, 1000)
    process.kill()
    process.wait(timeout=30)
    gone(guard)


def gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_watch_keeps_nothing_alive_that_a_function_has_let_go() -> None:
    """A frame that is kept keeps activations and logits: memory of one step then lies beside that of the next."""
    from megatron_edge.runtime import watchdog

    class Activation: ...

    def seen_by_a_beat(store: dist.Store) -> weakref.ref[Activation]:
        held, before = Activation(), store.get("alive/0")
        while store.get("alive/0") == before:
            time.sleep(0.01)
        return weakref.ref(held)

    store = dist.HashStore()
    with watchdog.watching(store, 0, 1, timeout_seconds=60):
        while not store.check(["alive/0"]):
            time.sleep(0.01)
        assert [seen_by_a_beat(store)() for _ in range(2)] == [None, None]
