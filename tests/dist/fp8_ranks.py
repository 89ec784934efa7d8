"""What a rank does for test_fp8_layouts.py, which starts it under torchrun: the gradients of a step with FP8 products
and with fake-quantised ones, those of weights added by the product and by Megatron's hook, on one layout after the
other; on LAYOUT:nvfp4, those with nvfp4 inputs that norms and SwiGLU round, and that the layers round; on LAYOUT:ways,
with context parallelism, those of each way to attend.

In: the JSON file to write, and the names of layouts.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from tests.unit.tiny_megatron import random_batches
from tools.layout_parity import layout_plan

DENSE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
EXPERTS = DENSE | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}


def build(layout: str, hf_config: dict[str, Any], session: Any) -> nn.Module:
    """Random weights, equal on ranks that share them (those that do not have the same ones too)."""
    from megatron_edge.model.build import build_model

    recompute = "full" if layout.endswith("RC") else "none"
    model = build_model(hf_config, session.plan, torch.float32, session.device, recompute)
    torch.manual_seed(6)
    for weight in model.parameters():
        weight.data.normal_(0, 0.1)
    return model


@contextlib.contextmanager
def counted_products(calls: list[int]) -> Iterator[None]:
    """Inside, the number of tokens of each product that adds the gradient of a weight."""
    from megatron.core.tensor_parallel import layers

    place = layers.fused_weight_gradient_mlp_cuda
    product = place.wgrad_gemm_accum_fp32

    def counted(x: Tensor, gradient: Tensor, buffer: Tensor) -> None:
        calls.append(len(x))
        product(x, gradient, buffer)

    place.wgrad_gemm_accum_fp32 = counted
    try:
        yield
    finally:
        place.wgrad_gemm_accum_fp32 = product


@contextlib.contextmanager
def added_by_the_hook() -> Iterator[None]:
    """Inside, no product adds the gradient of a weight."""
    from megatron_edge.runtime import weight_gradients

    devices, weight_gradients.ADDED_ON = weight_gradients.ADDED_ON, {}
    try:
        yield
    finally:
        weight_gradients.ADDED_ON = devices


def quantised(layout: str, session: Any, quant: str) -> tuple[nn.Module, Callable[[], tuple[list[float], Tensor]]]:
    """A calibrated model, and what gives the losses of a step and all gradients of this rank's weights."""
    from megatron_edge.compose import compose
    from megatron_edge.model.hf_config import checked_config
    from megatron_edge.quantize import apply, policy
    from megatron_edge.train import step

    hf_config = checked_config(EXPERTS if "E" in layout else DENSE, layout)
    model = build(layout, hf_config, session)
    config = compose([quant, "train.precision=fp32"])
    plan = policy.make_plan(config.quant, config.kv, hf_config)
    matches = apply.insert_quantizers(model, plan)
    batches = random_batches(4)
    apply.calibrate(model, plan, matches, lambda _: step.run_forward(model, batches, session))
    wrapped, _ = step.make_trainable(model, config.train, torch.float32)

    def gradients() -> tuple[list[float], Tensor]:
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        found = step.forward_backward(wrapped, batches, session, step.LABELS)
        flat = [param.main_grad.flatten().clone() for param in wrapped.parameters() if param.requires_grad]
        return [float(part["total"]) for part in found], torch.cat(flat)

    return wrapped, gradients


def compare(layout: str, session: Any) -> dict[str, Any]:
    """Relative differences of the loss and of all gradients, how many layers have FP8 products, how many inputs were
    kept as codes, and how many products added their gradient; whether all is the same where no norm or SwiGLU writes an
    input's codes."""
    from megatron_edge.model import fused
    from megatron_edge.model.layers import RMSNorm, read_by_one
    from megatron_edge.quantize import fp8_gemm, written_inputs

    added_of_values, added_of_codes = [], []
    wrapped, gradients = quantised(layout, session, "quant=fp8")
    with added_by_the_hook():
        losses, expected = gradients()
    with counted_products(added_of_values):
        of_values = gradients()[1]
    used, kept = fp8_gemm.use(wrapped), 0
    written_inputs.use(wrapped)

    def count(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.dtype is torch.float8_e4m3fn
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x), added_by_the_hook():
        theirs, ours = gradients()
    with counted_products(added_of_codes):
        of_codes = gradients()[1]
    norm = expected.norm()
    for owner, name, _ in (found for module in wrapped.modules() for found in read_by_one(module)):
        setattr(owner, name, fused.rms_norm if isinstance(owner, RMSNorm) else fused.swiglu)
    with added_by_the_hook():
        unwritten, alone = gradients()
    return {
        "used": used,
        "same": theirs == unwritten and ours.equal(alone),
        "kept": kept,
        "losses": max((abs(a - b) / abs(b) for a, b in zip(theirs, losses, strict=True)), default=0.0),
        "gradients": float((ours - expected).norm() / norm),
        "norm": float(norm),
        "added": [len(added_of_values), len(added_of_codes)],
        "gradients_added": max(float((one - expected).norm() / norm) for one in (of_values, of_codes)),
    }


