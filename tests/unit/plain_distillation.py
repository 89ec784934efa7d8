"""The distillation's loss in torch's own functions, for comparison."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def plain_loss(
    logits: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T^2 KL, CE) [b, s] from logits [b, s, vocab] of both and labels [b, s]."""
    log_q, log_p = (F.log_softmax(x / temperature, -1) for x in (logits, teacher))
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * temperature**2
    return kl, F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
