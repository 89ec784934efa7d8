"""What an artifact takes on its device and how fast it goes there, predicted before anything is spent. Pure.

In: a RunConfig (its precision settled, not "auto") and a model's checked config.json. Out: a `Prediction`, or a refusal
that names what would fit. Bytes of weights and cache are exact for the runtime's layout; what llama.cpp holds beside
them is counted from its buffers (LLAMA_CPP below), what other runtimes hold is an estimate of their profile.

Time to the next token is what moving the bytes takes, no more: all weights that a step reads (of experts, those that
its tokens are expected to choose) and the full cache, at the power mode's bandwidth times the share of it that decoding
attains (device.decode_efficiency). It leaves out launches of kernels and everything else that does not grow with bytes,
so that small models are slower than predicted. Energy is the power mode's whole wattage for that time: an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_edge import devices
from megatron_edge.artifact.formats import storage_bytes
from megatron_edge.artifact.tables import tables_of
from megatron_edge.config import QuantConfig, RunConfig
from megatron_edge.contracts import InputError, MemoryPlan, PowerMode
from megatron_edge.families import dims_of
from megatron_edge.memory import count_parameters, distinct_linears, kv_bytes, weights_bytes
from megatron_edge.recipe import quant_rules, rule_of

LLAMA_CPP = "llama.cpp"
GGUF_BLOCKS = {"int4": (32, 18), "int8": (32, 34), "nvfp4": (64, 36)}  # values and bytes of Q4_0, Q8_0, NVFP4
PREFILL_CHUNK_TOKENS = 512  # llama.cpp's n_ubatch; other runtimes read a prompt in chunks as well
CELLS = 256  # llama.cpp's cache is a multiple of it for each sequence
VOCABULARY_BYTES = 548  # of a token's text, score and merges in llama.cpp's tables: 25.7 MiB for 49,152, measured
NEAR = 0.9  # of the budget: beyond it the estimates decide whether all fits


@dataclass(frozen=True)
class RuntimeWeights:
    """Bytes of weights in the `artifact`, and as the runtime holds them; `head` is 0 where the output layer is the
    embedding. `repacked` are linear layers that lie in memory a second time, in the file that they were read from and
    are not read again; `repacked_table` is an embedding's copy as the output layer, which are both in use."""

    artifact: int
    linears: int
    experts: int
    embedding: int
    head: int
    others: int
    repacked: int
    repacked_table: int

    @property
    def total(self) -> int:
        return self.linears + self.experts + self.embedding + self.head + self.others + self.repacked_table


@dataclass(frozen=True)
class Prediction:
    """`largest_batch` at export.max_seq_len and `largest_seq_len` at export.max_batch_size are what memory allows (0:
    nothing; a context at most the model's own). `bound_ms` is the time per token at the whole bandwidth, `ms_per_token`
    at the share that is attained; both for one sequence while all are served. `limits` say what stops each."""

    memory: MemoryPlan
    mode: PowerMode
    largest_batch: int
    largest_seq_len: int
    bound_ms: float
    ms_per_token: float
    joules_per_token: float
    limits: tuple[str, ...]
    doubts: tuple[str, ...]

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.memory.max_batch / self.ms_per_token * 1e3


def predict(config: RunConfig, hf_config: Mapping[str, Any]) -> Prediction:
    """Raises InputError where the device has no power mode within the budget."""
    weights, mode = runtime_weights(config, hf_config), devices.power_mode(config)
    planned = plan(config, hf_config, weights)
    batch, seq_len = planned.max_batch, planned.max_seq_len
    context = hf_config["max_position_embeddings"]

    def fits(a_batch: int, a_seq_len: int) -> bool:
        return _plan_at(config, hf_config, weights, a_batch, a_seq_len).total_bytes <= planned.budget_bytes

    largest_batch = _largest(lambda value: fits(value, seq_len))
    largest_seq_len = _largest(lambda value: fits(batch, value), context)
    traffic = _bytes_per_step(config, hf_config, weights, batch, seq_len)
    bound_ms = traffic / (mode.bandwidth_bytes_per_second or config.device.bandwidth_bytes_per_second) * 1e3
    ms = bound_ms / config.device.decode_efficiency
    found = Prediction(
        memory=planned,
        mode=mode,
        largest_batch=largest_batch,
        largest_seq_len=largest_seq_len,
        bound_ms=bound_ms,
        ms_per_token=ms,
        joules_per_token=mode.power_w * ms / 1e3 / batch,
        limits=_limits(planned, largest_seq_len, context),
        doubts=(),
    )
    return replace(found, doubts=_doubts(config, hf_config, found))


