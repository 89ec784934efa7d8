"""What a Hugging Face `config.json` promises: checked, completed, and the tensors that follow from it.

In: the parsed JSON, in the classic style (rope_theta, rope_scaling) or that of transformers 5 (rope_parameters).
Out: a plain dict in which every field that this project reads is present under its classic key.
`model.source` calls `checked_config` and `check_tensors`; everyone may call the small functions below.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron_edge import families
from megatron_edge.contracts import InputError
from megatron_edge.families import FAMILIES, Family

# Rotary embeddings that we can reproduce, each with the numbers that it needs.
ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

# Buffers that old exporters wrote beside the weights; recomputed from the config by everyone who reads them.
_DERIVED_TENSOR = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def rope_theta(hf_config: Mapping[str, Any]) -> float:
    """Base wavelength of the rotary embedding, from a config of either style (10000 where it says nothing)."""
    theta = _rope_fields(hf_config).get("rope_theta") or hf_config.get("rope_theta") or 10000.0
    return float(theta)


def rope_scaling(hf_config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The classic `rope_scaling` of a config of either style: {"rope_type": ..., numbers}, None for plain RoPE.

    Raises:
        InputError: a rotary embedding other than those in ROPE_FIELDS, or one whose numbers are missing or odd.
    """
    fields = _rope_fields(hf_config)
    kind = fields.get("rope_type") or fields.get("type") or "default"
    if kind not in ROPE_FIELDS:
        raise InputError(f"rope_scaling: rope_type is {kind!r}; allowed: {', '.join(ROPE_FIELDS)}")
    numbers: dict[str, Any] = {name: fields.get(name) for name in ROPE_FIELDS[kind]}
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not number > 0:
            raise InputError(f"rope_scaling: {name} of rope_type {kind!r} is {number!r}; allowed: a positive number")
    surplus = sorted(set(fields) - set(numbers) - {"rope_type", "type", "rope_theta"})
    # A surplus number may change the embedding (partial_rotary_factor does): better refused than ignored.
    if any(fields[name] not in (None, 1, 1.0) for name in surplus):
        raise InputError(
            f"rope_scaling: rope_type {kind!r} comes with {surplus}; allowed: {ROPE_FIELDS[kind] or 'nothing more'}"
        )
    if kind == "llama3" and not numbers["high_freq_factor"] > numbers["low_freq_factor"]:
        raise InputError(
            f"rope_scaling: high_freq_factor is {numbers['high_freq_factor']!r}; "
            f"allowed: more than low_freq_factor, which is {numbers['low_freq_factor']!r}"
        )
    return None if kind == "default" else {"rope_type": kind, **numbers}


