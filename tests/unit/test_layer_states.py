"""A student drawn to its teacher's layers: loss and gradients against transformers with hooks, bytes, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain_distillation import plain_loss
from test_distill import save
from test_memory import TINY
from tiny_megatron import megatron_twin, random_batches, random_llama
from torch import Tensor

from megatron_edge import memory
from megatron_edge.checks import check_config
from megatron_edge.compose import compose
from megatron_edge.contracts import InputError, ParallelPlan
from megatron_edge.jobs.teacher import check_teacher
from megatron_edge.model.build import named_shards
from megatron_edge.train import step
from megatron_edge.train.distill import Distillation

LAYERS, WEIGHT = 3, 4.0
# Parameters that Megatron holds as transformers does.
TWINS = {"embedding.word_embeddings.weight": "model.embed_tokens.weight"} | {
    f"decoder.layers.{layer}.{ours}": f"model.layers.{layer}.{theirs}"
    for layer in range(LAYERS)
    for ours, theirs in {
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "input_layernorm.weight": "input_layernorm.weight",
    }.items()
}


def plain(dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, mean distance of the layers, and gradients, in transformers and torch."""
    ours, theirs = (random_llama(seed, num_hidden_layers=LAYERS).to(dtype) for seed in (3, 4))
    seen: list[Tensor] = []
    for model in (ours, theirs):  # the last of transformers' hidden_states has passed the final norm
        for layer in model.model.layers:
            layer.register_forward_hook(lambda _, inputs, out: seen.append(out[0] if isinstance(out, tuple) else out))
    tokens, mask, labels = (
        torch.cat([getattr(batch, name) for batch in random_batches()]) for name in ("tokens", "loss_mask", "labels")
    )
    logits, of_teacher = ours(tokens).logits, theirs(tokens).logits.detach()
    kl, _ = plain_loss(logits, of_teacher, labels, 1.0)
    pairs = zip(seen[:LAYERS], seen[LAYERS:], strict=True)
    distances = [2 * (1 - torch.cosine_similarity(a, b.detach(), -1)) for a, b in pairs]
    apart = torch.stack(distances)[:, mask].mean()
    loss = kl[mask].mean() + WEIGHT * apart
    loss.backward()
    return loss, apart, {name: weight.grad for name, weight in ours.named_parameters() if weight.grad is not None}


def distilled(
    session: Any, recompute: Any = "none", dtype: torch.dtype = torch.float32, weight: float = WEIGHT
) -> tuple[float, float, dict[str, Tensor]]:
    """The same through the product."""
    train = compose(["train=qad", f"train.distill_layers_weight={weight}"]).train
    ours, theirs = (random_llama(seed, num_hidden_layers=LAYERS) for seed in (3, 4))
    objective = Distillation(megatron_twin(theirs, session, dtype), train, session)
    model, _ = step.make_trainable(megatron_twin(ours, session, dtype, recompute), train, dtype)
    found = step.forward_backward(model, random_batches(), session, objective)
    total, tokens, apart = step._reduce(found, session, ("layers_loss_per_token",))
    gradients = {name: weight.main_grad for name, weight in named_shards(model).items()}  # type: ignore[attr-defined]
    return total / tokens, apart / tokens, gradients


def test_loss_and_gradients_are_those_of_transformers(session: Any) -> None:
    """With and without recomputing; limits are three times what transformers' fp32 is off its float64."""
    exact, single = plain(torch.float64), plain(torch.float32)
    for recompute in ("none", "selective", "full"):
        ours = distilled(session, recompute)
        for value, wide, narrow in zip(ours[:2], exact[:2], single[:2], strict=True):
            assert value == pytest.approx(wide.item(), rel=3e-6), float(narrow - wide)
        for mine, theirs in TWINS.items():
            floor = float((single[2][theirs] - exact[2][theirs]).abs().max())
            apart = float((ours[2][mine] - exact[2][theirs]).abs().max())
            print(f"{recompute} {mine}: {apart:.1e} of {float(exact[2][theirs].abs().max()):.1e} (noise {floor:.1e})")
            assert apart <= 3 * floor


