"""The C functions that the `xllamacpp` wheel exports: a file opened, tokens decoded, products watched, rows decoded.

Called by llama_process.py alone, in a process without torch. The structs of llama.cpp are not stable between builds:
the defaults that the library itself fills in are compared with what is written here of them, and nothing else is set.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import numpy as np

BATCH_TOKENS = 512  # logits of that many tokens are in memory at once
GGML_TYPES = {"fp32": 0, "none": 1, "int8": 8}  # F32, F16, Q8_0
# llama_context_params of b11549 as 32-bit words: name -> (index, default).
CONTEXT_WORDS = {
    "n_ctx": (0, 512), "n_batch": (1, 2048), "n_ubatch": (2, 512), "n_seq_max": (3, 1), "n_threads": (7, 4),
    "n_threads_batch": (8, 4), "flash_attn_type": (13, -1), "type_k": (26, 1), "type_v": (27, 1),
}  # fmt: skip
CALLBACK_WORD = 22  # cb_eval, a pointer: two words, 0 by default
# ggml_tensor of b11549: bytes from its start. The library says itself where the name is.
NE_AT, NB_AT, SRC_AT, NAME_AT = 16, 48, 152, 256
ROW_DECODERS = {
    "Q4_0": "dequantize_row_q4_0", "Q8_0": "dequantize_row_q8_0", "NVFP4": "dequantize_row_nvfp4",
    "BF16": "ggml_bf16_to_fp32_row", "F16": "ggml_fp16_to_fp32_row",
}  # fmt: skip


# (name of the weight, operation, [result, input, chosen experts or None], as stored, last dimension first)
Watcher = Callable[[str, str, list[np.ndarray | None]], None]
_kept: list[Any] = []  # callbacks, or Python frees them while llama.cpp still calls them


class _Params(ctypes.Structure):
    """More than either struct of parameters has: they are passed in memory, of which the library reads its part."""

    _fields_ = (("words", ctypes.c_int32 * 128),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def load_library(lines: list[str]) -> Any:
    """The exported functions with their types; what llama.cpp logs is added to `lines`."""
    import xllamacpp.xllamacpp as module

    library, pointer = ctypes.CDLL(module.__file__), ctypes.c_void_p
    types: dict[str, tuple[Any, list[Any]]] = {
        "llama_model_default_params": (_Params, []),
        "llama_context_default_params": (_Params, []),
        "llama_model_load_from_file": (pointer, [ctypes.c_char_p, _Params]),
        "llama_init_from_model": (pointer, [pointer, _Params]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_vocab_n_tokens": (ctypes.c_int32, [pointer]),
        "llama_get_memory": (pointer, [pointer]),
        "llama_memory_clear": (None, [pointer, ctypes.c_bool]),
        "llama_decode": (ctypes.c_int32, [pointer, _Batch]),
        "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [pointer]),
        "llama_n_ctx": (ctypes.c_uint32, [pointer]),
        "llama_n_batch": (ctypes.c_uint32, [pointer]),
        "llama_n_ubatch": (ctypes.c_uint32, [pointer]),
        "llama_batch_init": (_Batch, [ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]),
        "llama_batch_free": (None, [_Batch]),
        "ggml_get_name": (pointer, [pointer]),
        "ggml_op_desc": (ctypes.c_char_p, [pointer]),
        "ggml_nbytes": (ctypes.c_size_t, [pointer]),
        "ggml_backend_tensor_get": (None, [pointer, pointer, ctypes.c_size_t, ctypes.c_size_t]),
        **{name: (None, [pointer, pointer, ctypes.c_int64]) for name in ROW_DECODERS.values()},
        "llama_tokenize": (
            ctypes.c_int32,
            [
                pointer,
                ctypes.c_char_p,
                ctypes.c_int32,
                ctypes.POINTER(ctypes.c_int32),
                ctypes.c_int32,
                ctypes.c_bool,
                ctypes.c_bool,
            ],
        ),
    }
    for name, (result, arguments) in types.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, pointer)
    callback = kind(lambda level, text, data: lines.append(text.decode(errors="replace").rstrip("\n")))
    _kept.append(callback)
    library.llama_log_set(callback, None)
    library.llama_backend_init()
    return library


def open_file(library: Any, request: dict[str, Any], length: int, watch: Watcher | None = None) -> tuple[Any, Any]:
    """Model and context for one sequence of `length` tokens; `watch` gets every product with a weight of the file."""
    params = library.llama_context_default_params()
    known = {**CONTEXT_WORDS, "cb_eval": (CALLBACK_WORD, 0), "cb_eval, its end": (CALLBACK_WORD + 1, 0)}
    wrong = {name: params.words[at] for name, (at, default) in known.items() if params.words[at] != default}
    if wrong:
        raise RuntimeError(f"this llama.cpp has other context parameters than b11549: {wrong}")
    size = -(-max(length, 256) // 256) * 256
    kv = GGML_TYPES[request["kv"]]
    chosen = {"n_ctx": size, "n_batch": BATCH_TOKENS, "n_ubatch": BATCH_TOKENS, "type_k": kv, "type_v": kv}
    if request["kv"] == "fp32":  # flash attention casts such a cache to fp16
        chosen["flash_attn_type"] = 0
    chosen |= dict.fromkeys(("n_threads", "n_threads_batch"), request["threads"])
    for name, value in chosen.items():
        params.words[CONTEXT_WORDS[name][0]] = value
    if watch is not None:
        address = ctypes.cast(_watched(library, watch), ctypes.c_void_p).value
        ctypes.c_void_p.from_address(ctypes.addressof(params) + 4 * CALLBACK_WORD).value = address
    model = library.llama_model_load_from_file(request["gguf"].encode(), library.llama_model_default_params())
    if not model:
        raise RuntimeError("llama.cpp does not load the file")
    context = library.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("llama.cpp makes no context for the file")
    # It clips a batch to the context.
    for name, asked in (("n_ctx", size), ("n_batch", min(size, BATCH_TOKENS)), ("n_ubatch", min(size, BATCH_TOKENS))):
        found = getattr(library, f"llama_{name}")(context)
        if found != asked:
            raise RuntimeError(f"llama.cpp has {name}={found} where {asked} was asked for: its parameters are others")
    return model, context


def decode(library: Any, context: Any, tokens: np.ndarray, begin: int, words: int) -> tuple[np.ndarray, float]:
    """Logits fp32 [n, words] of tokens that continue the sequence at position `begin`, and the seconds they took."""
    number = len(tokens)
    batch = library.llama_batch_init(number, 0, 1)
    batch.n_tokens = number
    for index, token in enumerate(tokens.tolist()):
        batch.token[index], batch.pos[index], batch.logits[index] = token, begin + index, 1
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
    began = time.monotonic()
    code = library.llama_decode(context, batch)
    if code:
        raise RuntimeError(f"llama_decode: {code}")
    logits = np.ctypeslib.as_array(library.llama_get_logits(context), shape=(number, words)).copy()
    took = time.monotonic() - began
    library.llama_batch_free(batch)
    return logits, took


def tokenize(library: Any, vocabulary: Any, text: str) -> list[int]:
    raw = text.encode()
    room = (ctypes.c_int32 * (len(raw) + 8))()
    count = library.llama_tokenize(vocabulary, raw, len(raw), room, len(room), True, True)
    if count < 0:
        raise RuntimeError(f"llama_tokenize: {count}")
    return list(room[:count])


def _watched(library: Any, watch: Watcher) -> Any:
    """llama.cpp's callback: asked before each operation whether to stop after it, and called again once it is done."""
    failed: list[Exception] = []

    def seen(tensor: int, asks: bool, data: Any) -> bool:
        operation = library.ggml_op_desc(tensor).decode()
        if operation not in ("MUL_MAT", "MUL_MAT_ID"):
            return not asks
        sources = (ctypes.c_void_p * 3).from_address(tensor + SRC_AT)
        weight = _name(library, int(sources[0] or 0))
        if not weight.endswith(".weight"):
            return not asks  # a product of attention
        if not asks:
            chosen = _array(library, int(sources[2] or 0), np.int32) if operation == "MUL_MAT_ID" else None
            watch(weight, operation, [_array(library, tensor), _array(library, int(sources[1] or 0)), chosen])
        return True

    def guarded(tensor: int, asks: bool, data: Any) -> bool:
        try:
            return seen(tensor, asks, data)
        except Exception as error:  # noqa: BLE001 - C code cannot pass it on
            failed.append(error)
            return False  # llama.cpp stops there

    callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)(guarded)
    _kept.extend((callback, failed))
    return callback