def nvfp4(layout: str, session: Any) -> dict[str, Any]:
    """How many of a rank's layers have a norm or SwiGLU write their input; how often one did, and how many inputs were
    rounded in all, beside how many were where the layers do it; whether loss and gradients are the same then."""
    from megatron_edge.quantize import kernels, written_inputs

    wrapped, gradients = quantised(layout, session, "quant=nvfp4")
    with counted_roundings(kernels) as by_layers:
        losses, expected = gradients()
    uses = written_inputs.use(wrapped)
    with counted_roundings(kernels) as made:
        again, ours = gradients()
    return {
        "uses": uses, "written": made["rms_norm_values"] + made["swiglu_values"], "rounded": made["fake_quantize"],
        "by_layers": by_layers["fake_quantize"], "same": losses == again and expected.equal(ours),
        "norm": float(ours.norm()),
    }  # fmt: skip


@contextlib.contextmanager
def counted_roundings(kernels: Any) -> Iterator[Counter[str]]:
    """Calls of the functions that round an input, by name."""
    made: Counter[str] = Counter()
    upstream = {name: getattr(kernels, name) for name in ("fake_quantize", "rms_norm_values", "swiglu_values")}

    def counting(name: str) -> Any:
        def call(*args: Any) -> Any:
            made[name] += not isinstance(args[0], dict) or args[0]["role"] == "input"
            return upstream[name](*args)

        return call

    for name in upstream:
        setattr(kernels, name, counting(name))
    try:
        yield made
    finally:
        for name, function in upstream.items():
            setattr(kernels, name, function)


def ways(layout: str, session: Any) -> dict[str, list[float]]:
    """Relative differences of loss and gradients between attention by a mask and the other ways, for windows of one
    document, and of several."""
    from megatron_edge.compose import compose
    from megatron_edge.model.hf_config import checked_config
    from megatron_edge.train import placement, step

    model = build(layout, checked_config(DENSE, layout), session)
    wrapped, _ = step.make_trainable(model, compose(["train.precision=fp32"]).train, torch.float32)
    whole = random_batches(2)
    documents = torch.zeros_like(whole[0].documents)
    documents[0, 5:] += 1
    documents[0, 17:] += 1
    documents[1, 20:] += 1

    def gradients(batches: list[Any], way: placement.Attends) -> tuple[Tensor, Tensor]:
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        placed = [placement.to_device(batch, session, way) for batch in batches]
        found = step.forward_backward(wrapped, placed, session, step.LABELS)
        flat = [param.main_grad.flatten().clone() for param in wrapped.parameters() if param.requires_grad]
        return torch.stack([part["total"] for part in found]), torch.cat(flat)

    differences = {}
    for way, batches in (
        ("causally", whole), ("within segments", [batch._replace(documents=documents) for batch in whole]),
    ):  # fmt: skip
        pairs = zip(gradients(batches, way), gradients(batches, "by mask"), strict=True)  # type: ignore[arg-type]
        differences[way] = [float((one - other).norm() / other.norm()) for one, other in pairs]
    return differences


def main(output: Path, layouts: list[str]) -> None:
    from torch.distributed import PrefixStore, rendezvous

    from megatron_edge.runtime.session import open_session

    store, rank, _ = next(iter(rendezvous("env://")))
    found = {}
    for layout in layouts:
        place = {"rank": rank, "local_rank": int(os.environ["LOCAL_RANK"]), "store": PrefixStore(layout, store)}
        name, _, what = layout.partition(":")
        with open_session(layout_plan(name), **place, timeout_seconds=300, seed=1) as session:
            found[layout] = session.gather({"": compare, "nvfp4": nvfp4, "ways": ways}[what](name, session))
    if rank == 0:
        output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