def plan(config: RunConfig, hf_config: Mapping[str, Any], weights: RuntimeWeights | None = None) -> MemoryPlan:
    """Bytes on the device at its limits: export.max_batch_size sequences of export.max_seq_len tokens (at most the
    model's own context)."""
    seq_len = min(config.export.max_seq_len, hf_config["max_position_embeddings"])
    weights = weights or runtime_weights(config, hf_config)
    return _plan_at(config, hf_config, weights, config.export.max_batch_size, seq_len)


def refuse(config: RunConfig, hf_config: Mapping[str, Any], found: Prediction) -> None:
    """Raises InputError where memory exceeds its budget, or even the whole bandwidth is too slow for the budget's
    latency; with what comes nearest and fits."""
    needed, device, latency = found.memory, config.device, config.budget.latency_ms_per_token
    over = needed.total_bytes - needed.budget_bytes
    if over > 0:
        parts = ", ".join(f"{name} {size:,}" for name, size in parts_of_plan(needed).items() if size)
        raise InputError(
            f"device={device.name}: {needed.total_bytes:,} bytes ({parts}) exceed its budget of "
            f"{needed.budget_bytes:,} bytes by {over:,}; allowed: {_advice(config, hf_config, found)}"
        )
    if latency is not None and found.bound_ms > latency:
        raise InputError(
            f"budget.latency_ms_per_token={latency:g}: device={device.name} takes {found.bound_ms:.1f} ms in its "
            f"{found.mode.power_w:g} W mode only to move the bytes of {needed.max_batch} x {needed.max_seq_len} "
            f"tokens; allowed: at least that, or {_advice(config, hf_config, found)}"
        )


def parts_of_plan(needed: MemoryPlan) -> dict[str, int]:
    return {
        "weights": needed.weights_bytes + needed.layout_bytes,
        "draft": needed.draft_bytes,
        "KV cache": needed.kv_bytes,
        "activations": needed.activations_bytes,
        "runtime": needed.workspace_bytes,
    }


def runtime_weights(config: RunConfig, hf_config: Mapping[str, Any]) -> RuntimeWeights:
    """llama.cpp: GGUF blocks, norms in fp32, and what device.repacked_formats doubles. Others: as the artifact has
    them."""
    rules, excluded = quant_rules(config.quant, hf_config), config.quant.exclude
    outside = inside = repacked = 0
    counted = distinct_linears(hf_config)
    for layer in range(hf_config["num_hidden_layers"]):
        for linear, count in counted:
            rule = rule_of(f"decoder.layers.{layer}.{linear.module}", rules, excluded)
            fmt, group = ("bf16", 0) if rule is None else (rule.weight, rule.group_size)
            size = count * _stored_bytes(config, fmt, linear.shape, group)
            inside, outside = inside + size * linear.is_expert, outside + size * (not linear.is_expert)
            repacked += size * (fmt in config.device.repacked_formats)
    sizes, doubled = {}, 0
    tables = tables_of(config.quant, hf_config)
    for table in tables:
        sizes[table.module] = size = _stored_bytes(config, table.format, table.shape, table.group_size)
        if table.format in config.device.repacked_formats:
            if len(tables) == 1:  # the embedding is the output layer too
                doubled = size
            elif table.module == "output_layer":
                repacked += size
    others = count_parameters(hf_config).others * (4 if config.device.runtime == LLAMA_CPP else 2)
    head, embedding = sizes.pop("output_layer", 0), sum(sizes.values())
    artifact = weights_bytes(config, hf_config)
    return RuntimeWeights(artifact, outside, inside, embedding, head, others, repacked, doubled)


def _stored_bytes(config: RunConfig, fmt: str, shape: tuple[int, int], group_size: int) -> int:
    if config.device.runtime != LLAMA_CPP or fmt not in GGUF_BLOCKS:
        return storage_bytes(fmt, shape, group_size)
    values, size = GGUF_BLOCKS[fmt]
    return math.prod(shape) // values * size + (4 if fmt == "nvfp4" else 0)  # its second scale is a tensor of its own


