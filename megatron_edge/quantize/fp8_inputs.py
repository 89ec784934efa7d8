"""RMSNorm and SwiGLU that round their result for the linear layer that reads it, in one pass: they give the
fake-quantised value, which that layer keeps for backward, and with it the codes that it multiplies.

The gradient is that of the plain function, straight through the rounding. Codes are needed until the product alone:
they travel as an attribute of the value, which the layer takes off. Called by fp8_gemm.py and direct.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_edge.model.fused import RMSNormFunction, SwiGLUFunction
from megatron_edge.quantize import kernels


class _RMSNormOperand(torch.autograd.Function):
    """Keeps what the plain norm keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, amax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, scale, value, inverse = kernels.rms_norm_operand(amax, x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.mark_non_differentiable(codes, scale)
        ctx.set_materialize_grads(False)
        return value, codes, scale

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return *RMSNormFunction.backward(ctx, gradients[0]), None


class _SwiGLUOperand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, scale, value = kernels.swiglu_operand(amax, x)
        ctx.save_for_backward(x)
        ctx.mark_non_differentiable(codes, scale)
        ctx.set_materialize_grads(False)
        return value, codes, scale

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return SwiGLUFunction.backward(ctx, gradients[0]), None


def rms_norm(quantizer: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """quantizer(fused.rms_norm(x, weight, eps)) of an fp8 input's quantizer, with codes for `taken`."""
    return _with_codes(quantizer, *_RMSNormOperand.apply(x, weight, eps, quantizer._buffers["_amax"]))


def swiglu(quantizer: Any, x: Tensor) -> Tensor:
    """quantizer(fused.swiglu(x)), likewise."""
    return _with_codes(quantizer, *_SwiGLUOperand.apply(x, quantizer._buffers["_amax"]))


def _with_codes(quantizer: Any, value: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    value.__dict__["_written"] = quantizer, codes, scale
    return value


def taken(x: Tensor, quantizer: Any) -> tuple[Tensor, Tensor] | None:
    """The (codes, scale) of x that `quantizer` stands behind, where x came with them; x has them no longer, or they
    would live until backward as x does."""
    written = x.__dict__.pop("_written", None)
    return written[1:] if written is not None and written[0] is quantizer else None
