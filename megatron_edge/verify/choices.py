"""How likely a model finds each choice of a question: packed like text, so that everything that runs windows can say.

In: a `Task` and a tokenizer. Out: windows whose counted tokens are the choices' (`pack_choices`), and from the losses
of those windows each choice's log-likelihood and the answers. Called by jobs/evaluation.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_edge.log import track
from megatron_edge.verify.quality import TOKENS_PER_FORWARD, Windows, forward
from megatron_edge.verify.tasks import Task

log = logging.getLogger("megatron_edge")

MIN_WINDOW_TOKENS = 256


@dataclass(frozen=True)
class PackedChoices:
    """One segment for each choice of each question: `window` and `segment`, both int64 [choices], in their order."""

    windows: Windows
    window: torch.Tensor
    segment: torch.Tensor


@dataclass(frozen=True)
class Answers:
    """Of each question: whether the likeliest choice is right, by its sum in nats and by the sum per character."""

    right: tuple[bool, ...]
    right_per_character: tuple[bool, ...]


def pack_choices(task: Task, tokenizer: Any, context_tokens: int, multiple: int = 1) -> PackedChoices:
    """Each choice after its prompt as a segment of its own, several in a window; only the choice's tokens count.

    Args:
        context_tokens: the model's context; of longer segments the beginning is cut off, as lm-evaluation-harness does.
        multiple: that the length of a window must be of.
    """
    longest = context_tokens // multiple * multiple
    segments, cut = [], 0
    for prompt, choice in _tokens(task, tokenizer):
        kept = choice[-(longest - 1) :]
        before = prompt[-(longest - len(kept)) :]
        cut += len(kept) + len(before) < len(choice) + len(prompt)
        segments.append((before + kept, len(kept)))
    if cut:
        log.warning("%s: %d of %d choices are longer than %d tokens: cut", task.name, cut, len(segments), longest)
    needed = max(MIN_WINDOW_TOKENS, *(len(tokens) for tokens, _ in segments))
    return _pack(segments, min(longest, -(-needed // multiple) * multiple))


def _tokens(task: Task, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """(prompt, choice) of every choice: what the whole text's tokens have beyond as many as the prompt's."""
    prompts = [question.prompt for question in task.questions]
    wholes = [question.prompt + choice for question in task.questions for choice in question.choices]
    encoded = tokenizer(prompts, return_attention_mask=False, verbose=False)["input_ids"]
    whole_ids = iter(tokenizer(wholes, return_attention_mask=False, verbose=False)["input_ids"])
    found, eos = [], tokenizer.eos_token_id
    for question, prompt in zip(task.questions, encoded, strict=True):
        prompt = prompt[:-1] if prompt[-1] == eos else prompt  # some tokenizers end every text with it
        for _ in question.choices:
            whole = next(whole_ids)
            whole = whole[:-1] if whole[-1] == eos else whole
            at = min(len(prompt), len(whole) - 1)  # a choice that melts into the prompt's last token counts with it
            found.append((whole[:at], whole[at:]))
    return found


def _pack(segments: Sequence[tuple[list[int], int]], length: int) -> PackedChoices:
    """First fit, the longest segments first. `segments`: tokens, and how many at the end count."""
    room: list[int] = []
    members: list[list[int]] = []
    oldest = 0  # windows before it have no room for anything
    shortest = min(len(tokens) for tokens, _ in segments)
    for index in sorted(range(len(segments)), key=lambda i: -len(segments[i][0])):
        size = len(segments[index][0])
        while oldest < len(room) and room[oldest] < shortest:
            oldest += 1
        place = next((w for w in range(oldest, len(room)) if room[w] >= size), len(room))
        if place == len(room):
            room.append(length)
            members.append([])
        room[place] -= size
        members[place].append(index)
    tokens = torch.zeros(len(room), length, dtype=torch.int64)
    positions, loss_mask = torch.zeros_like(tokens), torch.zeros(tokens.shape, dtype=torch.bool)
    documents = torch.zeros(tokens.shape, dtype=torch.int32)
    window, segment = torch.zeros(2, len(segments), dtype=torch.int64)
    for w, inside in enumerate(members):
        at = 0
        for number, index in enumerate(inside):
            ids, counted = segments[index]
            part = slice(at, at + len(ids))
            tokens[w, part], documents[w, part] = torch.tensor(ids), number
            positions[w, part] = torch.arange(len(ids))
            loss_mask[w, at + len(ids) - counted - 1 : at + len(ids) - 1] = True
            window[index], segment[index] = w, number
            at += len(ids)
        documents[w, at:] = len(inside)  # padding: a segment that counts nowhere
        positions[w, at:] = torch.arange(length - at)
    return PackedChoices(Windows(tokens, documents, positions, loss_mask), window, segment)


def log_likelihoods(packed: PackedChoices, nll: torch.Tensor) -> list[float]:
    """Nats of every choice, in order, out of `nll` [n, s] of the windows' next tokens."""
    counted = torch.where(packed.windows.loss_mask, nll.double(), 0.0)
    sums = torch.zeros(len(counted), int(packed.windows.documents.max()) + 1, dtype=torch.float64)
    sums.scatter_add_(1, packed.windows.documents.long(), counted)
    return (-sums[packed.window, packed.segment]).tolist()


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
    per_forward = max(1, TOKENS_PER_FORWARD // windows.tokens.shape[1])
    begins = range(0, len(windows), per_forward)
    for begin in track(begins, "running the model", len(begins)):
        part = windows.slice(begin, begin + per_forward)
        logits = forward(model, part)
        mask = part.loss_mask.to(logits.device)
        wide = logits[mask].float().double()
        targets = part.tokens.to(logits.device).roll(-1, dims=1)[mask]
        nll = wide.logsumexp(-1) - wide.gather(-1, targets[:, None]).squeeze(-1)
        losses[begin : begin + len(part)][part.loss_mask] = nll.float().cpu()
    return losses
