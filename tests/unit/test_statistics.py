"""Errors, intervals and paired tests against scipy's own tests, plain sums and simulation."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from scipy import stats

from megatron_edge.verify.statistics import (
    LEVEL,
    exact_interval,
    is_at_chance,
    mean_over_tokens,
    paired_means,
    paired_shares,
    share_of,
)


def test_share_against_scipy() -> None:
    right = [True] * 37 + [False] * 63
    share = share_of(right)
    assert share.value == 0.37 and share.count == 100
    assert share.error == pytest.approx(stats.sem(right))
    interval = stats.binomtest(37, 100).proportion_ci(LEVEL, method="exact")
    assert (share.low, share.high) == pytest.approx((interval.low, interval.high))
    assert exact_interval(0, 10)[0] == 0.0 and exact_interval(10, 10)[1] == 1.0
    assert share_of([True, True, True]).error == 0.0


@pytest.mark.parametrize("only_ours, only_theirs", [(1, 9), (9, 1), (0, 5), (0, 6), (12, 12), (30, 50), (3, 0)])
def test_mcnemar_against_scipy(only_ours: int, only_theirs: int) -> None:
    """p is the exact binomial test's, and the interval leaves out 0 exactly where p is under 5%."""
    ours = [True] * only_ours + [False] * only_theirs + [True, False] * 20
    theirs = [False] * only_ours + [True] * only_theirs + [True, False] * 20
    found = paired_shares(ours, theirs)
    assert found.p == pytest.approx(stats.binomtest(only_ours, only_ours + only_theirs).pvalue)
    assert found.value == pytest.approx((sum(ours) - sum(theirs)) / len(ours))
    assert found.low <= found.value <= found.high
    assert found.is_noise == (found.p > 1 - LEVEL)


def test_answers_that_do_not_differ_leave_open_what_so_few_can_tell() -> None:
    few, many = (paired_shares([True, False] * n, [True, False] * n) for n in (5, 500))
    assert few.value == 0 and few.p == 1 and few.is_noise and many.is_noise
    assert few.high == -few.low == pytest.approx(1 - 0.025 ** (1 / 10))
    assert many.high < 0.005


def test_paired_means_of_equal_windows_are_the_t_test() -> None:
    rng = np.random.default_rng(1)
    theirs = rng.normal(300, 40, 50)
    ours = theirs + rng.normal(1.5, 3, 50)
    found, scipys = paired_means(ours, theirs, [100] * 50), stats.ttest_rel(ours, theirs)
    assert found.p == pytest.approx(scipys.pvalue)
    interval = scipys.confidence_interval(LEVEL)
    assert (found.low, found.high) == pytest.approx((interval.low / 100, interval.high / 100))
    assert found.value == pytest.approx((ours.sum() - theirs.sum()) / 5000)


def test_windows_of_different_sizes_against_the_bootstrap() -> None:
    """The standard error of a ratio of sums; windows without tokens are none."""
    rng = np.random.default_rng(2)
    tokens = rng.integers(5, 128, 400)
    sums = rng.normal(3, 0.5, 400) * tokens
    mean, error, count = mean_over_tokens([*sums, 0.0], [*tokens, 0])
    assert mean == pytest.approx(sums.sum() / tokens.sum()) and count == 400
    drawn = rng.integers(0, 400, (4000, 400))
    bootstrap = (sums[drawn].sum(1) / tokens[drawn].sum(1)).std()
    assert error == pytest.approx(bootstrap, rel=0.06)  # 4,000 draws know a deviation to 1.1% (1 / sqrt(2 n))


def test_the_same_losses_do_not_differ() -> None:
    found = paired_means([3.0, 4.0], [3.0, 4.0], [2, 2])
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1) and found.is_noise


def test_intervals_hold_as_often_as_they_say() -> None:
    """Of 300 pairs of models that are equally good, at most about 5% may be told apart: exact tests are cautious."""
    rng = random.Random(3)
    told = 0
    for _ in range(300):
        pairs = [(rng.random() < 0.6, rng.random() < 0.6) for _ in range(200)]
        told += not paired_shares(*zip(*pairs, strict=True)).is_noise
    assert told <= 300 * 0.05 + 3 * math.sqrt(300 * 0.05 * 0.95)


def test_at_chance_is_not_above_what_guessing_gives() -> None:
    assert is_at_chance(share_of([True] * 55 + [False] * 45), 0.5)
    assert is_at_chance(share_of([True] * 30 + [False] * 70), 0.5), "below it is no better"
    assert not is_at_chance(share_of([True] * 70 + [False] * 30), 0.5)
