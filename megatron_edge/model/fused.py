"""RMSNorm, SwiGLU and rotary embedding, each one node of autograd that keeps no more than backward needs.

What is kept is the same on every device. On CUDA with Triton each direction is one pass over memory
(triton_layers.py); elsewhere it is plain torch. Forward rounds where the operations of the Hugging Face model round;
backward is in fp32 and rounds once, but rotation, which rounds as its forward does.
"""

from __future__ import annotations

import functools
import logging
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger("megatron_edge")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / rms(x) over the last dim, the statistic in fp32; x / rms(x) is rounded to x's dtype first."""
    return RMSNormFunction.apply(x, weight, eps)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up of x [..., 2 f], gate first -> [..., f]."""
    return SwiGLUFunction.apply(x)


def normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(`rms_norm`, 1 / rms of each row in fp32), for a function's forward: without gradient."""
    triton = _kernels(x)
    if triton is not None:
        return triton.rms_norm(x, weight, eps)
    wide = _wide(x)
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * inverse).to(x.dtype), inverse


def gated(x: Tensor) -> Tensor:
    """`swiglu`, for a function's forward: without gradient."""
    triton = _kernels(x)
    if triton is not None:
        return triton.swiglu(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x [s, b, heads, d], any strides, turned by the angles of its positions: pairs are a head's first and second half.

    Args:
        rotation: fp32 [s, b, 1, d], cosines of the d / 2 angles followed by their sines (PackedRotaryEmbedding).
    """
    return _Rotation.apply(x, rotation)


class RMSNormFunction(torch.autograd.Function):
    """Keeps x and 1 / rms(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, inverse = normed(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        trained = ctx.needs_input_grad[1]
        triton = _kernels(x)
        if triton is not None:
            return *triton.rms_norm_backward(gradient, x, weight, inverse, trained), None
        wide = _wide(gradient)
        normed, of_normed = _wide(x) * inverse, wide * weight
        of_x = inverse * (of_normed - normed * (of_normed * normed).mean(-1, keepdim=True))
        of_weight = None
        if trained:
            of_weight = (wide * normed.to(x.dtype)).reshape(-1, weight.numel()).sum(0).to(weight.dtype)
        return of_x.to(x.dtype), of_weight, None


class SwiGLUFunction(torch.autograd.Function):
    """Keeps x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return gated(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        triton = _kernels(x)
        if triton is not None:
            return triton.swiglu_backward(gradient, x)
        gate, up = x.chunk(2, dim=-1)
        wide, wide_gate = _wide(gradient), _wide(gate)
        share = torch.sigmoid(wide_gate)
        of_gate = wide * up * share * (1 + wide_gate * (1 - share))
        return torch.cat((of_gate.to(x.dtype), (wide * F.silu(gate)).to(x.dtype)), dim=-1)


class _Rotation(torch.autograd.Function):
    """Keeps the rotation, which all layers share; the gradient is turned back by it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor) -> Tensor:
        ctx.save_for_backward(rotation)
        return _turned(x, rotation, back=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rotation,) = ctx.saved_tensors
        return _turned(gradient, rotation, back=True), None


def _turned(x: Tensor, rotation: Tensor, back: bool) -> Tensor:
    triton = _kernels(x)
    if triton is not None:
        return triton.rotate(x, rotation, back)
    cos, sin = rotation.to(x.dtype).chunk(2, dim=-1)
    if back:
        sin = -sin
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _wide(x: Tensor) -> Tensor:
    """fp32, or float64 where x is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _kernels(x: Tensor) -> ModuleType | None:
    """triton_layers, where it can take x."""
    if not x.is_cuda or not x.numel() or x.dtype is torch.float64:
        return None
    return _kernels_of(x.device)


@functools.cache
def _kernels_of(device: torch.device) -> ModuleType | None:
    if not runs_triton(device, "norm, SwiGLU and rope"):
        return None
    from megatron_edge.model import triton_layers

    return triton_layers


def runs_triton(device: torch.device, what: str) -> bool:
    """Whether the kernels of this project run on a CUDA device: bf16, and clamps that keep NaN. Where not, the log says
    that `what` is calculated without them."""
    if find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0):
        return True
    log.warning("%s in plain torch: the kernels need Triton and compute capability 8.0 or higher", what)
    return False
