"""One GGUF file of the `llama` architecture, read as the Hugging Face model that it was converted from.

In: a *.gguf file. Out: a config.json dict, Hugging Face tensor names, slices of dequantised weights (fp32), the
tokenizer. Only the blocks that a slice touches are dequantised. Called by `model.source` alone.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is read here because gguf.GGUFReader 0.19
makes a numpy view of every token (SmolLM2: 3.5 s against 0.1 s, on every rank); blocks are decoded by gguf itself.
"""

from __future__ import annotations

import os
import re
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_edge.contracts import InputError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_WHOLE_MODEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PER_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_ROPE_FACTORS = "rope_freqs.weight"

# Byte-level pre-tokenizers that Llama-family files name, as llama.cpp's llama-vocab.cpp treats them.
_PRE_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_PRE_TOKENIZERS = ("gpt-2", "smollm", *_PRE_LLAMA3)


@dataclass(frozen=True)
class _Stored:
    """A tensor as the file holds it; `shape` is in torch's order, `offset` counts bytes from the file's start."""

    shape: tuple[int, ...]
    type_id: int
    offset: int


class _Header:
    """Cursor over a GGUF header. `struct.error`, KeyError or UnicodeDecodeError: the file is cut off or damaged."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.position = data, 0

    def take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{layout}", self.data, self.position)
        self.position += struct.calcsize(f"<{layout}")
        return values

    def text(self) -> str:
        (length,) = self.take("Q")
        (raw,) = self.take(f"{length}s")
        return raw.decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.take("IQ")
            return list(self.take(f"{count}{_SCALARS[inner]}")) if inner in _SCALARS else self._values(inner, count)
        return self.take(_SCALARS[kind])[0]

    def _values(self, kind: int, count: int) -> list[Any]:
        return [self.value(kind) for _ in range(count)]

    def read(self) -> tuple[dict[str, Any], dict[str, _Stored]]:
        tensor_count, key_count = self.take("QQ")
        metadata = {}
        for _ in range(key_count):
            key = self.text()
            metadata[key] = self.value(self.take("I")[0])
        tensors = {}
        for _ in range(tensor_count):
            name = self.text()
            (dims,) = self.take("I")
            shape = tuple(reversed(self.take(f"{dims}Q")))
            tensors[name] = _Stored(shape, *self.take("IQ"))
        alignment = metadata.get("general.alignment", 32)
        start = -(-self.position // alignment) * alignment
        return metadata, {n: _Stored(t.shape, t.type_id, start + t.offset) for n, t in tensors.items()}


class GgufStore:
    """Tensors of a GGUF file under their Hugging Face names.

    Attributes:
        hf_config: the config.json that the metadata amounts to, not yet checked.
        shapes, dtypes: by Hugging Face name; a tensor that has none keeps its own. Every dtype is fp32.

    Raises:
        InputError: no GGUF file, cut off, another architecture, or a block format that gguf cannot decode.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.files = path, [path]
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty; allowed: a complete GGUF file")
        self._data = np.memmap(path, dtype=np.uint8, mode="r")
        self.metadata, stored = _read_header(self._data, path)
        self._check_blocks(stored)
        factors = stored.pop(_ROPE_FACTORS, None)
        self._stored = {_hf_name(name): tensor for name, tensor in stored.items()}
        self.shapes = {name: tensor.shape for name, tensor in self._stored.items()}
        self.dtypes = dict.fromkeys(self.shapes, torch.float32)
        self.hf_config = self._config(None if factors is None else self._decode(factors, slice(None), slice(0, None)))

    def _check_blocks(self, stored: dict[str, _Stored]) -> None:
        """Every tensor ends inside the file, and gguf can decode each block format that occurs."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        tried: set[int] = set()
        for name, tensor in stored.items():
            try:
                values, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type_id)]
                if tensor.offset + int(np.prod(tensor.shape)) // values * nbytes > self._data.size:
                    raise InputError(
                        f"{self.path}: cut off: tensor {name} ends beyond the file's {self._data.size} bytes; "
                        "allowed: a complete GGUF file"
                    )
                if tensor.type_id not in tried:
                    self._decode(tensor, slice(0, 1), slice(0, min(values, tensor.shape[-1])))
                tried.add(tensor.type_id)
            except InputError:
                raise
            except (NotImplementedError, ValueError) as error:
                raise InputError(
                    f"{self.path}: tensor {name} has block format {tensor.type_id}, which gguf cannot decode "
                    f"({error}); allowed: F32, F16, BF16 and the quantised formats of the gguf package"
                ) from error

    def read(self, name: str, rows: slice, cols: slice | None) -> torch.Tensor:
        """fp32 slice; `rows` and `cols` are Hugging Face's, within bounds and without step."""
        stored = self._stored[name]
        if cols is None:
            return torch.from_numpy(self._decode(stored, slice(None), rows)[0])
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if heads is None:
            return torch.from_numpy(self._decode(stored, rows, cols))
        wanted = interleaved_rows(np.arange(rows.start, rows.stop), stored.shape[0] // self.hf_config[heads])
        return torch.from_numpy(self._decode(stored, wanted, cols))

    def _decode(self, stored: _Stored, rows: slice | np.ndarray, cols: slice) -> np.ndarray:
        """Dequantise only the blocks of `rows` that `cols` touches: fp32 [rows, cols]; a vector is one row."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        kind = GGMLQuantizationType(stored.type_id)
        values, nbytes = GGML_QUANT_SIZES[kind]
        width = stored.shape[-1]
        start, stop, _ = cols.indices(width)
        size = int(np.prod(stored.shape)) // values * nbytes
        blocks = self._data[stored.offset : stored.offset + size].reshape(-1, width // values, nbytes)
        first, last = start // values, -(-stop // values)
        raw = np.ascontiguousarray(blocks[rows, first:last])
        plain = dequantize(raw.reshape(len(raw), -1), kind)
        return np.array(plain[:, start - first * values : stop - first * values], dtype=np.float32, order="C")

    def _config(self, rope_factors: np.ndarray | None) -> dict[str, Any]:
        """The config.json of the model, in classic keys; llama.cpp's meaning of each key is in its gguf.md."""
        meta, embedding = self.metadata, self.shapes.get("model.embed_tokens.weight", (0, 0))
        for key in ("expert_count", "attention.sliding_window", "rope.scale_linear"):
            if meta.get(f"llama.{key}") not in (None, 0, 1):
                raise InputError(f"{self.path}: llama.{key} is {meta[f'llama.{key}']!r}; allowed: absent")
        heads, hidden = meta.get("llama.attention.head_count"), meta.get("llama.embedding_length")
        width = meta.get("llama.attention.key_length") or meta.get("llama.rope.dimension_count")
        for key in ("attention.value_length", "rope.dimension_count"):
            if meta.get(f"llama.{key}", width) != width:
                raise InputError(f"{self.path}: llama.{key} is {meta[f'llama.{key}']!r}; allowed: head_dim, {width}")
        theta = _shortest(meta.get("llama.rope.freq_base", 10000.0))
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": meta.get("llama.vocab_size", embedding[0]),
            "hidden_size": hidden,
            "intermediate_size": meta.get("llama.feed_forward_length"),
            "num_hidden_layers": meta.get("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
            "head_dim": width,
            "max_position_embeddings": meta.get("llama.context_length"),
            "rms_norm_eps": _shortest(meta.get("llama.attention.layer_norm_rms_epsilon", 0.0)),
            "rope_theta": theta,
            "rope_scaling": self._rope_scaling(rope_factors, theta, width or 0),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
            "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
            "torch_dtype": "float32",
            "use_cache": True,
        }

    def _rope_scaling(self, factors: np.ndarray | None, theta: float, width: int) -> dict[str, Any] | None:
        kind = self.metadata.get("llama.rope.scaling.type", "none")
        if kind != "none":
            return {"rope_type": kind, "factor": self.metadata.get("llama.rope.scaling.factor")}
        if factors is None:
            return None
        # The file keeps llama3's effect on each frequency, not its numbers: all Llama 3 models use 1, 4 and 8192.
        scaling = {
            "rope_type": "llama3",
            "factor": _shortest(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        found = factors.reshape(-1)
        if found.shape != (width // 2,) or not np.allclose(found, llama3_factors(scaling, theta, width), rtol=1e-5):
            raise InputError(
                f"{self.path}: {_ROPE_FACTORS} holds frequency factors {found[:4].tolist()}...{found[-1]}; "
                "allowed: those of Llama 3 (original_max_position_embeddings 8192, low 1, high 4), or none"
            )
        return scaling

    def tokenizer(self) -> Any:
        """The transformers tokenizer that the metadata describes.

        transformers 5.23 knows nothing of `smollm` (digits stand alone) and of llama3's ignore_merges and BOS: set
        here as llama.cpp does. It splits unknown pre-tokenizers as GPT-2 does without a word: refused here.
        """
        from tokenizers import pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        model, pre = self.metadata.get("tokenizer.ggml.model"), self.metadata.get("tokenizer.ggml.pre")
        if model not in ("gpt2", "llama") or "tokenizer.ggml.tokens" not in self.metadata:
            raise InputError(f"{self.path}: tokenizer.ggml.model is {model!r}; allowed: 'gpt2' or 'llama', with tokens")
        if model == "gpt2" and pre not in _PRE_TOKENIZERS:
            raise InputError(f"{self.path}: tokenizer.ggml.pre is {pre!r}; allowed: {', '.join(_PRE_TOKENIZERS)}")
        with tempfile.TemporaryDirectory() as alone:  # from_pretrained prefers a tokenizer.json that lies beside
            os.symlink(self.path.resolve(), Path(alone, "model.gguf"))
            tokenizer = PreTrainedTokenizerFast.from_pretrained(alone, gguf_file="model.gguf")
        if model == "gpt2" and pre == "smollm":
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        if model == "gpt2" and pre in _PRE_LLAMA3:
            tokenizer.backend_tokenizer.model.ignore_merges = True
            if "tokenizer.ggml.add_bos_token" not in self.metadata:
                tokenizer.add_bos_token = True
        return tokenizer


def _read_header(data: np.ndarray, path: Path) -> tuple[dict[str, Any], dict[str, _Stored]]:
    header = _Header(data.data)
    try:
        magic, version = header.take("4sI")
        if magic != b"GGUF" or version not in (2, 3):
            raise InputError(f"{path}: starts with {magic!r}, version {version}; allowed: a GGUF file, version 2 or 3")
        metadata, stored = header.read()
    except (struct.error, KeyError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise InputError(
            f"{path}: the GGUF header is cut off or damaged ({error}); allowed: a complete file"
        ) from error
    architecture, parts = metadata.get("general.architecture"), metadata.get("split.count", 1)
    if architecture != "llama":
        raise InputError(f"{path}: general.architecture is {architecture!r}; allowed: 'llama'")
    if parts > 1:
        raise InputError(f"{path}: one of {parts} parts; allowed: a whole model (llama-gguf-split --merge joins them)")
    return metadata, stored


def _hf_name(name: str) -> str:
    match = _LAYER_TENSOR.fullmatch(name)
    if match and match[2] in _PER_LAYER:
        return f"model.layers.{match[1]}.{_PER_LAYER[match[2]]}.weight"
    return _WHOLE_MODEL.get(name, name)


def interleaved_rows(rows: np.ndarray, width: int) -> np.ndarray:
    """Where llama.cpp keeps `rows` of a Hugging Face q_proj or k_proj with heads of `width` rows.

    Hugging Face turns row j with row j + width/2, llama.cpp neighbours: its converter (LlamaModel.permute) moves
    row (half, j) of a head to row (j, half).
    """
    head, inside = rows // width, rows % width
    half, j = inside // (width // 2), inside % (width // 2)
    return head * width + 2 * j + half


def llama3_factors(scaling: dict[str, Any], theta: float, width: int) -> np.ndarray:
    """Divisor of each of the width/2 rotary frequencies under llama3 scaling (Llama 3.1 reference, apply_scaling)."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, width, 2) / width)
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    smooth = np.clip((scaling["original_max_position_embeddings"] / wavelength - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _shortest(value: float) -> float:
    """The shortest decimal that is this fp32 number: 1e-05, where the file holds 9.999999747378752e-06."""
    return float(str(np.float32(value)))
