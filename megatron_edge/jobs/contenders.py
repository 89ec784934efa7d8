"""What the bench job times: one model without quantizers, with ours, and with modelopt's own; and the ways to run them.

All have the same layers, attention, loss, optimizer and data. A way is a contender with its kernels launched one by one
or as one CUDA graph, ours with its weights quantised once in a step or at each use. On CUDA all ways share a stream,
and the graphs one pool of memory: they take turns. Called by jobs/bench.py and jobs/whole_job.py.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megatron_edge import devices, memory
from megatron_edge.config import RunConfig, has_fp8_product
from megatron_edge.families import dims_of
from megatron_edge.jobs.preflight import records_steps
from megatron_edge.jobs.training import DTYPES
from megatron_edge.model.build import build_model, chunks_of, named_shards
from megatron_edge.model.hf_config import checked_config
from megatron_edge.quantize import apply, plain_modelopt, policy, written_inputs
from megatron_edge.runtime.session import Session
from megatron_edge.runtime.watchdog import mark
from megatron_edge.train import graph, step
from megatron_edge.train.data import Batch
from megatron_edge.train.placement import place

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32768,
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "llama_1b": _LLAMA,
    "tiny": _LLAMA | {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512,
    },
}  # fmt: skip
PLAIN = "plain"
UNCACHED = "ours_uncached"
Launched = Literal["graph", "one by one"]
Gradients = Callable[..., list[dict[str, Tensor]]]
RECORDED_LOSS = 1e-3  # relative: a replayed step that is further from the launched one is not that step


@dataclass
class Contender:
    """`resident_bytes`: weights, gradients and what the optimizer holds so far."""

    name: str
    chunks: nn.ModuleList
    optimizer: Any
    resident_bytes: int


@dataclass
class Way:
    """`gradients` stands for step.forward_backward; `peak_bytes` are those that this contender alone accounts for;
    `first_seconds` is its first step's time, in which kernels that are not there yet are compiled."""

    name: str
    contender: Contender
    launched: Launched
    gradients: Gradients
    peak_bytes: int = 0
    first_seconds: float | None = None

    def steps(self, batches: Sequence[list[Batch]], session: Session) -> list[float]:
        """Seconds of a step on each of `batches`."""
        apply.set_weight_cache(self.contender.chunks, self.name != UNCACHED)
        seconds = []
        with self.counted_memory():
            for mine in batches:
                began = time.perf_counter()
                step.train_step(
                    self.contender.chunks, self.contender.optimizer, mine, session, gradients=self.gradients
                )
                _synchronize()
                seconds.append(time.perf_counter() - began)
        if self.first_seconds is None:
            self.first_seconds = seconds[0]
        return seconds

    @contextlib.contextmanager
    def counted_memory(self) -> Iterator[None]:
        before = allocated()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        yield
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        self.peak_bytes = max(self.peak_bytes, peak - before + self.contender.resident_bytes)
        self.contender.resident_bytes += allocated() - before  # the optimizer's state, made at its first step


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def hf_config_of(config: RunConfig) -> dict[str, Any]:
    return checked_config(SIZES[config.bench.size], f"bench.size={config.bench.size}")


def quant_of(config: RunConfig, name: str) -> Any:
    """The preset's formats, tables in bf16, scales of maxima: what modelopt's configuration of that name quantises."""
    preset = devices.presets("quant")[name]
    chosen = {key: preset[key] for key in ("name", "weight", "activation", "group_size")}
    return replace(
        config.quant, **chosen, recipe=[], overrides=[], exclude=[], algorithm="max", calibration="max",
        embedding="bf16", head="bf16",
    )  # fmt: skip


def build(config: RunConfig, session: Session, name: str, fmt: str, stream: torch.cuda.Stream | None) -> Contender:
    """A model with random weights, the same for every `name`, and its optimizer. All ranks call it."""
    mark(f"building {name} {fmt}")
    before, hf_config, dtype = allocated(), hf_config_of(config), DTYPES[config.train.precision]
    model = build_model(hf_config, session.plan, dtype, session.device, config.parallel.recompute, config.model.backend)
    generator = torch.Generator(session.device).manual_seed(config.train.seed)
    for param in named_shards(model).values():
        param.data.fill_(1.0) if param.dim() == 1 else param.data.normal_(0, 0.02, generator=generator)
    windows, length = shape_of(config.bench.shapes[0])
    batches = random_batches(config, hf_config, windows, length, 2, session)

    def run_data(_: nn.Module) -> None:
        step.run_forward(model, batches, session)

    if name == "ours":
        plan = policy.make_plan(quant_of(config, fmt), config.kv, hf_config)
        matches = apply.insert_quantizers(model, plan)
        apply.calibrate(model, plan, matches, run_data)
        written_inputs.use(model, config.train.fp8_gemm)
    elif name == "modelopt":
        plain_modelopt.quantize(model, fmt, run_data)
    train = replace(config.train, steps=10_000, warmup_steps=0)
    chunks, optimizer = step.make_trainable(
        model, train, dtype, distributed_optimizer=config.parallel.distributed_optimizer, stream=stream
    )
    step.learning_rate_schedule(optimizer, train).step(1)
    return Contender(name, chunks, optimizer, allocated() - before)


def shape_of(shape: str) -> tuple[int, int]:
    """(windows, tokens of each) of a micro-batch."""
    windows, length = shape.split("x")
    return int(windows), int(length)


def random_batches(
    config: RunConfig, hf_config: dict[str, Any], windows: int, length: int, count: int, session: Session
) -> list[Batch]:
    """`count` micro-batches of this rank: random tokens, one document a window."""
    generator = torch.Generator().manual_seed(config.train.seed + session.dp_rank)
    ids = torch.randint(0, hf_config["vocab_size"], (windows * count, length), generator=generator)
    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[:, -1] = False
    places = torch.arange(length).expand_as(ids).contiguous()
    return Batch(ids, torch.zeros_like(ids, dtype=torch.int32), places, counted, ids.roll(-1, 1)).split(windows)


