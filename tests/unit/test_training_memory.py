"""The planner of training memory against what autograd keeps of our own Megatron model, and against peaks on GPUs."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_megatron import one_process

from megatron_edge import compose, memory
from megatron_edge.config import RunConfig
from megatron_edge.contracts import ParallelPlan
from megatron_edge.families import dims_of
from megatron_edge.model.build import build_model, chunks_of, forward
from megatron_edge.model.cross_entropy import vocab_parallel_cross_entropy
from megatron_edge.model.hf_config import checked_config
from megatron_edge.quantize import apply, fp8_gemm, plain_modelopt, written_inputs
from megatron_edge.quantize.policy import make_plan
from megatron_edge.train.data import Batch
from megatron_edge.train.placement import to_device
from tools import layout_speed

TOKENS = 64
DENSE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
    "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
EXPERTS = DENSE | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN3 = DENSE | {"architectures": ["Qwen3ForCausalLM"]}
MODELS = {
    "dense": DENSE, "experts": EXPERTS, "heads for each": DENSE | {"num_key_value_heads": 4}, "norms": QWEN3,
    "norms, one group": QWEN3 | {"num_key_value_heads": 1}, "norms, heads for each": QWEN3 | {"num_key_value_heads": 4},
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def session() -> Any:
    with one_process() as opened:
        yield opened


def configured(*arguments: str) -> RunConfig:
    return compose.compose([f"train.seq_length_tokens={TOKENS}", "train.precision=bf16", *arguments])


def built(raw: dict[str, Any], config: RunConfig, session: Any) -> tuple[Any, Batch]:
    """A model with random weights, and a window of two documents, which needs a mask."""
    hf_config, torch_dtype = checked_config(raw, "the test's model"), DTYPES[config.train.precision]
    model = build_model(hf_config, session.plan, torch_dtype, session.device, config.parallel.recompute).train()
    for weight in model.parameters():
        weight.data.normal_(0, 0.05)
    ids = torch.randint(0, raw["vocab_size"], (1, TOKENS))
    places, counted = torch.arange(TOKENS)[None], torch.ones_like(ids, dtype=torch.bool)
    documents = (places >= TOKENS // 2).int()
    return model, Batch(ids, documents, places % (TOKENS // 2), counted, ids.roll(-1, 1))


def saved_bytes(raw: dict[str, Any], config: RunConfig, session: Any) -> tuple[int, int]:
    """(bytes that autograd keeps of a forward pass with loss, those of weights that are kept for the step)."""
    model, batch = built(raw, config, session)
    plan = make_plan(config.quant, config.kv, checked_config(raw, "the test's model"))
    if plan.rules or plan.kv != "none":
        apply.calibrate(
            model,
            plan,
            apply.insert_quantizers(model, plan),
            lambda _: forward(chunks_of(model)[0], to_device(batch, session)),
        )
    apply.set_weight_cache(model, config.train.cache_weights)
    if config.train.fp8_gemm:
        fp8_gemm.use(model)
    written_inputs.use(model)
    return kept_by_autograd(model, batch, session)


def kept_by_autograd(model: Any, batch: Batch, session: Any) -> tuple[int, int]:
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor too, or its place would be used again
        return tensor

    with apply.constant_weights(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(model[0], to_device(batch, session), labels=batch.labels)
        kept = [module._kept for module in model.modules() if getattr(module, "_kept", None) is not None]
        operands = [getattr(module, "_kept_operand", None) for module in model.modules()]
        kept += [operand[0] for operand in operands if operand is not None]
    weights = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    activations = sum(size for place, (size, _) in found.items() if place not in weights)
    return activations, sum(weights.values())


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("raw", MODELS.values(), ids=MODELS)
def test_a_layers_activations_are_what_autograd_keeps(
    raw: dict[str, Any], precision: str, recompute: str, session: Any
) -> None:
    """Two more layers keep two layers' bytes: to the byte, but for a checkpoint's small tensors."""
    config = configured(f"train.precision={precision}", f"parallel.recompute={recompute}", "quant=none")
    two, _ = saved_bytes(raw, config, session)
    four, _ = saved_bytes(raw | {"num_hidden_layers": 4}, config, session)
    dims = dims_of(checked_config(raw, "the test's model"))
    planned = memory.layer_activations_bytes(config, dims, ParallelPlan())
    if recompute == "full":
        planned = memory.ACTIVATION_BYTES[precision] * dims.hidden_size
    assert (four - two) / (2 * TOKENS) == pytest.approx(planned, rel=1e-4)


@pytest.mark.parametrize("precision", DTYPES)
def test_the_loss_keeps_the_logits_alone(precision: str, session: Any) -> None:
    """More words: so many more logits in the activations' dtype, and nothing beside them."""
    config, sizes = configured(f"train.precision={precision}", "quant=none"), (512, 1536)
    models = [DENSE | {"vocab_size": size} for size in sizes]
    few, many = (saved_bytes(raw, config, session)[0] for raw in models)
    assert many - few == TOKENS * (sizes[1] - sizes[0]) * memory.ACTIVATION_BYTES[precision]
    plans = [memory.training_plan(config, checked_config(raw, "the test's model"), ParallelPlan())[0] for raw in models]
    largest = memory.ACTIVATION_BYTES[precision] * (sizes[1] - sizes[0]) * DENSE["hidden_size"]  # gradient of the table
    assert plans[1].activations_bytes - plans[0].activations_bytes - largest == many - few