def _name(library: Any, tensor: int) -> str:
    place = library.ggml_get_name(tensor)
    if place - tensor != NAME_AT:
        raise RuntimeError(f"this llama.cpp has a tensor's name at byte {place - tensor}, b11549 at {NAME_AT}")
    return ctypes.string_at(place).decode()


def _array(library: Any, tensor: int, dtype: Any = np.float32) -> np.ndarray:
    """A tensor of numbers, or a view of one, last dimension first."""
    shape, strides = (tuple((ctypes.c_int64 * 4).from_address(tensor + at))[::-1] for at in (NE_AT, NB_AT))
    raw = np.empty(library.ggml_nbytes(tensor), np.uint8)
    if strides[-1] != np.dtype(dtype).itemsize:
        raise RuntimeError(f"{_name(library, tensor)} is no array of {np.dtype(dtype)}: strides {strides}")
    library.ggml_backend_tensor_get(tensor, raw.ctypes.data, 0, raw.nbytes)
    return np.ndarray(shape, dtype, raw, strides=strides).copy()


def decode_rows(library: Any, kind: str, data: np.ndarray) -> np.ndarray:
    """fp32 values of a tensor's bytes by llama.cpp's own function; what is fp32 already as it is."""
    import gguf

    if kind == "F32":
        return data
    values, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = np.ascontiguousarray(data).view(np.uint8)
    found = np.empty(raw.nbytes // nbytes * values, np.float32)
    getattr(library, ROW_DECODERS[kind])(raw.ctypes.data, found.ctypes.data, found.size)
    return found.reshape(*raw.shape[:-1], -1)
