"""Norm and SwiGLU with FP8 codes in one pass, beside the plain kernel and the cast after it: the same bits, how fast.

Run by pytest (marked gpu), or as a program that prints what it compared and a table of speeds:

    python tests/gpu/test_inputs_cuda.py
    TRITON_INTERPRET=1 python tests/gpu/test_inputs_cuda.py      on a CPU, in Triton's interpreter: bits only

Equal means the same bits; a NaN is equal to a NaN. The interpreter (3.6) rounds to bf16 in another way than hardware,
but all kernels alike; of a NaN it makes an ordinary E4M3 number, which is not compared with artifact/formats.py's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[1] / "unit"), str(HERE.parent)]

from test_layers_cuda import random  # noqa: E402
from triton_device import ABSENT, DEVICE, INTERPRETED, timed  # noqa: E402

from megatron_edge.artifact import formats  # noqa: E402
from megatron_edge.model import fused  # noqa: E402
from megatron_edge.quantize import kernels, written_inputs  # noqa: E402

if not ABSENT and not INTERPRETED and torch.cuda.get_device_capability() < (8, 9):
    ABSENT = "FP8 conversions need compute capability 8.9"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(ABSENT), reason=ABSENT)]

EPS = 1e-6
ARGS = {"role": "input", "format": "fp8", "group_size": 0}
DTYPES = (torch.bfloat16, torch.float32)
# Name -> shape of x; "part": x is a part of the last dim of a tensor three times as wide.
SHAPES: dict[str, tuple[int, ...]] = {
    "norm 576": (37, 3, 576), "norm 2048": (5, 2, 2048), "norm 4096": (3, 2, 4096), "norm 8192": (2, 1, 8192),
    "norm 37": (70, 1, 37), "norm 64, many rows": (301, 64), "norm of one row": (1, 576), "norm 576, part": (9, 2, 576),
    "swiglu 576": (11, 3, 1152), "swiglu 8192": (3, 2, 16384), "swiglu 37": (70, 74), "swiglu of one row": (1, 3072),
    "swiglu 1536, part": (5, 3, 3072),
}  # fmt: skip


def integers(x: Tensor) -> Tensor:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def differing(ours: Tensor, theirs: Tensor) -> int:
    assert ours.shape == theirs.shape and ours.dtype is theirs.dtype
    same = integers(ours) == integers(theirs)
    return int((~(same | (ours.float().isnan() & theirs.float().isnan()))).sum())


def with_kernels() -> None:
    """In the interpreter tensors are on the CPU, where neither fused.py nor kernels.py would ask for the kernels."""
    if INTERPRETED:
        from megatron_edge.model import triton_layers
        from megatron_edge.quantize import triton_inputs

        fused._kernels = lambda x: triton_layers if x.numel() else None
        kernels._fused_inputs = lambda x: triton_inputs if x.numel() else None


def operand(x: Tensor, amax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from megatron_edge.quantize import triton_kernels

    return triton_kernels.fp8_operand(ARGS, x, amax, with_values=True)


def calibrated(amax: Tensor, args: dict[str, Any]) -> Any:
    quantizer = torch.nn.Module()
    quantizer.register_buffer("_amax", amax)
    quantizer.backend_extra_args = args
    return quantizer


def inputs_of(name: str, dtype: torch.dtype, is_finite: bool) -> list[Tensor]:
    shape = SHAPES[name]
    x = random(*shape[:-1], 3 * shape[-1]) if "part" in name else random(*shape)
    if not is_finite:
        for place, value in enumerate((torch.nan, torch.inf, -torch.inf, 3e38, -1e-40)):
            x.view(-1)[place * (x.numel() // 5)] = value
    x = x.to(DEVICE, dtype)
    if "part" in name:
        x = x[..., shape[-1] : 2 * shape[-1]]
    if name.startswith("swiglu"):
        return [x]
    return [x, (1 + 0.3 * random(shape[-1], seed=1)).to(DEVICE, dtype)]


def compare(name: str, dtype: torch.dtype) -> Iterator[tuple[str, int, int]]:
    """(where, elements, how many differ) of forward and backward."""
    with_kernels()
    for is_finite in (True, False):
        inputs = [x.detach().requires_grad_() for x in inputs_of(name, dtype, is_finite)]
        norm = name.startswith("norm")
        result = fused.rms_norm(*inputs, EPS) if norm else fused.swiglu(*inputs)
        largest = torch.nan_to_num(result.detach().float(), 1.0, 1.0, 1.0).abs().max()
        gradient = random(*result.shape, seed=2).to(DEVICE, dtype)
        expected = torch.autograd.grad(result, inputs, gradient)
        for kind, amax in {
            "snapped": formats.snap_tensor_amax("fp8", largest), "raw": largest, "clipped": largest / 8,
            "zero": torch.zeros_like(largest),
        }.items():  # fmt: skip
            quantizer = calibrated(amax, ARGS)
            value = (
                written_inputs.rms_norm(quantizer, *inputs, EPS) if norm else written_inputs.swiglu(quantizer, *inputs)
            )
            written = written_inputs.taken(value, quantizer)
            assert written is not None
            theirs = operand(result, amax)
            reference = formats.fp8_operand("fp8", result, amax)
            for what, mine, other in zip(("codes", "scale"), written, reference, strict=True):
                if INTERPRETED and not is_finite:
                    continue
                yield f"{name} {str(dtype)[6:]} {kind} {what} of formats", mine.numel(), differing(mine, other)
            ours = (*written, value.detach(), *torch.autograd.grad(value, inputs, gradient))
            for what, mine, other in zip(
                ("codes", "scale", "value", "dx", "dw"), ours, (*theirs, *expected), strict=False
            ):
                where = f"{name} {str(dtype)[6:]} {'finite' if is_finite else 'not finite'} {kind} {what}"
                yield where, mine.numel(), differing(mine, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", SHAPES)
def test_bits_of_the_two_kernels(name: str, dtype: torch.dtype) -> None:
    found = list(compare(name, dtype))
    assert sum(elements for _, elements, _ in found) > 1000
    assert not [(where, count) for where, _, count in found if count]


# ---------------------------------------------------------------- as a program


def large(fmt: str) -> Iterator[tuple[str, Tensor, tuple[Tensor, ...], Callable[[], Any], Tensor, Tensor]]:
    """(name, x, what follows it, the plain function of them, its result, that result's amax) of a layer of 4 windows of
    2048 tokens, hidden 2048, ffn 8192, bf16, forward, without autograd."""
    for name, shape in (("norm", (2048, 4, 2048)), ("swiglu", (2048, 4, 16384))):
        x = random(*shape).to(DEVICE, torch.bfloat16)
        more: tuple[Any, ...] = (torch.ones(shape[-1], device=DEVICE, dtype=x.dtype), EPS) if name == "norm" else ()
        plain = partial(fused.normed if more else fused.gated, x, *more)
        result = plain()[0] if more else plain()
        yield name, x, more, plain, result, formats.snap_tensor_amax(fmt, result.float().abs().max())


def speeds() -> Iterator[str]:
    yield f"{'bf16':24}{'us':>8}{'GB/s':>8}{'plain us':>10}{'plain, then cast us':>21}{'then values us':>16}"
    for name, x, more, plain, result, amax in large("fp8"):
        ours = partial(kernels.rms_norm_operand if more else kernels.swiglu_operand, amax, x, *more)
        cast = partial(kernels.fp8_operand, ARGS, result, amax)
        values = partial(kernels.fp8_values, *cast()[:2], torch.bfloat16)
        times = [timed(call) for call in (ours, plain, cast, values)]
        bandwidth = (5 / 2 if more else 7 / 4) * 2 * x.numel() / times[0] / 1e3
        yield f"{name:24}{times[0]:8.1f}{bandwidth:8.0f}{times[1]:10.1f}{times[2]:21.1f}{times[3]:16.1f}"


def program(
    compare: Callable[..., Iterator[tuple[str, int, int]]], names: Iterable[str], speeds: Callable[..., Any]
) -> int:
    if ABSENT:
        print(f"skipped: {ABSENT}")
        return 0
    surprises, elements = [], 0
    for dtype in DTYPES:
        for name in names:
            found = list(compare(name, dtype))
            elements += sum(count for _, count, _ in found)
            surprises += [f"{where}: {count} of {among} differ" for where, among, count in found if count]
            print(f"{name} {str(dtype)[6:]}: {len(found)} comparisons", flush=True)
    print(*surprises, f"{len(surprises)} surprises among {elements} numbers", sep="\n")
    if not INTERPRETED:
        print(torch.cuda.get_device_name(), *speeds(), sep="\n")
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(program(compare, SHAPES, speeds))
