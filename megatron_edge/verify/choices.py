"""How likely a model finds each choice of a question: packed like text, so that everything that runs windows can say.

In: a `Task` and a tokenizer. Out: windows whose counted tokens are the choices' (`pack_choices`), and from the losses
of those windows each choice's log-likelihood and the answers. A prompt is there once for all choices: each is a branch
(contracts.BRANCH) that begins with the prompt's last token, which predicts the choice's first. Called by
jobs/evaluation.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_edge.contracts import BRANCH
from megatron_edge.log import track
from megatron_edge.verify.quality import Windows, counted_logits, windows_per_forward
from megatron_edge.verify.tasks import Task

log = logging.getLogger("megatron_edge")

MIN_WINDOW_TOKENS = 256
ROWS = 512  # tokens at once: fp64 copies of their logits


@dataclass(frozen=True)
class PackedChoices:
    """Windows, those of one length together, and where each choice is, in the questions' order: int64 [choices, 4] of
    which of `windows`, row, first counted position, and how many are counted."""

    windows: tuple[Windows, ...]
    places: torch.Tensor


@dataclass(frozen=True)
class _Segment:
    """A trunk of tokens, and choices (by their number) that go on from it, each beginning with the same token."""

    trunk: list[int]
    branches: list[tuple[int, list[int]]]

    @property
    def size(self) -> int:
        return len(self.trunk) + sum(len(tokens) for _, tokens in self.branches)


@dataclass(frozen=True)
class Answers:
    """Of each question: whether the likeliest choice is right, by its sum in nats and by the sum per character."""

    right: tuple[bool, ...]
    right_per_character: tuple[bool, ...]


def pack_choices(task: Task, tokenizer: Any, context_tokens: int, multiple: int = 1) -> PackedChoices:
    """The choices of every question as branches of its prompt, several questions in a window; only the choices' tokens
    count. Windows are as long as their questions need, by powers of 2.

    Args:
        context_tokens: the model's context; of longer segments the beginning is cut off, as lm-evaluation-harness does.
        multiple: that the length of a window must be of.
    """
    longest = context_tokens // multiple * multiple
    segments: list[_Segment] = []
    cut = number = 0
    for choices in _tokens(task, tokenizer):
        own: list[_Segment] = []  # more than one where choices begin elsewhere, or are too long together
        for prompt, choice in choices:
            kept = choice[-(longest - 1) :]
            before = prompt[-(longest - len(kept)) :]
            cut += len(kept) + len(before) < len(choice) + len(prompt)
            trunk, branch = before[:-1], (number, before[-1:] + kept)
            number += 1
            place = next(
                (
                    one
                    for one in own
                    if one.trunk == trunk
                    and one.branches[0][1][0] == branch[1][0]
                    and one.size + len(branch[1]) <= longest
                ),
                None,
            )
            if place is None:
                own.append(_Segment(trunk, [branch]))
            else:
                place.branches.append(branch)
        segments += own
    if cut:
        log.warning("%s: %d of %d choices are longer than %d tokens: cut", task.name, cut, number, longest)
    return _packed(segments, number, longest, multiple)


def _tokens(task: Task, tokenizer: Any) -> list[list[tuple[list[int], list[int]]]]:
    """(prompt, choice) of every choice of every question: what the whole text's tokens have beyond as many as the
    prompt's; a first token without any before it, which nothing predicts, is the prompt."""
    prompts = [question.prompt for question in task.questions]
    wholes = [question.prompt + choice for question in task.questions for choice in question.choices]
    encoded = tokenizer(prompts, return_attention_mask=False, verbose=False)["input_ids"]
    whole_ids = iter(tokenizer(wholes, return_attention_mask=False, verbose=False)["input_ids"])
    found, eos = [], tokenizer.eos_token_id
    for question, prompt in zip(task.questions, encoded, strict=True):
        prompt = prompt[:-1] if prompt[-1] == eos else prompt  # some tokenizers end every text with it
        own = []
        for _ in question.choices:
            whole = next(whole_ids)
            whole = whole[:-1] if whole[-1] == eos else whole
            # A choice that melts into the prompt's last token counts with it.
            at = max(1, min(len(prompt), len(whole) - 1))
            own.append((whole[:at], whole[at:]))
        found.append(own)
    return found


