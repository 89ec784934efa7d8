"""The labels' cross-entropy in Triton against torch's in float64.

Run by pytest (marked gpu), or as a program that prints the largest differences, and on CUDA how fast it is:

    python tests/gpu/test_loss_cuda.py
    TRITON_INTERPRET=1 python tests/gpu/test_loss_cuda.py      on a CPU, in Triton's interpreter: differences only

The interpreter (3.6) cuts fp32 to bf16 where hardware rounds to nearest: there, a gradient in bf16 may be a whole step
of bf16 off, on hardware half a step.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from triton_device import ABSENT, DEVICE, INTERPRETED

from megatron_edge.model import cross_entropy
from megatron_edge.model.cross_entropy import vocab_parallel_cross_entropy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(ABSENT), reason=ABSENT)]

DTYPES = (torch.bfloat16, torch.float32)
ROWS = (1, 37) if INTERPRETED else (1, 37, 4096)
COLUMNS = (1000, 32768, 49152, 128256)
STEP = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-23}  # of a number's own size, at most
# fp32: of a loss's own size, at least 1; the exponential is that of hardware, right to 2^-22 of its argument's size.
LIMIT = 2e-6


@pytest.fixture(autouse=True)
def through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(cross_entropy, "_passes", passes)
    x = torch.ones(2, 8, device=DEVICE)
    assert cross_entropy._passes(x) == passes(x)


def passes(logits: Tensor) -> tuple[Any, Any]:
    from megatron_edge.model import triton_loss

    return triton_loss.row_sums, triton_loss.write_gradient


def example(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of trained models' size; the first word, the last and, in long examples, two labels outside."""
    torch.manual_seed(rows + columns)
    logits = (torch.randn(rows, columns, device=DEVICE) * 4).to(dtype)
    labels, weights = torch.randint(0, columns, (rows,), device=DEVICE), torch.rand(rows, device=DEVICE)
    labels[0] = columns - 1
    logits[0, labels[0]] += 20
    if rows > 4:
        labels[1], labels[2], labels[3] = 0, -100, columns
        weights[4] = 0.0
    return logits, labels, weights