def test_a_tokens_loss_keeps_a_label_and_two_numbers(session: Any) -> None:
    made, found = torch.randn(TOKENS, 1, 512, dtype=torch.bfloat16, requires_grad=True) * 1, []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: found.append(tensor) or tensor, lambda tensor: tensor):
        vocab_parallel_cross_entropy(made, torch.zeros(TOKENS, 1, dtype=torch.long))
    assert sum(tensor.nbytes for tensor in found) - made.nbytes == TOKENS * memory.LOSS_ROW_BYTES


@pytest.mark.parametrize(
    "arguments",
    [("quant=nvfp4", "kv=fp8"), ("quant=int4", "quant.embedding=int8"), ("quant=fp8", "train.fp8_gemm=true")],
)
def test_quantizers_keep_a_copy_of_the_weights(arguments: tuple[str, ...], session: Any) -> None:
    """And of activations no more than without them, but where an input is rounded that attention keeps as well: one
    byte of each number, where that is kept as FP8 codes."""
    config, plain = configured(*arguments), configured("quant=none")
    before, nothing = saved_bytes(DENSE, plain, session)
    after, weights = saved_bytes(DENSE, config, session)
    hf_config = checked_config(DENSE, "the test's model")
    (planned,) = memory.training_plan(config, hf_config, ParallelPlan())
    maxima = 4 * memory.count_parameters(hf_config).linears // 64 if config.quant.weight == "int4" else 0
    assert nothing == 0 and planned.quantizers_bytes - maxima == weights
    more = [memory.layer_activations_bytes(one, dims_of(hf_config), ParallelPlan()) for one in (plain, config)]
    assert after - before == pytest.approx(DENSE["num_hidden_layers"] * TOKENS * (more[1] - more[0]), abs=256)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_weights_that_are_not_kept_for_a_step(recompute: str, session: Any) -> None:
    """Backward needs them all the same, until it has passed their layer; recomputed layers keep none."""
    quantised = configured("quant=int4", "quant.embedding=int8", f"parallel.recompute={recompute}")
    uncached = replace(quantised, train=replace(quantised.train, cache_weights=False))
    activations, weights = saved_bytes(DENSE, quantised, session)
    together, nothing = saved_bytes(DENSE, uncached, session)
    table = 2 * DENSE["vocab_size"] * DENSE["hidden_size"]
    layers = 0 if recompute == "full" else weights - table
    assert nothing == 0 and together - activations == layers + table
    hf_config = checked_config(DENSE, "the test's model")
    (with_cache,) = memory.training_plan(quantised, hf_config, ParallelPlan())
    (without,) = memory.training_plan(uncached, hf_config, ParallelPlan())
    saved = (weights - table) // 2 if recompute == "full" else 0  # of two layers' one is made at a time
    assert with_cache.quantizers_bytes - without.quantizers_bytes == saved
    pipelined = replace(uncached, train=replace(uncached.train, global_batch=8, micro_batch=1))
    first, last = memory.training_plan(pipelined, hf_config, ParallelPlan(pp=2, world_size=2))
    assert (first.quantizers_bytes > last.quantizers_bytes) == (recompute == "none"), "two micro-batches in flight"


