"""One optimiser step and one evaluation pass over Megatron's pipeline schedules; the same code for every layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_edge.log import track
from megatron_edge.model.build import chunks_of, forward
from megatron_edge.quantize import adapters
from megatron_edge.quantize.apply import constant_weights, set_weight_cache
from megatron_edge.runtime.session import Session, gather_context
from megatron_edge.train import update
from megatron_edge.train.data import Batch
from megatron_edge.train.placement import DeviceBatch, to_device


@dataclass(frozen=True)
class StepResult:
    """loss is what was minimised, the mean over the global batch's counted tokens, in nats; equal on all ranks. `parts`
    are other means of the objective's, by metric. `applied` is False where loss or gradient was not finite: weights and
    optimizer are as before. `stopping`: a rank was asked to stop."""

    loss: float
    gradient_norm: float
    tokens: int
    applied: bool
    parts: dict[str, float] = field(default_factory=dict)
    stopping: bool = False


def make_trainable(
    model: nn.Module,
    train: Any,
    dtype: torch.dtype,
    *,
    distributed_optimizer: bool = False,
    stream: torch.cuda.Stream | None = None,
) -> tuple[nn.ModuleList, Any]:
    """Wraps the shard's chunks for data parallelism and builds their Adam optimizer (fp32 main weights under bf16).

    `distributed_optimizer` splits its state between the data-parallel ranks; `stream` is that of forward and backward,
    where it is not the current one.

    Returns:
        (chunks in Megatron's DistributedDataParallel, Megatron optimizer). All ranks call it.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    chunks = chunks_of(model)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=distributed_optimizer
    )
    with torch.cuda.stream(stream):
        wrapped = nn.ModuleList(
            DistributedDataParallel(chunk.config, settings, chunk.train(), disable_bucketing=index > 0)
            for index, chunk in enumerate(chunks)
        )
    if stream is not None:
        torch.cuda.current_stream().wait_stream(stream)
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
            use_distributed_optimizer=distributed_optimizer,
        ),
        list(wrapped),
    )
    finalize = update.fuse(optimizer, next(model.parameters()).device)
    adapters.let_gradients_pass(wrapped)
    set_weight_cache(wrapped, train.cache_weights)
    config = chunks[0].config  # of all chunks
    config.finalize_model_grads_func = finalize
    config.grad_scale_func = optimizer.scale_loss
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


class Objective(Protocol):
    """What a step minimises. `parts` names what it reports beside the sums "total" and "tokens", as sums too."""

    @property
    def parts(self) -> tuple[str, ...]: ...

    def targets(self, batches: Sequence[Batch | DeviceBatch]) -> list[Any]:
        """What `forward_step` finds as each micro-batch's target. All ranks call it, before the step."""

    def forward_step(self, iterator: Any, chunk: nn.Module) -> tuple[Tensor, Any]:
        """As Megatron's schedules want it, with the sum of the loss over counted tokens."""

    def found_inside(self) -> list[dict[str, Tensor]]:
        """Sums that `forward_step` found on this rank's stage, and not at the end of the model, since the last call;
        equal on its tensor-parallel ranks."""


class LabelLoss:
    """The labels' cross-entropy."""

    parts: tuple[str, ...] = ()

    def targets(self, batches: Sequence[Batch | DeviceBatch]) -> list[Any]:
        return [None] * len(batches)

    def forward_step(self, iterator: Any, chunk: nn.Module) -> tuple[Tensor, Any]:
        batch = next(iterator)
        output = forward(chunk, batch, labels=batch.labels)
        return output, lambda result: _losses(result, batch)

    def found_inside(self) -> list[dict[str, Tensor]]:
        return []


LABELS = LabelLoss()


def _iterators(batches: Sequence[Batch | DeviceBatch], session: Session, targets: list[Any] | None = None) -> list[Any]:
    """One iterator over the micro-batches for each chunk of the shard."""
    pairs = list(zip(batches, targets or [None] * len(batches), strict=True))
    return [
        (replace(to_device(batch, session), target=target) for batch, target in pairs) for _ in range(session.plan.vpp)
    ]