def exact(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """float64, in chunks of rows: the whole would be large."""
    loss = torch.empty(len(labels), dtype=torch.float64, device=DEVICE)
    gradient = torch.empty_like(logits, dtype=torch.float64)
    for part in torch.arange(len(labels), device=DEVICE).split(256):
        leaf, outside = logits[part].double().requires_grad_(), (labels[part] < 0) | (labels[part] >= logits.shape[1])
        found = F.cross_entropy(leaf, labels[part].masked_fill(outside, 0), reduction="none")
        normaliser = torch.logsumexp(leaf, -1)
        found = torch.where(outside, normaliser - leaf.detach().amax(-1), found)
        (gradient[part],) = torch.autograd.grad((found * weights[part]).sum(), leaf)
        loss[part] = found.detach()
    return loss, gradient


def ours(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    made = logits.clone().requires_grad_() * 1
    place = made.data_ptr()
    loss = vocab_parallel_cross_entropy(made, labels)
    (gradient,) = torch.autograd.grad((loss * weights).sum(), made)
    assert gradient.data_ptr() == place and gradient.dtype is logits.dtype
    return loss.detach(), gradient


def differences(rows: int, columns: int, dtype: torch.dtype) -> tuple[float, float, float]:
    """(of losses, of gradients, of gradients larger than 1e-6 in steps of their dtype)."""
    logits, labels, weights = example(rows, columns, dtype)
    theirs, found = exact(logits, labels, weights), ours(logits, labels, weights)
    again = ours(logits, labels, weights)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "not the same twice"
    loss = float(((found[0].double() - theirs[0]).abs() / theirs[0].clamp(min=1)).max())
    off, size = (found[1].double() - theirs[1]).abs(), theirs[1].abs()
    largest = float(off.max())
    inside = (labels >= 0) & (labels < columns)
    row, column = inside.nonzero()[:, 0], labels[inside]
    off[row, column] = (off[row, column] - 4 * STEP[torch.float32] * weights[inside]).clamp(min=0)  # share - 1 cancels
    return loss, largest, float((off / (size * STEP[dtype])).where(size > 1e-6, 0.0).max())


def check(rows: int, columns: int, dtype: torch.dtype) -> str:
    loss, gradient, steps = differences(rows, columns, dtype)
    told = f"{rows:5} x {columns:6} {str(dtype).removeprefix('torch.'):8} loss {loss:.1e} gradient {gradient:.1e}"
    told += f" ({steps:.2f} steps)"
    # A bf16 gradient is right to rounding; an fp32 one to the exponential's error, a few steps.
    whole = (1.1 if INTERPRETED else 0.6) if dtype is torch.bfloat16 else 64
    assert loss <= LIMIT and steps <= whole, told
    return told


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", ROWS)
def test_loss_and_gradient_are_torchs(rows: int, columns: int, dtype: torch.dtype) -> None:
    print(check(rows, columns, dtype))


def test_what_is_not_finite() -> None:
    logits, labels, weights = example(5, 5000, torch.float32)
    logits[0, :4096] = float("-inf")  # a whole tile
    assert ours(logits, labels, weights)[0].isfinite().all()
    logits[1, 7], logits[2, 4999], logits[3] = float("nan"), float("inf"), float("-inf")
    loss, gradient = ours(logits, labels, weights)
    assert (~loss.isfinite()).tolist() == [False, True, True, True, False]
    assert gradient.isnan().any(-1).tolist() == [False, True, True, True, False]


def test_a_vocabulary_in_two_parts() -> None:
    """What ranks exchange, done here: maxima, then sums."""
    from megatron_edge.model import triton_loss

    logits, labels, _ = example(37, 2000, torch.float32)
    parts, local = [part.contiguous() for part in logits.chunk(2, 1)], (labels, labels - 1000)
    found = [triton_loss.row_sums(part, mine) for part, mine in zip(parts, local, strict=True)]
    largest = torch.maximum(found[0][0], found[1][0])
    total = sum(one[1] * (one[0] - largest).exp() for one in found)
    whole = triton_loss.row_sums(logits, labels)
    assert torch.equal(largest, whole[0]) and torch.allclose(total, whole[1], rtol=1e-6)
    for at, mine in enumerate(local):
        here = (mine >= 0) & (mine < 1000)
        assert torch.equal(found[at][2][here], whole[2][here]) and here.any()


@pytest.mark.skipif(INTERPRETED, reason="a place beyond 2^31 elements takes 4 GiB of logits and a GPU")
def test_more_elements_than_32_bits_count() -> None:
    rows, columns = 17_000, 128_256
    logits = torch.zeros(rows, columns, dtype=torch.bfloat16, device=DEVICE)
    logits[-1, 5] = 12.0
    labels = torch.full((rows,), 5, device=DEVICE)
    loss, gradient = ours(logits, labels, torch.ones(rows, device=DEVICE))
    expected, _ = exact(logits[-2:], labels[-2:], torch.ones(2, device=DEVICE))
    assert torch.allclose(loss[-2:].double(), expected, rtol=LIMIT, atol=LIMIT)  # a difference of numbers of 12
    assert gradient[-1, 5] < -0.4 and gradient[-2, 5] < -0.99 and (gradient[:, 6] > 0).all()


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs are of CUDA")
def test_in_a_cuda_graph() -> None:
    logits, labels, weights = example(37, 32768, torch.bfloat16)
    source = logits.clone()

    def once() -> tuple[Tensor, Tensor]:
        made = source.requires_grad_() * 1
        loss = vocab_parallel_cross_entropy(made, labels)
        (gradient,) = torch.autograd.grad((loss * weights).sum(), made)
        return loss.detach(), gradient

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        recorded = once()
    with torch.no_grad():
        source.copy_(logits.flip(0))
    graph.replay()
    expected = ours(logits.flip(0), labels, weights)
    assert all(torch.equal(a, b) for a, b in zip(recorded, expected, strict=True))


# ---------------------------------------------------------------- as a program


def speed(rows: int, columns: int) -> str:
    """Forward and backward, and what memory they take beside the logits: these kernels, and torch in fp32."""
    logits, labels, weights = example(rows, columns, torch.bfloat16)
    labels.clamp_(0, columns - 1)
    told = f"{rows} x {columns} bf16:"
    for name, loss_of in (("ours", vocab_parallel_cross_entropy), ("torch", torchs)):
        times = []
        for _ in range(8):
            made = logits.clone().requires_grad_() * 1
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held, began = torch.cuda.memory_allocated(), time.perf_counter()
            torch.autograd.grad((loss_of(made, labels) * weights).sum(), made)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - began) * 1e3)
        peak = (torch.cuda.max_memory_allocated() - held) / 2**20
        told += f" {name} {min(times):.2f} ms, {peak:.0f} MiB more;"
    return told


def torchs(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="none")


def main() -> int:
    if ABSENT:
        print(f"skipped: {ABSENT}")
        return 0
    if INTERPRETED:
        cross_entropy._passes = passes
    for dtype in DTYPES:
        for columns in COLUMNS:
            for rows in ROWS:
                print(check(rows, columns, dtype), flush=True)
    test_what_is_not_finite()
    test_a_vocabulary_in_two_parts()
    if not INTERPRETED:
        test_more_elements_than_32_bits_count()
        test_in_a_cuda_graph()
        print(torch.cuda.get_device_name(), speed(8192, 32768), speed(8192, 49152), sep="\n")
    print("all hold")
    return 0


if __name__ == "__main__":
    sys.exit(main())
