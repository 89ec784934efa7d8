"""The distillation's loss and gradient against plain float32 torch, and what a teacher may not be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain_distillation import plain_loss
from tiny_megatron import megatron_twin, random_batches, random_llama

from megatron_edge import memory
from megatron_edge.checks import check_config
from megatron_edge.compose import compose
from megatron_edge.contracts import InputError, ParallelPlan
from megatron_edge.jobs.teacher import check_teacher
from megatron_edge.model.source import open_source
from megatron_edge.runtime.session import tensor_group
from megatron_edge.train import distill, step
from megatron_edge.train.distill import Distillation, distillation_loss

VOCAB, WIDTH = 96, 64


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("label_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tokens_at_once", [5, 1000])
def test_loss_and_gradient_are_torchs(
    session: Any, temperature: float, label_weight: float, tokens_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits: three times what torch's own fp32 is off torch's float64."""
    monkeypatch.setattr(distill, "DISTILL_CHUNK_BYTES", 4 * VOCAB * tokens_at_once)
    torch.manual_seed(2)
    logits, hidden = torch.randn(2, 16, VOCAB) * 4, torch.randn(2, 16, WIDTH)
    head, labels = torch.randn(VOCAB, WIDTH) / 3, torch.randint(0, VOCAB, (2, 16))
    weights = torch.rand(2, 16) * (torch.rand(2, 16) > 0.3)
    found = {}
    for dtype in (torch.float32, torch.float64):
        own = logits.to(dtype, copy=True).requires_grad_()
        kl, label = plain_loss(own, hidden.to(dtype) @ head.to(dtype).t(), labels, temperature)
        loss = (1 - label_weight) * kl + label_weight * label
        (loss * weights.to(dtype)).sum().backward()
        found[dtype] = [value.detach().double() for value in (loss, kl, label, own.grad)]  # type: ignore[union-attr]
    ours = logits.clone().requires_grad_()
    losses = distillation_loss(
        ours, hidden, head, labels, temperature=temperature, label_weight=label_weight, group=tensor_group()
    )
    (losses.loss * weights).sum().backward()
    assert not losses.kl.requires_grad and not losses.label_loss.requires_grad
    assert ours.grad is not None
    for value, exact, plain in zip((*losses, ours.grad), found[torch.float64], found[torch.float32], strict=True):
        floor = float((plain - exact).abs().max())
        assert float((value.double() - exact).abs().max()) <= 3 * floor + 1e-7, floor


def test_a_teacher_equal_to_the_student_teaches_nothing(session: Any) -> None:
    train = compose(["train=qad"]).train
    llama = random_llama()
    student, optimizer = step.make_trainable(megatron_twin(llama, session), train, torch.float32)
    result = step.train_step(
        student, optimizer, random_batches(), session, Distillation(megatron_twin(llama, session), train, session)
    )
    assert result.loss == result.parts["kl_nats_per_token"] < 1e-6 and result.gradient_norm < 1e-5
    labels = step.evaluate(megatron_twin(llama, session), random_batches(), session)
    assert result.parts["label_loss_nats_per_token"] == pytest.approx(labels, rel=1e-6)