def test_bf16_has_about_the_gradients_of_fp32(session: Any) -> None:
    """Limits are three times what bf16 alone makes of the gradients without the layers."""

    def apart(weight: float) -> dict[str, float]:
        (*_, single), (*_, half) = (distilled(session, "full", one, weight) for one in (torch.float32, torch.bfloat16))
        return {name: float((half[name] - single[name]).norm() / single[name].norm()) for name in TWINS}

    floor, found = apart(1e-9), apart(WEIGHT)
    for name in TWINS:
        print(f"{name}: {found[name]:.3f} (noise {floor[name]:.3f})")
        assert found[name] <= 3 * floor[name], name


def test_the_loss_of_a_step_has_the_layers_part(session: Any) -> None:
    """And a teacher equal to the student draws it nowhere."""
    train = compose(["train=qad", f"train.distill_layers_weight={WEIGHT}"]).train
    for seed, is_apart in ((4, True), (3, False)):
        student, teacher = random_llama(3), random_llama(seed)
        model, optimizer = step.make_trainable(megatron_twin(student, session), train, torch.float32)
        objective = Distillation(megatron_twin(teacher, session), train, session)
        result = step.train_step(model, optimizer, random_batches(), session, objective)
        kl, layers = (result.parts[name] for name in ("kl_nats_per_token", "layers_loss_per_token"))
        assert result.loss == pytest.approx(kl + WEIGHT * layers, rel=1e-6)
        assert (layers > 0.1) == is_apart and (is_apart or layers < 1e-9)


def test_states_of_layers_are_planned() -> None:
    """A teacher's of all micro-batches on the stage that has the layer; a student's own are what its norms keep."""
    options = ["train=qad", "train.seq_length_tokens=64", "train.distill_layers_weight=1"]
    layers, width = TINY["num_hidden_layers"], TINY["hidden_size"]
    for precision, size in (("bf16", 2), ("fp32", 4)):
        with_layers, without = (
            compose([*options, f"train.precision={precision}", f"train.distill_layers_weight={weight}"])
            for weight in (1, 0)
        )
        for layout in (ParallelPlan(), ParallelPlan(pp=2, world_size=2), ParallelPlan(cp=2, world_size=2)):
            pairs = zip(*(memory.training_plan(one, TINY, layout, TINY) for one in (with_layers, without)), strict=True)
            more = [(a.teacher_bytes - b.teacher_bytes, a.activations_bytes - b.activations_bytes) for a, b in pairs]
            state = size * width * 64 // layout.cp
            assert [teacher for teacher, _ in more] == [
                layers // layout.pp * state * with_layers.train.global_batch // layout.dp
            ] * layout.pp
            assert all(own == 0 for _, own in more)


def test_a_teacher_of_other_layers_is_refused(tmp_path: Path) -> None:
    words = ["<unk>", "<eos>", "one", "two"]
    student = save(tmp_path / "student", words)
    options = ["train=qad", f"model.source={tmp_path / 'student'}", "train.distill_layers_weight=1"]
    config = compose([*options, "train.seq_length_tokens=32"])
    for name, changes, text in (
        ("deep", {"num_hidden_layers": 4}, "has 4 layers, the student 2; allowed is 0"),
        ("thin", {"hidden_size": 32}, "have 32 channels, the student's 64; allowed is 0"),
    ):
        with pytest.raises(InputError, match=f"train.distill_layers_weight=1.0: compares .*{text}"):
            check_teacher(config, student, save(tmp_path / name, words, **changes), ParallelPlan())
    with pytest.raises(InputError, match=r"train.distill_layers_weight=1.0: allowed is 0.0 with train.mode=qat"):
        check_config(compose(["train.distill_layers_weight=1"]))
