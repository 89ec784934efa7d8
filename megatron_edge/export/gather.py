"""Reads a sharded checkpoint of any layout, one whole tensor at a time, without the training world."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_edge.contracts import InputError, ParamRule
from megatron_edge.families import ModelDims, hf_shape, pieces
from megatron_edge.log import quiet

# Megatron stores a norm with the linear layer that reads it, as TransformerEngine's fused layers have it.
_STORED_AS = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}


class CheckpointTensors:
    """Whole tensors of a checkpoint by their Megatron parameter name; one is in memory at a time."""

    def __init__(self, path: Path) -> None:
        from torch.distributed.checkpoint import FileSystemReader

        self._reader = FileSystemReader(str(path))
        self._metadata = self._reader.read_metadata().state_dict_metadata
        self.path = path

    def names(self) -> list[str]:
        return sorted(self._metadata)

    def read(self, name: str) -> Tensor:
        """Raises InputError where the checkpoint has no tensor of that name."""
        for ending, stored in _STORED_AS.items():
            if name.endswith(ending):
                name = name.removesuffix(ending) + stored
        if not name.startswith("quantizer."):  # Megatron's own spelling of an expert
            name = name.replace(".experts.local_experts.", ".experts.experts.")
        if name.endswith(".linear_fc1.weight"):  # SwiGLU: gate rows, then up rows
            return torch.cat([self._read(name + half) for half in ("_w", "_v")])
        return self._read(name)

    def _read(self, stored: str) -> Tensor:
        import torch.distributed.checkpoint as dcp

        if stored not in self._metadata:
            raise InputError(f"{self.path}: no tensor {stored} in this checkpoint")
        entry = self._metadata[stored]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        with quiet("torch.distributed is disabled, unavailable or uninitialized", UserWarning):
            dcp.load({stored: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor


def cut(whole: Tensor, rule: ParamRule, dims: ModelDims, *, columns_per_entry: int = 1) -> dict[str, Tensor]:
    """Cuts an unsharded Megatron tensor into the Hugging Face tensors of `rule`.

    `columns_per_entry` > 1 cuts a tensor with one column per block of that many weights (maxima of int4 and int8).
    """
    parts: dict[str, Tensor] = {}
    for piece in pieces(rule, dims):
        shape = list(hf_shape(piece.target, rule, dims))
        if piece.cols is not None:
            shape[1] //= columns_per_entry
        out = parts.setdefault(piece.target, whole.new_empty(shape))
        out[slice(*piece.rows)] = whole[slice(*piece.shard_rows)]
    return parts