@pytest.mark.parametrize("quant", ["int4", "fp8"])
def test_no_more_than_modelopts_own(quant: str, session: Any) -> None:
    """What backward keeps, weights not cached, beside modelopt's quantizers in the same model."""
    raw = DENSE | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}  # whole groups of 128
    config = configured(f"quant={quant}", "train.cache_weights=false")
    ours, _ = saved_bytes(raw, config, session)
    model, batch = built(raw, config, session)
    plain_modelopt.quantize(model, quant, lambda _: forward(chunks_of(model)[0], to_device(batch, session)))
    theirs, _ = kept_by_autograd(model, batch, session)
    assert ours <= 1.05 * theirs


# What tools/layout_speed.py was told, and the peak of torch.cuda.max_memory_allocated (GiB) on an H200: bf16, one
# process or two, 8 sequences of 2048 tokens one by one.
MEASURED: list[tuple[dict[str, str], float]] = [
    ({}, 20.13), ({"recompute": "full"}, 17.86), ({"train": "qad", "quant": "int4"}, 24.48),
    ({"layout": "DP2DO"}, 14.38), ({"layout": "CP2"}, 18.91), ({"layout": "TP2SP"}, 10.11), ({"layout": "PP2"}, 11.89),
    ({"layout": "TP2"}, 10.42), ({"model": "experts"}, 17.74), ({"model": "experts", "layout": "EP2"}, 11.10),
]  # fmt: skip


@pytest.mark.parametrize(("told", "measured"), MEASURED)
def test_peaks_on_gpus_are_planned_within_five_percent(told: dict[str, str], measured: float) -> None:
    as_it_is = {"train": "qat", "quant": "none", "recompute": "none", "backend": "local", "seq_length_tokens": 2048}
    chosen = argparse.Namespace(**as_it_is | told, one_by_one=False)
    layout = told.get("layout", "")
    plan = layout_speed.layout_plan(layout) if layout else ParallelPlan()
    config = layout_speed.configured(chosen, layout, 8, plan)
    raw = layout_speed.EXPERTS if "model" in told else layout_speed.DENSE
    sizes = checked_config(raw, "the benchmark's model")
    planned = memory.training_plan(config, sizes, plan, sizes if chosen.train == "qad" else None)
    assert max(stage.total_bytes for stage in planned) / 2**30 == pytest.approx(measured, rel=0.05)


def test_experts_are_counted_once_in_each_layout() -> None:
    sizes, config = checked_config(EXPERTS, "the test's model"), configured("quant=int4")
    count = memory.count_parameters(sizes)
    (whole,) = memory.training_plan(config, sizes, ParallelPlan())
    (spread,) = memory.training_plan(config, sizes, ParallelPlan(ep=4, dp=4, world_size=4))
    (cut,) = memory.training_plan(config, sizes, ParallelPlan(tp=2, etp=2, world_size=2, sequence_parallel=True))
    assert whole.parameters == count.total
    assert whole.parameters - spread.parameters == 3 * count.experts // 4
    assert 2 * cut.parameters == count.total + count.others
    assert whole.quantizers_bytes > spread.quantizers_bytes > whole.quantizers_bytes // 4


def test_a_stage_of_several_chunks_holds_more_in_flight() -> None:
    sizes = checked_config(DENSE | {"num_hidden_layers": 8}, "the test's model")
    config = configured("train.global_batch=8", "quant=none")
    plain = memory.training_plan(config, sizes, ParallelPlan(pp=2, world_size=2))
    chunks = memory.training_plan(config, sizes, ParallelPlan(pp=2, vpp=2, world_size=2))
    # 1F1B: 2 and 1 micro batches of 4 layers; interleaved: 2 (pp - stage - 1) + pp + 1 of 2 layers (arXiv 2104.04473)
    layer = TOKENS * memory.layer_activations_bytes(config, dims_of(sizes), ParallelPlan())
    assert [b.activations_bytes - a.activations_bytes for a, b in zip(plain, chunks, strict=True)] == [2 * layer] * 2
