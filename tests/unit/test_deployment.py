"""What a device is predicted to need and to give, against files, measured processes and arithmetic done another way."""

from __future__ import annotations

import dataclasses
from typing import Any

import gguf
import pytest
from test_config import SMOLLM2
from transformers import LlamaConfig

from megatron_edge import compose, deployment, devices, memory
from megatron_edge.config import RunConfig
from megatron_edge.contracts import InputError
from megatron_edge.model.hf_config import checked_config

MIB = 2**20
HUGE = SMOLLM2 | {
    "hidden_size": 65536, "intermediate_size": 1048576, "num_hidden_layers": 10, "num_attention_heads": 1024,
}  # fmt: skip
MIXTRAL = checked_config(
    {
        "architectures": ["MixtralForCausalLM"], "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024,
        "max_position_embeddings": 512, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "the test's model",
)  # fmt: skip


def configured(*arguments: str) -> RunConfig:
    return compose.compose(["train.precision=bf16", *arguments])


def refusal(config: RunConfig, hf_config: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        deployment.refuse(config, hf_config, deployment.predict(config, hf_config))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("scenario", compose.options("scenario"))
def test_every_scenario_holds_its_budgets_and_a_model_too_large_is_refused(scenario: str) -> None:
    run = configured(f"+scenario={scenario}")
    found = deployment.predict(run, SMOLLM2)
    deployment.refuse(run, SMOLLM2, found)
    assert found.memory.total_bytes < found.memory.budget_bytes == run.budget.memory_bytes
    assert found.ms_per_token < run.budget.latency_ms_per_token
    assert found.mode.power_w <= run.budget.power_w
    words = refusal(run, HUGE)
    assert f"device={run.device.name}: " in words and "exceed its budget" in words and "a smaller model" in words


def test_weights_are_a_files_of_llama_cpp() -> None:
    for name, fmt in (("int4", "Q4_0"), ("int8", "Q8_0"), ("nvfp4", "NVFP4")):
        quantised = gguf.GGMLQuantizationType[fmt]
        assert deployment.GGUF_BLOCKS[name] == gguf.GGML_QUANT_SIZES[quantised]
    run = configured("device=board_2gb", "quant=int4_awq", "quant.embedding=int8")
    found, count = deployment.runtime_weights(run, SMOLLM2), memory.count_parameters(SMOLLM2)
    assert found.linears == found.repacked == count.linears * 18 // 32
    assert (found.embedding, found.repacked_table) == (count.embedding * 34 // 32,) * 2
    assert found.others == count.others * 4 and found.head == found.experts == 0
    nvfp4 = deployment.runtime_weights(configured("device=board_2gb", "quant=nvfp4_w4a16"), SMOLLM2)
    assert nvfp4.linears == count.linears * 36 // 64 + 4 * 7 * SMOLLM2["num_hidden_layers"]
    assert nvfp4.repacked == 0 and nvfp4.embedding == 2 * count.embedding
    assert deployment.plan(run, SMOLLM2).evictable_bytes == found.repacked


# VmRSS in MiB of a Python process with xllamacpp 2026.10.11549 on x86, one slot and one thread, after a prompt of 480
# tokens: SmolLM2-135M as Q4_0 and Q8_0 (token_embd as said), and a 345M-like model (24 layers, hidden 1024, 16 heads,
# MLP 4096, the same 49,152 words) as Q4_0.
LARGER = SMOLLM2 | {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 16,
}  # fmt: skip
Q8_0 = ("quant=int8_sq", "quant.activation=none", "quant.algorithm=max")
RESIDENT = [
    (SMOLLM2, ("quant=int4", "quant.embedding=int8", "kv=none", "export.max_seq_len=1024"), 234),
    (SMOLLM2, ("quant=int4", "quant.embedding=int8", "kv=int8", "export.max_seq_len=4096"), 260),
    (SMOLLM2, ("quant=int4", "quant.embedding=int4", "kv=none", "export.max_seq_len=1024"), 236),
    (SMOLLM2, (*Q8_0, "quant.embedding=int8", "kv=none", "export.max_seq_len=1024"), 228),
    (SMOLLM2, (*Q8_0, "quant.embedding=int8", "kv=int8", "export.max_seq_len=2048"), 230),
    (LARGER, ("quant=int4", "quant.embedding=int4", "kv=int8", "export.max_seq_len=2048"), 675),
]


@pytest.mark.parametrize(("sizes", "arguments", "measured"), RESIDENT)
def test_resident_memory_of_llama_cpp_is_planned_within_five_percent(
    sizes: dict[str, Any], arguments: tuple[str, ...], measured: int
) -> None:
    run = configured("device=x86_laptop_llamacpp", "export.max_batch_size=1", *arguments)
    assert deployment.plan(run, sizes).resident_bytes / MIB == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("device", compose.options("device"))
def test_largest_batch_and_context_are_the_last_that_fit(device: str) -> None:
    profile = devices.profiles()[device]
    run = configured(f"device={device}", "quant=int4_awq", "export.max_batch_size=2", "export.max_seq_len=512")
    sizes = LARGER | {"max_position_embeddings": 10**7}
    found = deployment.predict(run, sizes)
    if device == "orin_nano_4gb_edgellm":
        assert found.largest_batch == found.largest_seq_len == 0
        return
    for leaf, value in (("max_batch_size", found.largest_batch), ("max_seq_len", found.largest_seq_len)):
        for more, fits in ((0, True), (256 if leaf == "max_seq_len" else 1, False)):
            export = dataclasses.replace(run.export, **{leaf: value + more})
            planned = deployment.plan(dataclasses.replace(run, export=export), sizes)
            assert (planned.total_bytes <= profile.memory_bytes - profile.reserved_bytes) is fits, (leaf, value)
    assert found.limits[-1] == "context: memory"
    assert deployment.predict(run, SMOLLM2).largest_seq_len <= SMOLLM2["max_position_embeddings"]


def test_time_is_bytes_over_bandwidth_and_energy_power_times_time() -> None:
    run = configured("device=orin_nano_8gb_edgellm", "quant=int4", "export.max_batch_size=3", "export.max_seq_len=100")
    found, count = deployment.predict(run, LARGER), memory.count_parameters(LARGER)
    cache = 2 * 24 * 3 * 100 * 16 * 64 * 2
    moved = count.linears / 2 + count.linears / 128 * 2 + 2 * (count.embedding + count.others) + cache
    assert found.bound_ms == pytest.approx(moved / 68e9 * 1e3)
    assert found.ms_per_token == pytest.approx(found.bound_ms / 0.8)
    assert found.tokens_per_second == pytest.approx(3 / found.ms_per_token * 1e3)
    assert found.joules_per_token == pytest.approx(7 * found.ms_per_token / 1e3 / 3)
    fast = deployment.predict(dataclasses.replace(run, budget=dataclasses.replace(run.budget, power_w=25.0)), LARGER)
    assert (fast.mode.power_w, fast.bound_ms) == (25, pytest.approx(moved / 102e9 * 1e3))


def test_of_experts_those_are_read_that_a_batch_is_expected_to_choose() -> None:
    times, run = [], configured("quant=none", "export.max_seq_len=2")
    for batch in (1, 4, 1000):
        export = dataclasses.replace(run.export, max_batch_size=batch)
        found = deployment.predict(dataclasses.replace(run, export=export), MIXTRAL)
        cache = memory.kv_bytes("none", MIXTRAL, batch, 2)
        times.append(found.bound_ms * 1e-3 * run.device.bandwidth_bytes_per_second - cache)
    count = memory.count_parameters(MIXTRAL)
    for moved, share in zip(times, (2 / 8, 1 - (6 / 8) ** 4, 1.0), strict=True):
        assert moved == pytest.approx(2 * (count.linears + count.others + count.head + share * count.experts))


def test_a_context_or_batch_that_is_too_large_is_refused_with_one_that_fits() -> None:
    run = configured("+scenario=gateway")
    needed = deployment.plan(run, SMOLLM2)
    tight = dataclasses.replace(run.budget, memory_bytes=needed.total_bytes - needed.kv_bytes // 2)
    message = refusal(dataclasses.replace(run, budget=tight), SMOLLM2)
    fitting = int(message.split("export.max_seq_len of at most ")[1].split()[0])
    shorter = dataclasses.replace(run, budget=tight, export=dataclasses.replace(run.export, max_seq_len=fitting))
    deployment.refuse(shorter, SMOLLM2, deployment.predict(shorter, SMOLLM2))
    roomy = dataclasses.replace(run.budget, memory_bytes=2 * needed.total_bytes)
    several = dataclasses.replace(run, budget=roomy, export=dataclasses.replace(run.export, max_batch_size=64))
    fitting = int(refusal(several, SMOLLM2).split("export.max_batch_size of at most ")[1].split()[0])
    fewer = dataclasses.replace(several, export=dataclasses.replace(run.export, max_batch_size=fitting))
    deployment.refuse(fewer, SMOLLM2, deployment.predict(fewer, SMOLLM2))


def test_what_is_named_as_nearest_does_fit() -> None:
    run = configured("device=board_2gb", "quant=none", "export.max_seq_len=512")
    llama_1b = SMOLLM2 | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    }  # fmt: skip
    message = refusal(run, llama_1b)
    named = next(part for part in message.split("allowed: ")[1].split(", or ") if part.startswith("quant="))
    nearest = configured("device=board_2gb", "export.max_seq_len=512", *named.split())
    deployment.refuse(nearest, llama_1b, deployment.predict(nearest, llama_1b))
    named = next(part for part in message.split("allowed: ")[1].split(", or ") if part.startswith("device="))
    for device in named.removeprefix("device=").split("|"):
        other = configured(f"device={device}", "quant=none", "export.max_seq_len=512")
        deployment.refuse(other, llama_1b, deployment.predict(other, llama_1b))


def test_a_latency_that_the_bandwidth_forbids_is_refused_and_one_in_between_is_a_doubt() -> None:
    run = configured("+scenario=vehicle")
    found = deployment.predict(run, SMOLLM2)
    for latency, refused in ((found.bound_ms * 0.99, True), (found.bound_ms * 1.01, False)):
        held = dataclasses.replace(run, budget=dataclasses.replace(run.budget, latency_ms_per_token=latency))
        if refused:
            assert "ms in its 7 W mode only to move the bytes of 4 x 512 tokens" in refusal(held, SMOLLM2)
        else:
            assert any("decode_efficiency=0.75 decides" in doubt for doubt in deployment.predict(held, SMOLLM2).doubts)


def test_the_plan_stops_at_the_models_own_context_and_says_so() -> None:
    short = SMOLLM2 | {"max_position_embeddings": 100}
    found = deployment.predict(configured(), short)
    assert found.memory.max_seq_len == 100 and "the model's own context is 100" in found.doubts[0]


def test_heads_of_medusa_are_counted_as_modules() -> None:
    import torch

    config = LlamaConfig(**LARGER)
    hidden, vocab = config.hidden_size, config.vocab_size
    with torch.device("meta"):
        heads = [
            torch.nn.Sequential(torch.nn.Linear(hidden, hidden), torch.nn.Linear(hidden, vocab, bias=False))
            for _ in range(2)
        ]
    assert deployment.medusa_bytes(LARGER, 2) == 2 * sum(p.numel() for head in heads for p in head.parameters())
