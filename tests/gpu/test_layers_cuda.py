"""The fused norm, SwiGLU and rope on CUDA beside torch's operations one by one: how far apart, and how fast.

Run by pytest (marked gpu), or as a program that prints the largest differences and a table of speeds:

    python tests/gpu/test_layers_cuda.py
    TRITON_INTERPRET=1 python tests/gpu/test_layers_cuda.py      on a CPU, in Triton's interpreter: differences only

The interpreter (3.6) cuts fp32 to bf16 where hardware rounds to nearest: there, fp32 alone is compared.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

import eager_layers as eager
from triton_device import ABSENT, DEVICE, INTERPRETED

from megatron_edge.model import fused

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(ABSENT), reason=ABSENT)]

EPS = 1e-6
DTYPES = (torch.float32,) if INTERPRETED else (torch.float32, torch.bfloat16)
INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
Function = Callable[..., Tensor]

# Name -> shape of x. "part": x is a part of the last dim of a tensor three times as wide, as key is of Megatron's qkv.
SHAPES: dict[str, tuple[int, ...]] = {
    "norm 576": (37, 3, 576), "norm 1536, more rows than programs": (601, 1, 1536), "norm 2048": (5, 2, 2048),
    "norm 8192": (3, 1, 8192), "norm of one row": (1, 576), "norm of heads 64": (97, 3, 9, 64),
    "norm of heads 64, part": (31, 3, 5, 64), "norm of heads 128, part": (6, 2, 4, 128), "norm of nothing": (0, 576),
    "swiglu 576": (11, 3, 1152), "swiglu 1536": (5, 3, 3072), "swiglu 8192": (3, 2, 16384), "swiglu 37": (70, 74),
    "swiglu 1536, part": (5, 3, 3072), "swiglu of nothing": (0, 3072),
    "rope 64": (19, 3, 9, 64), "rope 128": (7, 2, 32, 128), "rope 64, part": (5, 3, 3, 64),
    "rope 128, part": (33, 1, 8, 128), "rope of nothing": (0, 2, 9, 64),
}  # fmt: skip


def random(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def case(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Function, Function, list[Tensor]]:
    """(fused, one by one, inputs)."""
    x = random(*shape[:-1], 3 * shape[-1]) if "part" in name else random(*shape)
    x = x.to(DEVICE, dtype)
    if "part" in name:
        x = x[..., shape[-1] : 2 * shape[-1]]
    if name.startswith("norm"):
        weight = (1 + 0.3 * random(shape[-1], seed=1)).to(DEVICE, dtype)
        return partial(fused.rms_norm, eps=EPS), partial(eager.rms_norm, eps=EPS), [x, weight]
    if name.startswith("swiglu"):
        return fused.swiglu, eager.swiglu, [x]
    angles = eager.random_angles(*shape[:2], shape[-1] // 2).to(DEVICE)
    return partial(fused.rotate, rotation=eager.rotation_of(angles)), partial(eager.rotate, angles=angles), [x]


def gradient_of(out: Tensor) -> Tensor:
    """Of a head's result it comes as attention gives it: [b, heads, s, d], permuted."""
    if out.dim() == 4:
        places, windows, heads, size = out.shape
        gradient = random(windows, heads, places, size, seed=2).permute(2, 0, 1, 3)
    else:
        gradient = random(*out.shape, seed=2)
    return gradient.to(out.device).to(out.dtype)  # strides are kept


def differentiated(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient_of(out).to(torch.bfloat16).to(out.dtype))]


def with_kernels() -> None:
    """In the interpreter tensors are on the CPU, where fused.py would not ask for the kernels."""
    if INTERPRETED:
        from megatron_edge.model import triton_layers

        fused._kernels = lambda x: triton_layers if x.numel() else None


def ulps(ours: Tensor, theirs: Tensor) -> Tensor:
    """Numbers of the dtype that lie between two of one sign."""
    places = [x.contiguous().view(INTEGER[x.dtype]).long() for x in (ours, theirs)]
    return torch.where(ours == theirs, 0, (places[0] - places[1]).abs())


