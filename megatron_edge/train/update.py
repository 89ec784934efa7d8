"""The optimizer's part of a step: gradients divided by tokens, their norm, clipping, Adam.

The host waits for the device once in a step, in `step.train_step`, which fetches loss and norm together; nothing here
does, and Adam in one pass is launched before that wait. What each parameter costs in memory traffic on CUDA, in bytes:
4 for the norm and 30 for Adam (triton_adam.py), which divides, clips and writes the bf16 weight on its way. Without
Triton, or with the Adam of TransformerEngine or apex: 8 to divide its gradient, 4 for the norm, 8 where it is clipped,
28 for Adam, 6 for its bf16 weight. Neither makes temporaries.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_edge.model.fused import runs_triton
from megatron_edge.runtime.optimizer_state import inner_optimizers, is_torch_adam

log = logging.getLogger("megatron_edge")

FUSED_ON = ("cuda",)  # devices
ONE_PASS_ON = ("cuda",)  # devices whose gradients are divided by Adam, in triton_adam.py


def fuse(optimizer: Any, device: torch.device) -> Callable[..., None]:
    """Has torch's Adam update parameters on CUDA in one kernel, which otherwise takes eight passes and 4 bytes a
    parameter meanwhile: ours, or torch's where ours does not run. Those of TransformerEngine and apex are so already.
    In place, before the first step; the same choice on all ranks.

    Returns:
        Megatron's finalize_model_grads_func for this optimizer.
    """
    from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER

    for inner in inner_optimizers(optimizer):
        if is_torch_adam(inner):
            for group in inner.optimizer.param_groups:
                group["fused"] = any(param.device.type in FUSED_ON for param in group["params"])
    optimizer.in_one_pass = None
    if device.type not in ONE_PASS_ON:
        return finalize
    if not USING_PYTORCH_OPTIMIZER:
        log.info("Adam is TransformerEngine's or apex's, which Megatron takes where it finds one")
        return finalize
    if device.type == "cuda" and not runs_triton(device, "Adam"):  # Triton's interpreter, in tests, runs on CPUs
        return finalize
    from megatron_edge.train.triton_adam import TritonAdam

    inners = inner_optimizers(optimizer)
    optimizer.in_one_pass = [None if inner.is_stub_optimizer else TritonAdam(inner, device) for inner in inners]
    return sum_gradients


def sum_gradients(model: list[nn.Module], num_tokens: Tensor, **settings: Any) -> None:
    """Megatron's finalize_model_grads without dividing: gradients summed over replicas. All ranks call it."""
    from megatron.core.distributed import finalize_model_grads

    finalize_model_grads(model, None, **settings)


def finalize(model: list[nn.Module], num_tokens: Tensor, **settings: Any) -> None:
    """Megatron's finalize_model_grads, which would ask the device whether there were tokens: gradients summed over
    replicas and divided by the step's tokens. All ranks call it."""
    from megatron.core import parallel_state

    sum_gradients(model, num_tokens, **settings)
    last_stage = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(num_tokens, last_stage, group=parallel_state.get_pipeline_model_parallel_group())
    dist.all_reduce(num_tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    for chunk in model:
        chunk.scale_gradients(1.0 / num_tokens.clamp(min=1))


def undivided_by(optimizer: Any, tokens: float) -> float:
    """What the gradients of a step of so many tokens have still to be divided by."""
    return 1.0 if optimizer.in_one_pass is None else max(tokens, 1.0)


@torch.no_grad()
def gradient_square(optimizer: Any, device: torch.device) -> Tensor:
    """fp64 []: the square of the norm of the whole model's gradient as it is, see `undivided_by`; equal on all ranks.
    All ranks call it, after optimizer.prepare_grads()."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    inners = inner_optimizers(optimizer)  # experts have one of their own, and ranks of their own to share it
    for inner, adam in zip(inners, optimizer.in_one_pass or [None] * len(inners), strict=True):
        if adam is not None:
            square = adam.gradient_square()
        else:
            gradients = inner.get_main_grads_for_grad_norm()
            norm = nn.utils.get_total_norm(gradients) if gradients else torch.zeros_like(total)
            square = norm.double().square()
        dist.all_reduce(square, group=inner.get_grad_stats_parallel_group())
        total += square
    return total


@torch.no_grad()
def start(optimizer: Any, *, total: Tensor, tokens: Tensor, are_bad: Tensor, square: Tensor) -> None:
    """Launches an update in one pass, whose kernels find out themselves whether loss and gradients are finite, so that
    the device has work while the host hears of it; `finish` does all where another Adam updates.

    Args: fp64 [] each, equal on all ranks: the loss's sum, its tokens, not 0 where a gradient is not finite, and
        `gradient_square`. All ranks call it.
    """
    if optimizer.in_one_pass is None:
        return
    factor, limit = 1.0 / tokens.clamp(min=1), optimizer.config.clip_grad
    if limit > 0:
        factor = factor * (limit / (square.sqrt() * factor + 1e-6)).clamp(max=1)
    is_applied = total.isfinite() & (are_bad == 0)
    decision = torch.stack([factor, is_applied.double()]).float()
    for adam in filter(None, optimizer.in_one_pass):
        adam.step(decision)


@torch.no_grad()
def finish(optimizer: Any, norm: float, applied: bool) -> None:
    """The rest of an update that is `applied`: all of it but where `start` has launched it, scaling gradients of that
    norm down to the optimizer's limit. All ranks call it."""
    if optimizer.in_one_pass is not None:
        for adam in filter(None, optimizer.in_one_pass):
            adam.count(applied)
        return
    if not applied:
        return
    limit = optimizer.config.clip_grad
    coefficient = limit / (norm + 1e-6) if limit > 0 else 1.0
    if coefficient < 1.0:
        for inner in inner_optimizers(optimizer):
            gradients = [param.grad for param in inner.get_parameters() if param.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, coefficient)
    optimizer.step_with_ready_grads()
