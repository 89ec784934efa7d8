"""A rank's shard in plain tensors, for tools/layout_checks.py: its weights and maxima, its part of what one process
has kept, and bitwise comparison. How a whole parameter falls into shards is written here apart from the product's own
name table (families/), which it is to check."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def _cut(name: str, session: Any) -> tuple[int, int]:
    """(rank, size) of the tensor parallelism that cuts a module: an expert's own, or the model's."""
    if ".local_experts." in name:
        return session.etp_rank, session.plan.etp
    return session.tp_rank, session.plan.tp


def shard_of(name: str, whole: Tensor, session: Any) -> Tensor:
    """The part of a whole Megatron parameter (or of its block maxima) that this rank holds."""
    tp_rank, tp = _cut(name, session)
    if name.endswith(".linear_qkv.bias"):
        return whole.chunk(tp)[tp_rank]
    row_maxima = name.endswith((".weight_quantizer.amax", ".weight_quantizer.raw"))
    row_parallel = ".linear_proj." in name or ".linear_fc2." in name
    if whole.dim() < 2 or ".router." in name or (row_maxima and row_parallel and whole.shape[1] == 1):
        return whole
    if ".linear_fc1." in name:
        return torch.cat([half.chunk(tp)[tp_rank] for half in whole.chunk(2)])
    return whole.chunk(tp, dim=1 if row_parallel else 0)[tp_rank]


def input_of(name: str, whole: Tensor, session: Any) -> Tensor:
    """The part of a recorded activation that one rank's quantizer sees: a row-parallel linear's channels, its heads."""
    tp_rank, tp = _cut(name, session)
    if ".core_attention." in name:
        return whole.chunk(tp, dim=2)[tp_rank]
    return whole.chunk(tp, dim=-1)[tp_rank] if ".linear_proj." in name or ".linear_fc2." in name else whole


def num_differing(a: Tensor, b: Tensor) -> int:
    """Elements that are not equal bit for bit; all of them where the shapes differ."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return max(a.numel(), b.numel())
    a, b = (x.detach().cpu().contiguous().reshape(-1) for x in (a, b))
    return int((a.view(torch.uint8) != b.view(torch.uint8)).view(-1, a.element_size()).any(-1).sum()) if len(a) else 0


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Weights and maxima of this shard by name; maxima of int4 and int8 weights as [rows, maxima per row]."""
    from megatron_edge.model.build import named_shards
    from megatron_edge.quantize.apply import enabled_quantizers

    state = {name: param.detach() for name, param in named_shards(model).items()}
    for name, quantizer in enabled_quantizers(model).items():
        if hasattr(quantizer, "_amax"):
            amax, args = quantizer._amax, quantizer.backend_extra_args
            is_block = args["role"] == "weight" and args["format"] in ("int4", "int8")
            rows = state[name.rsplit(".", 1)[0] + ".weight"].shape[0] if is_block else 0
            state[name + ".amax"] = amax.reshape(rows, -1) if is_block else amax.reshape(())
    return state


def keep(file: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, file)


def against_reference(file: Path, mine: dict[str, Tensor], session: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, mine, this rank's part of the whole tensor in `file`) of every tensor."""
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as stored:
        for name, tensor in mine.items():
            yield name, tensor.cpu(), shard_of(name, stored.get_tensor(name), session)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Every whole tensor of a checkpoint, through torch alone."""
    import torch.distributed.checkpoint as dcp

    from megatron_edge.log import quiet

    reader = dcp.FileSystemReader(str(path))
    metadata = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, dcp.metadata.TensorStorageMetadata)
    }
    with quiet("torch.distributed is disabled, unavailable or uninitialized", UserWarning):
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


@contextlib.contextmanager
def watched(modules: dict[str, nn.Module], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside, `see(name, input, output)` is called whenever one of the modules has run."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: see(name, inputs[0].detach(), output.detach())

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def data_quantizers(model: nn.Module) -> dict[str, Any]:
    """Those on activations and on the KV cache, by name."""
    from megatron_edge.quantize.apply import enabled_quantizers

    return {n: q for n, q in enabled_quantizers(model).items() if q.backend_extra_args["role"] != "weight"}


def raw_maxima(model: nn.Module, seen: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each maximum was before it was snapped, found again: from the weights, and from what data quantizers saw
    (all experts of a layer together). Maxima of whole tensors are taken over the ranks that share them. All ranks call
    it."""
    import torch.distributed as dist

    from megatron_edge.model.build import named_shards
    from megatron_edge.quantize.apply import enabled_quantizers

    weights, world = named_shards(model), dist.get_world_size()
    found, whole, rows = {}, {}, {}
    for name, quantizer in enabled_quantizers(model).items():
        args = quantizer.backend_extra_args
        if not hasattr(quantizer, "_amax"):
            continue
        if args["role"] == "weight":
            weight = weights[name.rsplit(".", 1)[0] + ".weight"].detach().abs()
            if args["format"] == "int4":
                found[name] = weight.unflatten(-1, (-1, args["group_size"])).amax(-1)
            elif args["format"] == "int8":
                row_parallel = name.split(".")[-2] in ("linear_proj", "linear_fc2")
                (rows if row_parallel else found)[name] = weight.amax(-1, keepdim=True)
            else:
                whole[name] = float(weight.max())
        else:
            whole[name] = float(seen.get(name, torch.zeros(())))
    parts: list[dict[str, Tensor]] = [{}] * world
    dist.all_gather_object(parts, rows)
    for name in rows:
        found[name] = torch.stack([one[name].to(rows[name].device) for one in parts if name in one]).amax(0)
    everyone: list[dict[str, float]] = [{}] * world
    dist.all_gather_object(everyone, whole)
    for name in whole:
        pattern = _shared_by(name)
        values = [value for one in everyone for other, value in one.items() if _shared_by(other) == pattern]
        found[name] = torch.tensor(max(values), device=next(iter(weights.values())).device)
    return found


def _shared_by(name: str) -> str:
    """Quantizers with the same answer share a maximum: one tensor's on all ranks, inputs of all experts of a layer."""
    if name.endswith(".input_quantizer"):
        return re.sub(r"(?<=\.local_experts\.)\d+", "*", name)
    return name
