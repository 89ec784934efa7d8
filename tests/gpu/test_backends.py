"""model.backend=te and =apex beside local on one CUDA device: the same model, the same quantizers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # TransformerEngine multiplies fp32 in TF32 else; before CUDA starts

import pytest
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1] / "unit")]

from tiny_megatron import hf_config_of, random_batches, random_llama  # noqa: E402

MODULES = {"te": "transformer_engine", "apex": "fused_layer_norm_cuda"}
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.fixture(scope="module")
def session() -> Iterator[Any]:
    from megatron_edge.contracts import ParallelPlan
    from megatron_edge.runtime.session import open_session

    with open_session(ParallelPlan(), rank=0, local_rank=0, store=None, timeout_seconds=300, seed=1) as opened:
        yield opened


def run(llama: Any, session: Any, backend: str, weight: str, activation: str) -> dict[str, Any]:
    """Logits before and after quantization, maxima, and the loss and gradient norm of a step."""
    from megatron_edge.compose import compose
    from megatron_edge.model.build import build_model, load_weights
    from megatron_edge.quantize import apply, policy
    from megatron_edge.train import step

    tensors, config = llama.state_dict(), hf_config_of(llama)
    model = build_model(config, session.plan, torch.float32, session.device, backend=backend)

    def read(name: str, rows: slice | None, cols: slice | None) -> torch.Tensor:
        part = tensors[name][rows if rows else slice(None)]
        return part if cols is None else part[:, cols]

    load_weights(model, read, config, session)
    batches = random_batches()
    plain = step.token_logits(model, batches, session)
    composed = compose([f"quant.weight={weight}", f"quant.activation={activation}", "quant.name=own",
                        f"quant.group_size={32 if weight == 'int4' else 16 if weight == 'nvfp4' else 0}"])  # fmt: skip
    plan = policy.make_plan(composed.quant, composed.kv, config)
    matches = apply.insert_quantizers(model, plan)
    apply.calibrate(model, plan, matches, lambda _: step.run_forward(model, batches, session))
    maxima = {name: q._amax.clone() for name, q in apply.enabled_quantizers(model).items() if hasattr(q, "_amax")}
    quantised = step.token_logits(model, batches, session)
    wrapped, optimizer = step.make_trainable(model, composed.train, torch.float32)
    result = step.train_step(wrapped, optimizer, batches, session)
    return {"plain": plain, "maxima": maxima, "quantised": quantised, "loss": result.loss, "norm": result.gradient_norm}


@pytest.mark.parametrize("backend", MODULES)
@pytest.mark.parametrize(("weight", "activation"), [("int4", "none"), ("nvfp4", "nvfp4"), ("fp8", "fp8")])
def test_backends_are_the_same_model(session: Any, backend: str, weight: str, activation: str) -> None:
    """Limits are three times what summing in float64 changes."""
    from tools.layout_parity import Float64Sums

    if find_spec(MODULES[backend]) is None:
        pytest.skip(f"needs {MODULES[backend]}")
    llama = random_llama(hidden_size=128, intermediate_size=256)
    local, other = (run(llama, session, name, weight, activation) for name in ("local", backend))
    with Float64Sums():
        reordered = run(llama, session, "local", weight, activation)
    weights = {name for name in local["maxima"] if name.endswith("weight_quantizer")}
    assert set(local["maxima"]) == set(other["maxima"]) and weights
    assert all(torch.equal(local["maxima"][name], other["maxima"][name]) for name in weights), "maxima of equal weights"
    found, floor = apart(local, other, weights), apart(local, reordered, weights)
    for what, value in found.items():
        print(f"{backend} {weight}/{activation}: {what} {value:.1e}, noise floor {floor[what]:.1e}")
    assert found["logits"] <= 3 * floor["logits"]
    if activation == "none":
        assert found["loss"] <= 3 * floor["loss"]


def apart(one: dict[str, Any], other: dict[str, Any], weights: set[str]) -> dict[str, float]:
    data = [(one["maxima"][name], other["maxima"][name]) for name in set(one["maxima"]) - weights]
    return {
        "maxima of data": max((float(((a - b) / b).abs().max()) for a, b in data), default=0.0),
        "logits": float((one["plain"] - other["plain"]).abs().max()),
        "quantised logits": float((one["quantised"] - other["quantised"]).abs().max()),
        "loss": abs(one["loss"] - other["loss"]),
        "gradient norm": abs(one["norm"] / other["norm"] - 1),
    }
