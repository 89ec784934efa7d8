"""Who is to blame, from the ranks' signs of life."""

from __future__ import annotations

from typing import Any

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
