"""Does the artifact answer as the trained fake-quantised model did? Like with like: same text, same formats, same data type.

In: a loaded artifact and what the trained model said (nll, logits); out: checks of logits and loss, whose limits come from a
noise floor measured here: the artifact against itself with its roundings in another order. Called by report.py.
"""

from __future__ import annotations

import math

import torch

from megatron_edge.artifact.store import ArtifactReader
from megatron_edge.contracts import Check
from megatron_edge.verify.parity import Reference
from megatron_edge.verify.quality import Scores, Windows, reordered, score

FLOOR_FACTOR = 3.0
NOISE_WINDOWS = 8
# Quantised activations turn a difference in the last digit into another code, which cascades: over this many tokens the mean
# loss of two right implementations stays within this part of itself (SmolLM2, NVFP4: 0.65% over 2,560 tokens).
CASCADE_TOKENS = 8192
CASCADE_RISE = 0.01


def run_artifact(model: torch.nn.Module, reference: Reference) -> tuple[Scores, Scores]:
    """Scores over all reference windows, and over the first of them with the roundings in another order."""
    kept = reference.logits.shape[0]
    scores = score(model, reference.windows, kept)
    few = reference.windows.first(max(kept, NOISE_WINDOWS))
    with reordered(model):
        return scores, score(model, few, kept)


def check_behaviour(reader: ArtifactReader, reference: Reference, scores: Scores, noise: Scores) -> list[Check]:
    return [*check_logits(reference.logits, scores.logits, noise.logits), check_loss(reader, reference, scores, noise)]


def check_logits(trained: torch.Tensor, artifact: torch.Tensor, noise: torch.Tensor, name: str = "") -> list[Check]:
    """Largest and root-mean-square difference of logits [m, s, vocabulary], each against the same of the noise."""
    checks = []
    for metric, size in (("largest", _largest), ("rms", _rms)):
        floor, value = size(noise - artifact), size(trained - artifact)
        checks.append(
            Check(
                name or "logits",
                f"{metric} difference from the trained model" if not name else f"{metric} logit difference",
                value,
                FLOOR_FACTOR * floor,
                value <= FLOOR_FACTOR * floor,
                f"noise floor {floor:.3g} (the artifact with its roundings in another order), logits' rms {_rms(artifact):.3g}",
            )
        )
    return checks


def check_loss(reader: ArtifactReader, reference: Reference, scores: Scores, noise: Scores) -> Check:
    """Mean nll of the artifact against the trained model's, over all windows."""
    trained = float((reference.nll * reference.windows.loss_mask).double().sum()) / max(scores.counted_tokens, 1)
    value = abs(scores.nats_per_token - trained)
    floor = loss_noise(reference.windows, scores.nll, noise.nll)
    limit, reason = FLOOR_FACTOR * floor, ""
    cascades = any(linear.activation != "none" for linear in reader.manifest.linears.values())
    if cascades and scores.counted_tokens >= CASCADE_TOKENS and CASCADE_RISE * trained > limit:
        limit, reason = CASCADE_RISE * trained, f"; activations are quantised: {CASCADE_RISE:.0%} of the loss"
    detail = f"artifact {scores.nats_per_token:.6f}, trained {trained:.6f} nats/token over {scores.counted_tokens} tokens, "
    return Check(
        "loss",
        "difference from the trained model, nats/token",
        value,
        limit,
        value <= limit,
        f"{detail}noise floor {floor:.3g}{reason}",
    )


def loss_noise(windows: Windows, plain: torch.Tensor, noise: torch.Tensor) -> float:
    """What the mean loss over all windows moves by when roundings change order; nll tensors [n, s], noise for the first.

    The windows' own differences are draws of that noise; a mean over n windows has their rms over sqrt(n). The mean
    difference itself counts too, for noise that all windows share.
    """
    few = noise.shape[0]
    counted = windows.loss_mask[:few].sum(1)
    per_window = ((noise - plain[:few]).double().sum(1) / counted)[counted > 0]
    spread = float(per_window.square().mean().sqrt()) / math.sqrt(len(windows))
    return max(spread, abs(float(per_window.mean())) * math.sqrt(few / len(windows)))


def _largest(difference: torch.Tensor) -> float:
    return float(difference.abs().max())


def _rms(difference: torch.Tensor) -> float:
    return float(difference.double().square().mean().sqrt())
