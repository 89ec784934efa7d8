"""llama.cpp reads the target gguf: every tensor, every token of the held-out text, one chat prompt.

In: the artifact's reader and references, the target's directory; out: checks and what the runtime did. Called by
runtimes.py. llama.cpp runs in a process of its own (llama_process.py), from the prebuilt `xllamacpp` wheel.

The CPU kernels of llama.cpp round the inputs of products (llama_rounding.py). A rounding that falls the other way
changes all that follows, so that two right implementations, or one in two orders of sums, agree on 96% of SmolLM2's
likeliest tokens: the same seen from the device. What the file is, is told apart from that in three ways:
- each product with a weight, on llama.cpp's own input, is that of the rule and of the weight (gguf_tensors.py);
- the file with its weights decoded to F32 by llama.cpp's own functions answers as the artifact does, token by token;
- the file as it is, on all windows, has the loss of the artifact under the same roundings.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

import megatron_edge
from megatron_edge.artifact.store import ArtifactReader
from megatron_edge.export.targets.gguf import FILE
from megatron_edge.model.source import load_tokenizer
from megatron_edge.verify import gguf_tensors
from megatron_edge.verify.agreement import Answers, answers_of, compare, figures
from megatron_edge.verify.findings import Findings
from megatron_edge.verify.llama_rounding import INPUTS, round_as_llama_cpp
from megatron_edge.verify.parity import failures
from megatron_edge.verify.quality import Windows
from megatron_edge.verify.references import References

PACKAGE = "xllamacpp"
MOST_DECODED_BYTES = 8_000_000_000
WATCHED_TOKENS = 30  # of which two are a remainder in kernels that take four or eight rows at once
LEAST_WINDOWS = 4  # of one process, which loads the model for them
THREADS = 1  # llama.cpp's threads spin where they wait: two on a core that others use too are a hundred times slower
CONTEXT_TOKENS, ANSWER_TOKENS = 512, 48
PROMPT = "In one sentence: what is an embedded computer?"
TRICKY = "It's 12345 o'clock:\tDON'T  panic!\n\n   naïve 東京 😀 x=3.14**2\r\n</s>"


def check_gguf(references: References, label: str, directory: Path, trained_nll: torch.Tensor | None) -> Findings:
    """Tensors by the gguf package, then products, words, loss, likeliest tokens and a conversation by llama.cpp.

    trained_nll: fp32 [n, s], what the trained model itself said of the windows, if it was asked.

    Raises:
        RuntimeError: llama.cpp does not load or run the file.
    """
    reader, windows, file = references.reader, references.windows, directory / FILE
    if importlib.util.find_spec(PACKAGE) is None:
        reason = f"{PACKAGE} is not installed (pip install megatron-edge[llama-cpp])"
        return Findings(gguf_tensors.check_file(reader, label, file), {f"{label}: llama.cpp": reason})
    kv = str(reader.manifest.kv.get("format", "none"))
    told = {"gguf": str(file), "kv": kv, "threads": THREADS}
    _, watched = run_llama_cpp({**told, "task": "products", "tokens": WATCHED_TOKENS}, windows.first(1))
    found = Findings(gguf_tensors.check_file(reader, label, file, gguf_tensors.Products(watched)))
    tokenizer = load_tokenizer(reader.directory)
    texts = [TRICKY, *(tokenizer.decode(row) for row in windows.tokens[:2])]
    scored, arrays = score({**told, "texts": texts}, windows)
    expected = [tokenizer(text).input_ids for text in texts]
    problems = [
        f"{text[:40]!r}"
        for text, ours, theirs in zip(texts, expected, scored["token_ids"], strict=True)
        if ours != theirs
    ]
    found.checks.append(failures(label, "texts that llama.cpp splits into other tokens", problems))
    row: dict[str, Any] = {"target": "gguf", "status": "ran", **_compare(found, references, label, arrays, trained_nll)}
    row |= {f"decoded_{name}": value for name, value in _compare_decoded(found, references, label, file).items()}
    row |= converse(reader, file, kv) | {
        "version": f"{PACKAGE} {importlib.metadata.version(PACKAGE)}",
        "recipe": describe_recipe(reader, scored["log"], kv),
        "prefill_tokens_per_second": scored["tokens_per_second"],
    }
    found.runtimes["llama.cpp"] = row
    return found


def converse(reader: ArtifactReader, file: Path, kv: str) -> dict[str, Any]:
    """The answer to one prompt, with its speed and memory."""
    templated = bool(load_tokenizer(reader.directory).chat_template)
    request = {
        "task": "chat",
        "gguf": str(file),
        "kv": kv,
        "threads": THREADS,
        "context_tokens": CONTEXT_TOKENS,
        "max_tokens": ANSWER_TOKENS,
        "messages": [{"role": "user", "content": PROMPT}] if templated else [],
        "prompt": PROMPT,
    }
    answer, _ = run_llama_cpp(request, None)
    return {"prompt": PROMPT, "threads": THREADS, "context_tokens": CONTEXT_TOKENS, **answer}


def run_llama_cpp(request: dict[str, Any], windows: Windows | None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """llama_process.py on one request. Raises RuntimeError with its last words where it fails or takes too long."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "request.json").write_text(json.dumps(request))
        patience_seconds = 600.0
        if windows is not None:
            parts = ("tokens", "documents", "loss_mask")
            np.savez(directory / "request.npz", **{part: getattr(windows, part).numpy() for part in parts})
            patience_seconds += windows.tokens.numel() / 2
        package = str(Path(megatron_edge.__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-m", "megatron_edge.verify.llama_process", name]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", env=environment, timeout=patience_seconds
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"llama.cpp was not done after {patience_seconds:.0f} s") from None
        if done.returncode:
            raise RuntimeError(f"llama.cpp's process ended with {done.returncode}: {done.stderr[-800:]}")
        answer = json.loads((directory / "answer.json").read_text())
        arrays = dict(np.load(directory / "answer.npz")) if windows is not None else {}
    return answer, arrays


def score(request: dict[str, Any], windows: Windows) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Task score of llama_process.py, windows shared between as many processes as this one has threads. llama.cpp's own
    threads would share every product instead, and spin. Of the answers the first is given back."""
    number = max(1, min(torch.get_num_threads(), len(windows) // LEAST_WINDOWS))
    edges = [len(windows) * part // number for part in range(number + 1)]
    with ThreadPoolExecutor(number) as pool:
        parts = [
            pool.submit(run_llama_cpp, {**request, "task": "score"}, windows.slice(begin, end))
            for begin, end in itertools.pairwise(edges)
        ]
        answers, arrays = zip(*(part.result() for part in parts), strict=True)
    return answers[0], {name: np.concatenate([part[name] for part in arrays]) for name in arrays[0]}


def describe_recipe(reader: ArtifactReader, log: list[str], kv: str) -> str:
    """What was computed with what: weights and inputs by the formats of the file, the cache as llama.cpp says it.

    Raises:
        RuntimeError: it took another cache than the one asked for, or says nothing of it.
    """
    weights = sorted({linear.format for linear in reader.manifest.layer_linears.values()} or {"bf16"})
    inputs = sorted({str(INPUTS[weight]) for weight in weights})
    said = [found.groups() for line in log if (found := re.search(r"K \((\w+)\).*V \((\w+)\)", line))]
    asked = {"none": "f16", "int8": "q8_0"}[kv]
    if said[-1:] != [(asked, asked)]:
        raise RuntimeError(f"llama.cpp was asked for a {asked} KV cache and took {said[-1:]}")
    return f"weights {'/'.join(weights)}, inputs rounded to {'/'.join(inputs)} by the CPU kernels, KV {asked}"


# ---------------------------------------------------------------- the same tokens, like with like


def _compare(
    found: Findings, references: References, label: str, arrays: dict[str, np.ndarray], trained_nll: torch.Tensor | None
) -> dict[str, Any]:
    """The shipped file as the device runs it, against the reference with the same roundings and the trained model's
    loss; the first comparison's figures."""
    windows = references.windows
    theirs = Answers(torch.from_numpy(arrays["nll"]), torch.from_numpy(arrays["top"]))
    run = references.run(torch.float32, activations=False, cache=False, rounding=round_as_llama_cpp)
    ours, noise = answers_of(run)
    found.checks += compare(label, windows, ours, theirs, noise, "like-for-like reference")
    if trained_nll is not None:  # the text on which training measured the other losses
        found.losses["llama.cpp"] = float((theirs.nll * windows.loss_mask).sum()) / windows.counted_tokens
        trained = Answers(trained_nll, theirs.choices)
        found.checks.append(compare(label, windows, trained, theirs, against="trained model")[0])
    return figures(windows, ours, theirs)


def _compare_decoded(found: Findings, references: References, label: str, file: Path) -> dict[str, Any]:
    """The shipped file with its weights decoded to F32 by llama.cpp's own functions, under an fp32 cache, where no
    kernel rounds anything, against the artifact without roundings: weights, names, rows, positions, norms, scales."""
    import gguf

    size_bytes = 4 * sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(file).tensors)
    if size_bytes > MOST_DECODED_BYTES:
        reason = f"{size_bytes / 1e9:.0f} GB of decoded weights, at most {MOST_DECODED_BYTES / 1e9:.0f} GB are written"
        found.not_run[f"{label}: llama.cpp without the roundings of its kernels"] = reason
        return {}
    windows = references.windows
    with tempfile.TemporaryDirectory() as directory:
        decoded = Path(directory) / FILE
        run_llama_cpp({"task": "rewrite", "gguf": str(file), "to": str(decoded)}, None)
        _, arrays = score({"gguf": str(decoded), "kv": "fp32", "threads": THREADS, "texts": []}, windows)
    theirs = Answers(torch.from_numpy(arrays["nll"]), torch.from_numpy(arrays["top"]))
    ours, _ = answers_of(references.run(torch.float32, activations=False, cache=False, with_noise=False))
    found.checks += compare(f"{label}, weights decoded to F32", windows, ours, theirs)
    return figures(windows, ours, theirs)
