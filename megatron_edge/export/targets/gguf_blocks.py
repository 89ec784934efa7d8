"""Stored weights as the blocks of a GGUF file: the same codes and scales in llama.cpp's order, nothing computed anew.

In: `formats.Encoded`, or a plain tensor; out: uint8 [rows, bytes of a row]. Called by gguf.py.
Layout: ggml-common.h (block_q4_0, block_q8_0, block_nvfp4) of llama.cpp b11549; the `gguf` package reads it back.

    Q4_0   32 values: fp16 scale, 16 bytes, of which byte i holds value i low and value i + 16 high, as code + 8
    Q8_0   32 values: fp16 scale, 32 int8
    NVFP4  64 values: 4 e4m3 scales, then for each 16 values 8 bytes, byte i value i low and value i + 8 high

A scale that serves more than 32 values is repeated. NVFP4's scale of the whole tensor is a tensor of its own, `.scale`,
by which llama.cpp multiplies the product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_edge.artifact import formats
from megatron_edge.contracts import InputError

Q4_0_BLOCK, NVFP4_BLOCKS = 32, 4
ROW_MULTIPLE = {"int4": 32, "int8": 32, "nvfp4": 64}


def packed(name: str, encoded: formats.Encoded) -> Tensor:
    """uint8 [out, bytes of a row].

    Raises:
        InputError: naming the tensor, where its rows are no whole number of blocks or a scale has no place in them.
    """
    multiple = ROW_MULTIPLE[encoded.format]
    if encoded.shape[1] % multiple:
        raise InputError(
            f"export.targets: gguf packs {multiple} values of {encoded.format}, which do not divide the "
            f"{encoded.shape[1]} of a row of {name}; allowed: another format for it (quant.overrides)"
        )
    pack = {"int4": _q4_0, "int8": _q8_0, "nvfp4": _nvfp4}[encoded.format]
    return pack(name, encoded)


def _q4_0(name: str, encoded: formats.Encoded) -> Tensor:
    rows, columns = encoded.shape
    halves = formats.unpacked_codes(encoded).view(rows, columns // Q4_0_BLOCK, 2, Q4_0_BLOCK // 2)
    scale = encoded.scale.repeat_interleave(encoded.group_size // Q4_0_BLOCK, dim=1)
    return torch.cat((_scale_bytes(name, scale), _paired(halves)), dim=-1).view(rows, -1)


def _q8_0(name: str, encoded: formats.Encoded) -> Tensor:
    rows, columns = encoded.shape
    scale = encoded.scale.expand(rows, columns // formats.INT8_BLOCK)
    codes = encoded.codes.view(torch.uint8).view(rows, -1, formats.INT8_BLOCK)
    return torch.cat((_scale_bytes(name, scale), codes), dim=-1).view(rows, -1)


def _nvfp4(name: str, encoded: formats.Encoded) -> Tensor:
    rows, columns = encoded.shape
    halves = formats.unpacked_codes(encoded).view(rows, columns // formats.NVFP4_BLOCK, 2, formats.NVFP4_BLOCK // 2)
    scale = encoded.scale.view(torch.uint8)
    if bool((scale >= 0x7F).any()):  # a sign, or e4m3's NaN: llama.cpp's scales have neither
        raise InputError(f"export.targets: gguf cannot carry {name}: a block scale of it is negative or no number")
    scale = scale.view(rows, -1, NVFP4_BLOCKS)
    return torch.cat((scale, _paired(halves).view(rows, scale.shape[1], -1)), dim=-1).view(rows, -1)


def _paired(halves: Tensor) -> Tensor:
    """[rows, blocks, 2, n] codes below 16 -> [rows, blocks, n] bytes, the first half in the low nibbles."""
    return halves[:, :, 0] | (halves[:, :, 1] << 4)


def _scale_bytes(name: str, scale: Tensor) -> Tensor:
    """fp16 [rows, blocks] -> uint8 [rows, blocks, 2]. The artifact's scales are fp16 already: there is no rounding."""
    if scale.dtype != torch.float16:
        raise InputError(f"export.targets: gguf stores fp16 scales and {name} has {scale.dtype}: they would be rounded")
    return scale.contiguous().unsqueeze(-1).view(torch.uint8)
