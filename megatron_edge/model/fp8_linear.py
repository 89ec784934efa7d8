"""Megatron's linear function with a forward product of E4M3 numbers, and the gradients of the fake-quantised one.

In: operands as formats.fp8_operand has them, and the weight's values, which backward multiplies. Every layout is
upstream's: what is gathered, reduced or scattered, and when. Called by quantize/direct.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_edge.runtime import weight_gradients

# Tensor cores of compute capability 9.0 add up FP8 products in about 14 bits where this is True; False moves the sums
# to fp32 every 128 products, at some speed. Grouped scales allow nothing else. CPUs ignore it.
USE_FAST_ACCUM = False


def product(codes: Tensor, scale: Tensor, weight_codes: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., in] times [out, in], both float8_e4m3fn, -> [..., out] in `dtype`: sums in fp32, then one cast.

    `scale` is [], `weight_scale` [] or [in / 128, out]. Sizes are as quantize/fp8_gemm.py says.
    """
    flat = codes.view(-1, codes.shape[-1])
    if weight_scale.dim():  # cuBLASLt wants both sides' scales in groups, and the tokens of a group in a row
        scale = scale.expand(weight_scale.shape[0], flat.shape[0]).contiguous().t()
    out = torch._scaled_mm(
        flat, weight_codes.t(), scale_a=scale, scale_b=weight_scale, out_dtype=dtype, use_fast_accum=USE_FAST_ACCUM
    )
    return out.view(*codes.shape[:-1], -1)


def _gathered(codes: Tensor, group: Any) -> Tensor:
    """Of all ranks that split the sequence, along the first dim, as bytes: not every backend knows the dtype."""
    whole = codes.new_empty((codes.shape[0] * group.size(), *codes.shape[1:]))
    torch.distributed.all_gather_into_tensor(whole.view(torch.uint8), codes.view(torch.uint8), group=group)
    return whole


@functools.cache
def linear_of_codes() -> Callable[..., Tensor]:
    """What model/layers.py's linear_of_values gives, but that its forward product is `product`. For backward it keeps
    x, where that is what the codes stand for, and the codes elsewhere, one byte for each value.

    Returns:
        f(x, weight, codes, scale, weight_codes, weight_scale, weight_value, values, bias, *settings). `weight_value`
        [out, in] is in the layer's dtype; `values(codes, scale, dtype)` gives the input's, and is None where that is x;
        settings are as upstream's after the bias. Gradients are those of x, weight and bias; that of the weight goes
        where runtime/weight_gradients.py says.
    """
    from megatron.core.tensor_parallel.layers import LinearWithGradAccumulationAndAsyncCommunication as Linear

    class LinearOfCodes(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, x: Tensor, weight: Tensor, codes: Tensor, scale: Tensor, weight_codes: Tensor,
            weight_scale: Tensor, weight_value: Tensor, values: Callable[..., Tensor] | None,
            bias: Tensor | None, *settings: Any,
        ) -> Tensor:  # fmt: skip
            fused, allreduce_dgrad, sequence_parallel, grad_output_buffer, wgrad_deferral_limit, tp_group = settings
            assert not fused and grad_output_buffer is None, "model/build.py has gradients of weights made at once"
            ctx.save_for_backward(x if values is None else codes, scale, weight_value)
            ctx.values, buffer = values, weight_gradients.buffer_of(weight)
            ctx.of_upstream = {
                "main_grad": buffer, "use_bias": bias is not None, "gradient_accumulation_fusion": buffer is not None,
                "allreduce_dgrad": allreduce_dgrad, "sequence_parallel": sequence_parallel, "grad_output_buffer": None,
                "wgrad_deferral_limit": wgrad_deferral_limit, "tp_group": tp_group,
                "_fwd_used_autocast": False, "_dtype": weight_value.dtype,  # torch.amp.custom_bwd
            }  # fmt: skip
            total = _gathered(codes, tp_group) if sequence_parallel else codes
            out = product(total, scale, weight_codes, weight_scale, weight_value.dtype)
            return out if bias is None else out + bias

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            kept, scale, weight_value = ctx.saved_tensors
            x_value = kept if ctx.values is None else ctx.values(kept, scale, weight_value.dtype)
            upstream = SimpleNamespace(saved_tensors=(x_value, weight_value), **ctx.of_upstream)
            of_x, of_weight, of_bias, *others = Linear.backward(upstream, *gradients)
            return of_x, of_weight, *[None] * 6, of_bias, *others

    return LinearOfCodes.apply
