"""Norm and SwiGLU that write their nvfp4 value in one pass, beside the plain kernel and the rounding after it: the same
bits, how fast.

Run by pytest (marked gpu), or as a program that prints what it compared and a table of speeds:

    python tests/gpu/test_nvfp4_inputs_cuda.py
    TRITON_INTERPRET=1 python tests/gpu/test_nvfp4_inputs_cuda.py      on a CPU, in Triton's interpreter: bits only

Equal means the same bits; a NaN is equal to a NaN. The interpreter (3.6) rounds to bf16 in another way than hardware,
but all kernels alike: there, artifact/formats.py is compared in fp32 alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[1] / "unit"), str(HERE.parent)]

from test_fp8_gemm_cuda import WRITES, session, steps  # noqa: E402, F401
from test_inputs_cuda import (  # noqa: E402
    DTYPES,
    EPS,
    SHAPES,
    calibrated,
    differing,
    inputs_of,
    large,
    program,
    with_kernels,
)  # fmt: skip
from test_layers_cuda import random  # noqa: E402
from tiny_megatron import random_llama  # noqa: E402
from triton_device import ABSENT, DEVICE, INTERPRETED, timed  # noqa: E402

from megatron_edge.artifact import formats  # noqa: E402
from megatron_edge.model import fused  # noqa: E402
from megatron_edge.quantize import kernels, written_inputs  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(ABSENT), reason=ABSENT)]

ARGS: dict[str, Any] = {"role": "input", "format": "nvfp4", "group_size": 0}
NAMES = [name for name in SHAPES if "37" not in name]  # whole blocks of 16


def rounded(x: Tensor, amax: Tensor) -> Tensor:
    from megatron_edge.quantize import triton_kernels

    return triton_kernels.fake_quantize(ARGS, x, amax, x.dtype)


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
            "snapped": formats.snap_tensor_amax("nvfp4", largest), "raw": largest, "clipped": largest / 1000,
            "blocks below the smallest scale": largest * 2.0**20, "a power of two": torch.full_like(largest, 2688.0),
            "zero": torch.zeros_like(largest),
        }.items():  # fmt: skip
            quantizer, where = (
                calibrated(amax, ARGS),
                f"{name} {str(dtype)[6:]} {'' if is_finite else 'not '}finite {kind}",
            )
            value = (
                written_inputs.rms_norm(quantizer, *inputs, EPS) if norm else written_inputs.swiglu(quantizer, *inputs)
            )
            assert written_inputs.taken(value, quantizer) == ()
            ours, theirs = value.detach(), result.detach()
            yield f"{where} of the kernel", ours.numel(), differing(ours, rounded(theirs, amax))
            if not INTERPRETED or dtype is torch.float32:
                reference = formats.fake_quantize_input("nvfp4", theirs, amax)
                yield f"{where} of formats", ours.numel(), differing(ours, reference)
            for what, mine, other in zip(
                ("dx", "dw"), torch.autograd.grad(value, inputs, gradient), expected, strict=False
            ):
                yield f"{where} {what}", mine.numel(), differing(mine, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", NAMES)
def test_bits_of_the_two_kernels(name: str, dtype: torch.dtype) -> None:
    found = list(compare(name, dtype))
    assert sum(elements for _, elements, _ in found) > 1000
    assert not [(where, count) for where, _, count in found if count]


@pytest.mark.skipif(INTERPRETED, reason="needs CUDA")
@pytest.mark.parametrize("backend", ["local", "te"])
def test_a_recorded_step_is_the_step(session: Any, backend: str) -> None:  # noqa: F811
    if backend == "te" and find_spec("transformer_engine") is None:
        pytest.skip("needs transformer_engine")
    of = partial(steps, random_llama(hidden_size=128, intermediate_size=256), session, "nvfp4", fp8=False)
    eager, again, recorded = (of(recorded=graph, backend=backend) for graph in (False, False, True))
    unwritten = of(recorded=False, written=False, backend=backend)
    assert eager["writes"] == recorded["writes"] == WRITES[backend] and not unwritten["writes"]
    for what in ("losses", "norms", "weights"):
        noise, apart, by_layers = (float((o[what] - eager[what]).abs().max()) for o in (again, recorded, unwritten))
        print(f"{backend} {what}: eager twice {noise:.1e}, recorded {apart:.1e}, rounded by the layers {by_layers:.1e}")
        assert apart <= 1e-6 + 3 * noise
        assert by_layers <= 3 * noise, "the same bits, where a step twice has them"
    assert len(set(recorded["losses"].tolist())) == len(recorded["losses"]), "replayed on new samples"


# ---------------------------------------------------------------- as a program


def speeds() -> Iterator[str]:
    yield f"{'bf16':24}{'us':>8}{'GB/s':>8}{'plain us':>10}{'plain, then rounding us':>25}"
    for name, x, more, plain, result, amax in large("nvfp4"):
        ours = partial(kernels.rms_norm_values if more else kernels.swiglu_values, amax, x, *more)
        times = [timed(call) for call in (ours, plain, partial(kernels.fake_quantize, ARGS, result, amax))]
        bandwidth = (2 if more else 3 / 2) * 2 * x.numel() / times[0] / 1e3
        yield f"{name:24}{times[0]:8.1f}{bandwidth:8.0f}{times[1]:10.1f}{times[1] + times[2]:25.1f}"


if __name__ == "__main__":
    sys.exit(program(compare, NAMES, speeds))
