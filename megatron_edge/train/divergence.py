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
from megatron_edge.train.step import sums_of_logits

ROWS, CUDA_ROWS = 64, 1024  # tokens at once: fp64 copies of their logits
ROOM = 8  # times a micro-batch's logits must be free on the device for them to stay there


class Divergence:
    """KL(plain || now) in nats of the counted tokens of `batches`, where plain is the model when this was made.

    Logits of the counted tokens (of this rank's batches and part of the vocabulary) are kept: on a CUDA device while it
    has room, else in host memory.
    """

    def __init__(self, model: nn.Module, batches: list[Batch], session: Session) -> None:
        """All ranks call it, with the model without quantizers or with all of them off."""
        self._batches, self._session = batches, session
        self._plain: list[tuple[Tensor, Tensor]] = []
        self.tokens = torch.cat([batch.loss_mask.sum(1) for batch in batches])  # counted ones of each window

        def keep(logits: Tensor) -> Tensor:
            norms = [_log_sum_exp(part.double()) for part in logits.split(_rows(logits))]
            stays = logits.is_cuda and torch.cuda.mem_get_info(logits.device)[0] > ROOM * logits.nbytes
            self._plain.append((logits if stays else logits.cpu(), torch.cat(norms)))
            return logits.new_zeros(len(logits), dtype=torch.float64)

        sums_of_logits(model, batches, session, keep)

    def __call__(self, model: nn.Module) -> float:
        """The mean per counted token. Equal on all ranks, which all call it."""
        return float(self.of_windows(model).sum()) / max(int(self.tokens.sum()), 1)

    def of_windows(self, model: nn.Module) -> Tensor:
        """The sum of each window, fp64 [n]. Equal on all ranks, which all call it."""
        plain = iter(self._plain)
        return sums_of_logits(model, self._batches, self._session, lambda logits: divergence(*next(plain), logits))


def divergence(plain: Tensor, norms: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(plain) || softmax(logits)) of each token, fp64 [n]; both [n, vocabulary / tp] of this rank, `norms`
    the log-sum-exp of `plain` over the whole vocabulary."""
    found = [torch.zeros(0, dtype=torch.float64, device=logits.device)]
    rows = _rows(logits)
    for p, p_norm, q in zip(plain.split(rows), norms.split(rows), logits.split(rows), strict=True):
        p, q = p.to(logits.device, torch.float64), q.double()
        expected = ((p - p_norm[:, None]).exp_() * p.sub_(q)).sum(-1)
        dist.all_reduce(expected, group=tensor_group())
        found.append(expected - p_norm + _log_sum_exp(q))
    return torch.cat(found)


def _rows(logits: Tensor) -> int:
    return CUDA_ROWS if logits.is_cuda else ROWS


def _log_sum_exp(logits: Tensor) -> Tensor:
    """[n] over the whole vocabulary."""
    largest = logits.amax(-1)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=tensor_group())
    total = (logits - largest[:, None]).exp_().sum(-1)
    dist.all_reduce(total, group=tensor_group())
    return largest + total.log()
