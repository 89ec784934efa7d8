"""What a quantizer gives, by its role (weight, input, KV): on CUDA in one pass with Triton, else artifact/formats.py.

Both give the same bits; formats is the one home of numerics. Called by apply._fake_quantize for every quantised tensor
of every step, so what does not depend on the values is done once.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_edge.artifact import formats
from megatron_edge.model import fused as layers
from megatron_edge.model.fused import runs_triton

_FP8_INPUT: dict[str, Any] = {"role": "input", "format": "fp8", "group_size": 0}
_NVFP4_INPUT: dict[str, Any] = {"role": "input", "format": "nvfp4", "group_size": 0}


def fake_quantize(args: dict[str, Any], x: Tensor, amax: Tensor | None, out_dtype: torch.dtype | None = None) -> Tensor:
    """x as it will be stored and read back: a new tensor of x's shape, without gradient.

    `args` are the quantizer's: role (weight | input | kv), format and, of weights, group_size along the last dim; int4
    weights may also come as [groups, group_size]. `amax` is the calibrated maximum; only KV int8 has none. The
    arithmetic is fp32 whatever x is, followed by ONE cast to `out_dtype` (None: x's dtype).

    Raises:
        InputError: an unknown format, or an amax or a shape that does not fit it.
    """
    dtype = out_dtype or x.dtype
    if x.is_cuda and x.numel():
        fused = _fused(x.device)
        if fused is not None:
            return fused.fake_quantize(args, x, amax, dtype)
    return plain(args, x, amax, dtype)


def plain(args: dict[str, Any], x: Tensor, amax: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The same by artifact/formats.py, on any device."""
    if dtype is not x.dtype:
        x = x.float()  # what is rounded to x's dtype first is rounded twice
    if args["role"] == "kv":
        return formats.fake_quantize_kv(args["format"], x, amax).to(dtype)
    assert amax is not None
    if args["role"] == "input":
        return formats.fake_quantize_input(args["format"], x, amax).to(dtype)
    return formats.fake_quantize(args["format"], x, amax, args["group_size"]).to(dtype)


def fp8_operand(
    args: dict[str, Any], x: Tensor, amax: Tensor, with_values: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x as an operand of a product of E4M3 numbers: (codes, scale) of formats.fp8_operand, and with_values what
    `fake_quantize` gives in x's dtype, from the same pass. `args` are a quantizer's: an input's or a weight's of fp8, a
    weight's of int4 in a power of two."""
    if x.is_cuda and x.numel():
        fused = _fused(x.device)
        if fused is not None:
            codes, scale, values = fused.fp8_operand(args, x, amax, with_values)
            return codes, scale, values if with_values else None
    codes, scale = formats.fp8_operand(args["format"], x.contiguous(), amax, args["group_size"])
    return codes, scale, plain(args, x, amax, x.dtype) if with_values else None


def rms_norm_operand(amax: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, scale, values, 1 / rms of each row in fp32): `fp8_operand`, as an input, of what fused.rms_norm gives."""
    triton = _fused_inputs(x)
    if triton is not None:
        return triton.rms_norm_operand(amax, x, weight, eps)
    out, inverse = layers.normed(x, weight, eps)
    return *_operand_and_values(out, amax), inverse


def swiglu_operand(amax: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, values): `fp8_operand`, as an input, of what fused.swiglu gives."""
    triton = _fused_inputs(x)
    if triton is not None:
        return triton.swiglu_operand(amax, x)
    return _operand_and_values(layers.gated(x), amax)


def rms_norm_values(amax: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(values, 1 / rms of each row in fp32): `fake_quantize`, as an nvfp4 input, of what fused.rms_norm gives."""
    triton = _fused_inputs(x)
    if triton is not None:
        return triton.rms_norm_values(amax, x, weight, eps)
    out, inverse = layers.normed(x, weight, eps)
    return fake_quantize(_NVFP4_INPUT, out, amax), inverse


def swiglu_values(amax: Tensor, x: Tensor) -> Tensor:
    """`fake_quantize`, as an nvfp4 input, of what fused.swiglu gives."""
    triton = _fused_inputs(x)
    if triton is not None:
        return triton.swiglu_values(amax, x)
    return fake_quantize(_NVFP4_INPUT, layers.gated(x), amax)


def _operand_and_values(x: Tensor, amax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, values = fp8_operand(_FP8_INPUT, x, amax, with_values=True)
    assert values is not None
    return codes, scale, values


def fp8_values(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What codes with one scale stand for: the bits of `fake_quantize`."""
    if codes.is_cuda and codes.numel():
        fused = _fused(codes.device)
        if fused is not None:
            return fused.fp8_values(codes, scale, dtype)
    return formats.fp8_values(codes, scale, dtype)


@functools.cache
def _fused(device: torch.device) -> ModuleType | None:
    if not runs_triton(device, "fake quantisation"):
        return None
    from megatron_edge.quantize import triton_kernels

    return triton_kernels


def _fused_inputs(x: Tensor) -> ModuleType | None:
    """triton_inputs, where it can take x."""
    if not x.is_cuda or not x.numel() or x.dtype is torch.float64 or _fused(x.device) is None:
        return None
    from megatron_edge.quantize import triton_inputs

    return triton_inputs