def compare(name: str, dtype: torch.dtype) -> tuple[str, list[str]]:
    """(what to print, what is wrong)."""
    with_kernels()
    ours, plain, inputs = case(name, SHAPES[name], dtype)
    found, expected = differentiated(ours, inputs), differentiated(plain, inputs)
    again, exact = differentiated(ours, inputs), differentiated(plain, [x.double() for x in inputs])
    wrong = [] if all(torch.equal(a, b) for a, b in zip(found, again, strict=True)) else ["a rerun gives other bits"]
    if [(x.shape, x.dtype) for x in found] != [(x.shape, x.dtype) for x in expected]:
        return "", [f"{name}: shapes or dtypes differ"]
    if not found[0].numel():
        return f"{name:36} empty", wrong if all(x.eq(0).all() for x in found) else ["not empty or not zero"]
    apart = ulps(found[0], expected[0])
    differing, far = float((apart > 0).double().mean()), float((apart > 1).double().mean())
    text = (
        f"{name:36} {str(dtype)[6:]:9} forward: {differing:.1e} differ, {far:.1e} by > 1 ulp, most {int(apart.max())}"
    )
    if name.startswith("rope") and int(apart.max()):
        wrong.append(f"{differing} of rotated numbers differ")
    if dtype is torch.bfloat16 and (far > 1e-3 or differing > 0.01):
        wrong.append(f"{differing} of forward differ, {far} by more than 1 ulp")
    for what, mine, theirs, reference in zip(("out", "dx", "dw"), found, expected, exact, strict=False):
        errors = [(x.double() - reference).abs() for x in (mine, theirs)]
        scale, floor = float(reference.abs().max()), 2e-6 if dtype is torch.float32 else 1e-5
        text += f"; {what} {float(errors[0].max()) / scale:.1e} (eager {float(errors[1].max()) / scale:.1e})"
        for kind, (mine_is, theirs_is) in {
            "largest": [float(x.max()) for x in errors],
            "mean square": [float(x.square().mean().sqrt()) for x in errors],
        }.items():
            if not mine_is <= 1.5 * theirs_is + floor * scale:
                wrong.append(f"{what}: {kind} error {mine_is}, one by one {theirs_is}")
    return text, [f"{name} {dtype}: {each}" for each in wrong]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", SHAPES)
def test_beside_one_by_one(name: str, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    text, wrong = compare(name, dtype)
    with capsys.disabled():
        print("\n ", text, end="")
    assert not wrong, "\n".join(wrong)


def test_extreme_gates() -> None:
    with_kernels()
    gate = torch.tensor([-1e30, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e30], device=DEVICE)
    x = torch.cat((gate, torch.ones_like(gate)))[None]
    for mine, theirs in zip(differentiated(fused.swiglu, [x]), differentiated(eager.swiglu, [x]), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.skipif(INTERPRETED, reason="a CUDA graph needs CUDA")
@pytest.mark.parametrize("name", ["norm 2048", "swiglu 1536", "rope 64"])
def test_in_a_cuda_graph(name: str) -> None:
    ours, _, inputs = case(name, SHAPES[name], torch.bfloat16)
    gradient = gradient_of(ours(*inputs))
    leaves = [x.detach().requires_grad_() for x in inputs]

    def once() -> list[Tensor]:
        out = ours(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]

    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        expected = [x.clone() for x in once()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = once()
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


# ---------------------------------------------------------------- as a program

# Of a layer of 4 windows of 2048 tokens, hidden 2048, ffn 8192, 32 heads of 64 over 8: name, shape, passes over x
# that forward and backward cannot do without (of reads and writes, x counted once).
SPEEDS = (
    ("norm", (2048, 4, 2048), 2, 3), ("swiglu", (2048, 4, 16384), 1.5, 2.5),
    ("rope", (2048, 4, 32, 64), 2, 2), ("rope, part", (2048, 4, 8, 64), 2, 2),
)  # fmt: skip


def speeds() -> Iterator[str]:
    yield f"{'bf16':24}{'us':>8}{'GB/s':>8}{'one by one us':>15}"
    for name, shape, forward, backward in SPEEDS:
        ours, plain, inputs = case(name, shape, torch.bfloat16)
        leaves = [x.detach().requires_grad_() for x in inputs]
        for direction, passes in (("forward", forward), ("backward", backward)):
            times = []
            for function in (ours, plain):
                out = function(*leaves)
                gradient = gradient_of(out)
                back = partial(torch.autograd.grad, out, leaves, gradient, retain_graph=True)
                times.append(timed(partial(function, *leaves) if direction == "forward" else back))
            bandwidth = passes * 2 * inputs[0].numel() / times[0] / 1e3
            yield f"{name + ' ' + direction:24}{times[0]:8.1f}{bandwidth:8.0f}{times[1]:15.1f}"


def timed(call: Callable[[], Any], repeats: int = 50) -> float:
    """Microseconds per call."""
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats * 1e6


def main() -> int:
    if ABSENT:
        print(f"skipped: {ABSENT}")
        return 0
    surprises = []
    for dtype in DTYPES:
        for name in SHAPES:
            text, wrong = compare(name, dtype)
            surprises += wrong
            print(text, flush=True)
    print(*surprises, f"{len(surprises)} surprises in all", sep="\n")
    if not INTERPRETED:
        print(torch.cuda.get_device_name(), *speeds(), sep="\n")
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main())
