"""Low-rank adapters of quantised linear layers (train=lora_qat), after LoRA (Hu et al. 2021, arXiv 2106.09685).

A layer's quantizer sees W = W0 + alpha / rank * B @ A. W0 and everything else stay as they came, A and B are trained.
The layer's own parameter holds W, rounded to its dtype once per step: what calculates, is saved, exported and verified
is the merged weight, bit for bit, and its scales are those of the calibration. Its gradient is led on to A and B.

Shards: of a column-parallel layer [out / tp, in] every rank has all of A and its rows of B; of a row-parallel one
[out, in / tp] its columns of A and all of B. Called by jobs, train/step.py and checkpoint.py.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_edge.contracts import InputError
from megatron_edge.model.build import chunks_of, named_modules
from megatron_edge.quantize.maxima import ROW_PARALLEL
from megatron_edge.runtime.session import Session, expert_groups, tensor_group

PREFIX = "adapters."  # of their parameters' names in a chunk
KEY = "adapter."  # of their keys in a checkpoint


class Adapter(nn.Module):
    """`name`: the layer's in the whole model, `layer`: in its chunk. Parameters are fp32: a [rank, in], and b
    [out, rank] in one part, or two of a gated layer (gate rows, up rows), which tensor parallelism cuts separately.
    `base` is W0."""

    base: Tensor

    def __init__(self, name: str, layer: str, weight: nn.Parameter, *, rank: int, alpha: float, is_row: bool) -> None:
        super().__init__()
        self.name, self.layer, self.is_row, self._scale = name, layer, is_row, alpha / rank
        self._weight = (weight,)  # a tuple: it is the layer's parameter, not this module's
        self.is_expert = ".local_experts." in name
        parts = 2 if name.endswith(".linear_fc1") else 1
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.zeros(rank, columns, device=weight.device))
        self.b = nn.ParameterList(torch.zeros(rows // parts, rank, device=weight.device) for _ in range(parts))
        self.register_buffer("base", weight.detach().clone())
        for param, axis in ((self.a, 1 if is_row else None), *((part, None if is_row else 0) for part in self.b)):
            marks: dict[str, Any] = {"allreduce": not self.is_expert}  # False: replicas are the experts' own
            if axis is not None:  # as Megatron's set_tensor_model_parallel_attributes; the gradient norm reads it
                marks |= {"tensor_model_parallel": True, "partition_dim": axis, "partition_stride": 1}
            for mark, value in marks.items():
                setattr(param, mark, value)

    @torch.no_grad()
    def start(self, seed: int, rank: int, size: int) -> None:
        """A as peft draws it, from the seed and the layer's name alone; B stays 0. `rank` of `size` share the layer."""
        columns = self.a.shape[1] * (size if self.is_row else 1)
        digest = hashlib.sha256(f"{seed} {self.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        bound = 1 / math.sqrt(columns)
        whole = torch.empty(self.a.shape[0], columns).uniform_(-bound, bound, generator=generator)
        self.a.copy_(whole.chunk(size, 1)[rank] if self.is_row else whole)

    @property
    def weight(self) -> nn.Parameter:
        return self._weight[0]

    @torch.no_grad()
    def merge(self) -> None:
        """Puts W0 + alpha / rank * B @ A into the layer's parameter: in fp32, with one rounding."""
        self.weight.copy_(torch.addmm(self.base.float(), torch.cat(list(self.b)), self.a, alpha=self._scale))

    def route(self, x: Tensor) -> Tensor:
        """`x`, the layer's parameter in any shape; a gradient for it becomes one for a and b."""
        return _Route.apply(x, self, self.a, *self.b)

    def gradients(self, of_weight: Tensor) -> tuple[Tensor, ...]:
        """Of a and of b's parts, from that of the weight's shard [out, in], summed over the ranks that share the layer
        where they are not cut. All of those ranks call it."""
        of_weight = of_weight.float() * self._scale
        of_a = torch.cat(list(self.b)).t() @ of_weight
        of_b = of_weight @ self.a.t()
        group = expert_groups()[0] if self.is_expert else tensor_group()
        dist.all_reduce(of_b if self.is_row else of_a, group=group)
        return of_a, *of_b.split([len(part) for part in self.b])


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, adapter: Adapter, *parameters: Tensor) -> Tensor:
        ctx.adapter = adapter
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        adapter: Adapter = ctx.adapter
        return None, None, *adapter.gradients(gradients[0].reshape(adapter.base.shape))


