"""Core attention without a mask on CUDA: fused kernels over grouped keys as they are, and the masked one's numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_edge.model import segments
from megatron_edge.model.layers import PackedAttention
from megatron_edge.runtime.session import context_positions
from megatron_edge.train.data import attention_mask, segment_starts

TOKENS, WINDOWS, HEADS, KV_HEADS, SIZE = 256, 2, 8, 2, 64
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def attended(dtype: torch.dtype, mask: Tensor | None) -> tuple[list[Tensor], set[str]]:
    """The result and the gradients of query, key and value, of inputs rounded to bf16; torch's operations."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().to("cuda", dtype)

    inputs = [random(TOKENS, WINDOWS, heads, SIZE).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        out = PackedAttention(SimpleNamespace(kv_channels=SIZE, context_parallel_size=1))(*inputs, mask)
        gradients = torch.autograd.grad((out * random(*out.shape)).sum(), inputs)
    return [out.detach().double(), *(x.double() for x in gradients)], {event.key for event in profiler.key_averages()}


def test_flash_attention_over_groups() -> None:
    """The limit is 3 times what the masked kernel is away from float64."""
    causal = attention_mask(torch.zeros(WINDOWS, TOKENS, dtype=torch.int32, device="cuda"))
    exact, _ = attended(torch.float64, causal)
    (masked, _), (without, names) = attended(torch.bfloat16, causal), attended(torch.bfloat16, None)
    print(sorted(name for name in names if "attention" in name))
    assert names & {"aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_cudnn_attention"}
    assert "aten::repeat_interleave" not in names
    for found, old, reference in zip(without, masked, exact, strict=True):
        assert float((found - reference).abs().max()) <= 3 * float((old - reference).abs().max())


def packed(most: int) -> tuple[Tensor, Tensor]:
    """(mask, segments) of windows with 3 and 1 documents."""
    documents = torch.zeros(WINDOWS, TOKENS, dtype=torch.int32)
    documents[0, 17:] += 1
    documents[0, 200:] += 1
    starts = segment_starts(documents, most)
    assert starts is not None
    return attention_mask(documents.to("cuda")), starts.to("cuda")


def test_attention_within_segments() -> None:
    """The limit is 3 times what the masked kernel is away from float64; twice the same bits."""
    mask, starts = packed(16)
    exact, _ = attended(torch.float64, mask)
    (masked, _), (within, names) = attended(torch.bfloat16, mask), attended(torch.bfloat16, starts)
    assert "aten::_flash_attention_forward" in names and "aten::repeat_interleave" not in names
    for found, old, reference in zip(within, masked, exact, strict=True):
        print(f"{float((found - reference).abs().max()):.2e}, masked {float((old - reference).abs().max()):.2e}")
        assert float((found - reference).abs().max()) <= 3 * float((old - reference).abs().max())
    for found, again in zip(within, attended(torch.bfloat16, starts)[0], strict=True):
        assert found.equal(again)


def takes_others(once: Callable[[Tensor], list[Tensor]], given: Tensor, other: Tensor) -> None:
    """A graph of once(given), replayed with other segments in their place, gives once(other)."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        once(given)
        once(given)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            recorded = once(given)
    given.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    for found, expected in zip(recorded, once(other), strict=True):
        assert found.equal(expected)


def test_a_graph_takes_other_segments() -> None:
    torch.manual_seed(1)
    query, key, value = (torch.randn(TOKENS, WINDOWS, n, SIZE).bfloat16().cuda() for n in (HEADS, KV_HEADS, KV_HEADS))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    given = torch.full((17,), TOKENS * WINDOWS, dtype=torch.int32, device="cuda")
    given[:2] = torch.tensor([0, TOKENS], dtype=torch.int32)

    def once(starts: Tensor) -> list[Tensor]:
        out = segments.attention(*leaves, starts, 0.125)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    takes_others(once, given, packed(16)[1])


def of_all_parts(size: int, dtype: torch.dtype, mask: Tensor, starts: Tensor | None) -> list[Tensor]:
    """The results of all ranks of `size`, in the order of the text, and the gradients that add up; by the mask where
    there are no `starts`. Inputs are rounded to bf16."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().to("cuda", dtype)

    query, key, value = (random(TOKENS, WINDOWS, n, SIZE).requires_grad_() for n in (HEADS, KV_HEADS, KV_HEADS))
    parts = [context_positions(TOKENS, rank, size).cuda() for rank in range(size)]
    gathered = torch.cat([torch.cat((key[part], value[part])) for part in parts])
    out, attend = [], PackedAttention(SimpleNamespace(kv_channels=SIZE, context_parallel_size=1))
    for rank, part in enumerate(parts):
        if starts is None:
            out.append(attend(query[part], key, value, mask[:, :, part]))
        else:
            keys, values = segments.keys_of_part(gathered, rank, size)
            own = segments.starts_of_part(starts, TOKENS, rank, size)
            out.append(segments.attention(query[part], keys, values, own, attend.scale))
    whole = torch.cat(out)[torch.cat(parts).argsort()]
    gradients = torch.autograd.grad((whole * random(*whole.shape)).sum(), (query, key, value))
    return [whole.detach().double(), *(x.double() for x in gradients)]


def spoil_free_memory() -> None:
    """What is not written reads as not a number."""
    spoiled = [torch.full((size // 4,), torch.nan, device="cuda") for size in [2**19] * 64 + [2**23] * 8]
    del spoiled
    torch.cuda.synchronize()


@pytest.mark.parametrize("several", [False, True], ids=["one document", "several"])
@pytest.mark.parametrize("size", [2, 4])
def test_parts_of_the_text(size: int, several: bool) -> None:
    """The limit is 3 times what the masked kernel, part by part too, is away from float64; twice the same bits."""
    mask, starts = packed(16)
    if not several:
        one = torch.zeros(WINDOWS, TOKENS, dtype=torch.int32)
        mask, found = attention_mask(one.cuda()), segment_starts(one, WINDOWS)
        assert found is not None
        starts = found.cuda()
    exact, masked = (of_all_parts(size, dtype, mask, None) for dtype in (torch.float64, torch.bfloat16))
    spoil_free_memory()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        within = of_all_parts(size, torch.bfloat16, mask, starts)
    names = {event.key for event in profiler.key_averages()}
    assert "aten::_flash_attention_forward" in names and "aten::repeat_interleave" not in names
    for name, found_one, old, reference in zip(("out", "query", "key", "value"), within, masked, exact, strict=True):
        far, limit = float((found_one - reference).abs().max()), 3 * float((old - reference).abs().max())
        print(f"{size} parts, {name}: {far:.2e}, masked {limit / 3:.2e}")
        assert far <= limit
    spoil_free_memory()
    for found_one, again in zip(within, of_all_parts(size, torch.bfloat16, mask, starts), strict=True):
        assert found_one.equal(again)


@pytest.mark.parametrize("size", [2, 4])
def test_a_graph_takes_other_segments_of_a_part(size: int) -> None:
    torch.manual_seed(1)
    part = TOKENS // size
    sizes = ((part, HEADS), (2 * TOKENS, KV_HEADS))  # of a rank's queries; of all keys and values
    leaves = [torch.randn(n, WINDOWS, heads, SIZE).bfloat16().cuda().requires_grad_() for n, heads in sizes]
    one = segment_starts(torch.zeros(WINDOWS, TOKENS, dtype=torch.int32), 16)
    assert one is not None
    rank = size - 1
    given = segments.starts_of_part(one, TOKENS, rank, size).cuda()
    other = segments.starts_of_part(packed(16)[1], TOKENS, rank, size)

    def once(starts: Tensor) -> list[Tensor]:
        out = segments.attention(leaves[0], *segments.keys_of_part(leaves[1], rank, size), starts, 0.125)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    takes_others(once, given, other)
