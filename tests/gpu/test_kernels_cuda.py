"""The fused kernels of fake quantisation on CUDA: the very bits of artifact/formats.py, and how fast.

Run by pytest (marked gpu), or as a program that prints what it compared and a table of speeds:

    python tests/gpu/test_kernels_cuda.py [--quick]      --quick: fp32 and bf16 alone
    TRITON_INTERPRET=1 python tests/gpu/test_kernels_cuda.py      on a CPU, in Triton's interpreter: bits only

The interpreter (3.6) cuts fp32 to bf16 where hardware rounds to nearest: there, results in bf16 are left out.
Equal means the same bits, signed zeros and subnormals included; a NaN is equal to a NaN.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from triton_device import ABSENT, DEVICE, INTERPRETED, timed

from megatron_edge.artifact import formats
from megatron_edge.quantize import kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(ABSENT), reason=ABSENT)]

# (role, format, group size, multiple of the last dim)
QUANTIZERS = (
    ("weight", "int4", 128, 128), ("weight", "int4", 32, 32), ("weight", "int4", 48, 48), ("weight", "int8", 0, 1),
    ("weight", "fp8", 0, 1), ("weight", "nvfp4", 16, 16), ("input", "fp8", 0, 1), ("input", "int8", 0, 1),
    ("input", "nvfp4", 0, 16), ("kv", "fp8", 0, 1), ("kv", "nvfp4", 0, 16), ("kv", "int8", 0, 32),
)  # fmt: skip
DTYPES = (
    (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32), (torch.float16, torch.float16), (torch.float32, torch.float16),
)  # fmt: skip
DTYPES = tuple(pair for pair in DTYPES if not (INTERPRETED and pair[1] is torch.bfloat16))


def arguments(role: str, fmt: str, group_size: int) -> dict[str, Any]:
    return {"role": role, "format": fmt, "group_size": group_size}


def named(case: Any) -> str:
    return "-".join(str(part).removeprefix("torch.") for part in case)


def shapes(multiple: int) -> Iterator[tuple[int, ...]]:
    """Whole tiles and odd ends, one row and one block, more rows than a tile and a row longer than it."""
    yield from ((64, 8 * multiple), (1, multiple), (3, 5, 3 * multiple), (129, 2 * multiple))
    if multiple == 1:
        yield from ((7, 4099), (4097,), (2, 3, 576))


def values(shape: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    """fp32 on CPU: ordinary, over the whole range of fp32, ties of every grid, zeros, subnormals, huge, not finite."""
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    normal = torch.randn(shape, generator=generator) * 0.02
    yield "normal", normal
    yield "wide", normal.sign() * torch.exp2(torch.rand(shape, generator=generator) * 250 - 130)
    ties = torch.randint(-4000, 4000, shape, generator=generator).float()
    yield "ties", ties * torch.exp2(-torch.randint(4, 12, shape, generator=generator).float())
    zeros = normal.clone()
    zeros[..., : max(1, shape[-1] // 2)] = -0.0
    yield "half zeros", zeros
    yield "zeros", torch.zeros(shape)
    yield "subnormal", normal.sign() * torch.randint(0, 1000, shape, generator=generator) * 2.0**-149
    yield "huge", normal.clone().mul_(1e38)
    spoilt = normal.clone()
    spoilt.view(-1)[:: max(1, spoilt.numel() // 3)] = float("nan")
    spoilt.view(-1)[1 :: max(2, spoilt.numel() // 2)] = float("inf")
    yield "not finite", spoilt


def maxima(role: str, fmt: str, group_size: int, x: Tensor) -> Iterator[tuple[str, Tensor | None]]:
    """As calibrated and snapped; not snapped; an eighth, so that most saturates; zero."""
    if (role, fmt) == ("kv", "int8"):
        yield "dynamic", None
        return
    finite = torch.nan_to_num(x.float(), 1.0, 1.0, 1.0)
    if role == "weight":
        raw = formats.weight_amax(fmt, finite, group_size)
    else:
        raw = finite.abs().max()
    snap = formats.snap_amax if role == "weight" else formats.snap_tensor_amax
    yield "snapped", snap(fmt, raw)
    yield "raw", raw
    yield "clipped", raw / 8
    yield "zero", torch.zeros_like(raw)


def fused(args: dict[str, Any], x: Tensor, amax: Tensor | None, dtype: torch.dtype) -> Tensor:
    from megatron_edge.quantize import triton_kernels

    return triton_kernels.fake_quantize(args, x, amax, dtype)


def differing(ours: Tensor, theirs: Tensor) -> int:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.device == theirs.device
    integer = torch.int32 if ours.dtype is torch.float32 else torch.int16
    same = ours.contiguous().view(integer) == theirs.contiguous().view(integer)
    return int((~(same | (ours.isnan() & theirs.isnan()))).sum())


def compare(quantizer: tuple[str, str, int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[int, list[str]]:
    """(elements compared, what differed)."""
    role, fmt, group_size, multiple = quantizer
    args, elements, wrong = arguments(role, fmt, group_size), 0, []
    for shape in shapes(multiple):
        for case, value in values(shape):
            x = value.to(DEVICE, dtypes[0])
            for kind, amax in maxima(role, fmt, group_size, x):
                theirs = kernels.plain(args, x, amax, dtypes[1])
                count = differing(fused(args, x, amax, dtypes[1]), theirs)
                elements += x.numel()
                if count:
                    wrong.append(f"{named((*quantizer[:3], *dtypes))} {shape} {case} {kind}: {count} of {x.numel()}")
    return elements, wrong


@pytest.mark.parametrize("dtypes", DTYPES, ids=named)
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=named)
def test_bits_of_formats(quantizer: tuple[str, str, int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    elements, wrong = compare(quantizer, dtypes)
    assert elements > 10_000 and not wrong, "\n".join(wrong)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=named)
def test_not_contiguous(quantizer: tuple[str, str, int, int]) -> None:
    role, fmt, group_size, multiple = quantizer
    args = arguments(role, fmt, group_size)
    wide = torch.randn(96, 3, 4 * multiple, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    for x in (wide[:, 1], wide.transpose(0, 1), wide[::2, :, multiple : 3 * multiple]):
        amax = next(maxima(role, fmt, group_size, x))[1]
        ours = fused(args, x, amax, x.dtype)
        assert ours.is_contiguous() and differing(ours, kernels.plain(args, x, amax, x.dtype)) == 0


def test_wrong_amax_or_shape_is_refused() -> None:
    from megatron_edge.contracts import InputError

    x, one = torch.ones(4, 64, device=DEVICE), torch.ones((), device=DEVICE)
    for args, shape, amax in (
        (arguments("weight", "int4", 32), (4, 64), one),
        (arguments("weight", "int8", 0), (4, 64), torch.ones(3, device=DEVICE)),
        (arguments("weight", "fp8", 0), (4, 64), torch.ones(4, device=DEVICE)),
        (arguments("input", "nvfp4", 0), (32, 8), one),
        (arguments("input", "int4", 0), (4, 64), one),
        (arguments("kv", "fp8", 0), (4, 64), None),
        (arguments("kv", "int8", 0), (16, 16), None),
    ):
        with pytest.raises(InputError):
            fused(args, x.view(shape), amax, x.dtype)


# ---------------------------------------------------------------- as a program


def speeds() -> Iterator[str]:
    """Of a weight or input [8192, 2048] in bf16, as a layer has them."""
    yield f"{'':22}{'us':>8}{'GB/s':>8}{'plain us':>10}"
    x = (torch.randn(8192, 2048, device=DEVICE) * 0.02).to(torch.bfloat16)
    for role, fmt, group_size, _ in QUANTIZERS:
        if group_size == 48:
            continue
        args, amax = arguments(role, fmt, group_size), next(maxima(role, fmt, group_size, x))[1]
        ours, plain = (timed(partial(call, args, x, amax, torch.bfloat16)) for call in (fused, kernels.plain))
        yield f"{named((role, fmt, group_size)):22}{ours:8.1f}{4 * x.numel() / ours / 1e3:8.0f}{plain:10.1f}"


def main() -> int:
    if ABSENT:
        print(f"skipped: {ABSENT}")
        return 0
    began, surprises = time.perf_counter(), []
    for quantizer in QUANTIZERS:
        for dtypes in DTYPES[:3] if "--quick" in sys.argv else DTYPES:
            elements, wrong = compare(quantizer, dtypes)
            surprises += wrong
            name = named((*quantizer[:3], *dtypes))
            print(f"{name:40} {elements:9d} elements, {len(wrong)} cases differ", flush=True)
    print(*surprises[:40], f"{len(surprises)} cases differ in all, {time.perf_counter() - began:.0f} s", sep="\n")
    if not INTERPRETED:
        print(torch.cuda.get_device_name(), *speeds(), sep="\n")
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main())