def forward_backward(
    model: nn.ModuleList, batches: Sequence[Batch | DeviceBatch], session: Session, objective: Objective
) -> list[dict[str, Tensor]]:
    """Gradients of a step's micro-batches, added up in the chunks' buffers, reduced over replicas and, unless that is
    left to Adam, divided by tokens. What the objective reports of each on the last stage's ranks, and on any what it
    found inside. All ranks call it."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    targets = objective.targets(batches)
    micro_batch, seq_length = batches[0].tokens.shape
    with constant_weights(model):
        found = get_forward_backward_func()(
            forward_step_func=objective.forward_step,
            data_iterator=_iterators(batches, session, targets),
            model=list(model),
            num_microbatches=len(batches),
            seq_length=seq_length,
            micro_batch_size=micro_batch,
            forward_only=False,
        )
    return [*found, *objective.found_inside()]


def train_step(
    model: nn.ModuleList,
    optimizer: Any,
    batches: list[Batch],
    session: Session,
    objective: Objective = LABELS,
    gradients: Callable[..., list[dict[str, Tensor]]] = forward_backward,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> StepResult:
    """Forward, backward, reduce, clip and update over this rank's micro-batches. All ranks call it; `asked_to_stop` is
    this rank's answer."""
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    found = gradients(model, batches, session, objective)
    optimizer.prepare_grads()
    square = update.gradient_square(optimizer, session.device)
    is_bad = torch.logical_not(square.isfinite())
    asked = square.new_full((), float(asked_to_stop()))
    sums = torch.cat([_sums(found, session, objective.parts), torch.stack([asked, is_bad.double()])])
    dist.all_reduce(sums)
    facts = torch.cat([sums, square[None]])
    # Fetched together, ahead of the update: each time that the host waits for the device, it loses its lead.
    fetched = _fetching(facts)
    update.start(optimizer, total=facts[0], tokens=facts[1], are_bad=facts[-2], square=facts[-1])
    total, tokens, *others, asked_by, are_bad, square_of_norm = fetched()
    # Upstream asks for finite gradients only where a loss is scaled, which fp16 needs, and would put what is not finite
    # into the weights.
    norm = math.sqrt(square_of_norm) / update.undivided_by(optimizer, tokens)
    applied = math.isfinite(total) and not are_bad
    update.finish(optimizer, norm, applied)
    adapters.merge(model)
    parts = {name: value / max(tokens, 1) for name, value in zip(objective.parts, others, strict=True)}
    return StepResult(total / max(tokens, 1), norm, int(tokens), applied, parts, asked_by > 0)


def _fetching(x: Tensor) -> Callable[[], list[float]]:
    """The copy of x to the host has been launched; the function waits for it, and for nothing that comes after."""
    if not x.is_cuda:
        return x.tolist
    kept, arrived = torch.empty(x.shape, dtype=x.dtype, pin_memory=True), torch.cuda.Event()
    kept.copy_(x, non_blocking=True)
    arrived.record()

    def wait() -> list[float]:
        arrived.synchronize()
        return kept.tolist()

    return wait


def _sums(found: list[dict[str, Tensor]], session: Session, parts: tuple[str, ...] = ()) -> Tensor:
    """fp64, on the device: loss, tokens and `parts` over this rank's micro-batches; 0 where another rank has the same.
    What is found has some of them each, equal on tensor-parallel ranks."""
    names = ("total", "tokens", *parts)
    sums = torch.zeros(len(names), dtype=torch.float64, device=session.device)
    if session.tp_rank == 0:
        for part in found:
            sums += torch.stack([part[name].double() if name in part else torch.zeros_like(sums[0]) for name in names])
    return sums


def _reduce(found: list[dict[str, Tensor]], session: Session, parts: tuple[str, ...] = ()) -> list[float]:
    """Those sums over stages and data-parallel ranks too, on every rank. All ranks call it."""
    sums = _sums(found, session, parts)
    dist.all_reduce(sums)
    return sums.tolist()


@torch.no_grad()
def run_forward(model: nn.Module, batches: Iterable[Batch], session: Session) -> None:
    """Runs batches through the pipeline for what quantizers or hooks see (calibration). All ranks call it."""
    forward_only(model, list(batches), session, lambda output, batch: {}, shown_as="calibrating")


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[Batch], session: Session) -> float:
    """Mean nats per counted token over `batches`, which data-parallel ranks share out. Equal on all ranks."""
    # Ranks that exchange tokens with others' experts must run as often as they do, also where there is less to do.
    filled = batches + [_uncounted(batches[0])] * (-len(batches) % session.plan.dp)
    mine = filled[session.dp_rank :: session.plan.dp]
    with constant_weights(model):
        found = forward_only(model, mine, session, lambda out, batch: _losses(out, batch)[2])
    total, tokens = _reduce(found, session)
    return total / max(tokens, 1)


