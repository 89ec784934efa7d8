"""Core attention without a mask on CUDA: fused kernels over grouped keys as they are, and the masked one's numbers."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_edge.model import segments
from megatron_edge.model.layers import PackedAttention
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


def test_a_graph_takes_other_segments() -> None:
    torch.manual_seed(1)
    query, key, value = (torch.randn(TOKENS, WINDOWS, n, SIZE).bfloat16().cuda() for n in (HEADS, KV_HEADS, KV_HEADS))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    given = torch.full((17,), TOKENS * WINDOWS, dtype=torch.int32, device="cuda")
    given[:2] = torch.tensor([0, TOKENS], dtype=torch.int32)

    def once(starts: Tensor) -> list[Tensor]:
        out = segments.attention(*leaves, starts, 0.125)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        once(given)
        once(given)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            recorded = once(given)
    _, starts = packed(16)
    given.copy_(starts)
    graph.replay()
    torch.cuda.synchronize()
    for found, expected in zip(recorded, once(starts), strict=True):
        assert found.equal(expected)
