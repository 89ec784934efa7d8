"""Other software reads the targets: what it really loads here, and whether it answers as the artifact does.

In: the artifact's reader, target directories, windows; out: checks, and for what cannot run here the reason. What did
not run never counts as passed. Called by report.py.

- `compressed_tensors`: transformers + compressed-tensors load and run it (seen with 5.23 and 0.20): int4 and fp8 in
  float32, because they cast the stored scales to the model's data type; nvfp4 in bfloat16, the only one it runs in.
- `hf`: plain transformers.
- `gguf`: llama.cpp, in llama_cpp.py.
- `modelopt`: no runtime without its own GPU reads it, so its bytes are decoded by the layout's rule and compared;
  tools/edge_llm.py lets TensorRT Edge-LLM's own export parse it.
- `gptq`, `onnx`: onnxruntime.py; onnxruntime-genai runs the latter.

Quantised embeddings and output layers lie in every target but gguf as bf16 values, and are compared as such.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import re
import time
from pathlib import Path
from typing import Any

import torch

from megatron_edge.artifact.store import ArtifactReader, ShardReader
from megatron_edge.contracts import Check
from megatron_edge.verify import experts, llama_cpp, onnxruntime
from megatron_edge.verify.agreement import Answers, answers_of, compare, figures
from megatron_edge.verify.behaviour import check_logits
from megatron_edge.verify.findings import Findings
from megatron_edge.verify.parity import failures
from megatron_edge.verify.quality import score, weight_of
from megatron_edge.verify.references import References

# Runtimes that verify can run, and the targets that they read.
RUNTIMES: dict[str, tuple[str, ...]] = {
    "llama.cpp": ("gguf",), "onnxruntime-genai": ("onnx",), "transformers": ("compressed_tensors", "hf"),
}  # fmt: skip
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def find_targets(artifact_dir: Path) -> dict[str, Path]:
    """Targets lie beside the canonical artifact; each says its name in target_report.json."""
    reports = sorted(artifact_dir.parent.glob("*/target_report.json"))
    return {json.loads(report.read_text())["name"]: report.parent for report in reports}


def check_target(
    references: References, name: str, directory: Path, trained_nll: torch.Tensor | None = None
) -> Findings:
    """Read one target as its runtime does, on the windows of `references`, whose losses in the trained model are
    `trained_nll`, fp32 [n, s]."""
    label, reader = f"target {name}", references.reader
    if name == "gguf":
        return llama_cpp.check_gguf(references, label, directory, trained_nll)
    if name == "modelopt":
        reason = "TensorRT-LLM, TensorRT Edge-LLM and vLLM run ModelOpt checkpoints on their own GPUs only"
        return Findings([_check_modelopt(reader, label, directory)], {f"{label}: logits": reason})
    if name in onnxruntime.TARGETS:
        return onnxruntime.check(references, label, name, directory)
    if name not in ("hf", "compressed_tensors"):
        return Findings([], {label: "no reader of this target is known here"})
    for package in ("transformers", *(["compressed_tensors"] if name == "compressed_tensors" else [])):
        if importlib.util.find_spec(package) is None:
            return Findings([], {label: f"{package} is not installed"})
    if name == "compressed_tensors" and reader.manifest.dims.get("num_experts"):
        reason = "transformers 5.23 leaves packed experts unread, and vLLM, which reads them, needs its own GPU"
        return Findings([_check_decompressed(reader, label, directory)], {f"{label}: logits": reason})
    used = {linear.format for linear in reader.manifest.layer_linears.values()}
    if name == "compressed_tensors" and "nvfp4" in used and len(used) > 1:
        reason = "transformers casts all scales to one data type: nvfp4 runs in bfloat16 only, the others are exact in "
        return Findings([_check_decompressed(reader, label, directory)], {f"{label}: logits": f"{reason}float32"})
    return _check_transformers(references, label, name, directory)


def _check_transformers(references: References, label: str, name: str, directory: Path) -> Findings:
    """Weights as transformers decodes them, logits of the first windows, losses and likeliest tokens of all, against
    the artifact in the same data type."""
    reader, windows = references.reader, references.windows
    formats_used = {linear.format for linear in reader.manifest.layer_linears.values()}
    dtype = torch.bfloat16 if name == "hf" or "nvfp4" in formats_used else torch.float32
    theirs, dtype_name = _load(directory, dtype), str(dtype).removeprefix("torch.")
    weights = dict(theirs.named_parameters())
    names = [f"{linear}.weight" for linear in reader.manifest.linears if f"{linear}.weight" in weights]
    names += [name for name in weights if experts.is_fused(name)]
    differing = [
        f"{name}: {wrong} of {weights[name].numel()} values"
        for name in names
        if (wrong := _differing(weights[name], weight_of(reader, name, dtype, torch.bfloat16)))
    ]
    checks = [failures(label, f"linears that transformers decodes otherwise ({dtype_name})", differing)]
    began = time.monotonic()
    answered = score(theirs, windows, references.keep_logits)
    seconds = time.monotonic() - began
    del theirs, weights
    carries = name == "compressed_tensors"
    fp8_cache = carries and reader.manifest.kv.get("format") == "fp8"
    run = references.run(dtype, activations=carries, cache=fp8_cache, tables=torch.bfloat16)
    activations = carries and any(linear.activation != "none" for linear in reader.manifest.linears.values())
    checks += check_logits(label, answered.logits, run, flips=activations or fp8_cache)
    ours, noise = answers_of(run)
    checks += compare(label, windows, ours, Answers.of(answered), noise)
    inputs = "quantised inputs" if activations else f"{dtype_name} inputs"
    ran = {
        "target": name,
        "status": "ran",
        "version": importlib.metadata.version("transformers"),
        "recipe": f"decoded weights with {inputs}, KV cache in {'fp8' if fp8_cache else dtype_name}",
        "prefill_tokens_per_second": windows.tokens.numel() / seconds,
        **figures(windows, ours, Answers.of(answered)),
    }
    return Findings(checks, runtimes={"transformers": ran})


def _check_decompressed(reader: ArtifactReader, label: str, directory: Path) -> Check:
    """Each linear layer through compressed-tensors' own decompressor, by the scheme that config.json gives it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    section = json.loads((directory / "config.json").read_text())["quantization_config"]
    config, target = QuantizationConfig.model_validate(section), ShardReader(directory)
    problems = _wrong_tables(reader, target)
    for name in reader.manifest.layer_linears:
        schemes = [scheme for scheme in config.config_groups.values() if _is_meant(name, scheme.targets)]
        parts = {
            key.removeprefix(f"{name}."): target.tensor(key) for key in target.names() if key.startswith(f"{name}.")
        }
        decompress = BaseCompressor.get_value_from_registry(schemes[0].format).decompress if len(schemes) == 1 else None
        weight = decompress(parts, schemes[0])["weight"] if decompress else torch.empty(0)
        if not decompress or not torch.equal(weight, reader.dequantized(name, weight.dtype)):
            problems.append(f"{name}.weight")
    return failures(label, "linears that compressed-tensors decodes otherwise", problems)


