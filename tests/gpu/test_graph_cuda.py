"""A recorded step beside the same step launched kernel by kernel: losses, gradient norms, weights of several steps."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1] / "unit")]

from tiny_megatron import hf_config_of, random_batches, random_llama  # noqa: E402

STEPS = 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.fixture(scope="module")
def session() -> Iterator[Any]:
    from megatron_edge.contracts import ParallelPlan
    from megatron_edge.runtime.session import open_session

    with open_session(ParallelPlan(), rank=0, local_rank=0, store=None, timeout_seconds=300, seed=1) as opened:
        yield opened


def build(llama: Any, session: Any, recompute: Any = "none", backend: Any = "local") -> Any:
    from megatron_edge.model.build import build_model, load_weights

    tensors, config = llama.state_dict(), hf_config_of(llama)
    model = build_model(config, session.plan, torch.bfloat16, session.device, recompute, backend)

    def read(name: str, rows: slice | None, cols: slice | None) -> torch.Tensor:
        part = tensors[name][rows if rows else slice(None)]
        return part if cols is None else part[:, cols]

    load_weights(model, read, config, session)
    return model


def one_by_one(model: Any, batches: list[Any], session: Any, objective: Any) -> Any:
    """Attention goes in all micro-batches as in the recorded step."""
    from megatron_edge.train import placement, step

    _, placed = placement.place(batches, session)
    return step.forward_backward(model, placed, session, objective)


def run(
    llama: Any, session: Any, quant: str, kv: str, mode: str, recorded: bool, recompute: str = "none"
) -> dict[str, Any]:
    from megatron_edge.compose import compose
    from megatron_edge.model.build import named_shards
    from megatron_edge.quantize import apply, fp8_gemm, policy, written_inputs
    from megatron_edge.train import step
    from megatron_edge.train.data import Batch
    from megatron_edge.train.distill import Distillation
    from megatron_edge.train.graph import StepGraph

    model = build(llama, session, recompute)
    composed = compose([f"quant={quant}", f"kv={kv}", f"train={mode}", "train.distill_hidden_weight=0.5",
                        "train.distill_layers_weight=0.5",
                        "quant.algorithm=max", "train.learning_rate=1e-4"])  # fmt: skip
    plan = policy.make_plan(composed.quant, composed.kv, hf_config_of(llama))
    batches = random_batches()
    matches = apply.insert_quantizers(model, plan)
    apply.calibrate(model, plan, matches, lambda _: step.run_forward(model, batches, session))
    stream = torch.cuda.Stream() if recorded else None
    wrapped, optimizer = step.make_trainable(model, composed.train, torch.bfloat16, stream=stream)
    written_inputs.use(wrapped, not fp8_gemm.absent())
    objective = Distillation(build(llama, session), composed.train, session) if mode == "qad" else step.LABELS
    gradients = StepGraph(stream) if stream is not None else one_by_one
    found = []
    for at in range(STEPS):  # other samples at each step; every second holds two documents
        mine = [batch._replace(tokens=batch.tokens.roll(at, 1), labels=batch.labels.roll(at, 1)) for batch in batches]
        if at % 2:
            half = mine[0].tokens.shape[1] // 2
            mine[1] = mine[1]._replace(documents=(mine[1].positions >= half).int(), positions=mine[1].positions % half)
        found.append(step.train_step(wrapped, optimizer, mine, session, objective, gradients))
        if at == STEPS // 2:  # a larger forward pass between, for which Megatron replaces its buffers
            step.evaluate(wrapped, [Batch(*(torch.cat(parts) for parts in zip(*mine, strict=True)))], session)
    weights = {name: param.detach().float() for name, param in named_shards(wrapped).items()}
    return {"losses": [r.loss for r in found], "norms": [r.gradient_norm for r in found], "weights": weights}


@pytest.mark.parametrize("mode", ["qat", "qad"])
@pytest.mark.parametrize(("quant", "kv"), [("none", "none"), ("int4", "fp8"), ("nvfp4", "nvfp4"), ("fp8", "int8")])
def test_a_recorded_step_is_the_step(session: Any, quant: str, kv: str, mode: str) -> None:
    if quant == "none" and mode == "qad":
        pytest.skip("nothing to distil into")
    compare(session, quant, kv, mode)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_a_recorded_step_recomputes(session: Any, recompute: str) -> None:
    compare(session, "int4", "fp8", "qat", recompute)


def compare(session: Any, quant: str, kv: str, mode: str, recompute: str = "none") -> None:
    llama = random_llama(hidden_size=256, intermediate_size=512)  # two ranks: whole blocks of 128
    eager, again, recorded = (run(llama, session, quant, kv, mode, graph, recompute) for graph in (False, False, True))

    def apart(other: dict[str, Any], what: str) -> float:
        return max(abs(a - b) for a, b in zip(eager[what], other[what], strict=True))

    def weights_apart(other: dict[str, Any]) -> float:
        return max(float((w - other["weights"][name]).abs().max()) for name, w in eager["weights"].items())

    for what in ("losses", "norms"):
        print(f"{quant} {kv} {mode}: {what} {apart(recorded, what):.1e}, eager twice {apart(again, what):.1e}")
        assert apart(recorded, what) <= 1e-6 + 3 * apart(again, what)
    print(f"weights {weights_apart(recorded):.1e}, eager twice {weights_apart(again):.1e}; losses {eager['losses']}")
    assert weights_apart(recorded) <= 1e-6 + 3 * weights_apart(again)
    assert len(set(recorded["losses"])) == STEPS, "replayed on new samples"
