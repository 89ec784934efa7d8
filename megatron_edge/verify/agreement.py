"""Two implementations of one model on the same windows: their losses, compared in pairs, and their likeliest tokens.

In: what each says of every token; out: checks, and the figures for the runtime's row. Called by the files that let a
runtime answer: llama_cpp.py, onnxruntime.py, runtimes.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_edge.contracts import Check
from megatron_edge.verify.behaviour import FLOOR_FACTOR, Run, loss_noise
from megatron_edge.verify.quality import Scores, Windows
from megatron_edge.verify.statistics import mean_over_tokens

# What another implementation of the same recipe may differ by: of perplexity, and of the likeliest tokens where weights
# alone are quantised. A recipe that rounds while it runs differs from itself by more, which is then measured (`noise`).
PERPLEXITY_PART, CHOICE_PART = 0.005, 0.01


@dataclass(frozen=True)
class Answers:
    """nll: [n, s], nats of the next token, 0 where nothing counts; choices: int64 [n, s], its likeliest."""

    nll: torch.Tensor
    choices: torch.Tensor

    @classmethod
    def of(cls, scores: Scores) -> Answers:
        return cls(scores.nll, scores.top)


def answers_of(run: Run) -> tuple[Answers, list[Answers]]:
    """What the artifact's own model says, and what it says of the first windows in other orders of sums."""
    return Answers.of(run.scores), [Answers.of(scores) for scores in run.noise]


def paired_difference(windows: Windows, ours: Answers, theirs: Answers) -> tuple[float, float]:
    """Mean of their nll less ours over the tokens that count, in nats, and its standard error over windows: tokens of
    one window are not independent of each other. NaN where there is but one window."""
    mask = windows.loss_mask
    sums, tokens = ((theirs.nll.double() - ours.nll.double()) * mask).sum(1), mask.sum(1)
    if int((tokens > 0).sum()) < 2:
        return float(sums.sum() / tokens.sum()), math.nan
    mean, error, _ = mean_over_tokens(sums.tolist(), tokens.tolist())
    return mean, error


def agreement_of(windows: Windows, ours: Answers, theirs: Answers) -> float:
    """Part of the counted tokens at which both hold the same next one for the likeliest."""
    return float((ours.choices == theirs.choices)[windows.loss_mask].double().mean())


def compare(
    label: str,
    windows: Windows,
    ours: Answers,
    theirs: Answers,
    noise: Sequence[Answers] = (),
    against: str = "artifact",
) -> list[Check]:
    """Checks that `theirs` is `ours` within `PERPLEXITY_PART` and `CHOICE_PART`; `noise` is `ours` in other orders of
    sums, of the first windows."""
    parts = (label, windows, ours, theirs, noise, against)
    return [_compare_losses(*parts), _compare_choices(*parts)]


def _compare_losses(
    label: str, windows: Windows, ours: Answers, theirs: Answers, noise: Sequence[Answers], against: str
) -> Check:
    mask, counted = windows.loss_mask, windows.counted_tokens
    mean, error = paired_difference(windows, ours, theirs)
    loss = float((ours.nll * mask).double().sum()) / counted
    own = max((loss_noise(windows, ours.nll, other.nll) for other in noise), default=0.0)
    # On a short text half a percent is less than noise, of which the reference has its own.
    widest = max(own, error) if math.isfinite(error) else own
    limit = max(PERPLEXITY_PART, math.expm1(FLOOR_FACTOR * widest))
    moved = math.expm1(mean) if math.isfinite(mean) else math.inf
    largest = float(((theirs.nll - ours.nll) * mask).abs().max())
    detail = (
        f"{against} {loss:.6f}, {mean:+.3g} nats/token in the runtime (paired standard error {error:.2g}), perplexity "
        f"{moved:+.4%} over {counted} tokens in the same windows; largest difference of a token {largest:.2g}"
        + (f"; other orders of sums move the {against} by {own:.1e}" if noise else "")
    )
    metric = "perplexity, relative difference" + _against(against)
    return Check(label, metric, abs(moved), limit, abs(moved) <= limit, detail)


def _compare_choices(
    label: str, windows: Windows, ours: Answers, theirs: Answers, noise: Sequence[Answers], against: str
) -> Check:
    few = windows.first(len(noise[0].choices)) if noise else windows
    plain = Answers(ours.nll[: len(few)], ours.choices[: len(few)])
    floor = min((agreement_of(few, plain, other) for other in noise), default=1.0)
    limit, share = min(1 - CHOICE_PART, 1 - FLOOR_FACTOR * (1 - floor)), agreement_of(windows, ours, theirs)
    counted = windows.counted_tokens
    detail = f"{round(share * counted)} of {counted} agree ({share:.3%})"
    if noise:
        detail += f"; the {against} agrees with itself in other orders of sums at {floor:.3%} of {few.counted_tokens}"
    return Check(label, "likeliest tokens that agree" + _against(against), share, limit, share >= limit, detail)


def _against(against: str) -> str:
    return "" if against == "artifact" else f", against the {against}"


def figures(windows: Windows, ours: Answers, theirs: Answers) -> dict[str, Any]:
    """For the runtime's row in verify.json."""
    mean, error = paired_difference(windows, ours, theirs)
    return {
        "compared_tokens": windows.counted_tokens,
        "perplexity_ratio": math.exp(mean) if math.isfinite(mean) else None,
        "paired_error_nats": error if math.isfinite(error) else None,
        "likeliest_agree": agreement_of(windows, ours, theirs),
    }