@pytest.mark.parametrize("hidden_weight", [0.0, 0.5])
def test_one_step_has_the_gradient_of_transformers(session: Any, hidden_weight: float) -> None:
    """Another model as teacher, in Megatron; the same loss written down in transformers and torch."""
    options = ["train=qad", "train.distill_temperature=2", "train.distill_label_weight=0.25"]
    train = compose([*options, f"train.distill_hidden_weight={hidden_weight}"]).train
    ours, theirs = random_llama(3), random_llama(4)
    batches = random_batches()
    objective = Distillation(megatron_twin(theirs, session), train, session)
    model, optimizer = step.make_trainable(megatron_twin(ours, session), train, torch.float32)
    result = step.train_step(model, optimizer, batches, session, objective)

    tokens, mask, labels = (torch.cat([getattr(b, n) for b in batches]) for n in ("tokens", "loss_mask", "labels"))
    with torch.no_grad():
        teacher = theirs(tokens, output_hidden_states=True)
    student = ours(tokens, output_hidden_states=True)
    kl, label = plain_loss(student.logits, teacher.logits, labels, 2.0)
    wanted = teacher.hidden_states[-1]
    apart = (student.hidden_states[-1] - wanted).pow(2).sum(-1) / wanted.pow(2).sum(-1)
    loss = (0.75 * kl + 0.25 * label + hidden_weight * apart)[mask].mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in ours.parameters() if p.grad is not None]).norm()
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    assert result.gradient_norm == pytest.approx(float(norm), rel=1e-4)
    assert result.parts["kl_nats_per_token"] == pytest.approx(float(kl[mask].mean()), rel=1e-5)
    assert ("hidden_loss_per_token" in result.parts) == bool(hidden_weight)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train.teacher=/x",), "train.teacher='/x': allowed is null with train.mode=qat"),
        (("train=ptq", "train.distill_temperature=2"), "train.distill_temperature=2.0: allowed is 1.0 with"),
        (("train.distill_hidden_weight=1",), "train.distill_hidden_weight=1.0: allowed is 0.0 with"),
        (("train=qad", "quant=none", "device=x86_laptop"), "the student is its own teacher"),
        (("train.teacher_hf_config=/x",), "train.teacher_hf_config='/x': allowed is null with train.mode=qat"),
        (
            ("train=qad", "train.teacher_hf_config=/x"),
            "train.teacher_hf_config='/x': allowed is null with train.teacher",
        ),
    ],
)
def test_leaves_that_nothing_would_read_are_refused(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_config(compose(arguments))


def test_a_quantised_embedding_alone_is_something_to_learn() -> None:
    check_config(compose(["train=qad", "quant=none", "quant.embedding=int8"]))


def save(directory: Path, tokens: list[str], **changes: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    random_llama(**changes).save_pretrained(directory)
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokens[1]).save_pretrained(directory)
    return open_source(directory)


def test_a_teacher_that_cannot_teach_is_refused(tmp_path: Path) -> None:
    words = ["<unk>", "<eos>", "one", "two"]
    student = save(tmp_path / "student", words)
    options = ["train.seq_length_tokens=32", "train.distill_hidden_weight=1"]
    config = compose(["train=qad", f"model.source={tmp_path / 'student'}", *options])
    check_teacher(config, student, save(tmp_path / "good", words, num_hidden_layers=1), ParallelPlan())
    wrong = {
        "its vocab_size=128; allowed is the student's, 96": save(tmp_path / "a", words, vocab_size=128),
        "'one' 3 there and 2 here": save(tmp_path / "b", ["<unk>", "<eos>", "two", "one"]),
        "have 32 channels, the student's 64": save(tmp_path / "c", words, hidden_size=32),
        "max_position_embeddings=16": save(tmp_path / "d", words, max_position_embeddings=16),
    }
    for text, teacher in wrong.items():
        with pytest.raises(InputError, match=text):
            check_teacher(config, student, teacher, ParallelPlan())
    with pytest.raises(InputError, match="2 chunks, but the model has 1 layers"):
        check_teacher(config, student, open_source(tmp_path / "good"), ParallelPlan(pp=2, world_size=2))


def test_a_teachers_bytes_are_planned() -> None:
    """Weights of all stages add up to the teacher's; the last stage keeps hidden states, and works on logits."""
    from test_memory import TINY

    config = compose(["train=qad", "train.precision=bf16", "train.seq_length_tokens=64"])
    larger = {**TINY, "num_hidden_layers": 2 * TINY["num_hidden_layers"]}
    (plain,) = memory.training_plan(config, TINY, ParallelPlan())
    (taught,) = memory.training_plan(config, TINY, ParallelPlan(), larger)
    weights = 2 * memory.count_parameters(larger).total
    hidden = 2 * config.train.global_batch * 64 * TINY["hidden_size"]
    logits = (memory.DISTILL_CHUNKS * 4 + 2) * 64 * TINY["vocab_size"]
    rest = taught.teacher_bytes - weights - hidden - logits
    assert taught.total_bytes - plain.total_bytes == taught.teacher_bytes
    assert 0 < rest < plain.activations_bytes, "one layer's activations"
    first, last = memory.training_plan(config, TINY, ParallelPlan(pp=2, world_size=2), larger)
    copy = 2 * memory.count_parameters(TINY).embedding if TINY["tie_word_embeddings"] else 0
    assert first.teacher_bytes + last.teacher_bytes - 2 * rest == weights + copy + hidden + logits
