"""RMSNorm and SwiGLU that round their result for the linear layer that reads it, in one pass: they give the
fake-quantised value, which that layer keeps for backward, and for an FP8 product with it the codes that it multiplies.

The gradient is that of the plain function, straight through the rounding. That a value is rounded, and its codes,
travel as an attribute of it, which the layer takes off: rounded again, an nvfp4 value could be another. It is done in
training alone, where nothing else reads the value and nothing looks at it on its way. Called by jobs (use) and
direct.py.
"""

from __future__ import annotations

import functools
import logging
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from megatron_edge.model import fused
from megatron_edge.model.build import named_modules
from megatron_edge.model.fused import RMSNormFunction, SwiGLUFunction
from megatron_edge.model.layers import RMSNorm, read_by_one
from megatron_edge.quantize import fp8_gemm, kernels

log = logging.getLogger("megatron_edge")

# Of a layer: a backward hook has it called with another tensor, which has no mark.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
VALUES_OF = ("nvfp4",)  # formats of inputs whose value alone is written; without them it is for FP8 products alone


def use(model: nn.Module, fp8_products: bool | None = False) -> int:
    """Has the shard's norms and SwiGLU write the inputs of the layers after them, where those take them rounded, and no
    others; before that, where `fp8_products`, has the layers multiply FP8 numbers (fp8_gemm.use). After calibration (or
    a checkpoint) and adapters; in place.

    Returns:
        How many do.
    """
    if fp8_products:
        fp8_gemm.use(model)
    count = 0
    for _, module in named_modules(model):
        for owner, name, linear in read_by_one(module):
            plain, ours = (fused.rms_norm, _rms_norm) if isinstance(owner, RMSNorm) else (fused.swiglu, _swiglu)
            writes = linear.__dict__.get("_fp8_product", False) or _takes_values(linear)
            # A proxy: what keeps its owner is freed with it by garbage collection alone.
            setattr(owner, name, functools.partial(ours, weakref.proxy(owner), linear) if writes else plain)
            count += writes
    if count:
        log.info("in training a norm or SwiGLU writes %d of the inputs of rank 0's linear layers, rounded", count)
    return count


def _rms_norm(norm: Any, linear: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if _will_take(norm, linear, x):
        return rms_norm(linear._modules["input_quantizer"], x, weight, eps)
    return fused.rms_norm(x, weight, eps)


def _swiglu(mlp: Any, linear: Any, x: Tensor) -> Tensor:
    if _will_take(mlp, linear, x):
        return swiglu(linear._modules["input_quantizer"], x)
    return fused.swiglu(x)


def _will_take(owner: Any, linear: Any, x: Tensor) -> bool:
    """Whether `linear` will take what comes of x rounded, and nobody looks at that on its way."""
    if owner.__dict__["_forward_hooks"] or any(linear.__dict__[kind] for kind in _HOOKS) or not linear._is_direct(None):
        return False
    return fp8_gemm.takes(linear, x) or (linear.training and x.numel() > 0 and _takes_values(linear))


def _takes_values(linear: Any) -> bool:
    """Whether direct.py has a layer multiply its input as it is, where that comes rounded, and its format is one of
    those."""
    if not hasattr(linear, "_is_direct"):
        return False
    state = linear._modules["input_quantizer"].__dict__
    return not state["_disabled"] and (state["backend_extra_args"] or {}).get("format") in VALUES_OF


class _RoundedRMSNorm(torch.autograd.Function):
    """(value, or with it codes and scale); keeps what the plain norm keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, amax: Tensor, with_codes: bool) -> tuple[Tensor, ...]:
        rounded = kernels.rms_norm_operand if with_codes else kernels.rms_norm_values
        *written, value, inverse = rounded(amax, x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return _differentiable_alone(ctx, value, written)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return *RMSNormFunction.backward(ctx, gradients[0]), None, None


class _RoundedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Tensor, with_codes: bool) -> tuple[Tensor, ...]:
        *written, value = kernels.swiglu_operand(amax, x) if with_codes else (kernels.swiglu_values(amax, x),)
        ctx.save_for_backward(x)
        return _differentiable_alone(ctx, value, written)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return SwiGLUFunction.backward(ctx, gradients[0]), None, None


def _differentiable_alone(ctx: Any, value: Tensor, written: list[Tensor]) -> tuple[Tensor, ...]:
    ctx.mark_non_differentiable(*written)
    ctx.set_materialize_grads(False)
    return value, *written


def rms_norm(quantizer: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """quantizer(fused.rms_norm(x, weight, eps)) of the quantizer of an fp8 or nvfp4 input; marked for `taken`, of fp8
    with codes."""
    return _marked(quantizer, *_RoundedRMSNorm.apply(x, weight, eps, *_settings(quantizer)))


def swiglu(quantizer: Any, x: Tensor) -> Tensor:
    """quantizer(fused.swiglu(x)), likewise."""
    return _marked(quantizer, *_RoundedSwiGLU.apply(x, *_settings(quantizer)))


def _settings(quantizer: Any) -> tuple[Tensor, bool]:
    return quantizer._buffers["_amax"], quantizer.__dict__["backend_extra_args"]["format"] not in VALUES_OF


def _marked(quantizer: Any, value: Tensor, *codes: Tensor) -> Tensor:
    value.__dict__["_written"] = quantizer, *codes
    return value


def taken(x: Tensor, quantizer: Any) -> tuple[Tensor, ...] | None:
    """Where x came rounded as `quantizer` does: the (codes, scale) that it stands for, or () where it came alone. x has
    them no longer, or they would live until backward as x does."""
    written = x.__dict__.pop("_written", None)
    return written[1:] if written is not None and written[0] is quantizer else None
