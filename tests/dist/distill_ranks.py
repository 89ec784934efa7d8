"""What a rank does for test_distill_layouts.py, which starts it under torchrun: the distillation's loss on logits that
ranks share, steps of a quantised student with a teacher, and steps of adapters, on one layout after the other.

In: the directory of the two models, and the names of layouts. Out: <layout>.json there. The layout of one process saves
the calibrated students, and adapters after two steps, that the other layouts load.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from tests.unit.plain_distillation import plain_loss
from tools.layout_parity import REFERENCE, REORDERED, SEQ_LENGTH_TOKENS, Float64Sums, layout_plan

WITH_EXPERTS = ("EP2", "TP2ETP2SP")
STEPS, GLOBAL_BATCH, VOCAB, WIDTH = 3, 4, 600, 64
TRAIN = (
    "train=qad", "train.precision=fp32", "train.distill_temperature=2", "train.distill_label_weight=0.2",
    "train.distill_hidden_weight=0.5", f"train.steps={STEPS}", f"train.global_batch={GLOBAL_BATCH}",
    f"train.seq_length_tokens={SEQ_LENGTH_TOKENS}",
)  # fmt: skip
ADAPTERS = (*(one for one in TRAIN if "distill" not in one and one != "train=qad"), "train=lora_qat")
INT4 = ("quant=int4", "quant.group_size=32")
LAYERS = "train.distill_layers_weight=0.5"
# Student, teacher (none: adapters), recipe. Data quantizers would amplify what the order of sums makes of their inputs.
CASES: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "dense": ("tiny", "deep", ("quant=nvfp4_w4a16",)),
    "layers": ("tiny", "tiny", (*INT4, LAYERS)),
    "adapters": ("tiny", None, INT4),
    "experts": ("mixtral", "mixtral", (*INT4, LAYERS)),
    "experts_adapters": ("mixtral", None, INT4),
}


def shared_loss(session: Any) -> dict[str, float]:
    """How far losses and gradients of logits that the tensor ranks share are from torch's of the whole, in float64:
    the distillation's, and the labels' cross-entropy."""
    from megatron_edge.model.cross_entropy import vocab_parallel_cross_entropy
    from megatron_edge.runtime.session import tensor_group
    from megatron_edge.train.distill import distillation_loss

    torch.manual_seed(7)
    logits, hidden = torch.randn(2, 24, VOCAB) * 4, torch.randn(2, 24, WIDTH)
    head, labels = torch.randn(VOCAB, WIDTH) / 3, torch.randint(0, VOCAB, (2, 24))
    whole = logits.double().requires_grad_()
    kl, label = plain_loss(whole, hidden.double() @ head.double().t(), labels, 2.0)
    exact = 0.7 * kl + 0.3 * label
    exact.sum().backward()

    def mine(x: Tensor, dim: int) -> Tensor:
        return x.chunk(session.plan.tp, dim)[session.tp_rank]

    own = mine(logits, 2).clone().requires_grad_()
    given = {"temperature": 2.0, "label_weight": 0.3, "group": tensor_group()}
    losses = distillation_loss(own, hidden, mine(head, 0), labels, **given)  # type: ignore[arg-type]
    losses.loss.sum().backward()
    assert whole.grad is not None and own.grad is not None
    pairs = {"loss": (losses.loss, exact), "kl": (losses.kl, kl), "label": (losses.label_loss, label)}
    pairs["gradient"] = (own.grad, mine(whole.grad, 2))
    alone, part = (x.detach().clone().requires_grad_() for x in (whole, own))
    _, cross_entropy = plain_loss(alone, hidden.double() @ head.double().t(), labels, 1.0)
    cross_entropy.sum().backward()
    pairs["cross-entropy"] = (vocab_parallel_cross_entropy(part * 1, labels, tensor_group()), cross_entropy)
    pairs["cross-entropy"][0].sum().backward()
    assert alone.grad is not None and part.grad is not None
    pairs["cross-entropy's gradient"] = (part.grad, mine(alone.grad, 2))
    return {name: float((a.double() - b).abs().max()) for name, (a, b) in pairs.items()}


def shard(source: Any, session: Any) -> nn.ModuleList:
    from megatron_edge.model.build import build_model, load_weights

    model = build_model(source.hf_config, session.plan, torch.float32, session.device)
    load_weights(model, source.read, source.hf_config, session)
    return model


def steps(case: str, layout: str, directory: Path, session: Any) -> list[dict[str, float]]:
    """The metrics of each step, through the product's own import, calibration, checkpoint and training."""
    from megatron_edge import checkpoint
    from megatron_edge.compose import compose
    from megatron_edge.model.source import open_source
    from megatron_edge.quantize import adapters, apply, policy
    from megatron_edge.train import step
    from megatron_edge.train.data import BatchPlan, load_data
    from megatron_edge.train.distill import Distillation

    student, teacher, recipe = CASES[case]
    config = compose([*(TRAIN if teacher else ADAPTERS), *recipe, f"model.source={directory / student}", f"run_dir={directory}"])
    source = open_source(directory / student)
    plan = policy.make_plan(config.quant, config.kv, source.hf_config)
    cache = directory / "data"
    data = load_data(config.data, source.tokenizer(), SEQ_LENGTH_TOKENS, 1, cache, session.on_rank_0)
    model = shard(source, session)
    matches = apply.insert_quantizers(model, plan)
    saved = directory / "checkpoints" / case
    if layout == REFERENCE:
        apply.calibrate(model, plan, matches, lambda _: None)
        checkpoint.save_checkpoint(saved, 0, model, None, plan, session, extra={}, keep=1)
    start = checkpoint.newest_intact(saved) if layout == REFERENCE else checkpoint.CheckpointInfo(
        saved / "step_00000000", 0, {})
    assert start is not None
    checkpoint.load_checkpoint(start, model, None, plan, session)
    objective: step.Objective = step.LABELS
    if teacher is not None:
        objective = Distillation(shard(open_source(directory / teacher), session), config.train, session)
    else:
        adapters.attach(model, session, rank=8, alpha=16.0, seed=1)
    split = layout.endswith("DO")
    wrapped, optimizer = step.make_trainable(model, config.train, torch.float32, distributed_optimizer=split)
    schedule = step.learning_rate_schedule(optimizer, config.train)
    schedule.step(1)
    batches, metrics = BatchPlan(data.train, GLOBAL_BATCH, 1), []
    for at in range(STEPS):
        if teacher is None and at == STEPS - 1:
            if layout == REFERENCE:
                checkpoint.save_checkpoint(saved, at, wrapped, optimizer, plan, session, extra={}, keep=2)
            found = checkpoint.find_newest(saved, session)
            assert found is not None
            checkpoint.load_checkpoint(found, wrapped, optimizer, plan, session)
        mine = batches.micro_batches(at, session.dp_rank, session.plan.dp)
        result = step.train_step(wrapped, optimizer, mine, session, objective)
        metrics.append({"loss": result.loss, "gradient_norm": result.gradient_norm, **result.parts})
        schedule.step(1)
    return metrics


def main(directory: Path, layouts: list[str]) -> None:
    from torch.distributed import PrefixStore, rendezvous

    from megatron_edge.runtime.session import open_session

    store, rank, _ = next(iter(rendezvous("env://")))
    for layout in layouts:
        sums = Float64Sums() if layout == REORDERED else contextlib.nullcontext()
        place = {"rank": rank, "local_rank": int(os.environ["LOCAL_RANK"]), "store": PrefixStore(layout, store)}
        with open_session(layout_plan(layout), **place, timeout_seconds=600, seed=1) as session, sums:
            found: dict[str, Any] = {"shared_loss": shared_loss(session)}
            for case in CASES:
                if layout in (REFERENCE, REORDERED) or case.startswith("experts") == (layout in WITH_EXPERTS):
                    found[case] = steps(case, layout, directory, session)
            everyone = session.gather(found)
            found["shared_loss"] = {
                name: max(one["shared_loss"][name] for one in everyone) for name in found["shared_loss"]
            }
            if rank == 0:
                (directory / f"{layout}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