class AdapterShard(NamedTuple):
    """This rank's part of a or b: its parameter's name in the chunk, its key in a checkpoint, and the dimension that
    tensor parallelism splits (an expert's own, where `is_expert`), None where replicated."""

    parameter: str
    key: str
    data: Tensor
    axis: int | None
    is_expert: bool


def attach(model: nn.Module, session: Session, *, rank: int, alpha: float, seed: int) -> int:
    """Gives every layer of the decoder whose weight is quantised an adapter, and freezes everything else. In place,
    before Megatron's DistributedDataParallel; all ranks call it.

    Returns:
        The number of layers on this rank.

    Raises:
        InputError: a pipeline stage's chunk without a quantised layer, which would have nothing to train.
    """
    names = {module: name for name, module in named_modules(model)}
    model.requires_grad_(False)
    count = 0
    for chunk in chunks_of(model):
        adapters = nn.ModuleList()
        for layer, module in list(chunk.named_modules()):
            quantizer = getattr(module, "weight_quantizer", None)
            if not layer.startswith("decoder.layers.") or quantizer is None or not quantizer.is_enabled:
                continue
            weight = dict(module.named_parameters(recurse=False))["weight"]
            is_row = layer.endswith(ROW_PARALLEL)
            adapter = Adapter(names[module], layer, weight, rank=rank, alpha=alpha, is_row=is_row)
            place = (session.etp_rank, session.plan.etp) if adapter.is_expert else (session.tp_rank, session.plan.tp)
            adapter.start(seed, *place)
            quantizer._route = adapter.route
            adapters.append(adapter)
        if not len(adapters):
            raise InputError(
                "quant.exclude: a stage of the pipeline has no quantised layer, and so no adapter to train; allowed "
                "with train=lora_qat: fewer exclusions, or a smaller parallel.pipeline x parallel.virtual_pipeline"
            )
        chunk.adapters = adapters
        if chunk.pre_process:  # recomputed layers get a gradient only where their input wants one
            chunk.adapters_input = chunk.embedding.register_forward_hook(_want_gradient)
        count += len(adapters)
    return count


def let_gradients_pass(model: nn.Module) -> None:
    """Megatron's linear layers ask their own parameter whether a gradient is wanted. It may say so once
    DistributedDataParallel and the optimizer have been built without it; nothing then accumulates in it. In place."""
    for chunk in chunks_of(model):
        for adapter in getattr(chunk, "adapters", ()):
            adapter.weight.requires_grad_(True)


def _want_gradient(_: nn.Module, inputs: Any, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_()


def detach(model: nn.Module) -> None:
    """Takes the adapters away; the merged weights stay."""
    for module in model.modules():
        if getattr(module, "_route", None) is not None:
            module._route = None
    for chunk in chunks_of(model):
        if hasattr(chunk, "adapters"):
            del chunk.adapters
        if hasattr(chunk, "adapters_input"):
            chunk.adapters_input.remove()
            del chunk.adapters_input


def merge(model: nn.Module) -> None:
    """Layers with an adapter compute with it as it is now; every other layer is left alone."""
    for chunk in chunks_of(model):
        for adapter in getattr(chunk, "adapters", ()):
            adapter.merge()


def adapter_shards(chunk: Any) -> Iterator[AdapterShard]:
    """What a checkpoint holds of a chunk's adapters, beside their bases."""
    for index, adapter in enumerate(getattr(chunk, "adapters", ())):
        where, key = f"{PREFIX}{index}", f"{KEY}{adapter.name}"
        axis_a, axis_b = (1, None) if adapter.is_row else (None, 0)
        yield AdapterShard(f"{where}.a", f"{key}.a", adapter.a, axis_a, adapter.is_expert)
        for part, b in enumerate(adapter.b):
            yield AdapterShard(f"{where}.b.{part}", f"{key}.b{part}", b, axis_b, adapter.is_expert)


def bases(chunk: Any) -> Iterator[tuple[str, str, Tensor]]:
    """(its name in the chunk, that of the weight that it is cut like, W0) of each adapter of a chunk."""
    for index, adapter in enumerate(getattr(chunk, "adapters", ())):
        yield f"{PREFIX}{index}.base", f"{adapter.layer}.weight", adapter.base
