"""Two implementations of one model on the same windows: their losses, compared in pairs, and their first choices.

In: what each says of every token; out: checks. Called by the files that let a runtime answer, such as onnxruntime.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_edge.contracts import Check
from megatron_edge.verify.quality import Windows, forward, token_nll, windows_per_forward
from megatron_edge.verify.statistics import mean_over_tokens

# What another implementation of the same recipe may differ by: of perplexity, and of the tokens' first choices where
# weights alone are quantised.
PERPLEXITY_PART, CHOICE_PART = 0.005, 0.01


@dataclass(frozen=True)
class Answers:
    """nll: fp32 [n, s], nats of the next token, 0 where nothing counts; choices: int64 [n, s], its likeliest token."""

    nll: torch.Tensor
    choices: torch.Tensor


@torch.no_grad()
def answers(model: torch.nn.Module, windows: Windows) -> Answers:
    """What a transformers model says, without keeping its logits."""
    nll, choices = [], []
    per_forward = windows_per_forward(model, windows)
    for begin in range(0, len(windows), per_forward):
        part = windows.slice(begin, begin + per_forward)
        logits = forward(model, part).float().cpu()
        nll.append(token_nll(logits, part.tokens) * part.loss_mask)
        choices.append(logits.argmax(-1))
    return Answers(torch.cat(nll), torch.cat(choices))


def paired_difference(windows: Windows, ours: Answers, theirs: Answers) -> tuple[float, float]:
    """Mean of their nll less ours over the tokens that count, in nats, and its standard error over windows: tokens of
    one window are not independent of each other. NaN where there is but one window."""
    mask = windows.loss_mask
    sums, tokens = ((theirs.nll - ours.nll).double() * mask).sum(1), mask.sum(1)
    if int((tokens > 0).sum()) < 2:
        return float(sums.sum() / tokens.sum()), math.nan
    mean, error, _ = mean_over_tokens(sums.tolist(), tokens.tolist())
    return mean, error


def compare(label: str, windows: Windows, ours: Answers, theirs: Answers) -> list[Check]:
    """Checks that `theirs` is `ours` within `PERPLEXITY_PART` and `CHOICE_PART`."""
    mask, counted = windows.loss_mask, windows.counted_tokens
    mean, error = paired_difference(windows, ours, theirs)
    loss = float((ours.nll * mask).double().sum()) / counted
    largest = float(((theirs.nll - ours.nll) * mask).abs().max())
    detail = (
        f"artifact {loss:.6f}, {mean:+.3g} nats/token in the runtime (paired standard error {error:.2g}) over "
        f"{counted} tokens in the same windows; largest difference of a token {largest:.2g}"
    )
    moved = abs(math.expm1(mean)) if math.isfinite(mean) else math.inf
    differing = int(((ours.choices != theirs.choices) & mask).sum())
    share = differing / counted
    return [
        Check(label, "perplexity, relative difference", moved, PERPLEXITY_PART, moved <= PERPLEXITY_PART, detail),
        Check(
            label,
            "first choices that differ",
            share,
            CHOICE_PART,
            share <= CHOICE_PART,
            f"{counted - differing} of {counted} agree ({1 - share:.3%})",
        ),
    ]
