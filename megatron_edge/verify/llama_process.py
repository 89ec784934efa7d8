"""llama.cpp in a process of its own: a program that reads a request, runs a GGUF file, and writes what it found.

In: request.json and request.npz of llama_cpp.py, in the directory named on the command line; out: answer.json (and
answer.npz) there. Run as `python -m megatron_edge.verify.llama_process DIRECTORY`. It imports neither torch nor
transformers, so that its resident memory is llama.cpp's and a bare Python's, and a crash is its own.

The library is the one inside of the `xllamacpp` wheel; logits come through the C functions that it exports. Their
structs are not stable between builds: the defaults that the library itself fills in are compared with what is written
here of them, and nothing else is set.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

BATCH_TOKENS = 512  # logits of that many tokens are in memory at once
GGML_TYPES = {"fp32": 0, "none": 1, "int8": 8}  # F32, F16, Q8_0
# llama_context_params of b11549 as 32-bit words: name -> (index, default).
CONTEXT_WORDS = {
    "n_ctx": (0, 512), "n_batch": (1, 2048), "n_ubatch": (2, 512), "n_seq_max": (3, 1), "n_threads": (7, 4),
    "n_threads_batch": (8, 4), "flash_attn_type": (13, -1), "type_k": (26, 1), "type_v": (27, 1),
}  # fmt: skip


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


def main(directory: Path) -> None:
    request = json.loads((directory / "request.json").read_text())
    answer = {"score": _score, "chat": _chat}[request["task"]](request, directory)
    answer |= _memory()
    (directory / "answer.json").write_text(json.dumps(answer))


def _memory() -> dict[str, int]:
    """Of this process, in bytes: the most that was resident, and what is now, by kind (file pages are the weights)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kinds = {"peak_rss_bytes": "VmHWM", "rss_anon_bytes": "RssAnon", "rss_file_bytes": "RssFile"}
    return {name: 1024 * int(status[key].split()[0]) for name, key in kinds.items()}


# ---------------------------------------------------------------- chat


def _chat(request: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Answer one prompt through llama.cpp's own server and the chat template of the file, greedily."""
    import xllamacpp

    before = _memory()
    params = xllamacpp.CommonParams()
    params.model.path = request["gguf"]
    params.n_ctx, params.n_parallel, params.warmup, params.port = request["context_tokens"], 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
    kv = {"none": "GGML_TYPE_F16", "int8": "GGML_TYPE_Q8_0"}[request["kv"]]
    params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, kv)
    began = time.monotonic()
    server = xllamacpp.Server(params)
    loading_seconds = time.monotonic() - began
    told = {"max_tokens": request["max_tokens"], "temperature": 0.0}
    if request["messages"]:
        reply = _parsed(server.handle_chat_completions({"messages": request["messages"], **told}))
        text = reply["choices"][0]["message"]["content"]
    else:
        reply = _parsed(server.handle_completions({"prompt": request["prompt"], **told}))
        text = reply["choices"][0]["text"]
    timings = reply["timings"]
    return {
        "text": text,
        "prompt_tokens": timings["prompt_n"],
        "prompt_tokens_per_second": timings["prompt_per_second"],
        "answer_tokens": timings["predicted_n"],
        "tokens_per_second": timings["predicted_per_second"],
        "loading_seconds": loading_seconds,
        "rss_before_bytes": before["peak_rss_bytes"],
    }


def _parsed(reply: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(reply) if isinstance(reply, str | bytes) else reply
    if "choices" not in found:
        raise RuntimeError(f"llama.cpp answered {str(found)[:400]}")
    return found


# ---------------------------------------------------------------- logits


def _score(request: dict[str, Any], directory: Path) -> dict[str, Any]:
    """nll and the most likely token of every position; each document is a sequence that starts at position 0."""
    given = np.load(directory / "request.npz")
    tokens, documents, mask = given["tokens"], given["documents"], given["loss_mask"]
    lines: list[str] = []
    library = _library(lines)
    model, context = _open(library, request, tokens.shape[1])
    vocabulary = library.llama_model_get_vocab(model)
    words = library.llama_vocab_n_tokens(vocabulary)
    nll, top = np.zeros(tokens.shape, np.float64), np.full(tokens.shape, -1, np.int64)
    seconds = 0.0
    for window in range(len(tokens)):
        for begin, document_end in _documents(documents[window]):
            library.llama_memory_clear(library.llama_get_memory(context), True)
            for first in range(begin, document_end, BATCH_TOKENS):
                end = min(first + BATCH_TOKENS, document_end)
                logits, took = _decode(library, context, tokens[window, first:end], first - begin, words)
                seconds += took
                top[window, first:end] = logits.argmax(-1)
                counted = np.flatnonzero(mask[window, first:end])
                nll[window, first + counted] = _nll(logits[counted], tokens[window, first + counted + 1])
    np.savez(directory / "answer.npz", nll=nll, top=top)
    texts = [_tokenize(library, vocabulary, text) for text in request["texts"]]
    return {"log": lines, "token_ids": texts, "vocabulary": words, "tokens_per_second": tokens.size / seconds}


def _documents(numbers: np.ndarray) -> list[tuple[int, int]]:
    edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    return list(itertools.pairwise(edges))


def _nll(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    largest = wide.max(-1, keepdims=True)
    total = np.log(np.exp(wide - largest).sum(-1)) + largest[:, 0]
    return np.asarray(total - wide[np.arange(len(targets)), targets])


def _library(lines: list[str]) -> Any:
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


def _open(library: Any, request: dict[str, Any], length: int) -> tuple[Any, Any]:
    """Model and context for one sequence of `length` tokens."""
    params = library.llama_context_default_params()
    wrong = {name: params.words[at] for name, (at, default) in CONTEXT_WORDS.items() if params.words[at] != default}
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


def _decode(library: Any, context: Any, tokens: np.ndarray, begin: int, words: int) -> tuple[np.ndarray, float]:
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


def _tokenize(library: Any, vocabulary: Any, text: str) -> list[int]:
    raw = text.encode()
    room = (ctypes.c_int32 * (len(raw) + 8))()
    count = library.llama_tokenize(vocabulary, raw, len(raw), room, len(room), True, True)
    if count < 0:
        raise RuntimeError(f"llama_tokenize: {count}")
    return list(room[:count])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
