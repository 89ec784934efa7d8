"""Does the artifact answer as the trained fake-quantised model did? Like with like: same text, formats and data type.

In: a loaded artifact and what the trained model said (nll, logits); out: checks of logits and loss. Every limit is 3
times a noise floor measured here: the artifact against itself with its roundings in other orders. Called by report.py
and runtimes.py.

Where activations or the KV cache are rounded while the model runs, a difference in the last digit can become another
code, which cascades through all later tokens: a rare event in a small fp32 model, everywhere in a large one. Logits
are then compared at the tokens that such flips touch least (the tenth percentile), the loss within 1% once it is a
mean over many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_edge.artifact.store import ArtifactReader
from megatron_edge.contracts import Check
from megatron_edge.verify.parity import Reference
from megatron_edge.verify.quality import Scores, Windows, reordered, score

FLOOR_FACTOR = 3.0
NOISE_WINDOWS = 8
# Reorderings tried: as many as this many tokens allow, so that a small model shows its rare flips.
NOISE_TOKENS, NOISE_RUNS = 2048, 4
# SmolLM2 in NVFP4: another summation order alone moved the mean loss by 0.65% over 2,560 tokens.
CASCADE_TOKENS, CASCADE_PART = 8192, 0.01
LEAST_TOUCHED = 0.1


@dataclass(frozen=True)
class Run:
    """The artifact's scores over all windows, and over the first few in each other order of roundings, if it was asked
    for them."""

    scores: Scores
    noise: list[Scores]


def rounds_while_running(reader: ArtifactReader) -> bool:
    linears = reader.manifest.linears.values()
    return reader.manifest.kv.get("format", "none") != "none" or any(x.activation != "none" for x in linears)


def run_artifact(model: torch.nn.Module, windows: Windows, keep_logits: int, with_noise: bool = True) -> Run:
    if not with_noise:
        return Run(score(model, windows, keep_logits), [])
    few = windows.first(max(keep_logits, NOISE_WINDOWS))
    runs = min(NOISE_RUNS, max(1, NOISE_TOKENS // few.tokens.numel()))
    scores, noise = score(model, windows, keep_logits), []
    for run in range(runs):
        with reordered(model, cut=(run + 1) / (runs + 1)):
            noise.append(score(model, few, keep_logits))
    return Run(scores, noise)


def check_behaviour(reader: ArtifactReader, reference: Reference, run: Run) -> list[Check]:
    flips = rounds_while_running(reader)
    return [
        *check_logits("logits", reference.logits, run, flips),
        check_loss(reference.windows, reference.nll, run, flips),
    ]


def check_logits(name: str, other: torch.Tensor, run: Run, flips: bool) -> list[Check]:
    """Another implementation's logits [m, s, vocabulary] of the first m windows against the artifact's."""
    metrics = {"rms at the least touched tokens": _least_touched} if flips else {"largest": _largest, "rms": _rms}
    ours, checks = run.scores.logits, []
    for metric, size in metrics.items():
        floor, value = max(size(noise.logits - ours) for noise in run.noise), size(other - ours)
        detail = (
            f"noise floor {floor:.3g} (largest of {len(run.noise)} reorderings); over all tokens rms "
            f"{_rms(other - ours):.3g}, noise {max(_rms(noise.logits - ours) for noise in run.noise):.3g}, "
            f"logits {_rms(ours):.3g}"
        )
        limit = FLOOR_FACTOR * floor
        checks.append(Check(name, f"difference, {metric}", value, limit, value <= limit, detail))
    return checks


def check_loss(windows: Windows, nll: torch.Tensor, run: Run, flips: bool) -> Check:
    """Mean nll of the artifact against the trained model's nll [n, s], over all windows."""
    scores = run.scores
    trained = float((nll * windows.loss_mask).double().sum()) / scores.counted_tokens
    value = abs(scores.nats_per_token - trained)
    floor = max(loss_noise(windows, scores.nll, noise.nll) for noise in run.noise)
    limit, reason = FLOOR_FACTOR * floor, ""
    if flips and scores.counted_tokens >= CASCADE_TOKENS and CASCADE_PART * trained > limit:
        limit, reason = CASCADE_PART * trained, f"; roundings cascade: {CASCADE_PART:.0%} of the loss"
    detail = (
        f"artifact {scores.nats_per_token:.6f}, trained {trained:.6f} nats/token over {scores.counted_tokens} tokens, "
        f"noise floor {floor:.3g} (largest of {len(run.noise)} reorderings){reason}"
    )
    return Check("loss", "difference, nats/token", value, limit, value <= limit, detail)


def loss_noise(windows: Windows, plain: torch.Tensor, noise: torch.Tensor) -> float:
    """What the mean loss over all windows moves by when roundings change order. nll [n, s]; noise for the first.

    The windows' own differences are draws of that noise; a mean over n windows has their rms over sqrt(n).
    """
    few = noise.shape[0]
    counted = windows.loss_mask[:few].sum(1)
    per_window = ((noise - plain[:few]).double().sum(1) / counted)[counted > 0]
    number = int((windows.loss_mask.sum(1) > 0).sum())
    return max(float(per_window.square().mean().sqrt()) / math.sqrt(number), abs(float(per_window.mean())))


def _largest(difference: torch.Tensor) -> float:
    return float(difference.abs().max())


def _rms(difference: torch.Tensor) -> float:
    return float(difference.double().square().mean().sqrt())


def _least_touched(difference: torch.Tensor) -> float:
    """Tenth percentile over tokens of a token's rms difference over the vocabulary."""
    return float(difference.double().square().mean(-1).sqrt().flatten().quantile(LEAST_TOUCHED))
