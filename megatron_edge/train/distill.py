"""Distillation (QAD): a quantised student learns a frozen teacher's distribution of the next token.

In: a teacher's shard in the student's layout, without quantizers. Out: the objective that `train/step.py` minimises
instead of the labels' cross-entropy:

    (1 - w) T^2 KL(teacher || student) + w CE(labels) + v |h_student - h_teacher|^2 / |h_teacher|^2 + u L

per counted token, with both distributions at temperature T (Hinton et al. 2015, arXiv 1503.02531); h is what enters the
output layer, w is train.distill_label_weight, v is train.distill_hidden_weight; L is the mean distance of the layers'
outputs (layer_states.py), u is train.distill_layers_weight.

At each step the teacher runs forward through the pipeline over all micro-batches first; the last stage keeps its h,
which is vocabulary / hidden size smaller than its logits. Those are made from it chunk by chunk inside of the loss.
Where u is not 0, each stage keeps its own layers' outputs as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_edge.memory import DISTILL_CHUNK_BYTES
from megatron_edge.model.build import chunks_of, forward, unwrap
from megatron_edge.runtime.session import Session, gather_sequence, tensor_group
from megatron_edge.train import layer_states
from megatron_edge.train.data import Batch
from megatron_edge.train.placement import DeviceBatch
from megatron_edge.train.step import forward_only


class Target(NamedTuple):
    """A teacher's states [s, b, h] of a micro-batch: what enters the output layer, on the last stage's ranks, and the
    outputs of each chunk's layers, where they are compared."""

    hidden: Tensor | None
    layers: list[list[Tensor]]