def medusa_bytes(hf_config: Mapping[str, Any], num_heads: int) -> int:
    """bf16 bytes of Medusa's heads (arXiv 2401.10774): each a residual layer with a bias, and an output layer."""
    hidden, vocab = hf_config["hidden_size"], hf_config["vocab_size"]
    return 2 * num_heads * (hidden * hidden + hidden + hidden * vocab)


def _plan_at(
    config: RunConfig, hf_config: Mapping[str, Any], weights: RuntimeWeights, batch: int, seq_len: int
) -> MemoryPlan:
    device, budget = config.device, config.budget.memory_bytes
    left = device.memory_bytes - device.reserved_bytes
    cells, vocabulary = seq_len, 0
    if device.runtime == LLAMA_CPP:
        cells, vocabulary = -(-seq_len // CELLS) * CELLS, VOCABULARY_BYTES * hf_config["vocab_size"]
    return MemoryPlan(
        weights_bytes=weights.artifact,
        layout_bytes=weights.total - weights.artifact,
        kv_bytes=kv_bytes(config.kv.format, hf_config, batch, cells),
        activations_bytes=_activations_bytes(config, hf_config, batch, cells),
        workspace_bytes=device.overhead_bytes + vocabulary,
        evictable_bytes=weights.repacked,
        budget_bytes=left if budget is None else min(left, budget),
        max_batch=batch,
        max_seq_len=seq_len,
    )


def _activations_bytes(config: RunConfig, hf_config: Mapping[str, Any], batch: int, cells: int) -> int:
    """llama.cpp: its compute buffer for one chunk of a prompt (three rows as wide as the MLP, five as wide as the
    model, fp32; fp16 mask over the cells of all sequences) and two rows of logits for each sequence: to the megabyte as
    its own log has it. Others, an estimate: such a chunk inside one layer in fp32, with its attention scores."""
    dims = dims_of(hf_config)
    tokens = min(PREFILL_CHUNK_TOKENS, batch * cells)
    ffn = dims.ffn_hidden_size + dims.experts_per_token * dims.expert_ffn_size
    heads = dims.num_heads * dims.head_dim
    if config.device.runtime == LLAMA_CPP:
        width = max(dims.hidden_size, heads) * 5 + dims.hidden_size * dims.experts_per_token
        return tokens * (4 * (3 * ffn + width) + 2 * batch * cells) + 2 * 4 * batch * dims.vocab_size
    row = 2 * dims.hidden_size + 2 * heads + 2 * dims.num_kv_heads * dims.head_dim + dims.num_heads * cells + 3 * ffn
    return 4 * (tokens * row + batch * dims.vocab_size)


def _bytes_per_step(
    config: RunConfig, hf_config: Mapping[str, Any], weights: RuntimeWeights, batch: int, seq_len: int
) -> float:
    """What a step of `batch` sequences reads: each weight once, of the embedding the rows alone where it is no output
    layer, and the cache of full sequences."""
    dims = dims_of(hf_config)
    chosen = 1 - (1 - dims.experts_per_token / dims.num_experts) ** batch if dims.num_experts else 0.0
    read = weights.linears + weights.experts * chosen + weights.others + (weights.head or weights.embedding)
    return read + kv_bytes(config.kv.format, hf_config, batch, seq_len)


def _largest(fits: Callable[[int], bool], limit: int | None = None) -> int:
    """The largest whole number of at most `limit` that fits, where smaller ones do too; 0: none does."""
    if not fits(1):
        return 0
    low = 1
    while (limit is None or low < limit) and fits(2 * low):
        low *= 2
    high = 2 * low if limit is None else min(2 * low, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return min(low, limit) if limit is not None else low


def _limits(needed: MemoryPlan, largest_seq_len: int, context: int) -> tuple[str, ...]:
    largest = max(parts_of_plan(needed).items(), key=lambda part: part[1])[0]
    return (
        f"memory: most of it is {largest}",
        "batch: memory",
        "context: the model's own" if largest_seq_len == context else "context: memory",
    )


def _doubts(config: RunConfig, hf_config: Mapping[str, Any], found: Prediction) -> tuple[str, ...]:
    """What is not refused and may yet not hold on the device."""
    device, budget, needed, doubts = config.device, config.budget, found.memory, []
    share = needed.total_bytes / needed.budget_bytes
    if NEAR < share <= 1:
        doubts.append(f"memory: {share:.0%} of the budget are planned, and a part of that is estimated")
    left = device.memory_bytes - device.reserved_bytes
    if budget.memory_bytes is not None and budget.memory_bytes > left:
        doubts.append(
            f"budget.memory_bytes={budget.memory_bytes:,}: device={device.name} has {left:,} left by its system; "
            "planned with those"
        )
    latency = budget.latency_ms_per_token
    if latency is not None and found.bound_ms <= latency < found.ms_per_token:
        doubts.append(
            f"budget.latency_ms_per_token={latency:g}: {found.ms_per_token:.1f} ms are predicted, {found.bound_ms:.1f} "
            f"at the whole bandwidth; device.decode_efficiency={device.decode_efficiency:g} decides"
        )
    held = device.power_w if budget.power_w is None else budget.power_w
    if found.mode.power_w < held:
        doubts.append(f"held to {held:g} W: device={device.name} obeys in its {found.mode.power_w:g} W mode")
    if config.export.max_seq_len > needed.max_seq_len:
        doubts.append(
            f"export.max_seq_len={config.export.max_seq_len}: the model's own context is {needed.max_seq_len}; planned "
            "with that"
        )
    return tuple(doubts)


def _advice(config: RunConfig, hf_config: Mapping[str, Any], found: Prediction) -> str:
    """What is nearest to the configuration and fits, in one line."""
    ways, export = [], config.export
    if 1 <= found.largest_seq_len < found.memory.max_seq_len:
        ways.append(
            f"export.max_seq_len of at most {found.largest_seq_len} with export.max_batch_size={export.max_batch_size}"
        )
    if 1 <= found.largest_batch < export.max_batch_size:
        ways.append(
            f"export.max_batch_size of at most {found.largest_batch} with export.max_seq_len={export.max_seq_len}"
        )
    if narrower := _narrower(config, hf_config):
        ways.append(narrower)
    if larger := _other_devices(config, hf_config):
        ways.append(f"device={larger}")
    return ", or ".join(ways or ["a smaller model"])


def _holds(config: RunConfig, hf_config: Mapping[str, Any]) -> bool:
    """Whether bytes and the bound of latency are within the budget."""
    found, latency = predict(config, hf_config), config.budget.latency_ms_per_token
    return found.memory.total_bytes <= found.memory.budget_bytes and (latency is None or found.bound_ms <= latency)


def _narrower(config: RunConfig, hf_config: Mapping[str, Any]) -> str:
    """The widest preset, and format of the embedding where that is not enough, that the device runs and that holds."""
    device, now = config.device, runtime_weights(config, hf_config).total
    able, presets = [], {}
    for name, preset in devices.presets_that_run(device).items():  # of equal bytes the one that does more (int4_awq)
        presets[preset["weight"], preset["activation"], preset["group_size"]] = (name, preset)
    for name, preset in presets.values():
        for embedding in device.embedding_formats:
            own = {key: preset[key] for key in ("weight", "activation", "group_size", "algorithm")}
            head = config.quant.head if embedding == config.quant.embedding else embedding
            tables: dict[str, Any] = {"embedding": embedding, "head": head}
            quant: QuantConfig = replace(config.quant, **own, **tables, overrides=[])
            candidate = replace(config, quant=quant)
            try:
                size = runtime_weights(candidate, hf_config).total
                if size < now and _holds(candidate, hf_config):
                    words = f"quant={name}" + (
                        "" if embedding == config.quant.embedding else f" quant.embedding={embedding}"
                    )
                    able.append((size, -len(words), words))
            except InputError:
                continue  # this model does not divide into that format's groups
    return max(able)[-1] if able else ""


def _other_devices(config: RunConfig, hf_config: Mapping[str, Any]) -> str:
    """Profiles that run the same recipe within the same budgets, the smallest first."""
    found = []
    for device in devices.profiles().values():
        candidate = replace(config, device=device)
        try:
            devices.check_device(candidate)
            if device.name != config.device.name and _holds(candidate, hf_config):
                found.append((device.memory_bytes, device.name))
        except InputError:
            continue
    return "|".join(name for _, name in sorted(found))
