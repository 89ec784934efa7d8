"""llama.cpp reads the target gguf: every tensor, every token of the held-out text, one chat prompt.

In: the artifact's reader, the target's directory, windows; out: checks and what the runtime did. Called by runtimes.py.
llama.cpp runs in a process of its own (llama_process.py), from the prebuilt `xllamacpp` wheel.

Like is compared with like: the CPU kernels of llama.cpp round the input of a product to the format that they multiply
by (`INPUTS`), and under a q8_0 cache queries as well as keys and values. The reference is the artifact in transformers,
fp32, with those roundings. What the trained model, which has none of them, said of the same tokens stands beside it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import megatron_edge
from megatron_edge.artifact import formats
from megatron_edge.artifact.store import ArtifactReader
from megatron_edge.contracts import Check
from megatron_edge.export.targets.gguf import FILE, write_decoded
from megatron_edge.families import ModelDims, dims_of, expected_tensors, rules_of
from megatron_edge.model.hf_config import checked_config
from megatron_edge.model.source import load_tokenizer
from megatron_edge.verify import experts
from megatron_edge.verify.behaviour import FLOOR_FACTOR, run_artifact
from megatron_edge.verify.findings import Findings
from megatron_edge.verify.parity import failures
from megatron_edge.verify.quality import Windows, load_model, score
from megatron_edge.verify.statistics import mean_over_tokens

PACKAGE = "xllamacpp"
MAX_LOSS_DIFFERENCE = math.log(1.005)  # half a percent of the perplexity
MIN_TOP1_AGREEMENT = 0.99
DECODED_WINDOWS, MOST_DECODED_BYTES = 4, 8_000_000_000
THREADS = 1  # llama.cpp's threads spin where they wait: two on a core that others use too are a hundred times slower
CONTEXT_TOKENS, ANSWER_TOKENS = 512, 48
PROMPT = "In one sentence: what is an embedded computer?"
TRICKY = "It's 12345 o'clock:\tDON'T  panic!\n\n   naïve 東京 😀 x=3.14**2\r\n</s>"
# Format of a weight -> what llama.cpp's CPU kernel rounds the other factor to (ggml-cpu.c, vec_dot_type, b11549).
INPUTS = {"int4": "q8_0", "int8": "q8_0", "nvfp4": "q8_0", "bf16": "bf16", "fp16": "fp16", "fp32": None}
PLAIN = ("bf16", "fp16", "fp32")
ATTENTION = "megatron_edge_llama_cpp_cache"


def check_gguf(
    reader: ArtifactReader, label: str, directory: Path, windows: Windows, trained_nll: torch.Tensor | None
) -> Findings:
    """Tensors by the gguf package, then words, loss, likeliest tokens and a conversation by llama.cpp.

    trained_nll: fp32 [n, s], what the trained model itself said of `windows`, if it was asked.

    Raises:
        RuntimeError: llama.cpp does not load or run the file.
    """
    found = Findings([check_tensors(reader, label, directory / FILE)])
    if importlib.util.find_spec(PACKAGE) is None:
        found.not_run[f"{label}: llama.cpp"] = f"{PACKAGE} is not installed (pip install megatron-edge[llama-cpp])"
        return found
    tokenizer = load_tokenizer(reader.directory)
    texts = [TRICKY, *(tokenizer.decode(row) for row in windows.tokens[:2])]
    kv = str(reader.manifest.kv.get("format", "none"))
    told = {"gguf": str(directory / FILE), "kv": kv, "threads": THREADS}
    scored, arrays = run_llama_cpp({**told, "task": "score", "texts": texts}, windows)
    expected = [tokenizer(text).input_ids for text in texts]
    problems = [
        f"{text[:40]!r}"
        for text, ours, theirs in zip(texts, expected, scored["token_ids"], strict=True)
        if ours != theirs
    ]
    found.checks.append(failures(label, "texts that llama.cpp splits into other tokens", problems))
    _compare(found, reader, label, windows, arrays, trained_nll)
    _compare_decoded(found, reader, label, windows)
    found.runtimes["llama.cpp"] = {"target": "gguf", **converse(reader, directory / FILE, kv)}
    found.runtimes["llama.cpp"] |= {
        "status": "ran",
        "version": f"{PACKAGE} {importlib.metadata.version(PACKAGE)}",
        "recipe": describe_recipe(reader, scored["log"], kv),
        "prefill_tokens_per_second": scored["tokens_per_second"],
    }
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
    found: Findings,
    reader: ArtifactReader,
    label: str,
    windows: Windows,
    theirs: dict[str, np.ndarray],
    trained_nll: torch.Tensor | None,
) -> None:
    """Loss and likeliest tokens against the reference with the same roundings, and against the trained model's loss."""
    model = load_model(reader, torch.float32, activations=False, cache=False)
    round_as_llama_cpp(reader, model)
    run = run_artifact(model, windows, keep_logits=0)
    ours = run.scores
    counted, number = windows.loss_mask, windows.counted_tokens
    loss = float(theirs["nll"].sum()) / number
    others = {"like-for-like reference": ours.nll} | ({} if trained_nll is None else {"trained model": trained_nll})
    few = windows.first(len(run.noise[0].top))
    reordered = max(abs(_loss_apart(noise.nll, ours.nll[: len(few)], few)) for noise in run.noise)
    for metric, nll in others.items():
        apart = (torch.from_numpy(theirs["nll"]) - nll.double()) * counted
        mean, error = _mean_of(apart.sum(1), counted.sum(1))
        detail = (
            f"llama.cpp {loss:.6f}, {metric} {loss - mean:.6f} nats/token over {number} tokens; difference "
            f"{mean:+.2e}, paired standard error {error:.1e}; perplexity {math.expm1(mean):+.3%}; other orders of "
            f"sums move the reference by {reordered:.1e} over {few.counted_tokens} tokens"
        )
        # On a short text half a percent is less than noise, of which this reference has its own.
        own_noise = reordered if nll is ours.nll else 0.0
        limit = max(MAX_LOSS_DIFFERENCE, FLOOR_FACTOR * max(error, own_noise))
        name = f"loss against the {metric}, nats/token"
        found.checks.append(Check(label, name, abs(mean), limit, abs(mean) <= limit, detail))
    floor = min(agreement_of(noise.top, ours.top[: len(few)], few) for noise in run.noise)
    agreement = agreement_of(torch.from_numpy(theirs["top"]), ours.top, windows)
    limit = min(MIN_TOP1_AGREEMENT, 1 - FLOOR_FACTOR * (1 - floor))
    detail = (
        f"over {number} tokens, against the like-for-like reference, which agrees with itself in another order of sums "
        f"at {floor:.4f} of {few.counted_tokens} (least of {len(run.noise)} orders)"
    )
    found.checks.append(Check(label, "likeliest tokens that agree", agreement, limit, agreement >= limit, detail))
    found.losses["llama.cpp"] = loss


