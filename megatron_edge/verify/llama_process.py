"""llama.cpp in a process of its own: a program that reads a request, runs a GGUF file, and writes what it found.

In: request.json and request.npz of llama_cpp.py, in the directory named on the command line; out: answer.json and
answer.npz there. Run as `python -m megatron_edge.verify.llama_process DIRECTORY`. It imports neither torch nor
transformers, so that its resident memory is llama.cpp's and a bare Python's, and a crash is its own.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_edge.verify.llama_library import (
    BATCH_TOKENS,
    decode,
    decode_rows,
    load_library,
    open_file,
    tokenize,
)


def main(directory: Path) -> None:
    request = json.loads((directory / "request.json").read_text())
    answer = {"score": _score, "chat": _chat, "products": _products, "rewrite": _rewrite}[request["task"]](
        request, directory
    )
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
    library = load_library(lines)
    model, context = open_file(library, request, tokens.shape[1])
    vocabulary = library.llama_model_get_vocab(model)
    words = library.llama_vocab_n_tokens(vocabulary)
    nll, top = np.zeros(tokens.shape, np.float64), np.full(tokens.shape, -1, np.int64)
    seconds = 0.0
    for window in range(len(tokens)):
        for begin, document_end in _documents(documents[window]):
            library.llama_memory_clear(library.llama_get_memory(context), True)
            for first in range(begin, document_end, BATCH_TOKENS):
                end = min(first + BATCH_TOKENS, document_end)
                logits, took = decode(library, context, tokens[window, first:end], first - begin, words)
                seconds += took
                top[window, first:end] = logits.argmax(-1)
                counted = np.flatnonzero(mask[window, first:end])
                nll[window, first + counted] = _nll(logits[counted], tokens[window, first + counted + 1])
    np.savez(directory / "answer.npz", nll=nll, top=top)
    texts = [tokenize(library, vocabulary, text) for text in request["texts"]]
    return {"log": lines, "token_ids": texts, "vocabulary": words, "tokens_per_second": tokens.size / seconds}


def _documents(numbers: np.ndarray) -> list[tuple[int, int]]:
    edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    return list(itertools.pairwise(edges))


def _nll(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    largest = wide.max(-1, keepdims=True)
    total = np.log(np.exp(wide - largest).sum(-1)) + largest[:, 0]
    return np.asarray(total - wide[np.arange(len(targets)), targets])


# ---------------------------------------------------------------- products, and weights decoded


def _products(request: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Each product with a weight of the file over the first document's tokens: its input and its result, as stored."""
    tokens = np.load(directory / "request.npz")["tokens"][0, : request["tokens"]]
    arrays: dict[str, Any] = {}

    def watch(weight: str, operation: str, parts: list[np.ndarray | None]) -> None:
        for role, part in zip(("result", "input", "experts"), parts, strict=True):
            if part is not None:
                arrays[f"{role} {weight}"] = part

    library = load_library([])
    _, context = open_file(library, request, len(tokens), watch)
    decode(library, context, tokens, 0, 1)
    np.savez(directory / "answer.npz", **arrays)
    return {"tokens": len(tokens)}


def _rewrite(request: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The same file, metadata and all, with every tensor decoded to F32 by llama.cpp's own functions."""
    import gguf

    library, read = load_library([]), gguf.GGUFReader(request["gguf"])
    writer = gguf.GGUFWriter(request["to"], read.fields["general.architecture"].contents())
    for field in read.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in read.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in read.tensors:
        writer.write_tensor_data(np.ascontiguousarray(decode_rows(library, tensor.tensor_type.name, tensor.data)))
    writer.close()
    return {"tensors": len(read.tensors)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
