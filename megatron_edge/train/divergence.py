"""How far a model's predictions are from those that it made unquantised: KL divergence of the next token.

Sums are in fp64 over vocabulary-parallel logits: what one layer's rounding changes is small against fp32's error of a
log-sum-exp over a whole vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_edge.runtime.session import Session, tensor_group
from megatron_edge.train.data import Batch
from megatron_edge.train.step import mean_of_logits

ROWS = 64  # tokens at once: fp64 copies of their logits


class Divergence:
    """KL(plain || now) in nats per counted token over `batches`, where plain is the model when this was made.

    Logits of the counted tokens (of this rank's batches and part of the vocabulary) are kept in host memory.
    """

    def __init__(self, model: nn.Module, batches: list[Batch], session: Session) -> None:
        """All ranks call it, with the model without quantizers or with all of them off."""
        self._batches, self._session = batches, session
        self._plain: list[Tensor] = []

        def keep(logits: Tensor) -> Tensor:
            self._plain.append(logits.detach().cpu())
            return torch.zeros((), dtype=torch.float64, device=logits.device)

        mean_of_logits(model, batches, session, keep)

    def __call__(self, model: nn.Module) -> float:
        """Equal on all ranks, which all call it."""
        plain = iter(self._plain)
        return mean_of_logits(model, self._batches, self._session, lambda logits: divergence(next(plain), logits))


def divergence(plain: Tensor, logits: Tensor) -> Tensor:
    """Sum over tokens of KL(softmax(plain) || softmax(logits)), fp64 []; both [n, vocabulary / tp] of this rank."""
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for p, q in zip(plain.split(ROWS), logits.split(ROWS), strict=True):
        p, q = p.to(logits.device, torch.float64), q.double()
        p_norm, q_norm = _log_sum_exp(p), _log_sum_exp(q)
        expected = ((p - p_norm[:, None]).exp() * (p - q)).sum(-1)
        dist.all_reduce(expected, group=tensor_group())
        total += (expected - p_norm + q_norm).sum()
    return total


def _log_sum_exp(logits: Tensor) -> Tensor:
    """[n] over the whole vocabulary."""
    largest = logits.amax(-1)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=tensor_group())
    total = (logits - largest[:, None]).exp().sum(-1)
    dist.all_reduce(total, group=tensor_group())
    return largest + total.log()