def _loss_apart(one: torch.Tensor, other: torch.Tensor, windows: Windows) -> float:
    return float((one.double() - other.double())[windows.loss_mask].mean())


def _compare_decoded(found: Findings, reader: ArtifactReader, label: str, windows: Windows) -> None:
    """llama.cpp on the decoded weights and an fp32 cache, where no kernel rounds anything, against the artifact without
    roundings: names, rows, positions and norms are right."""
    shapes: list[tuple[int, ...]] = [entry.shape for entry in reader.manifest.linears.values()]
    shapes += [entry.shape for entry in reader.manifest.tensors.values() if entry.format in PLAIN]
    size_bytes = 4 * sum(map(math.prod, shapes))
    if size_bytes > MOST_DECODED_BYTES:
        reason = f"{size_bytes / 1e9:.0f} GB of decoded weights, at most {MOST_DECODED_BYTES / 1e9:.0f} GB are written"
        found.not_run[f"{label}: llama.cpp without the roundings of its kernels"] = reason
        return
    few = windows.first(DECODED_WINDOWS)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / FILE
        write_decoded(reader, file)
        request = {"task": "score", "gguf": str(file), "kv": "fp32", "threads": THREADS, "texts": []}
        _, theirs = run_llama_cpp(request, few)
    ours = score(load_model(reader, torch.float32, activations=False, cache=False), few, keep_logits=0)
    agreement = agreement_of(torch.from_numpy(theirs["top"]), ours.top, few)
    apart = (torch.from_numpy(theirs["nll"]) - ours.nll.double())[few.loss_mask]
    detail = (
        f"weights decoded to F32, over {few.counted_tokens} tokens; loss differs by {float(apart.mean()):+.2e} "
        f"nats/token, rms {float(apart.square().mean().sqrt()):.1e}"
    )
    enough, metric = agreement >= MIN_TOP1_AGREEMENT, "likeliest tokens that agree without the kernels' roundings"
    found.checks.append(Check(label, metric, agreement, MIN_TOP1_AGREEMENT, enough, detail))


def agreement_of(top: torch.Tensor, other: torch.Tensor, windows: Windows) -> float:
    """Part of the counted tokens, [n, s], at which both hold the same next one for the likeliest."""
    return float((top == other)[windows.loss_mask].double().mean())


def _mean_of(sums: torch.Tensor, tokens: torch.Tensor) -> tuple[float, float]:
    """Mean over tokens and its standard error over windows, which one window alone does not show."""
    if int((tokens > 0).sum()) < 2:
        return float(sums.sum() / tokens.sum()), math.nan
    mean, error, _ = mean_over_tokens(sums.tolist(), tokens.tolist())
    return mean, error


