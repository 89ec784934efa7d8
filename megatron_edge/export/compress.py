"""From a checkpoint to the canonical artifact: every linear layer encoded in its format, nothing left unsaid.

What will be written is known from the name table before anything is read. Tensors then go through block by block of
rows: threads read and encode, the caller's writes, in order. Memory is a few blocks, whatever the size of the model or
of its largest tensor.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_edge.artifact import formats
from megatron_edge.artifact.store import ArtifactWriter, Streamed, expected_parts
from megatron_edge.contracts import InputError, LinearEntry, ParamRule, QuantPlan
from megatron_edge.export.gather import CheckpointTensors, Whole, rows_of
from megatron_edge.families import ModelDims, Piece, all_rules, dims_of, hf_shape, pieces, rules_of
from megatron_edge.log import track
from megatron_edge.quantize.policy import rule_for
from megatron_edge.quantize.state import PREFIX, amax_keys

log = logging.getLogger("megatron_edge")

BLOCK_BYTES = 1 << 23  # of a checkpoint's tensor that are read and encoded at once
MOST_THREADS = 8  # the writer's hashing keeps up with no more


@dataclass
class Compressed:
    """What was written, as the manifest will say it; `dtype` is the one that the model was trained in."""

    linears: dict[str, LinearEntry]
    kv: dict[str, Any]
    dtype: str


@dataclass(frozen=True)
class _Tensor:
    """One Hugging Face tensor on its way: `parts` place its rows in the Megatron tensor `weight`.

    `amax` is the maxima: of the whole tensor [], or with a row for each of `weight`'s; None where it stays bf16.
    """

    name: str
    shape: tuple[int, ...]
    weight: Whole
    parts: list[Piece]
    linear: LinearEntry | None = None
    amax: Tensor | Whole | None = None
    input_scale: Tensor | None = None

    def stored_names(self) -> list[str]:
        return list(self.linear.tensors.values()) if self.linear else [self.name]

    def blocks(self) -> list[tuple[int, int]]:
        row_bytes = self.weight.dtype.itemsize * (self.shape[1] if len(self.shape) > 1 else 1)
        rows = max(1, BLOCK_BYTES // row_bytes)
        return [(begin, min(begin + rows, self.shape[0])) for begin in range(0, self.shape[0], rows)]

    def block(self, begin: int, end: int) -> Any:
        """Rows [begin, end): bf16 values, or `formats.Encoded`."""
        values = rows_of(self.weight, self.parts, begin, end)
        if self.linear is None:
            return values.to(torch.bfloat16)
        amax = rows_of(self.amax, self.parts, begin, end) if isinstance(self.amax, Whole) else self.amax
        assert amax is not None
        try:
            return formats.encode(self.linear.format, values, amax, self.linear.group_size)
        except InputError as error:
            raise InputError(f"{self.name}, rows {begin} to {end - 1}: {error}") from error

    def store(self, writer: ArtifactWriter, blocks: Iterator[Any]) -> None:
        """Writes what `block` gave for all of `blocks`."""
        if self.linear is None:
            writer.add(self.name, Streamed(self.shape, torch.bfloat16, blocks), "bf16")
            return
        scales: list[tuple[Tensor, Tensor | None]] = []

        def codes() -> Iterator[Tensor]:
            for encoded in blocks:
                scales.append((encoded.scale, encoded.global_scale))
                yield encoded.codes

        names, (dtype, shape) = self.linear.tensors, expected_parts(self.linear)["codes"]
        writer.add(names["codes"], Streamed(shape, getattr(torch, dtype), codes()), self.linear.format)
        scale, global_scale = scales[0]
        writer.add(names["scale"], torch.cat([one for one, _ in scales]) if scale.dim() else scale, "scale")
        if global_scale is not None:
            writer.add(names["global_scale"], global_scale, "scale")
        if self.input_scale is not None:
            writer.add(names["input_scale"], self.input_scale, "scale")


def compress(
    checkpoint: Path, writer: ArtifactWriter, hf_config: dict, plan: QuantPlan, threads: int = 1
) -> Compressed:
    """Streams every parameter of `checkpoint` into `writer`, quantised as `plan` says. One process.

    Raises:
        InputError: a tensor or a quantizer's maximum is missing, or a pre_quant_scale is left.
    """
    source = CheckpointTensors(checkpoint)
    left = [name for name in source.names() if "pre_quant_scale" in name]
    if left:
        raise InputError(f"{checkpoint}: pre_quant_scale is left unfolded in {left[:3]}; nothing was exported")
    dims = dims_of(hf_config)
    tensors = [found for rule in all_rules(rules_of(hf_config), dims) for found in _tensors(source, rule, dims, plan)]
    kv_scales = _kv_scales(source, dims, plan.kv)
    todo = [tensor for tensor in tensors if not writer.holds(*tensor.stored_names())]
    if len(todo) < len(tensors):
        log.info(
            "%d of %d tensors are there already, as an interrupted export left them",
            len(tensors) - len(todo),
            len(tensors),
        )
    calls = (partial(tensor.block, *rows) for tensor in todo for rows in tensor.blocks())
    with _one_thread_per_operation(), closing(_in_order(calls, min(threads, MOST_THREADS))) as blocks:
        for tensor in track(todo, "exporting tensors", len(todo)):
            tensor.store(writer, islice(blocks, len(tensor.blocks())))
    for name, scale in kv_scales.items():
        writer.add(name, scale, "scale")
    linears = {tensor.name.removesuffix(".weight"): tensor.linear for tensor in tensors if tensor.linear}
    return Compressed(linears, {"format": plan.kv}, str(tensors[0].weight.dtype).removeprefix("torch."))


def _tensors(source: CheckpointTensors, rule: ParamRule, dims: ModelDims, plan: QuantPlan) -> Iterator[_Tensor]:
    """The Hugging Face tensors of one Megatron parameter. Reads maxima of whole tensors alone."""
    weight, module = source.parameter(rule.pattern), rule.pattern.removesuffix(".weight")
    parts: dict[str, list[Piece]] = {}
    for piece in pieces(rule, dims):
        parts.setdefault(piece.target, []).append(piece)
    _check_shape(source, rule, weight, parts)
    chosen = rule_for(module, plan)
    if chosen is None or chosen.weight == "none":
        for name in parts:
            yield _Tensor(name, hf_shape(name, rule, dims), weight, parts[name])
        return
    is_block = formats.scales_per_row(chosen.weight, weight.shape[1], chosen.group_size) > 0
    maxima = source.whole(amax_keys(f"{module}.weight_quantizer", is_block))
    amax = maxima if is_block else maxima.all().reshape(())
    input_scale = None
    if chosen.activation != "none":
        input_amax = source.whole([f"{PREFIX}{module}.input_quantizer.amax"]).all().reshape(())
        input_scale = formats.tensor_scale(chosen.activation, input_amax)
    for name in parts:
        rows, columns = hf_shape(name, rule, dims)
        linear = _entry(name.removesuffix(".weight"), chosen, (rows, columns))
        yield _Tensor(name, (rows, columns), weight, parts[name], linear, amax, input_scale)


def _entry(name: str, chosen: Any, shape: tuple[int, int]) -> LinearEntry:
    tensors = {"codes": f"{name}.weight_codes", "scale": f"{name}.weight_scale"}
    if chosen.weight == "nvfp4":
        tensors["global_scale"] = f"{name}.weight_global_scale"
    if chosen.activation != "none":
        tensors["input_scale"] = f"{name}.input_scale"
    return LinearEntry(chosen.weight, chosen.activation, chosen.group_size, shape, tensors)


def _check_shape(source: CheckpointTensors, rule: ParamRule, weight: Whole, parts: dict[str, list[Piece]]) -> None:
    rows = max(piece.shard_rows[1] for placed in parts.values() for piece in placed)
    columns = {piece.cols[1] for placed in parts.values() for piece in placed if piece.cols is not None}
    if weight.shape[0] < rows or set(weight.shape[1:]) != columns:
        raise InputError(
            f"{source.path}: {rule.pattern} is {list(weight.shape)}; allowed for this model: {[rows, *columns]}"
        )


def _kv_scales(source: CheckpointTensors, dims: ModelDims, fmt: str) -> dict[str, Tensor]:
    if fmt not in formats.STATIC_KV_FORMATS:
        return {}
    scales = {}
    for layer in range(dims.num_layers):
        for which in "kv":
            key = f"{PREFIX}decoder.layers.{layer}.self_attention.core_attention.{which}_bmm_quantizer.amax"
            scale = formats.tensor_scale(fmt, source.whole([key]).all().reshape(()))
            scales[f"model.layers.{layer}.self_attn.{which}_scale"] = scale
    return scales


def _in_order(calls: Iterable[Callable[[], Any]], threads: int) -> Generator[Any]:
    """What `calls` return, in their order; a few more of them are under way than there are threads."""
    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="export") as pool:
        waiting: deque[Future[Any]] = deque()
        try:
            for call in calls:
                waiting.append(pool.submit(call))
                if len(waiting) > threads + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def _one_thread_per_operation() -> Iterator[None]:
    """Blocks are what runs side by side; threads inside of each operation would only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
