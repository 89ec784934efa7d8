"""AdamW in one pass over memory: gradients divided and clipped, moments, fp32 main weights, the model's bf16 weights;
and, in a pass before, the gradients' norm.

One launch is for all tensors of a group: a table on the device says where they lie, and is made again when one of them
has moved. The state is that of torch's fused AdamW, with the same values within two roundings of each; who saves, loads
or reshards it sees no difference. fp32 without fused multiply-adds, sums in a fixed order: the same bits every time.
Only update.py imports this: it needs Triton. tests/gpu/test_triton_adam_cuda.py compares.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_edge.runtime.main_weights import weights_and_mains

TILE, WARPS = 1024, 4  # elements of a program, and its warps: two loads of 16 bytes in each thread from each tensor
SQUARE_TILE, SQUARE_WARPS = 8192, 8  # the same of the norm, which reads one tensor
_ALIGNMENT_BYTES = 16  # of addresses, for loads of that size
# Of the table: gradient, moments, main weight, bf16 weight or 0, step, number of elements, first program, is aligned,
# first program of the norm.
_COLUMNS = tl.constexpr(10)


@triton.jit
def _adam_kernel(
    table, tensors, decision, one, two, epsilon, rate, decay, root, step,
    TILE: tl.constexpr,
):  # fmt: skip
    """Program p works on a tile of tensor tensors[p], a row of the table. `decision` has what multiplies gradients, and
    0 where nothing is to be updated; `one` and `two` are 1 - beta; `rate` and `root` have the corrections of the
    moments' bias, see `TritonAdam.step`."""
    if tl.load(decision + 1) != 0:
        _program(table, tensors, tl.load(decision), one, two, epsilon, rate, decay, root, step, TILE)


@triton.jit
def _program(table, tensors, divided, one, two, epsilon, rate, decay, root, step, TILE: tl.constexpr):
    program = tl.program_id(0)
    row = table + tl.load(tensors + program).to(tl.int64) * _COLUMNS
    gradients, means, squares, mains = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    weights, steps, numel = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    first, is_aligned = tl.load(row + 7), tl.load(row + 8)
    if program == first:
        tl.store(steps.to(tl.pointer_type(tl.float32)), step)
    start = (program - first) * TILE
    if (numel - start >= TILE) & (is_aligned != 0):
        _update(
            gradients, means, squares, mains, weights, start, numel, divided, one, two, epsilon, rate, decay, root,
            True, TILE,
        )  # fmt: skip
    else:
        _update(
            gradients, means, squares, mains, weights, start, numel, divided, one, two, epsilon, rate, decay, root,
            False, TILE,
        )  # fmt: skip


