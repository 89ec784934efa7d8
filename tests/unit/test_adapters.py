"""Adapters against plain autograd, their merge, and their checkpoints; one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_megatron import hf_config_of, megatron_twin, random_batches, random_llama
from torch import nn

from megatron_edge import checkpoint, memory
from megatron_edge.checks import check_config
from megatron_edge.compose import compose
from megatron_edge.contracts import InputError, ParallelPlan
from megatron_edge.model.build import named_shards
from megatron_edge.quantize import adapters, apply, policy
from megatron_edge.train import step

RANK, ALPHA = 4, 12.0


def quantised(session: Any, quant: str, dtype: torch.dtype = torch.float32) -> tuple[nn.ModuleList, Any, Any]:
    """(model, plan, train): 8 linear layers with calibrated quantizers."""
    options = ["train=lora_qat", f"quant={quant}", "train.learning_rate=0.01", "train.steps=4", "train.clip_norm=0"]
    config = compose(options)
    llama = random_llama(hidden_size=128, intermediate_size=256)
    model = megatron_twin(llama, session, dtype)
    plan = policy.make_plan(config.quant, config.kv, hf_config_of(llama))
    matches = apply.insert_quantizers(model, plan)
    apply.calibrate(model, plan, matches, lambda _: step.run_forward(model, random_batches(), session))
    return model, plan, config.train


def with_adapters(
    model: nn.ModuleList, train: Any, session: Any, distributed: bool = False
) -> tuple[nn.ModuleList, Any]:
    assert adapters.attach(model, session, rank=RANK, alpha=ALPHA, seed=1) == 8
    dtype = next(model.parameters()).dtype
    wrapped, optimizer = step.make_trainable(model, train, dtype, distributed_optimizer=distributed)
    step.learning_rate_schedule(optimizer, train).step(1)
    return wrapped, optimizer


@pytest.mark.parametrize("quant", ["int4", "nvfp4_w4a16", "fp8"])
def test_gradients_are_those_of_autograd(session: Any, quant: str) -> None:
    """A weight's gradient in ordinary QAT, led by torch through W0 + alpha / rank B A."""
    model, _, train = quantised(session, quant)
    plain, ordinary = step.make_trainable(quantised(session, quant)[0], train, torch.float32)
    step.train_step(plain, ordinary, random_batches(), session)
    of_weight = {name: param.main_grad for name, param in named_shards(plain).items()}

    wrapped, optimizer = with_adapters(model, train, session)
    torch.manual_seed(3)
    for adapter in model[0].adapters:  # not merged: the weight is still W0, and B at 0 would hide A's gradient
        for part in adapter.b:
            part.data.normal_(0, 0.1)
    before = [(one.a.detach().clone(), torch.cat(list(one.b)).detach()) for one in model[0].adapters]
    step.train_step(wrapped, optimizer, random_batches(), session)
    for adapter, (a, b) in zip(model[0].adapters, before, strict=True):
        a.requires_grad_(), b.requires_grad_()
        wanted = of_weight[adapter.name + ".weight"]
        ((adapter.base + ALPHA / RANK * b @ a) * wanted).sum().backward()
        for ours, theirs in ((adapter.a, a), (torch.cat([part.main_grad for part in adapter.b]), b)):
            found = ours.main_grad if ours is adapter.a else ours
            assert theirs.grad is not None and theirs.grad.abs().max() > 0
            torch.testing.assert_close(found, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_adapters_move_and_the_model_is_the_merged_one(session: Any, dtype: torch.dtype) -> None:
    """Scales stay those of the calibration; without the adapters the model computes the same, bit for bit."""
    model, _, train = quantised(session, "int4", dtype)
    before = {name: param.detach().clone() for name, param in named_shards(model).items()}
    maxima = {name: q._amax.clone() for name, q in apply.enabled_quantizers(model).items()}
    wrapped, optimizer = with_adapters(model, train, session)
    losses = [step.train_step(wrapped, optimizer, random_batches(), session).loss for _ in range(4)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.05
    found = list(model[0].adapters)
    after = {name: param.detach().clone() for name, param in named_shards(model).items()}
    for adapter in found:
        name = adapter.name + ".weight"
        assert torch.equal(adapter.base, before[name]) and adapter.weight.grad is None
        wanted = before[name].float() + ALPHA / RANK * torch.cat(list(adapter.b)) @ adapter.a
        torch.testing.assert_close(
            after[name], wanted.to(dtype), rtol=2**-7 if dtype is torch.bfloat16 else 1e-6, atol=1e-7
        )
        assert not torch.equal(after[name], before[name])
    moved = {adapter.name + ".weight" for adapter in found}
    assert all(torch.equal(after[name], before[name]) for name in set(before) - moved)
    assert all(torch.equal(q._amax, maxima[name]) for name, q in apply.enabled_quantizers(model).items())
    loss = step.evaluate(wrapped, random_batches(), session)
    adapters.detach(wrapped)
    assert step.evaluate(wrapped, random_batches(), session) == loss
    assert not any("adapters" in name for name, _ in model.named_parameters())


def test_recomputed_layers_pass_the_gradient_on(session: Any) -> None:
    """The first layer's input is a frozen embedding, which wants none by itself."""
    norms = []
    for recompute in (None, "full"):
        model, _, train = quantised(session, "int4")
        config = model[0].config
        config.recompute_granularity, config.recompute_method, config.recompute_num_layers = recompute, "uniform", 1
        wrapped, optimizer = with_adapters(model, train, session)
        norms.append(step.train_step(wrapped, optimizer, random_batches(), session).gradient_norm)
        first = [one.b[0].main_grad.abs().max() for one in model[0].adapters if ".layers.0." in one.name]
        assert len(first) == 4 and all(value > 0 for value in first)
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


@pytest.mark.parametrize("distributed", [False, True])
def test_a_loaded_checkpoint_goes_on_bit_for_bit(session: Any, tmp_path: Path, distributed: bool) -> None:
    model, plan, train = quantised(session, "nvfp4_w4a16")
    wrapped, optimizer = with_adapters(model, train, session, distributed)
    for _ in range(2):
        step.train_step(wrapped, optimizer, random_batches(), session)
    checkpoint.save_checkpoint(tmp_path, 2, wrapped, optimizer, plan, session, extra={}, keep=1)
    saved = checkpoint.newest_intact(tmp_path)
    assert saved is not None
    went_on = [step.train_step(wrapped, optimizer, random_batches(), session) for _ in range(2)]

    again, _, _ = quantised(session, "nvfp4_w4a16")
    for param in again.parameters():
        param.data.zero_()
    wrapped, optimizer = with_adapters(again, train, session, distributed)
    checkpoint.load_checkpoint(saved, wrapped, optimizer, plan, session)
    assert [step.train_step(wrapped, optimizer, random_batches(), session) for _ in range(2)] == went_on

    # What knows nothing of adapters (evaluate, export) finds an ordinary checkpoint of the merged weights.
    other, _, _ = quantised(session, "nvfp4_w4a16")
    checkpoint.load_checkpoint(saved, other, None, plan, session)
    ordinary, _, _ = quantised(session, "nvfp4_w4a16")
    twin, twin_optimizer = with_adapters(ordinary, train, session, distributed)
    checkpoint.load_checkpoint(saved, twin, twin_optimizer, plan, session)
    merged = named_shards(other)
    assert all(torch.equal(param, merged[name]) for name, param in named_shards(ordinary).items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train.lora_rank=4",), "train.lora_rank=4: allowed is a number with train=lora_qat, null with any other"),
        (("train=lora_qat", "train.lora_alpha=null"), "train.lora_alpha=None: allowed is a number"),
        (("train=lora_qat", "quant=none"), "quant.weight='none': allowed is a format with train=lora_qat"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_config(compose(arguments))


def test_their_bytes_are_planned(session: Any) -> None:
    """A second copy of the adapted weights; gradients and moments of the adapters alone."""
    model, _, _ = quantised(session, "int4")
    sizes = hf_config_of(random_llama(hidden_size=128, intermediate_size=256))
    options = ["train.precision=fp32", "train.seq_length_tokens=32"]
    (whole,) = memory.training_plan(compose(["train=qat", *options]), sizes, ParallelPlan())
    config = compose(["train=lora_qat", f"train.lora_rank={RANK}", *options])
    (planned,) = memory.training_plan(config, sizes, ParallelPlan())
    adapters.attach(model, session, rank=RANK, alpha=ALPHA, seed=1)
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    bases = sum(adapter.base.nbytes for adapter in model[0].adapters)
    assert (planned.gradients_bytes, planned.optimizer_bytes) == (4 * trained, 8 * trained)
    assert planned.weights_bytes == whole.weights_bytes + bases + 4 * trained
    (half,) = memory.training_plan(config, sizes, ParallelPlan(tp=2, world_size=2))
    assert planned.gradients_bytes / 2 < half.gradients_bytes < planned.gradients_bytes, "some of it on both ranks"
