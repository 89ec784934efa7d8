"""One optimiser step and one evaluation pass over Megatron's pipeline schedules; the same code for every layout."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_edge.model.build import forward, unwrap
from megatron_edge.quantize.apply import constant_weights
from megatron_edge.runtime.session import Session
from megatron_edge.train.data import Batch, attention_mask


@dataclass(frozen=True)
class StepResult:
    """loss is the mean over the global batch's counted tokens, in nats; equal on all ranks."""

    loss: float
    gradient_norm: float
    tokens: int
    applied: bool


@dataclass
class DeviceBatch:
    """A micro-batch on the device, with its attention mask (bool [b, 1, s, s], True: not allowed)."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    loss_mask: Tensor
    attention_mask: Tensor


def to_device(batch: Batch, device: torch.device) -> DeviceBatch:
    documents = batch.documents.to(device)
    return DeviceBatch(
        tokens=batch.tokens.to(device),
        labels=batch.labels.to(device),
        positions=batch.positions.to(device),
        loss_mask=batch.loss_mask.to(device),
        attention_mask=attention_mask(documents),
    )


def make_trainable(model: nn.Module, train: Any, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Wraps the shard for data parallelism and builds its Adam optimizer (fp32 main weights under bf16).

    Returns:
        (Megatron DistributedDataParallel, Megatron optimizer). All ranks call it.
    """
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    inner = unwrap(model)
    inner.train()
    wrapped = DistributedDataParallel(
        inner.config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False),
        inner,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=train.learning_rate,
            min_lr=train.min_learning_rate,
            weight_decay=train.weight_decay,
            adam_beta1=train.adam_beta1,
            adam_beta2=train.adam_beta2,
            clip_grad=train.clip_norm,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=False,
        ),
        [wrapped],
    )
    inner.config.finalize_model_grads_func = finalize_model_grads
    inner.config.grad_scale_func = optimizer.scale_loss
    return wrapped, optimizer


def learning_rate_schedule(optimizer: Any, train: Any) -> Any:
    """Megatron's scheduler: linear warm-up, then cosine down to min_learning_rate at the last step."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    warmup = min(train.warmup_steps, max(train.steps - 1, 0))
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.learning_rate,
        min_lr=train.min_learning_rate,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(train.steps, 1),
        lr_decay_style="cosine",
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def _losses(output: Tensor, batch: DeviceBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    counted = batch.loss_mask
    total = torch.where(counted, output.float(), 0.0).sum()
    tokens = counted.sum().to(torch.int)
    return total, tokens, {"total": total.detach(), "tokens": tokens.detach()}


def _train_forward(iterator: Any, model: nn.Module) -> tuple[Tensor, Any]:
    batch = next(iterator)
    output = forward(model, batch, labels=batch.labels)
    return output, lambda result: _losses(result, batch)


def train_step(model: nn.Module, optimizer: Any, batches: list[Batch], session: Session) -> StepResult:
    """Forward, backward, reduce, clip and update over this rank's micro-batches. All ranks call it."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    model.zero_grad_buffer()
    optimizer.zero_grad()
    micro_batch, seq_length = batches[0].tokens.shape
    with constant_weights(model):
        found = get_forward_backward_func()(
            forward_step_func=_train_forward,
            data_iterator=(to_device(batch, session.device) for batch in batches),
            model=model,
            num_microbatches=len(batches),
            seq_length=seq_length,
            micro_batch_size=micro_batch,
            forward_only=False,
        )
    applied, norm, _ = optimizer.step()
    total, tokens = _reduce(found, session)
    return StepResult(loss=total / max(tokens, 1), gradient_norm=float(norm), tokens=tokens, applied=bool(applied))


def _reduce(found: list[dict[str, Tensor]], session: Session) -> tuple[float, int]:
    """Sums of loss and tokens over micro-batches and data-parallel ranks, on every rank."""
    sums = torch.zeros(2, dtype=torch.float64, device=session.device)
    if session.is_last_stage and session.tp_rank == 0:
        for part in found:
            sums[0] += part["total"].double()
            sums[1] += part["tokens"].double()
    dist.all_reduce(sums)
    return float(sums[0]), int(sums[1])


@torch.no_grad()
def run_forward(model: nn.Module, batches: Iterable[Batch], session: Session) -> None:
    """Runs batches through the pipeline for what quantizers or hooks see (calibration). All ranks call it."""
    _forward_only(model, list(batches), session, lambda output, batch: {})


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[Batch], session: Session) -> float:
    """Mean nats per counted token over `batches`, which data-parallel ranks share out. Equal on all ranks."""
    mine = batches[session.dp_rank :: session.plan.dp]
    with constant_weights(model):
        found = _forward_only(model, mine, session, lambda out, batch: _losses(out, batch)[2]) if mine else []
    total, tokens = _reduce(found, session)
    return total / max(tokens, 1)


@torch.no_grad()
def token_losses(model: nn.Module, batches: list[Batch], session: Session) -> Tensor | None:
    """fp32 nats [n, s] of each token of `batches` on the last stage's ranks, None elsewhere. No data parallelism:
    every data-parallel rank computes all. All ranks call it."""
    with constant_weights(model):
        found = _forward_only(model, batches, session, lambda output, batch: {"nll": output.float().cpu()})
    return torch.cat([part["nll"] for part in found]) if session.is_last_stage else None


@torch.no_grad()
def token_logits(model: nn.Module, batches: list[Batch], session: Session) -> Tensor | None:
    """fp32 logits [n, s, vocab] on the last stage's ranks, None elsewhere. All ranks call it."""
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    def keep(output: Tensor, batch: DeviceBatch) -> dict[str, Tensor]:
        return {"logits": gather_from_tensor_model_parallel_region(output).float().cpu()}

    with constant_weights(model):
        found = _forward_only(model, batches, session, keep, with_labels=False)
    return torch.cat([part["logits"] for part in found]) if session.is_last_stage else None


def _forward_only(
    model: nn.Module, batches: list[Batch], session: Session, keep: Any, with_labels: bool = True
) -> list[dict[str, Tensor]]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def step(iterator: Any, chunk: nn.Module) -> tuple[Tensor, Any]:
        batch = next(iterator)
        output = forward(chunk, batch, labels=batch.labels if with_labels else None)
        zero = torch.zeros((), dtype=torch.int, device=output.device)
        return output, lambda result: (result.sum() * 0, zero, keep(result, batch))

    inner = unwrap(model)
    was_training = inner.training
    inner.eval()
    micro_batch, seq_length = batches[0].tokens.shape
    try:
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=(to_device(batch, session.device) for batch in batches),
            model=inner,
            num_microbatches=len(batches),
            seq_length=seq_length,
            micro_batch_size=micro_batch,
            forward_only=True,
        )
    finally:
        inner.train(was_training)