@triton.jit
def _update(
    gradients, means, squares, mains, weights, start, numel, divided, one, two, epsilon, rate, decay, root,
    WHOLE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Elements from `start` on of the tensors at these addresses: a whole tile of aligned ones, or what there is."""
    at = tl.arange(0, TILE)
    inside = at < numel - start
    gradients = gradients.to(tl.pointer_type(tl.float32)) + start + at
    means = means.to(tl.pointer_type(tl.float32)) + start + at
    squares = squares.to(tl.pointer_type(tl.float32)) + start + at
    mains = mains.to(tl.pointer_type(tl.float32)) + start + at
    if WHOLE:  # all inside, and the compiler is told what it cannot know of addresses that come from memory
        inside = tl.full((TILE,), 1, tl.int1)
        gradients, means = tl.multiple_of(gradients, 16), tl.multiple_of(means, 16)
        squares, mains = tl.multiple_of(squares, 16), tl.multiple_of(mains, 16)
    gradient = tl.load(gradients, mask=inside, other=0.0) * divided
    mean = tl.load(means, mask=inside, other=0.0)
    square = tl.load(squares, mask=inside, other=0.0)
    main = tl.load(mains, mask=inside, other=0.0)
    mean += one * (gradient - mean)
    square += two * (gradient * gradient - square)
    main -= decay * main
    main -= tl.div_rn(rate * mean, tl.sqrt_rn(square) * root + epsilon)
    tl.store(means, mean, mask=inside)
    tl.store(squares, square, mask=inside)
    tl.store(mains, main, mask=inside)
    if weights != 0:
        halves = weights.to(tl.pointer_type(tl.bfloat16)) + start + at
        if WHOLE:
            halves = tl.multiple_of(halves, 8)  # a thread has as many elements of each
        tl.store(halves, main.to(tl.bfloat16), mask=inside)


@triton.jit
def _square_kernel(table, tensors, sums, TILE: tl.constexpr):
    """sums[p] becomes the sum of the squares of a tile of tensor tensors[p]'s gradient."""
    program = tl.program_id(0)
    row = table + tl.load(tensors + program).to(tl.int64) * _COLUMNS
    gradients, numel, is_aligned, first = tl.load(row), tl.load(row + 6), tl.load(row + 8), tl.load(row + 9)
    start = (program - first) * TILE
    at = tl.arange(0, TILE)
    if (numel - start >= TILE) & (is_aligned != 0):
        pointers = tl.multiple_of(gradients.to(tl.pointer_type(tl.float32)) + start + at, 16)
        value = tl.load(pointers)
        tl.store(sums + program, tl.sum(value * value, axis=0))
    else:
        value = tl.load(gradients.to(tl.pointer_type(tl.float32)) + start + at, mask=at < numel - start, other=0.0)
        tl.store(sums + program, tl.sum(value * value, axis=0))


@dataclass
class _Table:
    """What launches need. `steps` are torch's counts, held so that no other can take their addresses; `taken` is their
    value, so that nobody has to ask the device for it. `tensors` are the programs' tensors, `counted` those of the
    norm's, which write `sums`."""

    addresses: list[int]
    steps: list[Tensor]
    taken: float
    rows: Tensor
    tensors: Tensor
    counted: Tensor
    sums: Tensor


class TritonAdam:
    """The update of one of Megatron's optimizers, ordinary or distributed, whose `optimizer` is torch's fused AdamW.
    What the model computes with in bf16 is written with the main weights."""

    def __init__(self, inner: Any, device: torch.device) -> None:
        adam = inner.optimizer
        assert isinstance(adam, torch.optim.AdamW), type(adam)
        assert not any(group["amsgrad"] or group["maximize"] for group in adam.param_groups)
        self._inner = weakref.proxy(inner)  # which holds this: tensors in a cycle wait for Python's garbage collector
        self._adam, self._device, self._is_ready = adam, device, False
        self._tables: list[_Table | None] = [None] * len(adam.param_groups)

    @torch.no_grad()
    def gradient_square(self) -> Tensor:
        """fp64 []: of the gradients that Megatron counts on this rank, as they are. After prepare_grads(); the update
        may follow then."""
        self._prepare()
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for table in self._tables:
            if table is not None and table.counted.numel():
                _square_kernel[(table.counted.numel(),)](
                    table.rows, table.counted, table.sums,
                    TILE=SQUARE_TILE, num_warps=SQUARE_WARPS, enable_fp_fusion=False,
                )  # fmt: skip
                total += table.sums.sum(dtype=torch.float64)
        return total

    def _prepare(self) -> None:
        """Looks where gradients, states and weights lie, which takes time of the host alone. Makes states before the
        first step."""
        models, mains = weights_and_mains(self._inner)
        halves = {main.data_ptr(): weight for weight, main in zip(models, mains, strict=True)}
        for at, group in enumerate(self._adam.param_groups):
            params: list[Tensor] = []
            gradients: list[Tensor] = []
            means: list[Tensor] = []
            squares: list[Tensor] = []
            steps: list[Tensor] = []
            self._adam._init_group(group, params, gradients, means, squares, [], steps)
            weights = [halves.get(param.data_ptr()) for param in params]
            tensors = [*gradients, *means, *squares, *params]
            addresses = [each.data_ptr() for each in tensors]
            addresses += [0 if each is None else each.data_ptr() for each in weights]
            old = self._tables[at]
            if old is not None and old.addresses == addresses and _are(old.steps, steps):
                continue
            _check(params, tensors, weights, steps)
            counted = {id(gradient) for gradient in self._inner.get_main_grads_for_grad_norm()}
            sizes = [(param.numel(), id(param.grad) in counted) for param in params]
            self._tables[at] = _table(addresses, sizes, steps, self._device)
        self._is_ready = True

    def step(self, decision: Tensor) -> None:
        """With the gradients times decision[0], which are left as they are; nothing changes where decision[1] is 0.
        decision: fp32 [2] on the device. `count` tells what was decided, before the next step.

        Main weights become (1 - lr wd) main - lr m / (sqrt(v) + eps) with the moments m and v divided by
        1 - beta^step (Loshchilov & Hutter 2019, algorithm 2)."""
        from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

        if not self._is_ready:
            self._prepare()
        self._is_ready = False
        for group, table in zip(self._adam.param_groups, self._tables, strict=True):
            if table is None or not table.steps:
                continue
            (beta1, beta2), rate, taken = group["betas"], group["lr"], table.taken + 1
            _adam_kernel[(table.tensors.numel(),)](
                table.rows, table.tensors, decision, 1 - beta1, 1 - beta2, group["eps"],
                rate / (1 - beta1**taken), rate * group["weight_decay"], (1 - beta2**taken) ** -0.5,
                taken, TILE=TILE, num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
        if isinstance(self._inner, DistributedOptimizer):  # as its step_with_ready_grads does
            for chunk in self._inner.model_chunks:
                chunk.start_param_sync()

    def count(self, applied: bool) -> None:
        for table in self._tables:
            if table is not None and applied:
                table.taken += 1


def _are(tensors: list[Tensor], others: list[Tensor]) -> bool:
    return len(tensors) == len(others) and all(one is other for one, other in zip(tensors, others, strict=True))


def _check(params: list[Tensor], tensors: list[Tensor], weights: list[Tensor | None], steps: list[Tensor]) -> None:
    """Addresses say nothing of types: what the kernel takes for granted."""
    assert all(each.dtype is torch.float32 and each.is_contiguous() for each in (*tensors, *steps))
    assert all(each.device == params[0].device for each in (*tensors, *steps))
    shapes = [param.shape for param in params]
    assert [each.shape for each in tensors] == shapes * (len(tensors) // max(len(shapes), 1))
    for param, weight in zip(params, weights, strict=True):
        if weight is not None:
            assert weight.dtype is torch.bfloat16 and weight.is_contiguous() and weight.shape == param.shape


def _table(addresses: list[int], sizes: list[tuple[int, bool]], steps: list[Tensor], device: torch.device) -> _Table:
    """`sizes`: elements of each tensor, and whether the norm counts it. Asks the device for the number of steps.

    Raises:
        ValueError: they are not one for all tensors.
    """
    taken = set(torch.stack(steps).tolist() if steps else [0.0])
    if len(taken) != 1:
        raise ValueError(f"Adam's parameters have taken different numbers of steps: {sorted(taken)}")
    columns = torch.tensor(addresses, dtype=torch.int64).view(5, len(sizes))
    numel, is_counted = torch.tensor(sizes, dtype=torch.int64).view(-1, 2).unbind(1)
    programs = (-(-numel // TILE)).clamp(min=1)  # who has no elements is counted up all the same
    of_norm = -(-numel // SQUARE_TILE) * is_counted
    counts = torch.tensor([step.data_ptr() for step in steps], dtype=torch.int64)
    is_aligned = (columns % _ALIGNMENT_BYTES == 0).all(0).long()
    firsts = [each.cumsum(0) - each for each in (programs, of_norm)]
    rows = torch.stack([*columns, counts, numel, firsts[0], is_aligned, firsts[1]], dim=1)
    every = torch.arange(len(sizes), dtype=torch.int32)
    tensors, counted = (every.repeat_interleave(each).to(device) for each in (programs, of_norm))
    sums = torch.empty(counted.numel(), dtype=torch.float32, device=device)
    return _Table(addresses, steps, taken.pop(), rows.to(device), tensors, counted, sums)
