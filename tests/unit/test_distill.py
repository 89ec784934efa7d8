"""The distillation's loss and gradient against plain float32 torch, and what a teacher may not be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_megatron import megatron_twin, one_process, random_batches, random_llama

from megatron_edge.compose import compose
from megatron_edge.runtime.session import tensor_group
from megatron_edge.train import distill, step
from megatron_edge.train.distill import Distillation, distillation_loss

VOCAB, WIDTH = 96, 64


@pytest.fixture(scope="module")
def session() -> Iterator[Any]:
    with one_process() as opened:
        yield opened


def plain_loss(logits: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float) -> Any:
    """(T^2 KL, CE) of each token, from torch's own functions."""
    log_q, log_p = (F.log_softmax(x / temperature, -1) for x in (logits, teacher))
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * temperature**2
    return kl, F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


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
