"""The labels' cross-entropy over a vocabulary that tensor-parallel ranks share, in place of Megatron's.

In: the output layer's logits in their own dtype. Out: fp32 losses; in backward the logits become their gradient. All
arithmetic is fp32, on logits as they are: no fp32 copy of them is made. On CUDA it is one pass forward and one backward
(triton_loss.py, with Triton), elsewhere plain torch over chunks of rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_edge.model.fused import runs_triton

CHUNK_BYTES = 2**22  # fp32 logits that plain torch works on at once: as much as a core's cache holds
LOWEST = torch.finfo(torch.float32).min  # a maximum is at least that, so that -inf - maximum is never NaN


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, group: Any = None) -> Tensor:
    """-log softmax(logits)[label] of each token, in nats; all ranks of `group` call it, and have the same.

    Where backward follows, logits that some operation made (all but a leaf of the graph) are overwritten by it with
    their gradient, which has their dtype and size. Nothing else may read them by then: of Megatron's linear layers
    backward reads input and weight alone, and the model gives no logits where it is given labels. An operation that
    kept them all the same is refused by autograd's count of versions, as is a second backward.

    Args:
        logits: [..., vocab / ranks], this rank's part of the vocabulary: parts are equal, in the order of ranks.
        labels: int64 [...] of the whole vocabulary. One that is outside of it has no logit: its loss is that of a logit
            equal to the largest, as Megatron has it.
        group: None: this rank has the whole vocabulary.

    Returns:
        fp32 [...].
    """
    return _CrossEntropy.apply(logits, labels, group)


class _CrossEntropy(torch.autograd.Function):
    """Of each row the largest logit m and 1 / sum(exp(x - m)) are kept, both over the whole vocabulary."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: Any) -> Tensor:
        ranks = 1 if group is None else group.size()
        rows = logits.detach().contiguous().flatten(0, -2)  # counts its versions together with logits
        local, columns = labels.flatten(), rows.shape[1]
        if ranks > 1:
            local = local - dist.get_rank(group) * columns
        row_sums, ctx.write_gradient = _passes(rows)
        largest, total, found = row_sums(rows, local)
        of_all = largest
        if ranks > 1:
            of_all = largest.clone()
            dist.all_reduce(of_all, op=dist.ReduceOp.MAX, group=group)
        found = torch.where(_is_here(local, columns), found - of_all, 0.0)
        sums = torch.stack((total * (largest - of_all).exp_(), found))
        if ranks > 1:
            dist.all_reduce(sums, group=group)
        if ctx.needs_input_grad[0]:
            ctx.in_place, ctx.shape = not logits.is_leaf, logits.shape
            ctx.save_for_backward(rows, local, of_all, sums[0].reciprocal())
        return (sums[0].log() - sums[1]).view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor, None, None]:
        rows, local, largest, inverse = ctx.saved_tensors
        gradient = rows.detach() if ctx.in_place else torch.empty_like(rows)
        ctx.write_gradient(rows, local, largest, inverse, weights.flatten(), gradient)
        torch.autograd.graph.increment_version(gradient)  # of which a kernel of our own says nothing
        return gradient.view(ctx.shape), None, None


def _is_here(local: Tensor, columns: int) -> Tensor:
    """Whether this rank holds the logit of a label, counted from the first word of its part."""
    return (local >= 0) & (local < columns)


def _chunks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK_BYTES // (4 * logits.shape[1]))
    yield from (slice(begin, begin + rows) for begin in range(0, logits.shape[0], rows))


def row_sums(logits: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 [n] each, of logits [n, columns]: the largest m, sum(exp(x - m)), and the label's (any number where that is
    not here)."""
    rows, columns = logits.shape
    largest, total, found = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3))
    for part in _chunks(logits):
        largest[part] = logits[part].amax(-1).float().clamp_(min=LOWEST)
        total[part] = (logits[part] - largest[part][:, None]).exp_().sum(-1)  # bf16 minus fp32 is fp32
        found[part] = logits[part].gather(1, local[part].clamp(0, columns - 1)[:, None])[:, 0].float()
    return largest, total, found


def write_gradient(
    logits: Tensor, local: Tensor, largest: Tensor, inverse: Tensor, weights: Tensor, out: Tensor
) -> None:
    """out = (exp(logits - largest) * inverse - onehot(local)) * weights; logits and out [n, columns] may be the same,
    the others are [n]."""
    columns = logits.shape[1]
    for part in _chunks(logits):
        made = (logits[part] - largest[part][:, None]).exp_().mul_(inverse[part][:, None])
        labels = local[part]
        row = torch.arange(len(labels), device=labels.device)
        made[row, labels.clamp(0, columns - 1)] -= _is_here(labels, columns).float()
        out[part] = made.mul_(weights[part][:, None])


def _passes(logits: Tensor) -> tuple[Callable[..., tuple[Tensor, Tensor, Tensor]], Callable[..., None]]:
    """`row_sums` and `write_gradient` for where the logits are."""
    fused = _fused(logits.device) if logits.is_cuda and logits.numel() else None
    return (row_sums, write_gradient) if fused is None else (fused.row_sums, fused.write_gradient)


@functools.cache
def _fused(device: torch.device) -> ModuleType | None:
    if not runs_triton(device, "cross-entropy"):
        return None
    from megatron_edge.model import triton_loss

    return triton_loss


@functools.cache
def gpt_class() -> Any:
    """Megatron's GPTModel with this cross-entropy. Tokens are not exchanged: context parallelism has its own on each
    rank, and under sequence parallelism the output layer has gathered them."""
    from megatron.core.models.gpt import GPTModel

    class LanguageModel(GPTModel):
        def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
            """labels [b, s], logits [s, b, vocab / tp] -> fp32 [b, s]."""
            losses = vocab_parallel_cross_entropy(logits, labels.transpose(0, 1).contiguous(), self.pg_collection.tp)
            return losses.transpose(0, 1).contiguous()

    return LanguageModel
