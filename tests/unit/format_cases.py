"""What the tests of formats share: weights of every kind, and equality of bits."""

from __future__ import annotations

import torch

from megatron_edge.artifact import formats

DTYPES = [torch.float32, torch.bfloat16]
GROUP = {"fp8": 0, "int4": 64, "int8": 0, "nvfp4": 16}


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def weight_of_every_kind(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """[96, 256]: ordinary, zero, tiny and huge groups; single spikes; both zeros; subnormals."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(96, 256, generator=generator) * 0.02
    weight[0:4] = 0.0
    weight[4:8] *= 2.0**-12  # nvfp4 block scales near the bottom of e4m3
    weight[8:12] *= 2.0**-20  # below it
    weight[12:16] *= 8.0
    weight[16, ::16] = 1.0
    weight[17, :64] = -0.0
    weight[18, :64] = 1e-42
    weight[19, 3::16] = -weight[19].abs().max()
    return weight.to(dtype)


def amax_of(fmt: str, weight: torch.Tensor, clip: float = 1.0) -> torch.Tensor:
    return formats.snap_amax(fmt, formats.weight_amax(fmt, weight, GROUP[fmt]) * clip)