def one_by_one(stream: torch.cuda.Stream | None) -> Gradients:
    """Forward and backward launched kernel by kernel, on `stream` where there is one."""
    if stream is None:
        return step.forward_backward

    def gradients(model: nn.ModuleList, batches: list[Batch], session: Session, objective: Any) -> Any:
        return graph.launched_one_by_one(model, batches, session, objective, stream)

    return gradients


def launches(config: RunConfig, hf_config: dict[str, Any]) -> tuple[Launched, ...]:
    """train.cuda_graph: null is both, where a step can be recorded; false and true are one of them."""
    if not records_steps(config, hf_config):
        return ("one by one",)
    return ("graph",) if config.train.cuda_graph else ("graph", "one by one")


def record(
    name: str, one: Contender, batches: list[Batch], session: Session, stream: torch.cuda.Stream, pool: Any
) -> Way | str:
    """The contender's step as one CUDA graph, recorded and replayed once, or why that cannot be: something waits for
    the device, recording fails, or the replay gives another loss. All ranks call it; no weight changes."""
    way = Way(name, one, "graph", graph.StepGraph(stream, pool))
    apply.set_weight_cache(one.chunks, name != UNCACHED)
    obstacle = None
    try:
        with way.counted_memory():
            expected = _loss(one, one_by_one(stream), batches, session)
            if one.name == "modelopt":  # the others are recorded in every job
                _launched_without_waiting(one, batches, session, stream)
            for _ in range(graph.EAGER_STEPS + 1):
                found = _loss(one, way.gradients, batches, session)
        if not abs(found - expected) <= RECORDED_LOSS * abs(expected):
            obstacle = f"its replay gives a loss of {found:.6g} where the launched step gives {expected:.6g}"
    except RuntimeError as error:
        frames = traceback.extract_tb(error.__traceback__)
        upstream = [frame for frame in frames if "modelopt" in frame.filename or "megatron" in frame.filename]
        place = (upstream or frames)[-1]
        obstacle = f"{str(error).strip().splitlines()[0]} ({place.filename.rsplit('/', 1)[-1]}:{place.lineno})"
    said = next((other for other in session.gather(obstacle) if other is not None), None)
    return way if said is None else said


def _loss(one: Contender, gradients: Gradients, batches: list[Batch], session: Session) -> float:
    """Sum over this rank's tokens; gradients are made, weights stay."""
    for chunk in one.chunks:
        chunk.zero_grad_buffer()
    found = gradients(one.chunks, batches, session, step.LABELS)
    return float(sum(part["total"] for part in found))


def _launched_without_waiting(
    one: Contender, batches: list[Batch], session: Session, stream: torch.cuda.Stream
) -> None:
    """Forward and backward where an operation that waits for the device, which a graph cannot hold, is an error: a
    recording that fails would leave torch's allocator between two states."""
    _, placed = place(batches, session)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with graph.finalizing_later(chunks_of(one.chunks)[0].config):
            graph.launched_one_by_one(one.chunks, placed, session, step.LABELS, stream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


# NVIDIA's data sheets of the SXM modules: dense bf16 FLOP/s, bytes/s of memory.
CHIPS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}


def chip() -> tuple[float, float] | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((figures for known, figures in CHIPS.items() if known in name), None)


def flops_per_token(hf_config: dict[str, Any], length: int) -> float:
    """6 per parameter that multiplies a token, and attention's scores (Chowdhery et al. 2022, appendix B), causal."""
    dims, count = dims_of(hf_config), memory.count_parameters(hf_config)
    used = count.linears + dims.vocab_size * dims.hidden_size
    used += count.experts * dims.experts_per_token // max(dims.num_experts, 1)
    return 6 * used + 6 * dims.num_layers * dims.num_heads * dims.head_dim * length


def moved_bytes(quant: Any, hf_config: dict[str, Any], tokens: int, accumulate: int) -> float:
    """What fake quantisation must move in a step on one rank beside a plain step: 2 bytes read and 2 written for each
    weight, once, and for attention's result in each micro-batch (for FP8 products 1 written). A norm or SwiGLU before
    other layers can write the rounded value in the place of its own; beside it, for FP8 products, a byte of code."""
    dims, weights = dims_of(hf_config), 0.0
    if quant.weight != "none":
        weights = 4.0 * memory.count_parameters(hf_config).linears
    if quant.activation == "none":
        return weights
    of_attention, others = dims.num_heads * dims.head_dim, 2 * dims.hidden_size + dims.ffn_hidden_size
    of_token = 3 * of_attention + others if has_fp8_product(quant.weight, quant.activation) else 4 * of_attention
    return weights + of_token * dims.num_layers * tokens * accumulate


def bound(
    quant: Any, hf_config: dict[str, Any], tokens: int, accumulate: int, figures: tuple[float, float], plain: float
) -> float:
    """The ratio to a plain step of `plain` seconds, if quantising cost what its bytes take at the memory's whole
    bandwidth, and forward's products of operands that fp8 holds (int4 codes too) took half of their time at the whole
    FLOP/s: a little more is possible where the plain step's take longer than that."""
    flop_rate, byte_rate = figures
    seconds = moved_bytes(quant, hf_config, tokens, accumulate) / byte_rate
    if has_fp8_product(quant.weight, quant.activation):
        seconds -= memory.count_parameters(hf_config).linears * 2 * tokens * accumulate / flop_rate / 2
    return 1 + seconds / plain
