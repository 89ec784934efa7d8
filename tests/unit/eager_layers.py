"""RMSNorm, SwiGLU and rotary embedding one operation at a time, as torch differentiates them: references of fused.py.

The norm is transformers' LlamaRMSNorm, the others are Megatron's own (mlp.py's `glu`, rope_utils.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x if x.dtype is torch.float64 else x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def swiglu(x: Tensor) -> Tensor:
    gate, up = torch.chunk(x, 2, dim=-1)
    return F.silu(gate) * (up + 0.0)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """angles fp32 [s, b, 1, d / 2]."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    return _apply_rotary_pos_emb_bshd(x, torch.cat((angles, angles), dim=-1))


def random_angles(places: int, windows: int, half: int) -> Tensor:
    """Of positions that differ from window to window."""
    positions = torch.randint(0, 4000, (places, windows, 1, 1), generator=torch.Generator().manual_seed(places))
    return positions.float() * (1.0 / 10000 ** (torch.arange(half) / half))


def rotation_of(angles: Tensor) -> Tensor:
    """As PackedRotaryEmbedding gives it."""
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
