"""The fields of TensorRT-LLM's deployment templates (quant_cfg, enable_medusa, ...), and what stands for each here.

Those that mean something here are kept under this project's names; the others are choices of a runtime's engine build
that no runtime of ours offers. Passing one is refused with the answer, so that none is dropped in silence. Called by
compose.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_edge.contracts import InputError

if TYPE_CHECKING:
    from megatron_edge.config import RunConfig

# Template field -> what is written here instead.
KEPT = {
    "quant_cfg": "quant={value}",
    "weight_only": "quant.activation=none, which a preset for weights alone says itself (int4_awq, int4, nvfp4_w4a16)",
    "calib_size": "quant.calib_size={value}",
    "kv_cache_quant": "kv={value}",
    "max_batch_size": "export.max_batch_size={value}",
    "max_seq_len": "export.max_seq_len={value}",
}

_DRAFTS = {
    "tensorrt-edge-llm": "TensorRT Edge-LLM runs no Medusa heads: its drafts are EAGLE-3, MTP and DFlash",
    "llama.cpp": "llama.cpp runs no Medusa heads: its drafts are EAGLE-3 and a small model of the same vocabulary",
    "vllm": "vLLM registers Medusa, but its heads must be trained with the model, which nothing here does yet",
    "megatron_edge": "this project's own reader decodes without a draft",
}
_PLANNED = "their bytes are in tools/report_theoretical_memory.py --medusa-num-heads; allowed: leave it out"
_PAGES = {
    "tensorrt-edge-llm": "TensorRT Edge-LLM lays its cache out by itself",
    "llama.cpp": "llama.cpp has no pages: it takes export.max_batch_size x export.max_seq_len cells at its start",
    "vllm": "vLLM always has pages",
    "megatron_edge": "this project's own reader keeps no cache between tokens",
}
_PADDING = {
    "tensorrt-edge-llm": "TensorRT Edge-LLM batches prompts by itself",
    "llama.cpp": "llama.cpp takes tokens of all sequences in one row, which is what it means: nothing is padded",
    "vllm": "vLLM takes tokens of all sequences in one row, which is what it means: nothing is padded",
    "megatron_edge": "this project's own reader packs documents into whole windows: nothing is padded",
}
# Template field -> runtime -> why it is no choice here; and what is allowed.
ANSWERED: dict[str, tuple[dict[str, str], str]] = {
    "enable_medusa": (_DRAFTS, _PLANNED),
    "medusa_num_heads": (_DRAFTS, _PLANNED),
    "max_draft_tokens": (_DRAFTS, _PLANNED),
    "paged_kv_cache": (_PAGES, "allowed: leave it out; the plan counts the cache full"),
    "remove_input_padding": (_PADDING, "allowed: leave it out"),
}


def field_of(key: str) -> str | None:
    """The template field that `key` (max_seq_len, export.paged_kv_cache) means; None where it is none."""
    name = key.rsplit(".", 1)[-1]
    return name if name in KEPT or name in ANSWERED else None


def refusal(key: str, value: str, config: RunConfig) -> InputError:
    """What to say to someone who passes the template field `key`, for the runtime of `config`."""
    name, runtime = key.rsplit(".", 1)[-1], config.device.runtime
    if name in KEPT:
        return InputError(f"{key}={value}: this project calls it {KEPT[name].format(value=value.lower())}")
    reasons, allowed = ANSWERED[name]
    reason = reasons.get(runtime, f"no choice with the runtime {runtime}")
    return InputError(f"{key}={value}: device={config.device.name}: {reason}; {allowed}")
