"""A step whose gradient is not finite changes nothing; too many of them end the job."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_megatron import megatron_twin, random_batches, random_experts, random_llama

from megatron_edge.compose import compose
from megatron_edge.contracts import Diverged, ParallelPlan
from megatron_edge.runtime.session import Session
from megatron_edge.train import loop, step
from megatron_edge.train.batches import in_batches
from megatron_edge.train.data import Batch

TRAIN = compose(["train.learning_rate=0.01", "train.steps=8", "train.max_skipped_steps=2"]).train


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(session: Any, experts: bool, distributed_optimizer: bool) -> None:
    model = random_experts(session) if experts else megatron_twin(random_llama(), session)
    wrapped, optimizer = step.make_trainable(model, TRAIN, torch.float32, distributed_optimizer=distributed_optimizer)
    step.learning_rate_schedule(optimizer, TRAIN).step(3)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    poison = next(model.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    result = step.train_step(wrapped, optimizer, random_batches(), session)
    assert not result.applied and result.gradient_norm != result.gradient_norm and result.loss > 0
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
    poison.remove()
    result = step.train_step(wrapped, optimizer, random_batches(), session)
    assert result.applied and result.gradient_norm > 0
    assert all(torch.isfinite(param).all() for param in model.parameters())
    assert any(not torch.equal(param, before[name]) for name, param in model.named_parameters())


class Endless:
    """Stands for BatchPlan: the same two batches at every step."""

    global_batch = 4

    def micro_batches(self, at: int, dp_rank: int, dp_size: int) -> list[Any]:
        return random_batches()


def run(session: Any, bad_steps: set[int]) -> tuple[list[dict[str, float]], list[int]]:
    """(metrics, steps that were saved) of training in which the gradients of some steps (from 1) are poisoned."""
    model = megatron_twin(random_llama(), session)
    wrapped, optimizer = step.make_trainable(model, TRAIN, torch.float32)
    metrics: list[dict[str, float]] = []
    saved: list[int] = []
    bad = lambda gradient: gradient * float("nan") if len(metrics) + 1 in bad_steps else gradient  # noqa: E731
    next(model.parameters()).register_hook(bad)
    settings = SimpleNamespace(**{**vars(TRAIN), "checkpoint_every_steps": 2})
    loop.fit(wrapped, optimizer, Endless(), settings, session, start_step=0, save=saved.append, report=metrics.append)  # type: ignore[arg-type]
    return metrics, saved


def test_skipped_steps_are_counted_and_named(session: Any, caplog: pytest.LogCaptureFixture) -> None:
    metrics, saved = run(session, {2, 3, 5})
    assert [one["skipped"] for one in metrics] == [0, 1, 1, 0, 1, 0, 0, 0] and saved[-1] == 8
    assert "step 3: loss" in caplog.text and "samples 8 to 11 in the order of training" in caplog.text


def test_too_many_in_a_row_end_the_job(session: Any) -> None:
    with pytest.raises(Diverged, match=r"step 6: loss .* 3 steps in a row, train.max_skipped_steps=2"):
        run(session, {4, 5, 6})


def test_micro_batches_without_gradient(session: Any) -> None:
    """Four windows on CPU; on CUDA as many as 8192 tokens or 2 GiB of logits have, and one for each replica. What
    fills the last one does not count."""
    (windows,) = random_batches(1, windows=70)
    counted = int(windows.loss_mask.sum())

    def sizes(vocab_size: int, on: Session, length: int = 32) -> list[int]:
        whole = Batch(*(part.repeat(1, length // 32) for part in windows))
        found = in_batches(whole, vocab_size, on)
        assert sum(int(batch.loss_mask.sum()) for batch in found) == counted * length // 32
        assert torch.equal(torch.cat([batch.tokens for batch in found])[:70], whole.tokens)
        return [len(batch.tokens) for batch in found]

    cuda = replace(session, device=torch.device("cuda"))
    assert sizes(96, session) == [4] * 18
    assert sizes(96, cuda) == [70]
    assert sizes(49152, cuda, 256) == [24] * 3, "at most 32 windows"
    assert sizes(2**20, cuda, 128) == [4] * 18, "512 tokens have 2 GiB of logits"
    assert sizes(96, replace(cuda, plan=ParallelPlan(dp=4, world_size=4))) == [18] * 4
