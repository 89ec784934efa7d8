"""How sure a measured accuracy or loss is, and whether two models differ: standard errors, intervals, paired tests.

In: what each question or each window of text gave, for one model or for two models on the same ones. Out: numbers and
plain words. Pure; called by the evaluate job and by tools/accuracy_study.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95  # of every interval


@dataclass(frozen=True)
class Share:
    """A share of right answers: `error` is its standard error, `low` to `high` Clopper and Pearson's exact interval."""

    value: float
    error: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Difference:
    """Ours less the baseline's on the same questions or windows. `p` is two-sided, under "there is no difference"."""

    value: float
    low: float
    high: float
    p: float
    test: str

    @property
    def is_noise(self) -> bool:
        """The interval holds 0: this many questions or windows cannot tell the two apart."""
        return self.low <= 0.0 <= self.high


def share_of(right: Sequence[bool]) -> Share:
    """Of at least two answers. The standard error is the sample's, sqrt(p (1 - p) / (n - 1)), as lm-evaluation-harness
    prints it."""
    count, num_right = len(right), sum(map(bool, right))
    value = num_right / count
    low, high = exact_interval(num_right, count)
    return Share(value, math.sqrt(value * (1 - value) / (count - 1)), low, high, count)


def exact_interval(successes: int, count: int) -> tuple[float, float]:
    """Clopper and Pearson (1934): the probabilities under which neither tail of the binomial is under (1 - LEVEL)/2."""
    tail = (1 - LEVEL) / 2
    low = float(stats.beta.ppf(tail, successes, count - successes + 1)) if successes else 0.0
    high = float(stats.beta.ppf(1 - tail, successes + 1, count - successes)) if successes < count else 1.0
    return low, high


def paired_shares(ours: Sequence[bool], theirs: Sequence[bool]) -> Difference:
    """McNemar's exact test: of the questions that only one model has right, half would be ours by chance.

    The interval is that of the same binomial, so that it holds 0 exactly where p is at least 1 - LEVEL; where no answer
    differs it is what so many questions leave open.
    """
    only_ours = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    only_theirs = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    differing, count = only_ours + only_theirs, len(ours)
    test = f"McNemar, exact: {only_ours} right in ours alone, {only_theirs} in the baseline alone"
    if not differing:
        most = exact_interval(0, count)[1]
        return Difference(0.0, -most, most, 1.0, test)
    low, high = (differing / count * (2 * bound - 1) for bound in exact_interval(only_ours, differing))
    p = min(1.0, 2 * float(stats.binom.cdf(min(only_ours, only_theirs), differing, 0.5)))
    return Difference((only_ours - only_theirs) / count, low, high, p, test)


def mean_over_tokens(sums: Sequence[float], tokens: Sequence[float]) -> tuple[float, float, int]:
    """(mean, its standard error, windows) from the sum over each window's tokens; at least two windows have any.

    The mean is a ratio of two sums that vary from window to window; its error is linearised (Cochran 1977, 6.4).
    """
    weight = np.asarray(tokens, dtype=np.float64)
    used = weight > 0
    weight, values = weight[used], np.asarray(sums, dtype=np.float64)[used]
    count, mean = len(weight), float(values.sum() / weight.sum())
    residual = values - mean * weight
    error = math.sqrt(count / (count - 1) * float(np.square(residual).sum())) / float(weight.sum())
    return mean, error, count


def paired_means(ours: Sequence[float], theirs: Sequence[float], tokens: Sequence[float]) -> Difference:
    """Difference of two means over the tokens of the same windows: a paired t-test over windows.

    Args:
        ours, theirs: sum over each window's tokens, in nats.
        tokens: how many of them each window has.
    """
    apart = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    value, error, count = mean_over_tokens(apart.tolist(), tokens)
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    p = 2 * float(stats.t.sf(abs(value) / error, count - 1)) if error else float(value == 0)
    return Difference(value, value - half, value + half, p, f"paired t-test over {count} windows")


def is_at_chance(share: Share, chance: float) -> bool:
    """Not above what guessing gives: a difference to such a baseline says nothing about what quantisation cost."""
    return share.low <= chance
