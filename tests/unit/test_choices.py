"""Questions, and the likelihood of their choices: packed windows against transformers on one plain text at a time."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_edge.contracts import BRANCH, InputError
from megatron_edge.train.data import attention_mask
from megatron_edge.verify.choices import answers_of, log_likelihoods, next_token_losses, pack_choices
from megatron_edge.verify.evaluation import task_results
from megatron_edge.verify.tasks import TASKS, Question, Task, load_tasks
from tests.unit.tiny_tokenizer import tiny_tokenizer

ROWS = [
    {"question": "The assignment statement binds", "choices": ["names to objects", "a book"], "answer": 0},
    {
        "question": "A very long prompt, " * 12 + "and then",
        "choices": ["it ends", "it goes on", "neither"],
        "answer": 1,
    },
    {"question": "Q", "choices": ["1", "22"], "answer": 1},
]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=600, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def task(tmp_path: Path) -> Task:
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    return load_tasks([str(path)], None)[0]


@torch.no_grad()
def plain(model: LlamaForCausalLM, task: Task, context_tokens: int = 512) -> Iterator[float]:
    """Each choice's log-likelihood, one text at a time, as lm-evaluation-harness computes it."""
    tokenizer = tiny_tokenizer()
    for question in task.questions:
        for choice in question.choices:
            prompt, whole = tokenizer(question.prompt).input_ids, tokenizer(question.prompt + choice).input_ids
            counted, whole = len(whole) - len(prompt), whole[-context_tokens:]
            logits = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            yield sum(float(logits[len(whole) - n - 1, whole[-n]]) for n in range(1, counted + 1))


def test_packed_choices_are_as_likely_as_alone(model: LlamaForCausalLM, task: Task) -> None:
    """Noise floor: transformers in fp32 against fp64 on the same texts; sums in another order may differ by 3 of it."""
    packed = pack_choices(task, tiny_tokenizer(), context_tokens=512, multiple=6)
    assert all(windows.tokens.shape[1] % 6 == 0 for windows in packed.windows)
    assert sum(len(windows) for windows in packed.windows) < len(list(plain(model, task)))
    found = log_likelihoods(packed, lambda windows: next_token_losses(model, windows))
    single = list(plain(model, task))
    double = list(plain(model.double(), task))
    model.float()
    floor = max(abs(a - b) for a, b in zip(single, double, strict=True))
    assert 0 < floor < 1e-3
    assert max(abs(a - b) for a, b in zip(found, single, strict=True)) <= 3 * floor


def test_a_prompt_is_run_once_for_all_its_choices(model: LlamaForCausalLM) -> None:
    """As many tokens as one prompt and the choices, each with the token that predicts its first; the windows of longer
    questions do not make those of shorter ones longer; Megatron's mask says the same as transformers'."""
    tokenizer, prompt = tiny_tokenizer(), "Of five letters which is the last? " * 9 + "Answer:"
    letters = tuple(f" {letter}" for letter in "ABCDE")
    questions = (Question(prompt, letters, 4), Question(prompt * 2, letters, 4), Question("Q", (" a b", " c"), 0))
    own = Task("own", questions, 3)
    packed = pack_choices(own, tokenizer, context_tokens=512)
    wholes = [[len(tokenizer(q.prompt + c).input_ids) for c in q.choices] for q in questions]
    starts = [len(tokenizer(q.prompt).input_ids) for q in questions]
    expected = sum(n - 1 + sum(w - n + 1 for w in ws) for n, ws in zip(starts, wholes, strict=True))
    used = sum(int((w.documents < w.documents[:, -1:]).sum() + (w.documents >= BRANCH).sum()) for w in packed.windows)
    assert used == expected
    assert sorted(windows.tokens.shape[1] for windows in packed.windows) == [256, 512]
    found = log_likelihoods(packed, lambda windows: next_token_losses(model, windows))
    assert found == pytest.approx(list(plain(model, own)), abs=1e-4)
    for windows in packed.windows:
        allowed = ~attention_mask(windows.documents)[:, 0]
        seen = allowed[windows.loss_mask]
        assert bool((seen.sum(1) == windows.positions[windows.loss_mask] + 1).all()), "its past, and nothing else"


