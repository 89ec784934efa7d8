"""The file model.gguf by the gguf package, and llama.cpp's own products with it, against the artifact.

In: the artifact's reader, the file, and what llama.cpp was seen to multiply (llama_process.py, task products); out:
checks. Called by llama_cpp.py.

A product is compared on the input that llama.cpp itself gave it, so that no rounding of an earlier one cascades: its
kernels decode the weights of the shipped file as the gguf package does, and round inputs by the rule of
llama_rounding.py, or the difference would be thousands of times the noise of sums.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from megatron_edge.artifact.store import ArtifactReader
from megatron_edge.contracts import Check
from megatron_edge.families import ModelDims, dims_of, expected_tensors, rules_of
from megatron_edge.model.hf_config import checked_config
from megatron_edge.verify.behaviour import FLOOR_FACTOR
from megatron_edge.verify.llama_rounding import rounding_of
from megatron_edge.verify.parity import failures

FORMATS = {"Q4_0": "int4", "Q8_0": "int8", "NVFP4": "nvfp4", "BF16": "bf16", "F16": "fp16", "F32": "fp32"}


@dataclass
class Products:
    """What llama.cpp was seen to multiply, and how far it is from the rule: relative rms of the difference.

    `arrays` are llama.cpp's: `input NAME`, `result NAME` and for experts `experts NAME`, last dimension first.
    """

    arrays: dict[str, np.ndarray]
    seen: set[str] = field(default_factory=set)
    worst: float = 0.0
    worst_name: str = ""
    floor: float = 0.0
    without: float = math.inf

    def take(self, name: str, kind: str, values: np.ndarray, expert: int | None) -> None:
        """One weight of the file [out, in], as the gguf package decodes it (without `.scale`)."""
        if f"result {name}" not in self.arrays:
            return
        self.seen.add(name)
        given, result = self._rows(name, expert)
        if not len(given):
            return
        weight = torch.from_numpy(values)
        rounded = rounding_of(FORMATS[kind])(given)
        exact = rounded.double() @ weight.double().T
        size = exact.square().mean().sqrt().clamp_min(1e-300)
        found, floor, without = (
            float((other - exact).square().mean().sqrt() / size)
            for other in (result, F.linear(rounded, weight), F.linear(given, weight))
        )
        if not found <= self.worst:
            self.worst, self.worst_name = found, name
        self.floor = max(self.floor, floor)
        if rounded is not given:
            self.without = min(self.without, without)

    def _rows(self, name: str, expert: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs [n, in] and results [n, out] that belong to one matrix."""
        given, result = (torch.from_numpy(self.arrays[f"{role} {name}"])[0] for role in ("input", "result"))
        if expert is None:
            return given.flatten(0, 1), result.flatten(0, 1)
        chosen = torch.from_numpy(self.arrays[f"experts {name}"])[0, 0] == expert  # [tokens, used]
        return given.expand(*chosen.shape, -1)[chosen], result[chosen]

    def check(self, label: str, missing: list[str]) -> Check:
        limit = FLOOR_FACTOR * self.floor
        detail = (
            f"{len(self.seen)} weights, each product on the input that llama.cpp gave it, rounded as its kernels do; "
            f"relative rms, noise of fp32 sums {self.floor:.2g}; largest {self.worst_name}"
        )
        if math.isfinite(self.without):
            detail += f"; without the rounding at least {self.without:.2g}"
        if missing:
            detail = f"never multiplied: {', '.join(missing[:5])}; {detail}"
        fits = self.worst <= limit and not missing and bool(self.seen)
        return Check(label, "products of the shipped file in llama.cpp's kernels", self.worst, limit, fits, detail)


def check_file(reader: ArtifactReader, label: str, file: Path, products: Products | None = None) -> list[Check]:
    """Every tensor as the gguf package decodes it, times `.scale`, against the artifact's values in fp32; with
    `products` llama.cpp's products with them too."""
    import gguf

    config = checked_config(json.loads((reader.directory / "config.json").read_text()), str(reader.directory))
    read = gguf.GGUFReader(file)
    stored = {tensor.name: tensor for tensor in read.tensors}
    architecture = read.fields["general.architecture"].contents()
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    dims = dims_of(config)
    names = gguf.get_tensor_name_map(key, dims.num_layers)
    problems, seen, matrices = [], {"rope_freqs.weight"}, set()
    for name in expected_tensors(rules_of(config), dims):
        stacked, _, expert = _expert_of(name)
        theirs = str(names.get_name(stacked, (".weight", ".bias")))
        if theirs not in stored:
            problems.append(f"{name}: missing")
            continue
        kind, scale = stored[theirs].tensor_type, theirs.removesuffix("weight") + "scale"
        seen |= {theirs, scale}
        values = gguf.dequantize(_part(stored[theirs].data, expert), kind).astype(np.float32)
        if products is not None and values.ndim == 2:
            products.take(theirs, kind.name, values, expert)
            matrices.add(theirs)
        if scale in stored:
            values = values * np.float32(stored[scale].data.reshape(-1)[expert or 0])
        values = _heads_in_halves(values, name, architecture, dims)
        linear = name.removesuffix(".weight")
        known = linear in reader.manifest.linears
        ours = reader.dequantized(linear, torch.float32) if known else reader.tensor(name).float()
        if values.shape != tuple(ours.shape) or not np.array_equal(values, ours.numpy()):
            problems.append(f"{name} ({kind.name})")
    problems += [f"{name}: of no tensor of the artifact" for name in sorted(set(stored) - seen)]
    checks = [failures(label, "tensors that the gguf package decodes otherwise", problems)]
    if products is not None:
        only_read = {"token_embd.weight"} if "output.weight" in stored else set()
        checks.append(products.check(label, sorted(matrices - products.seen - only_read)))
    return checks


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
