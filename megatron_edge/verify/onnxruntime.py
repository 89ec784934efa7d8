"""The targets gptq and onnx: their bytes decoded by their layouts' rules, and onnx run by onnxruntime-genai.

In: the artifact's reader, a target's directory, windows; out: checks, and for what does not run here the reason. Called
by runtimes.py. The runtime answers in a process of its own (onnxruntime_child.py), each document of a window as a
sequence; it is compared with the artifact's model under the recipe that it really runs: packed int4 weights, fp32
inputs, fp32 KV cache.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_edge.artifact.store import ArtifactReader, ShardReader
from megatron_edge.contracts import Check, InputError
from megatron_edge.verify.agreement import Answers, answers_of, compare, figures
from megatron_edge.verify.findings import Findings
from megatron_edge.verify.parity import failures
from megatron_edge.verify.quality import Windows
from megatron_edge.verify.references import References

TARGETS = ("gptq", "onnx")
RUNTIME = "onnxruntime-genai"
FP32_INPUTS = 1  # MatMulNBits' accuracy_level
# Rows of a packed projection, in the builder's order.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def check(references: References, label: str, name: str, directory: Path) -> Findings:
    """Of one target: its bytes, and of onnx what the runtime answers."""
    reader, windows = references.reader, references.windows
    if name == "gptq":
        reason = "vLLM is not among the runtimes here; onnxruntime-genai runs these weights as the target onnx"
        return Findings([_check_gptq(reader, label, directory)], {f"{label}: logits": reason})
    absent = [package for package in ("onnxruntime_genai", "onnx") if importlib.util.find_spec(package) is None]
    if absent:
        return Findings([], {label: f"{' and '.join(absent)} not installed (pip install 'megatron-edge[onnx]')"})
    recipe, problems = read_recipe(reader, directory)
    checks = [failures(label, "linears and recipe that the ONNX file holds otherwise", problems)]
    theirs, facts = ask(directory, windows)
    ours, _ = answers_of(references.run(torch.float32, activations=False, cache=False, with_noise=False))
    ran = {
        "target": name,
        "status": "ran",
        "version": facts["version"],
        "recipe": recipe,
        "threads": facts["threads"],
        "context_tokens": facts["prompt_tokens"] + facts["decoded_tokens"],
        "tokens_per_second": facts["decoded_tokens_per_s"],
        "prefill_tokens_per_second": facts["prompt_tokens_per_s"],
        "peak_rss_bytes": facts["peak_rss_bytes"],
        **figures(windows, ours, theirs),
    }
    checks += compare(f"{label} in {RUNTIME}", windows, ours, theirs)
    return Findings(checks, runtimes={RUNTIME: ran})


def _check_gptq(reader: ArtifactReader, label: str, directory: Path) -> Check:
    """value[o, i] = (nibble i % 8 of qweight[i / 8, o] - nibble of qzeros - 1) * scales[g_idx[i], o]."""
    target, problems = ShardReader(directory), []
    shifts = 4 * torch.arange(8, dtype=torch.int32)
    for name in reader.manifest.layer_linears:
        words, zeros, scales, group = (
            target.tensor(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")
        )
        codes = ((words[:, None, :] >> shifts[None, :, None]) & 15).flatten(0, 1)
        offsets = ((zeros[:, :, None] >> shifts) & 15).flatten(1) + 1
        values = (codes - offsets[group]).float() * scales[group].float()
        if scales.dtype != torch.float16 or not torch.equal(values.T, reader.dequantized(name, torch.float32)):
            problems.append(f"{name}.weight")
    return failures(label, "linears that decode otherwise by GPTQ's rule", problems)


def read_recipe(reader: ArtifactReader, directory: Path) -> tuple[str, list[str]]:
    """What model.onnx computes, in words, and where its packed linears or their inputs are not the artifact's."""
    import onnx

    model = onnx.load(directory / "model.onnx", load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    packed = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    problems, seen, levels, groups = [], set(), set(), set()
    for node in packed:
        facts = {item.name: item.i for item in node.attribute}
        levels.add(facts.get("accuracy_level", 0))
        groups.add(facts["block_size"])
        linears = _linears_of(node.name)
        if strange := [name for name in linears if name not in reader.manifest.layer_linears]:
            problems.append(f"{node.name}: {', '.join(strange)} is not quantised in the artifact")
            continue
        arrays = [onnx.numpy_helper.to_array(stored[part], base_dir=str(directory)) for part in node.input[1:4]]
        rows = 0
        for linear in linears:
            height = reader.manifest.layer_linears[linear].shape[0]
            problems += _differing(reader, linear, facts, arrays, slice(rows, rows + height))
            rows += height
        seen.update(linears)
    problems += [f"{name}: not among its packed linears" for name in sorted(set(reader.manifest.layer_linears) - seen)]
    if levels != {FP32_INPUTS}:
        problems.append(f"inputs of its linears: accuracy_level {sorted(levels)}, where fp32 is {FP32_INPUTS}")
    caches = {
        onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
        for value in model.graph.input
        if value.name.startswith("past_key_values.")
    }
    sizes = ", ".join(str(size) for size in sorted(groups))
    inputs = "fp32 inputs" if levels == {FP32_INPUTS} else f"inputs at accuracy levels {sorted(levels)}"
    return f"int4 weights in groups of {sizes}, {inputs}, {'/'.join(sorted(caches))} KV cache", problems


def _linears_of(node: str) -> list[str]:
    """/model/layers.3/attn/qkv_proj/MatMulNBits -> model.layers.3.self_attn.q_proj, k_proj, v_proj; /lm_head/MatMul_Q4
    -> lm_head."""
    *modules, leaf = node.strip("/").split("/")[:-1]
    module = ".".join("self_attn" if part == "attn" else part for part in modules)
    return [f"{module}.{part}" if module else part for part in FUSED.get(leaf, (leaf,))]


def _differing(reader: ArtifactReader, linear: str, facts: dict[str, int], arrays: list[Any], rows: slice) -> list[str]:
    """Codes uint8 [N, K / g, g / 2], low nibble first; scales fp32 [N K / g]; zero points uint8 with two groups a byte,
    8 where there are none."""
    entry = reader.manifest.layer_linears[linear]
    groups = facts["K"] // facts["block_size"]
    codes, scales, *stored = arrays
    zeros = (stored[0] if stored else np.full(facts["N"] * ((groups + 1) // 2), 0x88, np.uint8)).reshape(facts["N"], -1)
    offsets = np.stack((zeros & 15, zeros >> 4), -1).reshape(facts["N"], -1)[rows, :groups]
    ours = {role: reader.tensor(entry.tensors[role]) for role in ("codes", "scale")}
    same = {
        "group size": facts["block_size"] == entry.group_size and facts["bits"] == 4,
        "codes": np.array_equal(codes.reshape(facts["N"], -1)[rows], ours["codes"].numpy()),
        "scales": np.array_equal(scales.reshape(facts["N"], -1)[rows], ours["scale"].float().numpy()),
        "zero points": bool((offsets == 8).all()),
    }
    return [f"{linear}: {part}" for part, equal in same.items() if not equal]


def ask(directory: Path, windows: Windows) -> tuple[Answers, dict[str, Any]]:
    """The runtime's answers and what it measured of itself.

    Raises:
        InputError: windows whose documents do not start at position 0, or longer than the model's context.
        RuntimeError: the process failed (its last words).
    """
    lengths = _document_lengths(windows)
    context = json.loads((directory / "genai_config.json").read_text())["model"]["context_length"]
    if max(lengths) > context:
        raise InputError(f"a document of {max(lengths)} tokens; {directory} allows {context}")
    with tempfile.TemporaryDirectory() as folder:
        questions, replies = Path(folder) / "questions.npz", Path(folder) / "answers.npz"
        np.savez(
            questions,
            tokens=windows.tokens.flatten().to(torch.int32).numpy(),
            targets=windows.tokens.roll(-1, dims=1).flatten().to(torch.int32).numpy(),
            lengths=np.array(lengths, np.int32),
            threads=torch.get_num_threads(),
        )
        command = [sys.executable, "-m", "megatron_edge.verify.onnxruntime_child"]
        command += [str(part) for part in (directory, questions, replies)]
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()[-3:]
            raise RuntimeError(f"{RUNTIME} ended with {done.returncode}: {' | '.join(said)}")
        with np.load(replies) as read:
            shape = windows.tokens.shape
            nll = torch.from_numpy(read["nll"]).view(shape) * windows.loss_mask
            choices = torch.from_numpy(read["choices"]).long().view(shape)
            return Answers(nll, choices), json.loads(str(read["facts"]))


def _document_lengths(windows: Windows) -> list[int]:
    """Lengths of the runs of tokens of one document, window by window; each must start at position 0."""
    lengths = []
    for documents, positions in zip(windows.documents, windows.positions, strict=True):
        _, counts = torch.unique_consecutive(documents, return_counts=True)
        expected = torch.cat([torch.arange(int(count)) for count in counts])
        if not torch.equal(positions.cpu().long(), expected):
            raise InputError("windows: a document's positions do not start at 0, as a runtime's sequences do")
        lengths += counts.tolist()
    return lengths