def head_dim(hf_config: Mapping[str, Any]) -> int:
    """Width of one attention head: the config's own word, else hidden_size / num_attention_heads."""
    return int(hf_config.get("head_dim") or hf_config["hidden_size"] // hf_config["num_attention_heads"])


def _rope_fields(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    # The order of transformers 5.23, RotaryEmbeddingConfigMixin.convert_rope_params_to_dict.
    fields = hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {}
    if not isinstance(fields, Mapping):
        raise InputError(f"rope_scaling is {fields!r}; allowed: an object with rope_type {', '.join(ROPE_FIELDS)}")
    return fields


def checked_config(raw: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """A copy of `raw`, checked and completed: classic keys, every default written out, no `rope_parameters`.

    Args:
        origin: what error messages call the config, for example its path.

    Raises:
        InputError: naming `origin`, the field, its value and what is allowed.
    """
    family = _refuse_unsupported(raw, origin)
    raw = {**family.defaults, **raw}
    config = {key: value for key, value in raw.items() if key not in ("rope_parameters", "dtype", "_name_or_path")}
    if raw.get("dtype") is not None:
        config["torch_dtype"] = raw["dtype"]
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        config[field] = _positive_int(raw, field, None, origin)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    config["num_key_value_heads"] = _positive_int(raw, "num_key_value_heads", heads, origin)
    config["max_position_embeddings"] = _positive_int(raw, "max_position_embeddings", 2048, origin)
    if raw.get("head_dim") is None and hidden % heads:
        raise InputError(f"{origin}: hidden_size is {hidden}; allowed: a multiple of num_attention_heads, {heads}")
    config["head_dim"] = _positive_int(raw, "head_dim", hidden // heads, origin)
    if heads % config["num_key_value_heads"]:
        raise InputError(
            f"{origin}: num_key_value_heads is {config['num_key_value_heads']}; "
            f"allowed: a divisor of num_attention_heads, {heads}"
        )
    if config["head_dim"] % 2:
        raise InputError(f"{origin}: head_dim is {config['head_dim']}; allowed: an even number, as RoPE turns pairs")
    epsilon = raw.get("rms_norm_eps", 1e-6)
    if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)) or not 0 < epsilon < 1:
        raise InputError(f"{origin}: rms_norm_eps is {epsilon!r}; allowed: a number between 0 and 1")
    config["rms_norm_eps"] = float(epsilon)
    config["tie_word_embeddings"] = bool(raw.get("tie_word_embeddings", False))
    config["hidden_act"] = "silu"
    config.update((field, raw.get(field, allowed[0])) for field, allowed in family.required.items())
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config[field] = raw.get(field)
    _check_experts(config, raw, family, origin)
    try:
        config["rope_theta"], config["rope_scaling"] = rope_theta(raw), rope_scaling(raw)
    except (InputError, TypeError, ValueError) as error:
        raise InputError(f"{origin}: {error}") from error
    return config


def _check_experts(config: dict[str, Any], raw: Mapping[str, Any], family: Family, origin: str) -> None:
    if family.num_experts is None or family.expert_ffn is None:
        return
    for spelling in ("num_experts", "num_local_experts"):  # transformers 5 writes either for any family
        if spelling != family.num_experts and spelling in config:
            config.setdefault(family.num_experts, config.pop(spelling))
    for field in (family.num_experts, family.expert_ffn, "num_experts_per_tok"):
        config[field] = _positive_int(config, field, None, origin)
    if config["num_experts_per_tok"] > config[family.num_experts]:
        raise InputError(
            f"{origin}: num_experts_per_tok is {config['num_experts_per_tok']}; "
            f"allowed: at most {family.num_experts}, {config[family.num_experts]}"
        )


def _refuse_unsupported(raw: Mapping[str, Any], origin: str) -> Family:
    if raw.get("auto_map"):
        raise InputError(
            f"{origin}: auto_map is {raw['auto_map']!r}: this model runs code of its own; "
            "allowed: architectures built into transformers (trust_remote_code is never set)"
        )
    for field in ("quantization_config", "compression_config"):
        if raw.get(field):
            raise InputError(
                f"{origin}: {field} is {raw[field]!r}: the weights are quantised already; "
                "allowed: weights in float32, float16 or bfloat16, or a GGUF file"
            )
    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in FAMILIES:
        raise InputError(
            f"{origin}: architectures is {architectures!r} (model_type {raw.get('model_type')!r}); "
            f"allowed: one of {', '.join(FAMILIES)}"
        )
    family = FAMILIES[architectures[0]]
    for field, allowed in {"hidden_act": ("silu",), **family.required}.items():
        if raw.get(field, allowed[0]) not in allowed:
            raise InputError(f"{origin}: {field} is {raw[field]!r}; allowed: {allowed[0]!r}")
    return family


def _positive_int(raw: Mapping[str, Any], field: str, default: int | None, origin: str) -> int:
    value = raw.get(field)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{origin}: {field} is {value!r}; allowed: a positive integer")
    return value


def expected_tensors(hf_config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checked config promises, in the model's order."""
    return families.expected_tensors(families.rules_of(hf_config), families.dims_of(hf_config))


def check_tensors(hf_config: Mapping[str, Any], found: Mapping[str, tuple[int, ...]], origin: str) -> None:
    """Compare the tensors that are there with those that the config promises.

    A tied model may still store `lm_head.weight` (transformers ignores it as well).

    Raises:
        InputError: naming the first tensors that are missing, surplus or of another shape.
    """
    expected = expected_tensors(hf_config)
    missing = [name for name in expected if name not in found]
    if missing:
        raise InputError(f"{origin}: {_some(missing)} missing; allowed: every tensor that its config promises")
    wrong = [
        f"{name} is {list(found[name])} and not {list(shape)}"
        for name, shape in expected.items()
        if tuple(found[name]) != shape
    ]
    if wrong:
        raise InputError(f"{origin}: tensor shapes do not fit: {_some(wrong)}; allowed: what its config promises")
    ignored = {"lm_head.weight"} if hf_config["tie_word_embeddings"] else set()
    surplus = [n for n in found if n not in expected and n not in ignored and not _DERIVED_TENSOR.fullmatch(n)]
    if surplus:
        raise InputError(f"{origin}: {_some(surplus)} unknown to {hf_config['architectures'][0]}; allowed: {_LAYOUT}")


_LAYOUT = "the names in that family's table (megatron_edge/families)"


def _some(items: list[str]) -> str:
    rest = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(items[:3]) + rest