def round_as_llama_cpp(reader: ArtifactReader, model: Any) -> None:
    """Give a plain model the roundings of llama.cpp's CPU kernels: inputs of products, and the cache.

    The router has fp32 weights in the file, and its inputs stay as they are.
    """
    import transformers

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            rounding = _rounding(_format_of(reader, name))
            module.register_forward_pre_hook(lambda _, args, rounding=rounding: (rounding(args[0]), *args[1:]))
        elif name.endswith(".mlp.experts"):
            weight = experts.stored_name(reader, experts.fused_targets(reader, f"{name}.gate_up_proj")[0][0])
            experts.round_inputs(module, _rounding(_format_of(reader, weight.removesuffix(".weight"))))
        elif name.endswith(".self_attn"):
            module.cache_format = str(reader.manifest.kv.get("format", "none"))
            module.neighbours = reader.manifest.family in ("LlamaForCausalLM", "MixtralForCausalLM")
    transformers.AttentionInterface.register(ATTENTION, _attention)
    model.config._attn_implementation = ATTENTION


def _format_of(reader: ArtifactReader, linear: str) -> str:
    """Format of a linear layer's weight; a tied output layer has the embedding's."""
    manifest = reader.manifest
    for name in (linear, "model.embed_tokens"):
        if name in manifest.linears:
            return manifest.linears[name].format
        if f"{name}.weight" in manifest.tensors:
            return manifest.tensors[f"{name}.weight"].format
    raise KeyError(linear)


def _rounding(weight: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """What becomes of the other factor of a product with weights of this format."""
    kind = INPUTS[weight]
    if kind == "q8_0":
        return lambda x: formats.fake_quantize_kv("int8", x)
    if kind is None:
        return lambda x: x
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[kind]
    return lambda x: x.to(dtype).to(x.dtype)


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
) -> tuple[torch.Tensor, Any]:
    """Post-RoPE [b, heads, s, head_dim]; a head's halves lie interleaved in llama.cpp's Llama, and so do its blocks."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if module.cache_format == "int8":
        query, key = (_q8_0(x, module.neighbours) for x in (query, key))
        value = _q8_0(value, neighbours=False)
    else:
        query, key, value = (x.half().to(x.dtype) for x in (query, key, value))
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **options)


def _q8_0(x: torch.Tensor, neighbours: bool) -> torch.Tensor:
    if not neighbours:
        return formats.fake_quantize_kv("int8", x)
    turned = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return formats.fake_quantize_kv("int8", turned).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


# ---------------------------------------------------------------- the same tensors


def check_tensors(reader: ArtifactReader, label: str, file: Path) -> Check:
    """Every tensor as the gguf package decodes it, times `.scale`, against the artifact's values in fp32."""
    import gguf

    config = checked_config(json.loads((reader.directory / "config.json").read_text()), str(reader.directory))
    read = gguf.GGUFReader(file)
    stored = {tensor.name: tensor for tensor in read.tensors}
    architecture = read.fields["general.architecture"].contents()
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    dims = dims_of(config)
    names = gguf.get_tensor_name_map(key, dims.num_layers)
    problems, seen = [], {"rope_freqs.weight"}
    for name in expected_tensors(rules_of(config), dims):
        stacked, _, expert = _expert_of(name)
        theirs = str(names.get_name(stacked, (".weight", ".bias")))
        if theirs not in stored:
            problems.append(f"{name}: missing")
            continue
        scale = theirs.removesuffix("weight") + "scale"
        seen |= {theirs, scale}
        values = gguf.dequantize(_part(stored[theirs].data, expert), stored[theirs].tensor_type).astype(np.float32)
        if scale in stored:
            values = values * np.float32(stored[scale].data.reshape(-1)[expert or 0])
        values = _heads_in_halves(values, name, architecture, dims)
        linear = name.removesuffix(".weight")
        known = linear in reader.manifest.linears
        ours = reader.dequantized(linear, torch.float32) if known else reader.tensor(name).float()
        if values.shape != tuple(ours.shape) or not np.array_equal(values, ours.numpy()):
            problems.append(f"{name} ({stored[theirs].tensor_type.name})")
    problems += [f"{name}: of no tensor of the artifact" for name in sorted(set(stored) - seen)]
    return failures(label, "tensors that the gguf package decodes otherwise", problems)


def _expert_of(name: str) -> tuple[str, str, int | None]:
    """(the name with its expert's number left out, what follows, the number)"""
    before, found, after = name.partition(".experts.")
    if not found:
        return name, "", None
    number, _, leaf = after.partition(".")
    return f"{before}.experts.{leaf}", leaf, int(number)


def _part(data: np.ndarray, expert: int | None) -> np.ndarray:
    return data if expert is None else data[expert]


def _heads_in_halves(values: np.ndarray, name: str, architecture: str, dims: ModelDims) -> np.ndarray:
    """llama.cpp's Llama has the rows (half, j) of a head at (j, half)."""
    if architecture != "llama" or not name.endswith((".q_proj.weight", ".k_proj.weight")):
        return values
    split = values.reshape(-1, dims.head_dim // 2, 2, values.shape[1])
    return split.swapaxes(1, 2).reshape(values.shape)