def test_what_is_too_long_loses_its_beginning(
    model: LlamaForCausalLM, task: Task, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_edge"), "propagate", True)
    packed = pack_choices(task, tiny_tokenizer(), context_tokens=48)
    assert "3 of 7 choices are longer than 48 tokens" in caplog.text
    assert max(windows.tokens.shape[1] for windows in packed.windows) == 48
    found = log_likelihoods(packed, lambda windows: next_token_losses(model, windows))
    assert found == pytest.approx(list(plain(model, task, 48)), abs=1e-3)


def test_answers_and_their_results() -> None:
    questions = tuple(Question("q", (" ab", " abcd"), answer) for answer in (0, 1, 1))
    answers = answers_of(Task("t", questions, 3), [-1.0, -1.5, -3.0, -2.0, -2.0, -3.0])
    assert answers.right == (True, True, False)
    assert answers.right_per_character == (False, True, True)
    same = Task("t", questions, 3)
    assert same.same_choices and same.chance == 2 / 3, "always the second is right twice"
    assert [result.by for result in task_results(same, answers, None)] == ["whole"]
    mixed = Task("t", (*questions, Question("q", (" x", " y", " z"), 0)), 4)
    assert mixed.chance == pytest.approx((3 / 2 + 1 / 3) / 4)
    assert [result.by for result in task_results(mixed, answers, None)] == ["whole", "per character"]


def test_verdicts_in_words() -> None:
    questions = tuple(Question(f"q{i}", (f" a{i}", f" b{i}"), 0) for i in range(100))
    task = Task("t", questions, 100)

    def right(count: int, begin: int = 0) -> list[float]:
        """Log-likelihoods under which `count` questions from `begin` on are answered rightly."""
        return [x for i in range(100) for x in ((-1.0, -2.0) if begin <= i < begin + count else (-2.0, -1.0))]

    def verdict(ours: list[float], theirs: list[float]) -> str:
        return task_results(task, answers_of(task, ours), answers_of(task, theirs))[0].verdict

    assert verdict(right(80), right(78)).startswith("noise: +2.0%")
    assert verdict(right(60), right(90)).startswith("worse: -30.0%")
    assert verdict(right(90), right(65)).startswith("better: +25.0%")
    assert verdict(right(55), right(50)).startswith("baseline is at chance (39.8% to 60.2%, chance 50.0%)")


def test_questions_are_read_as_they_are_written(tmp_path: Path) -> None:
    """One row of each packaged task, by hand."""
    options = {"options": "A. one\nB. two two\nC. three", "answer": "B. two two"}
    rows = {
        "boolq": {"passage": "P.", "question": "is it", "answer": "True"},
        "piqa": {"question": "goal ", **options},
        "openbookqa": {"question": "stem ", **options},
        "commonsenseqa": {"question": "why?", "answer": options["answer"], "options": "\n" + options["options"]},
        "siqa": {"passage": "C.", "question": "Why?", **options},
        "mmlu": {"question": "M?", **options},
    }
    told = (" one", " two two", " three")
    listed = "The following are multiple choice questions (with answers).\n\nM?\nA. one\nB. two two\nC. three\nAnswer:"
    assert {name: TASKS[name][1](row) for name, row in rows.items()} == {
        "boolq": Question("P.\nQuestion: is it?\nAnswer:", (" no", " yes"), 1),
        "piqa": Question("Question: goal\nAnswer:", told, 1),
        "openbookqa": Question("stem", told, 1),
        "commonsenseqa": Question("Question: why?\nAnswer:", told, 1),
        "siqa": Question("Q: C. Why?\nA:", told, 1),
        "mmlu": Question(listed, (" A", " B", " C"), 1),
    }
    assert set(rows) == set(TASKS)
    later = TASKS["siqa"][1]({"passage": "C.", "question": "Why?", "options": "B. two\nC. three", "answer": "C. three"})
    assert (later.choices, later.answer) == ((" two", " three"), 1), "some rows lack their first choices"


def test_a_limit_is_spread_evenly_and_repeated_choices_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    rows = [{"question": f"q{i}", "choices": ["a", "b"], "answer": 0} for i in range(10)]
    rows.insert(3, {"question": "twice", "choices": ["a", "a"], "answer": 0})
    path.write_text("\n".join(map(json.dumps, rows)))
    (task,) = load_tasks([str(path)], 4)
    assert [question.prompt for question in task.questions] == ["q0", "q2", "q5", "q7"] and task.total == 10


@pytest.mark.parametrize(
    "row, words",
    [
        ("{", "line 1: not a question"),
        ("[]", "line 1: not a question"),
        ('{"question": "q", "choices": ["a"], "answer": 0}', "at least two choices"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "answer 2 is no index of 2 choices"),
        ('{"question": "q", "choices": ["a", "b"], "answer": true}', "answer True is no index"),
        ('{"question": "q", "choices": ["a", ""], "answer": 0}', "must be texts that are not empty"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 0}', "1 questions; allowed: at least 2"),
    ],
)
def test_rows_that_are_no_questions(tmp_path: Path, row: str, words: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(row)
    with pytest.raises(InputError, match=words):
        load_tasks([str(path)], None)


def test_names_that_are_no_tasks(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'hellaswag' is no task; allowed: boolq, .*\*.jsonl"):
        load_tasks(["hellaswag"], None)
    with pytest.raises(InputError, match=r"gone.jsonl' is no task"):
        load_tasks([str(tmp_path / "gone.jsonl")], None)
    with pytest.raises(InputError, match="each at most once"):
        load_tasks(["boolq", "boolq"], None)