def _wrong_tables(reader: ArtifactReader, target: ShardReader) -> list[str]:
    """Quantised embeddings and output layers whose bf16 values a target does not hold: it carries no codes of them."""
    names = {f"{name}.weight": reader.dequantized(name, torch.bfloat16) for name in reader.manifest.tables}
    return [name for name, values in names.items() if not torch.equal(target.tensor(name), values)]


def _is_meant(name: str, targets: list[str]) -> bool:
    """By compressed-tensors' rule: a pattern after re:, a name, or the class of the module."""
    return any(re.match(t.removeprefix("re:"), name) if t.startswith("re:") else t in ("Linear", name) for t in targets)


def _load(directory: Path, dtype: torch.dtype) -> Any:
    """transformers' own loading. Its progress bars and compressed-tensors' go to stderr, which is not theirs here."""
    import transformers

    with contextlib.redirect_stderr(io.StringIO()):
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, trust_remote_code=False)
        model.eval().requires_grad_(False)
        compressed = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
        if compressed is not None:
            compressed.decompress_model(model)
    return model


def _differing(theirs: torch.Tensor, ours: torch.Tensor) -> int:
    return int((theirs.detach().to(ours.dtype).cpu() != ours).sum())


def _check_modelopt(reader: ArtifactReader, label: str, directory: Path) -> Check:
    """Decode by ModelOpt's rule: fp8 weight * weight_scale, nvfp4 e2m1 * (weight_scale * weight_scale_2), int4 two rows
    a byte."""
    target = ShardReader(directory)
    problems = _wrong_tables(reader, target)
    for name, linear in reader.manifest.layer_linears.items():
        expected = reader.dequantized(name, torch.float32)
        codes, scale = target.tensor(f"{name}.weight"), target.tensor(f"{name}.weight_scale").float()
        if linear.format == "nvfp4":
            scale = (scale * target.tensor(f"{name}.weight_scale_2")).repeat_interleave(linear.group_size, dim=1)
            nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1).long()
            values = torch.tensor([*E2M1, *(-value for value in E2M1)])[nibbles]
        elif linear.format == "int4":
            nibbles = torch.stack((codes & 15, codes >> 4), dim=1).flatten(0, 1).int()
            values = (nibbles - 16 * (nibbles > 7)).float()
            scale = scale.repeat_interleave(linear.group_size, dim=1)
        else:
            values = codes.float()
        if not torch.equal(values * scale, expected):
            problems.append(f"{name}.weight")
        if linear.activation != "none":
            stored = target.tensor(f"{name}.input_scale")
            if not torch.equal(stored, reader.tensor(linear.tensors["input_scale"])):
                problems.append(f"{name}.input_scale")
    for name in reader.names():  # model.layers.0.self_attn.k_scale lies with the projection, k_proj.k_scale
        if name.endswith((".self_attn.k_scale", ".self_attn.v_scale")):
            attention, which = name.removesuffix("_scale").rsplit(".", 1)
            if not torch.equal(target.tensor(f"{attention}.{which}_proj.{which}_scale").cpu(), reader.tensor(name)):
                problems.append(name)
    return failures(label, "tensors that decode otherwise by ModelOpt's rule", problems)
