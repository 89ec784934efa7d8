"""The labels' cross-entropy in plain torch against torch's in float64 and against Megatron's; Triton's passes are
compared in tests/gpu/test_loss_cuda.py, ranks that share the vocabulary in tests/dist/test_distill_layouts.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_megatron import megatron_twin, random_batches, random_llama
from torch import Tensor

from megatron_edge.compose import compose
from megatron_edge.model import cross_entropy
from megatron_edge.model.cross_entropy import vocab_parallel_cross_entropy
from megatron_edge.runtime.session import tensor_group
from megatron_edge.train import step

DTYPES = (torch.bfloat16, torch.float32)
EPSILON = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23}


def example(columns: int, dtype: torch.dtype, rows: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [rows, 2, columns], labels with the first word and the last, weights with zeros."""
    torch.manual_seed(columns)
    logits, labels = (torch.randn(rows, 2, columns) * 5).to(dtype), torch.randint(0, columns, (rows, 2))
    labels[0, 0], labels[-1, -1] = 0, columns - 1
    return logits, labels, torch.rand(rows, 2) * (torch.rand(rows, 2) > 0.3)


def with_gradient(loss_of: Any, logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    loss = loss_of(leaf * 1, labels)  # as a model has them: made by an operation
    (loss * weights).sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype is logits.dtype
    return loss.detach().double(), leaf.grad.double()


def torchs(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


def ours(logits: Tensor, labels: Tensor) -> Tensor:
    return vocab_parallel_cross_entropy(logits, labels, tensor_group())


def megatrons(logits: Tensor, labels: Tensor) -> Tensor:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy as upstream

    return upstream(logits, labels)


def apart(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[float, float]:
    return float((a[0] - b[0]).abs().max()), float((a[1] - b[1]).abs().max())


@pytest.mark.parametrize("rows_at_once", [5, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [96, 1000, 8191])
def test_loss_and_gradient_are_torchs(
    session: Any, columns: int, dtype: torch.dtype, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No further from float64 than three times Megatron's; in bf16 gradients are rounded once, by half a step."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * columns * rows_at_once)
    logits, labels, weights = example(columns, dtype)
    exact = with_gradient(torchs, logits.double(), labels, weights.double())
    found, floor = (with_gradient(one, logits, labels, weights) for one in (ours, megatrons))
    loss, gradient = apart(found, exact)
    loss_floor, gradient_floor = apart(floor, exact)
    print(f"loss {loss:.1e} (Megatron {loss_floor:.1e}), gradient {gradient:.1e} (Megatron {gradient_floor:.1e})")
    assert loss <= 3 * loss_floor and gradient <= 3 * gradient_floor
    assert gradient <= EPSILON[dtype]
    assert torch.equal(found[1][weights == 0], torch.zeros_like(found[1][weights == 0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_labels_outside_and_logits_that_are_not_finite_are_as_megatron_has_them(
    session: Any, dtype: torch.dtype
) -> None:
    logits, labels, weights = example(64, dtype, rows=5)
    labels[1, 0], labels[2, 0] = -100, 64
    logits[0, 1, ::2] = -math.inf
    labels[0, 1] = 3
    found, theirs = (with_gradient(one, logits, labels, weights) for one in (ours, megatrons))
    assert max(apart(found, theirs)) <= 4 * EPSILON[dtype]
    logits[3, 0, 7], logits[3, 1, 8], logits[4] = math.nan, math.inf, -math.inf
    found, theirs = (with_gradient(one, logits, labels, weights) for one in (ours, megatrons))
    assert torch.equal(found[0].isnan(), theirs[0].isnan()) and found[0].isnan().sum() == 4


def test_backward_overwrites_logits_and_tells_autograd(session: Any) -> None:
    logits, labels, _ = example(96, torch.bfloat16)
    leaf = logits.clone().requires_grad_()
    made = leaf * 1
    place, loss = made.data_ptr(), ours(made, labels).sum()
    (gradient,) = torch.autograd.grad(loss, made, retain_graph=True)
    assert gradient.data_ptr() == place
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    made = leaf * 1
    other = made.exp()  # keeps its result: not the logits
    (ours(made, labels).sum() + other.sum()).backward()
    made = leaf * 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (made.square().sum() + ours(made, labels).sum()).backward()


def test_a_leaf_keeps_its_values(session: Any) -> None:
    logits, labels, _ = example(96, torch.float32)
    leaf = logits.clone().requires_grad_()
    for _ in range(2):
        ours(leaf, labels).sum().backward()
    assert torch.equal(leaf, logits)
    with torch.no_grad():
        assert not ours(leaf * 1, labels).requires_grad
    assert ours(logits, labels).grad_fn is None and torch.equal(leaf, logits)


def test_logits_of_a_view_and_without_a_group(session: Any) -> None:
    logits, labels, weights = example(96, torch.float32)
    whole = with_gradient(ours, logits, labels, weights)
    alone = with_gradient(vocab_parallel_cross_entropy, logits, labels, weights)
    turned = with_gradient(lambda x, y: ours(x.transpose(0, 1), y.t()).t(), logits, labels, weights)
    assert apart(whole, alone) == apart(whole, turned) == (0.0, 0.0)
    assert ours(logits[:0], labels[:0]).shape == (0, 2)


def test_the_model_has_it(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's losses and gradients: no further from those of a float64 loss than three times Megatron's are."""
    from megatron.core.models.gpt import GPTModel

    model, _ = step.make_trainable(megatron_twin(random_llama(), session), compose([]).train, torch.float32)
    batches, seen = random_batches(), []

    def gradients(way: Any = None) -> tuple[Tensor, Tensor]:
        with monkeypatch.context() as patch:
            if way is not None:
                patch.setattr(cross_entropy.gpt_class(), "compute_language_model_loss", way)
            model[0].zero_grad_buffer()
            found = step.forward_backward(model, batches, session, step.LABELS)
        flat = torch.cat([weight.main_grad.flatten() for weight in model.parameters()])
        return torch.stack([part["total"] for part in found]).double(), flat.double()

    plain = (cross_entropy.row_sums, cross_entropy.write_gradient)
    monkeypatch.setattr(cross_entropy, "_passes", lambda logits: seen.append(logits.shape) or plain)
    found = gradients()
    assert seen == [(64, 96)] * len(batches)
    exact = gradients(lambda _, labels, logits: torchs(logits.double().transpose(0, 1), labels).float())
    loss, gradient = apart(found, exact)
    loss_floor, gradient_floor = apart(gradients(GPTModel.compute_language_model_loss), exact)
    print(f"loss {loss:.1e} (Megatron {loss_floor:.1e}), gradient {gradient:.1e} (Megatron {gradient_floor:.1e})")
    assert len(seen) == len(batches) and float(exact[1].norm()) > 0.1
    assert loss <= 3 * loss_floor + 1e-4 and gradient <= 3 * gradient_floor
