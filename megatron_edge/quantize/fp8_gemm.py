"""Which linear layers multiply E4M3 numbers in the forward pass of training, and their operands.

With fp8 inputs and fp8 weights both operands are such numbers, and a product of them differs from the fake-quantised
one only by not rounding code x scale to bf16 first. With fp8 inputs and int4 weights (w4a8_awq) the weight's codes are
numbers of E4M3 too, and each group's scale multiplies the sum over the group. Calibration, evaluation, the reference
and export multiply fake-quantised values as ever. Called by jobs (use), direct.py and written_inputs.py.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from megatron_edge.config import has_fp8_product
from megatron_edge.model.build import named_modules
from megatron_edge.model.fp8_linear import USE_FAST_ACCUM
from megatron_edge.model.layers import transformer_engine_classes
from megatron_edge.quantize import kernels

log = logging.getLogger("megatron_edge")

MULTIPLE = 16  # of a shard's in and out features: torch._scaled_mm
GROUP = 128  # cuBLASLt's groups of scales
TOKENS = 4  # with those, a multiple of tokens: 16 bytes of scales


def absent() -> str:
    """Why this machine has no products of FP8 numbers that training would gain from; empty where it has."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.cuda.get_device_capability() < (8, 9):
        return f"{torch.cuda.get_device_name()} has no FP8 tensor cores (compute capability 8.9 or higher)"
    return "" if find_spec("triton") else "Triton, which casts inputs in one pass, is not installed"


def use(model: nn.Module) -> dict[str, int]:
    """Has the shard's linear layers with fp8 inputs use FP8 products while they are trained, and says in the log which
    do not and why. After calibration (or a checkpoint) and adapters; in place.

    Returns:
        How many layers do ("used"), and how many do not, by the reason.
    """
    found: Counter[str] = Counter()
    for _, layer in named_modules(model):
        formats = _formats(layer)
        if formats is not None and has_fp8_product(*formats):
            reason = _obstacle(layer, formats[0])
            layer._fp8_product = not reason
            found[reason or "used"] += 1
    if found:
        others = "".join(
            f"; {count} multiply fake-quantised values: {why}" for why, count in found.items() if why != "used"
        )
        log.info(
            "FP8 products (torch._scaled_mm, use_fast_accum=%s) in the forward pass of %d linear layers of rank 0%s",
            USE_FAST_ACCUM, found["used"], others,
        )  # fmt: skip
    return dict(found)


def _formats(layer: Any) -> tuple[str, str] | None:
    """(weight's, input's) where both of a layer's quantizers are enabled and ours."""
    quantizers: list[Any] = [getattr(layer, f"{role}_quantizer", None) for role in ("weight", "input")]
    if any(q is None or not q.is_enabled or not q.backend_extra_args for q in quantizers):
        return None
    weight, x = (q.backend_extra_args["format"] for q in quantizers)
    return weight, x


def _obstacle(layer: Any, weight_format: str) -> str:
    weight = getattr(layer, "weight", None)
    if not hasattr(layer, "_is_direct") or weight is None:
        return "layers that are neither Megatron's nor TransformerEngine's"
    if isinstance(layer, transformer_engine_classes()) and layer.config.tensor_model_parallel_size > 1:
        return "TransformerEngine's layers under tensor parallelism"
    if getattr(layer.weight_quantizer, "_route", None) is not None:
        return "adapters take the gradient of the weight"
    if not weight.requires_grad:
        return "the weight is frozen"
    rows, columns = weight.shape
    if rows % MULTIPLE or columns % MULTIPLE:
        return f"a shard of {rows} x {columns}, of which {MULTIPLE} does not divide both"
    if weight_format == "int4":
        return _obstacle_of_groups(weight, layer.weight_quantizer.backend_extra_args["group_size"])
    return ""


def _obstacle_of_groups(weight: Tensor, group_size: int) -> str:
    if group_size != GROUP:
        return f"int4 in groups of {group_size}, for which only fake quantisation is exact ({GROUP} is allowed)"
    if not weight.is_cuda or torch.cuda.get_device_capability(weight.device) != (9, 0):
        return "int4 weights, whose grouped scales need compute capability 9.0"
    if tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2])) < (12, 9):
        return f"int4 weights, whose grouped scales need CUDA 12.9 (torch has {torch.version.cuda})"
    return ""


def takes(layer: Any, x: Tensor) -> bool:
    """Whether this forward pass of a layer in direct.py's state uses an FP8 product."""
    if not layer.__dict__.get("_fp8_product") or not layer.training:
        return False
    modules = layer._modules
    weight, inputs = modules["weight_quantizer"].__dict__, modules["input_quantizer"].__dict__
    if weight["_disabled"] or inputs["_disabled"] or not x.numel():
        return False
    if weight["backend_extra_args"]["format"] == "int4" and x.numel() // x.shape[-1] % TOKENS:
        _say_uneven()
        return False
    return True


@functools.cache
def _say_uneven() -> None:
    """Once."""
    log.info(
        "FP8 products of int4 weights take a multiple of %d tokens: where a micro-batch, or an expert's share of it, "
        "has another number, fake-quantised values are multiplied",
        TOKENS,
    )


def input_operand(x: Tensor, quantizer: Any) -> tuple[Tensor, Tensor]:
    """(codes, scale)."""
    codes, scale, _ = kernels.fp8_operand(quantizer.__dict__["backend_extra_args"], x, quantizer._buffers["_amax"])
    return codes, scale


def weight_operand(weight: Tensor, quantizer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, value in the weight's dtype); kept, where weights are constant (apply.constant_weights)."""
    state = quantizer.__dict__
    kept = state.get("_kept_operand")
    if kept is not None:
        return kept
    codes, scale, value = kernels.fp8_operand(
        state["backend_extra_args"], weight, quantizer._buffers["_amax"], with_values=True
    )
    assert value is not None
    if state.get("_keep"):
        quantizer._kept_operand, quantizer._kept = (codes, scale, value), value
    return codes, scale, value
