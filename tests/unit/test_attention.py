"""Core attention without a mask beside the same attention with a causal mask, and which of them a batch gets."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_megatron import hf_config_of, random_batches
from torch import Tensor

from megatron_edge.contracts import ParallelPlan
from megatron_edge.model import segments
from megatron_edge.model.build import build_model, chunks_of, forward
from megatron_edge.model.layers import PackedAttention
from megatron_edge.runtime.session import context_positions
from megatron_edge.train import data, placement

TOKENS, WINDOWS, HEADS, KV_HEADS, SIZE = 48, 2, 6, 2, 16


def attended(given: torch.dtype, computed: torch.dtype, mask: Tensor | None) -> list[Tensor]:
    """The result and the gradients of query, key and value for inputs of dtype `given`, in float64."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(given).to(computed)

    inputs = [random(TOKENS, WINDOWS, heads, SIZE).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS)]
    out = PackedAttention(SimpleNamespace(kv_channels=SIZE, context_parallel_size=1))(*inputs, mask)
    gradients = torch.autograd.grad((out * random(*out.shape)).sum(), inputs)
    return [out.detach().double(), *(x.double() for x in gradients)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_no_mask_is_a_causal_mask(dtype: torch.dtype) -> None:
    """The limit is 3 times what the masked kernel is away from float64."""
    causal = data.attention_mask(torch.zeros(WINDOWS, TOKENS, dtype=torch.int32))
    exact = attended(dtype, torch.float64, causal)
    masked, without = attended(dtype, dtype, causal), attended(dtype, dtype, None)
    for found, old, reference in zip(without, masked, exact, strict=True):
        assert float((found - reference).abs().max()) <= 3 * float((old - reference).abs().max())


def test_only_windows_of_several_documents_have_a_mask(session: Any) -> None:
    (batch, _) = random_batches()
    assert placement.to_device(batch, session).attention_mask is None
    forced = placement.to_device(batch, session, "by mask").attention_mask
    assert forced is not None and forced.equal(data.attention_mask(batch.documents))
    documents = batch.documents.clone()
    documents[1, 20:] = 1
    packed = batch._replace(documents=documents)
    mask = placement.to_device(packed, session).attention_mask
    assert mask is not None and mask[1, 0, 25, 19] and not mask[1, 0, 25, 20] and not mask[0, 0, 25, 19]


def test_a_part_of_the_text(session: Any) -> None:
    """Without flash attention it has a mask; else segments of its own, of one size for windows of one document and of
    another for all others."""
    (batch, packed), plan = random_batches(), ParallelPlan(cp=2, world_size=2)
    packed = packed._replace(documents=(torch.arange(32).expand(2, 32) // 7).int())
    found: dict[str, list[Tensor]] = {"causally": [], "within segments": []}
    for rank in range(2):
        here = dataclasses.replace(session, plan=plan, cp_rank=rank)
        assert placement.attends(batch, here) == placement.attends(packed, here) == "by mask"
        on_cuda = dataclasses.replace(here, device=torch.device("cuda"))
        assert placement.attends(batch, on_cuda) == "causally"
        assert placement.attends(packed, on_cuda) == "within segments"
        for given, way in ((batch, "causally"), (batch, "within segments"), (packed, "within segments")):
            placed = placement.to_device(given, here, way)
            assert placed.tokens.equal(given.tokens[:, context_positions(32, rank, 2)])
            assert placed.attention_mask is not None
            found[way].append(placed.attention_mask)
    assert [tuple(x.shape) for x in found["causally"]] == [(2, 5)] * 2
    assert [tuple(x.shape) for x in found["within segments"]] == [(2, 33)] * 4
    assert found["causally"][0].tolist() == [[0, 8, 16, 24, 32], [0, 8, 40, 48, 80]]
    assert found["causally"][1].tolist() == [[0, 8, 16, 24, 32], [0, 16, 40, 56, 80]]


DOCUMENTS = torch.tensor([[0] * 20 + [1] * 28, [1] * 5 + [2] * 42 + [3]], dtype=torch.int32)


def test_segments_say_what_a_mask_says() -> None:
    starts = data.segment_starts(DOCUMENTS, 8)
    assert starts is not None and starts.tolist() == [0, 20, 48, 53, 95, 96, 96, 96, 96]
    mask = data.attention_mask(DOCUMENTS)
    assert segments.mask(starts, WINDOWS, TOKENS, TOKENS).equal(mask)
    for within, masked in zip(*(attended(torch.float32, torch.float32, x) for x in (starts, mask)), strict=True):
        assert within.equal(masked)  # without flash attention they are one


def test_what_segments_cannot_say_is_a_mask() -> None:
    assert data.segment_starts(DOCUMENTS, 5) is not None and data.segment_starts(DOCUMENTS, 4) is None
    branches = DOCUMENTS.clone()
    branches[1, 30:] += data.BRANCH
    assert data.segment_starts(branches, 8) is None


def gathered(key: Tensor, value: Tensor, size: int) -> Tensor:
    """What all ranks of `size` have, as they exchange it."""
    parts = [context_positions(len(key), rank, size) for rank in range(size)]
    return torch.cat([torch.cat((key[part], value[part])) for part in parts])


def of_each_segment(query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> Tensor:
    """What flash attention computes, one segment after the other: the last query sees the last key."""
    rows = [x.transpose(0, 1).flatten(0, 1) for x in (query, key, value)]
    out, bounds = [], [starts[0].tolist(), starts[1].tolist()]
    assert [bound[-1] for bound in bounds] == [len(rows[0]), len(rows[1])]
    for at in range(starts.shape[1] - 1):
        (q, q_end), (k, k_end) = (bound[at : at + 2] for bound in bounds)
        assert 0 <= q_end - q <= k_end - k
        scores = torch.einsum("qhd,khd->hqk", rows[0][q:q_end], rows[1][k:k_end])
        later = torch.ones(q_end - q, k_end - k, dtype=torch.bool).triu(diagonal=k_end - k - (q_end - q) + 1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, rows[2][k:k_end]))
    return torch.cat(out).view(query.shape[1], len(query), *query.shape[2:]).transpose(0, 1)


@pytest.mark.parametrize("size", [2, 4])
def test_the_segments_of_a_part_say_what_a_mask_says(size: int) -> None:
    """For windows cut at random places: on each rank the result and the gradients of attention over its pieces'
    segments, which add up to those of masked attention over the whole text; float64."""
    generator = torch.Generator().manual_seed(size)
    for windows, cuts in ((1, 0), (1, 1), (2, 3), (2, 7), (3, 20)):
        whole = [torch.randn(TOKENS, windows, 2, 4, generator=generator).double() for _ in range(4)]
        query, key, value = (x.requires_grad_() for x in whole[:3])
        begins = torch.zeros(windows, TOKENS, dtype=torch.int32)
        for window in begins:
            window[torch.randperm(TOKENS - 1, generator=generator)[:cuts] + 1] = 1
        documents = begins.cumsum(1).int()
        mask, starts = data.attention_mask(documents), data.segment_starts(documents, windows * 24)
        scores = torch.einsum("qbhd,kbhd->bhqk", query, key).masked_fill(mask, -torch.inf)
        expected = torch.einsum("bhqk,kbhd->qbhd", scores.softmax(-1), value)
        gradients = torch.autograd.grad((expected * whole[3]).sum(), (query, key, value))
        assert starts is not None
        total = 0
        for rank in range(size):
            part, own = context_positions(TOKENS, rank, size), segments.starts_of_part(starts, TOKENS, rank, size)
            keys, values = segments.keys_of_part(gathered(key, value, size), rank, size)
            assert own.dtype is torch.int32 and own.shape == (2, 2 * windows * 24 + 1)
            out = of_each_segment(query[part], keys, values, own)
            assert float((out - expected[part]).detach().abs().max()) < 1e-12
            total = total + (out * whole[3][part]).sum()
            allowed = ~segments.mask(own, windows, len(part), len(keys))
            places = segments.keys_of_part(gathered(*[torch.arange(TOKENS)] * 2, size), rank, size)[0]
            found = torch.zeros(windows, len(part), TOKENS, dtype=torch.int32)
            found.index_add_(2, places, allowed[:, 0].int())
            assert found.equal((~mask[:, 0, part]).int())
        for one, other in zip(torch.autograd.grad(total, (query, key, value)), gradients, strict=True):
            assert float((one - other).abs().max()) < 1e-12


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_model_without_masks(llama: Any, session: Any, recompute: Any) -> None:
    model = build_model(hf_config_of(llama), session.plan, torch.float32, session.device, recompute).train()
    torch.manual_seed(4)
    for weight in model.parameters():
        weight.data.normal_(0, 0.1)
    (batch, _) = random_batches()
    losses, gradients = [], []
    for way in ("by mask", "causally", "within segments"):
        placed = placement.to_device(batch, session, way)
        loss = forward(chunks_of(model)[0], placed, labels=placed.labels)
        model.zero_grad(set_to_none=True)
        loss.sum().backward()
        losses.append(loss.detach())
        gradients.append([w.grad.clone() for w in model.parameters() if w.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for at in (1, 2):
        torch.testing.assert_close(losses[at], losses[0], rtol=1e-6, atol=1e-6)
        for found, expected in zip(gradients[at], gradients[0], strict=True):
            assert float((found - expected).norm() / expected.norm()) < 1e-5
