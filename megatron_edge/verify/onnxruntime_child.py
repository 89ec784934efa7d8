"""onnxruntime-genai alone in a process: loads a model, decodes, answers sequences. Run by onnxruntime.py.

    python -m megatron_edge.verify.onnxruntime_child MODEL_DIRECTORY QUESTIONS.npz ANSWERS.npz

Neither torch nor transformers is imported here, so that the memory measured is the runtime's (with Python and numpy).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

PROMPT_TOKENS, DECODED_TOKENS = 32, 64
ROWS = 32  # logits turned into losses at once


def main(directory: str, questions: str, answers: str) -> None:
    """QUESTIONS: `tokens` and `targets` int32 [t], `lengths` int32 of the sequences that they make up, `threads`.
    ANSWERS: `nll` fp32 [t], `choices` int32 [t], and `facts`, a JSON text."""
    import onnxruntime_genai as runtime

    with np.load(questions) as asked:
        tokens, targets, lengths = asked["tokens"], asked["targets"], asked["lengths"]
        threads = int(asked["threads"])
    began = time.perf_counter()
    config = runtime.Config(directory)
    options = {"intra_op_num_threads": threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = runtime.Model(config)
    facts: dict[str, Any] = {"version": runtime.__version__, "threads": threads, "load_s": time.perf_counter() - began}
    context = json.loads((Path(directory) / "genai_config.json").read_text())["model"]["context_length"]
    facts |= decode(runtime, model, tokens, context)
    facts["peak_rss_bytes"] = peak_rss_bytes()
    nll, choices = np.zeros(len(tokens), np.float32), np.zeros(len(tokens), np.int32)
    ends = np.cumsum(lengths)
    began, inside = time.perf_counter(), 0.0
    for begin, end in zip(ends - lengths, ends, strict=True):
        start = time.perf_counter()
        generator = make_generator(runtime, model, min(int(end - begin) + 1, context))
        generator.append_tokens(tokens[begin:end])
        logits = generator.get_output("logits")[0]
        inside += time.perf_counter() - start
        if logits.shape[0] != end - begin:
            raise RuntimeError(f"{logits.shape[0]} rows of logits for {end - begin} tokens")
        for row in range(0, len(logits), ROWS):
            part = logits[row : row + ROWS].astype(np.float64)
            at = slice(begin + row, begin + row + len(part))
            top = part.max(-1)
            total = top + np.log(np.exp(part - top[:, None]).sum(-1))
            nll[at] = total - part[np.arange(len(part)), targets[at]]
            choices[at] = part.argmax(-1)
        del generator
    facts["scoring_tokens_per_s"] = len(tokens) / inside
    np.savez(answers, nll=nll, choices=choices, facts=json.dumps(facts))


def decode(runtime: Any, model: Any, tokens: Any, context: int) -> dict[str, float]:
    """Speed of a prompt, then of one token after another. One token first, which is not measured: it warms up."""
    prompt = tokens[: max(1, min(PROMPT_TOKENS, len(tokens), context // 2))]
    decoded = max(1, min(DECODED_TOKENS, context - len(prompt) - 1))
    make_generator(runtime, model, 2).append_tokens(prompt[:1])
    generator = make_generator(runtime, model, len(prompt) + decoded + 1, min_length=len(prompt) + decoded)
    began = time.perf_counter()
    generator.append_tokens(prompt)
    generator.generate_next_token()
    first = time.perf_counter()
    for _ in range(decoded - 1):
        generator.generate_next_token()
    last = time.perf_counter()
    return {
        "prompt_tokens": len(prompt),
        "decoded_tokens": decoded,
        "prompt_tokens_per_s": len(prompt) / (first - began),
        "decoded_tokens_per_s": (decoded - 1) / (last - first) if decoded > 1 else 0.0,
    }


def make_generator(runtime: Any, model: Any, max_length: int, min_length: int = 0) -> Any:
    parameters = runtime.GeneratorParams(model)
    parameters.set_search_options(max_length=max_length, min_length=min_length, do_sample=False)
    return runtime.Generator(model, parameters)


def peak_rss_bytes() -> int:
    """VmHWM: getrusage's maximum would include the process that started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
