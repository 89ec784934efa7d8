"""Gradients of linear layers' weights, added to DistributedDataParallel's fp32 buffer by the product that makes them.

Megatron's hook adds them otherwise, after backward has written them in the weight's dtype: for a bf16 weight 10 bytes
read and written in each micro-batch beside the product's own 2. Here the product reads and writes its 4 bytes of the
buffer, and what it adds is an fp32 sum that was never rounded to bf16. A weight's own gradient is then None: a hook on
it is not called. Where a parameter has other uses (a tied table's lookup, adapters), their gradients come as ever.
With fp32 weights on a CPU one pass and the gradient's memory are saved; bf16 weights there are left to the hook.

A part of compat.py, which installs it. Tests: tests/unit/test_weight_gradients.py, tests/dist/test_fp8_layouts.py,
tests/gpu/test_weight_gradient_cuda.py.
"""

from __future__ import annotations

import functools
import logging
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("megatron_edge")

# Devices, and the dtypes of weights there: CPUs have no fast product of bf16 numbers with fp32 sums.
ADDED_ON: dict[str, tuple[torch.dtype, ...]] = {"cuda": (torch.bfloat16, torch.float32), "cpu": (torch.float32,)}


def buffer_of(weight: Tensor) -> Tensor | None:
    """Where backward is to add the gradient of a linear layer's `weight`: the fp32 tensor of that shape which Megatron
    keeps for this parameter. None for a tensor that is no parameter of DistributedDataParallel, as quantised values,
    and where there is no such product."""
    buffer = getattr(weight, "main_grad", None)
    if buffer is None or buffer.dtype is not torch.float32 or weight.dtype not in ADDED_ON.get(buffer.device.type, ()):
        return None
    return buffer if _can_add(buffer.device, weight.dtype) else None


def add_product(x: Tensor, gradient: Tensor, buffer: Tensor) -> None:
    """buffer [out, in] += gradient [n, out]^T times x [n, in], all sums in fp32; x and gradient are of one dtype."""
    if not len(x):  # an expert without tokens
        return
    if x.dtype is buffer.dtype:
        buffer.addmm_(gradient.t(), x)
    elif buffer.is_cuda:
        torch.addmm(buffer, gradient.t(), x, out_dtype=buffer.dtype, out=buffer)
    else:
        buffer.addmm_(gradient.t().to(buffer.dtype), x.to(buffer.dtype))


@functools.cache
def _can_add(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has that product, which 2.10 is the first to have (aten/src/ATen/native/cuda/Blas.cpp): tried once,
    on small matrices."""
    ones = torch.ones(8, 8, dtype=dtype, device=device)
    try:
        add_product(ones, ones, torch.zeros(8, 8, device=device))
    except RuntimeError as error:
        log.info(
            "gradients of weights are added to the fp32 buffer by a pass of their own: torch %s has no product of %s "
            "numbers that would (%s)", torch.__version__, dtype, str(error).splitlines()[0],
        )  # fmt: skip
        return False
    return True


def add_to(ctx: Any, buffer: Tensor | None) -> None:
    """Has Megatron's backward of `ctx`, after its forward, add the weight's gradient to `buffer` and return None for
    it; no change where that is None. The weight that forward was given must not be the parameter itself, or upstream
    makes an empty gradient for it, which a tied table's other gradient is added to."""
    if buffer is not None:
        ctx.main_grad, ctx.gradient_accumulation_fusion = buffer, True


def add_in_product() -> None:
    """layers.py:569 calls apex's extension where a layer says so, which its constructor refuses without one. Torch's
    product stands for it here, which a CPU has too, and each call decides by its weight."""
    from megatron.core.tensor_parallel import layers

    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=add_product)
    upstream: Any = layers.LinearWithGradAccumulationAndAsyncCommunication

    class LinearThatAdds(upstream):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, *settings: Any) -> Tensor:
            buffer = buffer_of(weight)
            out = upstream.forward(ctx, x, weight if buffer is None else weight.detach(), *settings)
            add_to(ctx, buffer)
            return out

    layers.LinearWithGradAccumulationAndAsyncCommunication = LinearThatAdds
