"""The optimizer's part of a step beside a plain loop in fp64: Adam's one kernel (its CPU twin here), clipping, copies
of main weights, states of checkpoints; and that a step leaves nothing for Python's garbage collector."""

from __future__ import annotations

import gc
import math
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from plain_adam import PlainAdam, apart, mains_of
from tiny_megatron import megatron_twin, random_batches, random_experts, random_llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_edge.compose import compose
from megatron_edge.runtime import optimizer_state
from megatron_edge.train import step, update

TRAIN = compose(["train.learning_rate=0.01", "train.steps=8", "train.weight_decay=0.1", "train.clip_norm=0.1"]).train


class Calls(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def trainable(session: Any, dtype: torch.dtype, *, distributed: bool = False, experts: bool = False) -> Any:
    model = random_experts(session).to(dtype) if experts else megatron_twin(random_llama(), session, dtype)
    return step.make_trainable(model, TRAIN, dtype, distributed_optimizer=distributed)


def parameters(chunks: Any) -> list[Any]:
    return [param for param in chunks.parameters() if hasattr(param, "main_grad")]


def is_fused(optimizer: Any) -> set[Any]:
    inners = optimizer_state.inner_optimizers(optimizer)
    return {group["fused"] for inner in inners for group in inner.optimizer.param_groups if group["params"]}


@pytest.mark.parametrize("fused_on", [(), ("cpu",)])
@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_are_those_of_a_plain_loop(
    session: Any, monkeypatch: Any, dtype: torch.dtype, distributed: bool, experts: bool, fused_on: tuple[str, ...]
) -> None:
    monkeypatch.setattr(update, "FUSED_ON", fused_on)
    chunks, optimizer = trainable(session, dtype, distributed=distributed, experts=experts)
    assert is_fused(optimizer) == {bool(fused_on)}
    schedule = step.learning_rate_schedule(optimizer, TRAIN)
    plain = PlainAdam(optimizer, TRAIN)
    for at in range(4):
        schedule.step(1)
        result = step.train_step(chunks, optimizer, random_batches(), session)
        left = math.sqrt(sum(float(main.grad.double().square().sum()) for main in mains_of(optimizer)))
        assert left == pytest.approx(min(result.gradient_norm, TRAIN.clip_norm), rel=1e-5)
        assert at or result.gradient_norm > TRAIN.clip_norm, "what is clipped is tested"
        plain.step()
    print(f"{plain.apart():.1e}")
    assert plain.apart() < 5e-6
    for param, slot in optimizer_state._slots(optimizer).items():
        assert torch.equal(param.detach().flatten()[slot.begin : slot.end], slot.main.detach().flatten().to(dtype))


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize(("saved_on", "loaded_on"), [((), ("cpu",)), (("cpu",), ()), (("cpu",), ("cpu",)), ((), ())])
def test_a_state_of_either_kind_is_continued(
    session: Any, monkeypatch: Any, saved_on: tuple[str, ...], loaded_on: tuple[str, ...], distributed: bool
) -> None:
    monkeypatch.setattr(update, "FUSED_ON", saved_on)
    chunks, optimizer = trainable(session, torch.bfloat16)
    for _ in range(2):
        step.train_step(chunks, optimizer, random_batches(), session)
    held, steps = optimizer_state.gather_state(optimizer, parameters(chunks))
    assert steps == 2
    monkeypatch.setattr(update, "FUSED_ON", loaded_on)
    others, other = trainable(session, torch.bfloat16, distributed=distributed)
    for target, source in zip(parameters(others), parameters(chunks), strict=True):
        target.data.copy_(source.data)
    pairs = zip(parameters(others), parameters(chunks), strict=True)
    optimizer_state.set_state(other, {target: held[source] for target, source in pairs}, steps)
    assert is_fused(other) == {bool(loaded_on)}
    continued = step.train_step(others, other, random_batches(), session)
    kept = step.train_step(chunks, optimizer, random_batches(), session)
    assert continued.loss == kept.loss and continued.gradient_norm == pytest.approx(kept.gradient_norm, rel=1e-6)
    new, steps = optimizer_state.gather_state(other, parameters(others))
    assert steps == 3
    held, _ = optimizer_state.gather_state(optimizer, parameters(chunks))
    bit_for_bit = saved_on == loaded_on and not distributed  # which adds up the norm in another order
    ours = [new[param]["main"] for param in parameters(others)]
    theirs = [held[param]["main"] for param in parameters(chunks)]
    assert apart(ours, theirs) <= (0.0 if bit_for_bit else 5e-6)


@pytest.mark.parametrize("distributed", [False, True])
def test_main_weights_are_copied_in_one_launch(session: Any, distributed: bool) -> None:
    chunks, optimizer = trainable(session, torch.bfloat16, distributed=distributed)
    step.train_step(chunks, optimizer, random_batches(), session)
    (inner,) = optimizer_state.inner_optimizers(optimizer)
    with Calls() as calls, torch.no_grad():
        inner._copy_main_params_to_model_params()
    assert calls.seen["aten._foreach_copy_.default"] == 1 and not calls.seen["aten.copy_.default"]


def test_nothing_waits_for_the_device_before_the_loss_is_fetched(session: Any) -> None:
    chunks, optimizer = trainable(session, torch.float32)
    found = step.forward_backward(chunks, random_batches(), session, step.LABELS)
    with Calls() as calls, torch.no_grad():
        update.finalize(list(chunks), sum(part["tokens"] for part in found))  # type: ignore[arg-type]
        optimizer.prepare_grads()
        square = update.gradient_square(optimizer, session.device)
    assert not calls.seen["aten._local_scalar_dense.default"] and float(square) > 0


def test_a_step_without_tokens_has_no_gradient(session: Any) -> None:
    chunks, optimizer = trainable(session, torch.float32)
    empty = [batch._replace(loss_mask=torch.zeros_like(batch.loss_mask)) for batch in random_batches()]
    result = step.train_step(chunks, optimizer, empty, session)
    assert result.applied and (result.loss, result.gradient_norm, result.tokens) == (0.0, 0.0, 0)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_step_leaves_no_cycles(session: Any, recompute: Any) -> None:
    """A tensor in a cycle lives on until Python collects garbage, beside those of the next steps."""
    model = megatron_twin(random_llama(), session, torch.bfloat16, recompute)
    chunks, optimizer = step.make_trainable(model, TRAIN, torch.bfloat16)
    step.train_step(chunks, optimizer, random_batches(), session)
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        step.train_step(chunks, optimizer, random_batches(), session)
        gc.collect()
        assert not [tuple(one.shape) for one in gc.garbage if isinstance(one, Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize("experts", [False, True])
def test_a_trained_model_is_freed(session: Any, experts: bool) -> None:
    chunks, optimizer = trainable(session, torch.float32, experts=experts)
    step.train_step(chunks, optimizer, random_batches(), session)
    weights = weakref.WeakSet(chunks.parameters())
    assert weights
    del chunks, optimizer
    gc.collect()
    assert not weights
