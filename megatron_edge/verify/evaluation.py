"""What an evaluation found: of one model, and against a baseline on the same text and questions, in plain words.

In: losses of windows of text, answers to tasks. Out: a `Report`, as a table and as evaluation.json. Called by
jobs/evaluation.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_edge.verify.choices import Answers
from megatron_edge.verify.quality import Windows
from megatron_edge.verify.statistics import (
    Difference,
    Share,
    is_at_chance,
    mean_over_tokens,
    paired_means,
    paired_shares,
    share_of,
)
from megatron_edge.verify.tasks import Task

if TYPE_CHECKING:
    from rich.table import Table

PER_CHARACTER = "per character"


@dataclass(frozen=True)
class Findings:
    """What one model gave. nll: fp32 [n, s] nats of the windows of held-out text; answers by task."""

    nll: torch.Tensor
    answers: dict[str, Answers]


@dataclass(frozen=True)
class TextResult:
    """Loss in nats per token, with its standard error over windows; rise is against the baseline."""

    nats_per_token: float
    error: float
    perplexity: float
    tokens: int
    windows: int
    baseline_nats_per_token: float | None = None
    difference: Difference | None = None
    verdict: str = ""


@dataclass(frozen=True)
class TaskResult:
    """Accuracy of a task by one way of choosing: the likeliest choice as a whole, or per character."""

    task: str
    by: str
    questions: int
    of: int
    chance: float
    accuracy: Share
    baseline: Share | None = None
    difference: Difference | None = None
    verdict: str = ""


@dataclass(frozen=True)
class Report:
    model: str
    baseline: str | None
    text: TextResult
    tasks: tuple[TaskResult, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)


def text_result(windows: Windows, nll: torch.Tensor, baseline: torch.Tensor | None) -> TextResult:
    tokens = windows.loss_mask.sum(1).tolist()

    def sums(losses: torch.Tensor) -> list[float]:
        return (losses.double() * windows.loss_mask).sum(1).tolist()

    if sum(count > 0 for count in tokens) < 2:  # no spread to speak of
        loss = sum(sums(nll)) / sum(tokens)
        return TextResult(loss, math.nan, math.exp(loss), sum(tokens), 1)
    loss, error, count = mean_over_tokens(sums(nll), tokens)
    found = TextResult(loss, error, math.exp(loss), sum(tokens), count)
    if baseline is None:
        return found
    apart = paired_means(sums(nll), sums(baseline), tokens)
    theirs = mean_over_tokens(sums(baseline), tokens)[0]
    interval = f"{apart.value:+.4f} nats/token, 95% interval {apart.low:+.4f} to {apart.high:+.4f}"
    if apart.is_noise:
        verdict = f"noise: {interval} ({count} windows)"
    else:
        verdict = f"{'worse' if apart.value > 0 else 'better'}: {interval}; {apart.value / theirs:+.2%}"
    return dataclasses.replace(found, baseline_nats_per_token=theirs, difference=apart, verdict=verdict)


def task_results(task: Task, ours: Answers, theirs: Answers | None) -> list[TaskResult]:
    """One result; a second, by the likelihood per character, where choices differ from question to question."""
    ways = {"whole": (ours.right, theirs.right if theirs else None)}
    if not task.same_choices:
        ways[PER_CHARACTER] = (ours.right_per_character, theirs.right_per_character if theirs else None)
    found = []
    for by, (right, baseline) in ways.items():
        result = TaskResult(task.name, by, len(right), task.total, task.chance, share_of(right))
        if baseline is not None:
            share, apart = share_of(baseline), paired_shares(right, baseline)
            verdict = _verdict(share, apart, task.chance, len(right))
            result = dataclasses.replace(result, baseline=share, difference=apart, verdict=verdict)
        found.append(result)
    return found


def _verdict(baseline: Share, apart: Difference, chance: float, questions: int) -> str:
    word = "noise" if apart.is_noise else "better" if apart.value > 0 else "worse"
    interval = f"95% interval {apart.low:+.1%} to {apart.high:+.1%}, p {apart.p:.2g}"
    said = f"{word}: {apart.value:+.1%}, {interval} ({questions} questions)"
    if not is_at_chance(baseline, chance):
        return said
    reach = f"{baseline.low:.1%} to {baseline.high:.1%}, chance {chance:.1%}"
    return f"baseline is at chance ({reach}), so that this task says nothing; {said}"


def table(report: Report) -> Table:
    from rich.table import Table

    title = f"{report.model}" + (f" against {report.baseline}" if report.baseline else "")
    shown = Table("", "of", "model", *(["baseline"] if report.baseline else []), title=title, title_justify="left")
    text = report.text
    row = ["held-out text, nats/token", f"{text.tokens:,} tokens", f"{text.nats_per_token:.4f} ± {text.error:.4f}"]
    if report.baseline:
        row.append("" if text.baseline_nats_per_token is None else f"{text.baseline_nats_per_token:.4f}")
    shown.add_row(_with_verdict(row[0], text.verdict), *row[1:])
    for task in report.tasks:
        name = task.task + (f", {task.by}" if task.by == PER_CHARACTER else "")
        cells = [f"{task.questions:,} of {task.of:,}", _percent(task.accuracy)]
        cells += [_percent(task.baseline)] if task.baseline else []
        shown.add_row(_with_verdict(f"{name} (chance {task.chance:.1%})", task.verdict), *cells)
    return shown


def _with_verdict(name: str, verdict: str) -> str:
    return f"{name}\n[dim]{verdict}[/]" if verdict else name


def _percent(share: Share) -> str:
    return f"{share.value:.1%} ± {share.error:.1%}"


def write(report: Report, path: Path) -> None:
    """As JSON; numbers that are not finite as null. Raises OSError."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(_finite(dataclasses.asdict(report)), indent=1) + "\n")
    partial.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