@torch.no_grad()
def sums_of_logits(
    model: nn.Module, batches: list[Batch], session: Session, measure: Callable[[Tensor], Tensor]
) -> Tensor:
    """fp64 [windows]: of each window of `batches` the sum of what `measure(logits [n, vocabulary / tp])` gives, [n],
    for the n counted tokens of a micro-batch; equal on its tensor-parallel ranks. Batches are shared out as in
    `evaluate`, and are of one size. All ranks call it, and have the result."""
    filled, plan = batches + [_uncounted(batches[0])] * (-len(batches) % session.plan.dp), session.plan

    def keep(output: Tensor, batch: DeviceBatch) -> dict[str, Tensor]:
        found = torch.zeros(batch.loss_mask.shape, dtype=torch.float64, device=output.device)
        found[batch.loss_mask] = measure(output[batch.loss_mask])
        return {"sums": found.sum(1)}

    with constant_weights(model):
        found = forward_only(model, filled[session.dp_rank :: plan.dp], session, keep, with_labels=False)
    sums = torch.zeros(len(filled), len(batches[0].tokens), dtype=torch.float64, device=session.device)
    if session.is_last_stage and session.tp_rank == 0:
        sums[session.dp_rank :: plan.dp] = torch.stack([part["sums"] for part in found])
    dist.all_reduce(sums)
    return sums[: len(batches)].flatten().cpu()


def _uncounted(batch: Any) -> Any:
    nothing = torch.zeros_like(batch.loss_mask)
    return batch._replace(loss_mask=nothing) if isinstance(batch, Batch) else replace(batch, loss_mask=nothing)


@torch.no_grad()
def token_losses(model: nn.Module, batches: list[Batch], session: Session) -> Tensor | None:
    """fp32 nats [n, s] of each token of `batches` on the last stage's ranks, None elsewhere. No data parallelism:
    every data-parallel rank computes all. All ranks call it."""

    def keep(output: Tensor, batch: DeviceBatch) -> dict[str, Tensor]:
        return {"nll": gather_context(output, dim=1).float().cpu()}

    with constant_weights(model):
        found = forward_only(model, batches, session, keep)
    return torch.cat([part["nll"] for part in found]) if session.is_last_stage else None


@torch.no_grad()
def token_logits(model: nn.Module, batches: list[Batch], session: Session) -> Tensor | None:
    """fp32 logits [n, s, vocab] on the last stage's ranks, None elsewhere. All ranks call it."""
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    def keep(output: Tensor, batch: DeviceBatch) -> dict[str, Tensor]:
        whole = gather_context(gather_from_tensor_model_parallel_region(output), dim=1)
        return {"logits": whole.float().cpu()}

    with constant_weights(model):
        found = forward_only(model, batches, session, keep, with_labels=False)
    return torch.cat([part["logits"] for part in found]) if session.is_last_stage else None


def forward_only(
    model: nn.Module,
    batches: Sequence[Batch | DeviceBatch],
    session: Session,
    keep: Any,
    with_labels: bool = True,
    shown_as: str = "",
) -> list[dict[str, Tensor]]:
    """`keep(output, batch)` of each batch on the last stage's ranks, nothing elsewhere. All ranks call it; `shown_as`
    gives rank 0 a progress bar of that name."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def step(iterator: Any, chunk: nn.Module) -> tuple[Tensor, Any]:
        batch = next(iterator)
        next(progress, None)
        output = forward(chunk, batch, labels=batch.labels if with_labels else None)
        zero = torch.zeros((), dtype=torch.int, device=output.device)
        return output, lambda result: (result.sum() * 0, zero, keep(result, batch))

    chunks, was_training = chunks_of(model), model.training
    micro_batch, seq_length = batches[0].tokens.shape
    filled = list(batches)
    if session.plan.vpp > 1:  # interleaved schedules want whole rounds of the pipeline
        filled += [_uncounted(batches[0])] * (-len(batches) % session.plan.pp)
    total = len(filled) * len(chunks)
    progress = track(range(total), shown_as, total, session.rank if shown_as else -1)
    model.eval()
    try:
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=_iterators(filled, session),
            model=chunks,
            num_microbatches=len(filled),
            seq_length=seq_length,
            micro_batch_size=micro_batch,
            forward_only=True,
        )[: len(batches)]
    finally:
        next(progress, None)  # past the end: a bar is then closed
        model.train(was_training)
