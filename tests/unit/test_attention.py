"""Core attention without a mask beside the same attention with a causal mask, and which of them a batch gets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_megatron import hf_config_of, random_batches
from torch import Tensor

from megatron_edge.model import segments
from megatron_edge.model.build import build_model, chunks_of, forward
from megatron_edge.model.layers import PackedAttention
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


DOCUMENTS = torch.tensor([[0] * 20 + [1] * 28, [1] * 5 + [2] * 42 + [3]], dtype=torch.int32)


def test_segments_say_what_a_mask_says() -> None:
    starts = data.segment_starts(DOCUMENTS, 8)
    assert starts is not None and starts.tolist() == [0, 20, 48, 53, 95, 96, 96, 96, 96]
    mask = data.attention_mask(DOCUMENTS)
    assert segments.mask(starts, WINDOWS, TOKENS).equal(mask)
    for within, masked in zip(*(attended(torch.float32, torch.float32, x) for x in (starts, mask)), strict=True):
        assert within.equal(masked)  # without flash attention they are one


def test_what_segments_cannot_say_is_a_mask() -> None:
    assert data.segment_starts(DOCUMENTS, 5) is not None and data.segment_starts(DOCUMENTS, 4) is None
    branches = DOCUMENTS.clone()
    branches[1, 30:] += data.BRANCH
    assert data.segment_starts(branches, 8) is None


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