class Distillation:
    """The objective; one for a job. `teacher` is this rank's shard of it, which no longer gives logits afterwards."""

    def __init__(self, teacher: nn.ModuleList, train: Any, session: Session) -> None:
        self._teacher, self._session = teacher.requires_grad_(False).eval(), session
        self._temperature, self._label_weight = train.distill_temperature, train.distill_label_weight
        self._hidden_weight = train.distill_hidden_weight
        self._layers_weight = train.distill_layers_weight
        hidden = ("hidden_loss_per_token",) if self._hidden_weight else ()
        layers = ("layers_loss_per_token",) if self._layers_weight else ()
        self.parts: tuple[str, ...] = ("kl_nats_per_token", "label_loss_nats_per_token", *hidden, *layers)
        self._found_inside: list[dict[str, Tensor]] = []
        self._head: Tensor | None = None  # [vocab / tp, h]
        last = chunks_of(teacher)[-1]
        if last.post_process:
            tied = last.share_embeddings_and_output_weights
            self._head = last.shared_embedding_or_output_weight() if tied else last.output_layer.weight
            last.post_process = False  # the chunk gives h, after the final norm

    @torch.no_grad()
    def targets(self, batches: Sequence[Batch | DeviceBatch]) -> list[Target]:
        """For each micro-batch; s is a rank's part under sequence and context parallelism. All ranks call it."""

        def keep(hidden: Tensor, batch: DeviceBatch) -> dict[str, Tensor]:
            return {"hidden": hidden.detach()}

        with contextlib.ExitStack() as stack:
            watches = [layer_states.watched(chunk) for chunk in self._teacher if self._layers_weight]
            seen = [stack.enter_context(watch) for watch in watches]  # of each chunk, one micro-batch after the other
            found = forward_only(self._teacher, batches, self._session, keep, with_labels=False)
        hidden = [part["hidden"] for part in found] if found else [None] * len(batches)
        counts = [len(chunk.decoder.layers) for chunk in chunks_of(self._teacher)]
        layers = [
            [states[at * count : (at + 1) * count] for states, count in zip(seen, counts, strict=False)]
            for at in range(len(batches))
        ]
        return [Target(*pair) for pair in zip(hidden, layers, strict=True)]

    def forward_step(self, iterator: Any, chunk: nn.Module) -> tuple[Tensor, Any]:
        """Megatron's forward_step_func for the student."""
        batch, model, hook = next(iterator), unwrap(chunk), None
        seen: list[Tensor] = []
        if self._hidden_weight and model.post_process:
            hook = model.output_layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with contextlib.ExitStack() as stack:
            states = stack.enter_context(layer_states.watched(chunk)) if self._layers_weight else []
            output = forward(chunk, batch)
        if hook is not None:
            hook.remove()
        if self._layers_weight:
            self._found_inside.append(self._layers_losses(states, model, batch))
        return output, lambda logits: self._losses(logits, seen[0] if seen else None, batch)

    def found_inside(self) -> list[dict[str, Tensor]]:
        found, self._found_inside = self._found_inside, []
        return found

    def _layers_losses(self, states: list[Tensor], model: Any, batch: DeviceBatch) -> dict[str, Tensor]:
        """Of one chunk; equal on its tensor-parallel ranks."""
        teachers, num_layers = batch.target.layers[model.vp_stage or 0], model.config.num_layers
        scale = model.config.grad_scale_func or (lambda value: value)
        weight = self._layers_weight / num_layers
        apart = layer_states.draw(states, teachers, self._own_part(batch.loss_mask.t()), weight, scale) / num_layers
        apart = self._of_all_parts(apart)
        return {"total": self._layers_weight * apart, "layers_loss_per_token": apart}

    def _losses(
        self, logits: Tensor, hidden: Tensor | None, batch: DeviceBatch
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        assert self._head is not None
        target = gather_sequence(batch.target.hidden) if self._session.plan.sequence_parallel else batch.target.hidden
        loss = distillation_loss(
            logits,
            target.transpose(0, 1),
            self._head,
            batch.labels,
            temperature=self._temperature,
            label_weight=self._label_weight,
            group=tensor_group(),
        )
        counted = batch.loss_mask
        total, kl, label = (torch.where(counted, value, 0.0).sum() for value in loss)
        tokens = counted.sum().to(torch.int)
        sums = {"total": total.detach(), "tokens": tokens, "kl_nats_per_token": kl, "label_loss_nats_per_token": label}
        if hidden is not None:
            apart = self._hidden_loss(hidden, batch.target.hidden, counted)
            total = total + self._hidden_weight * apart
            everywhere = self._of_all_parts(apart.detach().clone())
            sums["total"] = sums["total"] + self._hidden_weight * everywhere
            sums["hidden_loss_per_token"] = everywhere
        return total, tokens, sums

    def _hidden_loss(self, student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
        """Sum over counted tokens of the relative squared distance; student and teacher [s, b, h], counted [b, s],
        where s is the rank's own part under sequence parallelism in the former two alone."""
        wanted, counted = teacher.float(), self._own_part(counted.t())
        distance = (student.float() - wanted).pow(2).sum(-1) / wanted.pow(2).sum(-1)
        return torch.where(counted, distance, 0.0).sum()

    def _own_part(self, x: Tensor) -> Tensor:
        """[s, ...] of the text that all tensor-parallel ranks share -> what sequence parallelism gives to this one."""
        plan = self._session.plan
        return x.chunk(plan.tp)[self._session.tp_rank] if plan.sequence_parallel else x

    def _of_all_parts(self, value: Tensor) -> Tensor:
        """A sum over this rank's part of the text -> over all parts of sequence parallelism, in place."""
        if self._session.plan.sequence_parallel:
            dist.all_reduce(value, group=tensor_group())
        return value


class TokenLosses(NamedTuple):
    """fp32 [b, s] nats: what is minimised, and of what it consists (these two without a gradient)."""

    loss: Tensor
    kl: Tensor
    label_loss: Tensor


def distillation_loss(
    logits: Tensor,
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    label_weight: float,
    group: Any,
) -> TokenLosses:
    """(1 - label_weight) T^2 KL(teacher || student) + label_weight CE(labels) of each token, over a vocabulary that the
    ranks of `group` share; all of them call it.

    `kl` is that of the two distributions at temperature T, times T^2; `label_loss` is at temperature 1. Arithmetic is
    fp32, over chunks of tokens: beside the gradient in `logits`' dtype only some buffers of DISTILL_CHUNK_BYTES exist.

    Args:
        logits: the student's, [b, s, vocab / tp].
        hidden: the teacher's, [b, s, h]; its logits are hidden @ head.t().
        head: [vocab / tp, h].
        labels: int64 [b, s] of the whole vocabulary.
    """
    flat = _DistillationLoss.apply(
        logits.flatten(0, 1), hidden.flatten(0, 1), head, labels.flatten(), temperature, label_weight, group
    )
    return TokenLosses(*(part.view(labels.shape) for part in flat))


class _DistillationLoss(torch.autograd.Function):
    """The gradient is made with the loss, so that the teacher's logits are made once and never kept."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        temperature: float,
        label_weight: float,
        group: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, shard = logits.shape
        kl, label = (torch.empty(tokens, dtype=torch.float32, device=logits.device) for _ in range(2))
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        size = max(1, DISTILL_CHUNK_BYTES // (4 * shard))
        for begin in range(0, tokens, size):
            part = slice(begin, begin + size)
            teacher = (hidden[part] @ head.t()).float()
            kl[part], label[part] = _chunk_losses(
                logits[part].float(),
                teacher,
                labels[part],
                temperature,
                label_weight,
                group,
                None if gradient is None else gradient[part],
            )
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(kl, label)
        return (1 - label_weight) * kl + label_weight * label, kl, label

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0][:, None].to(gradient.dtype), *(None,) * 6)


def _chunk_losses(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    label_weight: float,
    group: Any,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(T^2 KL, CE), fp32 [n] each, from fp32 logits [n, vocab / tp], which it overwrites. Into `gradient` goes
    (1 - w) T (softmax(student / T) - softmax(teacher / T)) + w (softmax(student) - onehot(labels))."""
    rows = torch.arange(len(labels), device=labels.device)
    local = labels - dist.get_rank(group) * student.shape[1]
    here = (local >= 0) & (local < student.shape[1])
    local = local.clamp(0, student.shape[1] - 1)
    at_one = student.clone() if temperature != 1 and label_weight else student
    found = torch.where(here, student[rows, local], 0.0)  # of one rank, zero on the others
    label_normaliser = _log_sum_exp(student, group)
    if temperature != 1:
        student = student / temperature
        teacher.div_(temperature)
    log_q = student - (label_normaliser if temperature == 1 else _log_sum_exp(student, group))[:, None]
    log_p = teacher.sub_(_log_sum_exp(teacher, group)[:, None])
    p = log_p.exp()
    sums = torch.stack((torch.linalg.vecdot(p, log_p - log_q), found))
    dist.all_reduce(sums, group=group)
    if gradient is not None:
        made = log_q.exp_().sub_(p).mul_((1 - label_weight) * temperature)
        if label_weight:
            made.add_((at_one - label_normaliser[:, None]).exp_(), alpha=label_weight)
            made[rows, local] -= torch.where(here, label_weight, 0.0)
        gradient.copy_(made)
    return sums[0] * temperature**2, label_normaliser - sums[1]


def _log_sum_exp(logits: Tensor, group: Any) -> Tensor:
    """[n, vocab / tp] -> [n], over the whole vocabulary."""
    largest = logits.amax(-1)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    total = (logits - largest[:, None]).exp_().sum(-1)
    dist.all_reduce(total, group=group)
    return total.log_().add_(largest)