def _packed(segments: Sequence[_Segment], num_choices: int, longest: int, multiple: int) -> PackedChoices:
    by_length: dict[int, list[_Segment]] = {}
    for segment in segments:
        length = MIN_WINDOW_TOKENS
        while length < segment.size:
            length *= 2
        by_length.setdefault(min(longest, -(-length // multiple) * multiple), []).append(segment)
    windows, places = list[Windows](), torch.zeros(num_choices, 4, dtype=torch.int64)
    for length, ones in sorted(by_length.items()):
        rows = _first_fit([one.size for one in ones], length)
        windows.append(_windows([[ones[i] for i in row] for row in rows], length, len(windows), places))
    return PackedChoices(tuple(windows), places)


def _first_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Which segments are together in each window: first fit, the longest first."""
    room: list[int] = []
    members: list[list[int]] = []
    oldest = 0  # windows before it have no room for anything
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        while oldest < len(room) and room[oldest] < min(sizes):
            oldest += 1
        place = next((w for w in range(oldest, len(room)) if room[w] >= sizes[index]), len(room))
        if place == len(room):
            room.append(length)
            members.append([])
        room[place] -= sizes[index]
        members[place].append(index)
    return members


def _windows(rows: Sequence[Sequence[_Segment]], length: int, which: int, places: torch.Tensor) -> Windows:
    """The `which`-th group of windows; writes `places` of its choices."""
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    positions, loss_mask = torch.zeros_like(tokens), torch.zeros(tokens.shape, dtype=torch.bool)
    documents = torch.zeros(tokens.shape, dtype=torch.int32)
    for row, segments in enumerate(rows):
        at = 0

        def put(ids: list[int], document: int, position: int, at: int, row: int = row) -> int:
            part = slice(at, at + len(ids))
            tokens[row, part], documents[row, part] = torch.tensor(ids, dtype=torch.int64), document
            positions[row, part] = torch.arange(position, position + len(ids))
            return at + len(ids)

        for number, segment in enumerate(segments):
            at = put(segment.trunk, number, 0, at)
            for way, (choice, ids) in enumerate(segment.branches, start=1):
                counted = len(ids) - 1
                places[choice] = torch.tensor([which, row, at, counted])
                loss_mask[row, at : at + counted] = True
                at = put(ids, number + way * BRANCH, len(segment.trunk), at)
        documents[row, at:] = len(segments)  # padding: a segment that counts nowhere
        positions[row, at:] = torch.arange(length - at)
    return Windows(tokens, documents, positions, loss_mask)


def log_likelihoods(packed: PackedChoices, losses_of: Callable[[Windows], torch.Tensor]) -> list[float]:
    """Nats of every choice, in order; `losses_of` gives those [n, s] of each next token of windows."""
    sums = torch.zeros(len(packed.places), dtype=torch.float64)
    for which, windows in enumerate(packed.windows):
        counted_losses = torch.where(windows.loss_mask, losses_of(windows).double(), 0.0)
        until = torch.nn.functional.pad(counted_losses.cumsum(1), (1, 0))
        mine = packed.places[:, 0] == which
        _, row, first, counted = packed.places[mine].unbind(1)
        sums[mine] = until[row, first] - until[row, first + counted]
    return sums.tolist()


def answers_of(task: Task, likelihoods: Sequence[float]) -> Answers:
    """`likelihoods` of every choice of every question, in order; of equal ones the first is the answer."""
    right, per_character, at = [], [], 0
    for question in task.questions:
        sums = likelihoods[at : at + len(question.choices)]
        at += len(question.choices)
        means = [value / len(choice.lstrip()) for value, choice in zip(sums, question.choices, strict=True)]
        right.append(max(range(len(sums)), key=sums.__getitem__) == question.answer)
        per_character.append(max(range(len(means)), key=means.__getitem__) == question.answer)
    return Answers(tuple(right), tuple(per_character))


@torch.no_grad()
def next_token_losses(model: torch.nn.Module, windows: Windows) -> torch.Tensor:
    """fp32 nats [n, s] of a transformers model where the windows count, 0 elsewhere; as `quality.score` computes them,
    without the vocabulary's arithmetic where nothing counts."""
    losses = torch.zeros(windows.tokens.shape)
    per_forward = windows_per_forward(model, windows)
    begins = range(0, len(windows), per_forward)
    for begin in track(begins, "running the model", len(begins)):
        part = windows.slice(begin, begin + per_forward)
        logits = counted_logits(model, part)
        targets = part.tokens.roll(-1, dims=1)[part.loss_mask].to(logits.device)
        nll = [
            wide.logsumexp(-1) - wide.gather(-1, ids[:, None]).squeeze(-1)
            for rows, ids in zip(logits.split(ROWS), targets.split(ROWS), strict=True)
            for wide in [rows.double()]
        ]
        losses[begin : begin + len(part)][part.loss_mask] = torch.cat(nll).float().cpu()
    return losses
