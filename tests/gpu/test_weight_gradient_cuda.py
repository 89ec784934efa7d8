"""The product that adds gradients of weights to the fp32 buffer, on CUDA: bf16 operands beside float64 sums, its bits
twice, as a CUDA graph; and a model's buffers beside those that Megatron's hook fills."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1] / "unit")]

from test_direct import RECIPES, quantised  # noqa: E402
from tiny_megatron import megatron_twin, random_batches, random_llama  # noqa: E402

from megatron_edge.runtime import weight_gradients  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

# (tokens, out, in): of a layer, of few rows and many tokens, no multiples of 8, and one of each.
SIZES = [(512, 384, 256), (4096, 64, 64), (37, 19, 5), (1, 1, 7), (33, 1, 8), (33, 8, 1)]
OFFSET = 3  # elements before a buffer's view, which is then aligned to its elements alone
NOISE = 2.0**-6  # of a bf16 model's gradients, relative in the norm: one rounding, and attention's sums in any order


@pytest.fixture(scope="module")
def session() -> Iterator[Any]:
    from megatron_edge.contracts import ParallelPlan
    from megatron_edge.runtime.session import open_session

    with open_session(ParallelPlan(), rank=0, local_rank=0, store=None, timeout_seconds=300, seed=1) as opened:
        yield opened


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


def view_of(whole: Tensor, rows: int, columns: int) -> Tensor:
    return whole[OFFSET : OFFSET + rows * columns].view(rows, columns)


def test_torch_has_it() -> None:
    assert weight_gradients._can_add(torch.device("cuda", 0), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "rows", "columns"), SIZES)
def test_it_adds_to_a_view(tokens: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    x, gradient = drawn(tokens, columns, dtype=dtype), drawn(tokens, rows, dtype=dtype)
    start, found = drawn(rows * columns + 2 * OFFSET, dtype=torch.float32), []
    for _ in range(2):
        whole = start.clone()
        for _ in range(3):
            weight_gradients.add_product(x, gradient, view_of(whole, rows, columns))
        found.append(whole)
    assert found[0].equal(found[1]), "the same bits twice"
    expected = view_of(start, rows, columns).double() + 3 * (gradient.double().t() @ x.double())
    apart = (view_of(found[0], rows, columns).double() - expected).norm() / expected.norm()
    print(f"{tokens} x {rows} x {columns} of {dtype}: {float(apart):.1e}")
    assert apart < (1e-4 if dtype is torch.bfloat16 else 2e-3)  # a bf16 has 8 bits; TF32, where it is allowed, 10
    assert found[0][:OFFSET].equal(start[:OFFSET]) and found[0][-OFFSET:].equal(start[-OFFSET:])


def test_no_tokens_leave_the_buffer() -> None:
    buffer = drawn(16, 8, dtype=torch.float32)
    before = buffer.clone()
    weight_gradients.add_product(drawn(0, 8), drawn(0, 16), buffer)
    assert buffer.equal(before)


def test_a_graph_adds_at_each_replay() -> None:
    x, gradient, buffer = drawn(256, 64), drawn(256, 128), torch.zeros(128, 64, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        weight_gradients.add_product(x, gradient, buffer)
    torch.cuda.current_stream().wait_stream(stream)
    once, graph = buffer.clone(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        weight_gradients.add_product(x, gradient, buffer)
    buffer.zero_()
    graph.replay()
    assert buffer.equal(once)
    x.mul_(2)  # other numbers in the same place
    graph.replay()
    torch.testing.assert_close(buffer, 3 * once, rtol=1e-5, atol=1e-4)


def filled(wrapped: Any, session: Any) -> dict[str, Tensor]:
    """The buffers after two micro-batches."""
    from megatron_edge.model.build import named_shards
    from megatron_edge.train import step

    for chunk in wrapped:
        chunk.zero_grad_buffer()
    step.forward_backward(wrapped, random_batches(), session, step.LABELS)
    assert all(param.grad is None for param in wrapped.parameters())
    return {name: param.main_grad.clone() for name, param in named_shards(wrapped).items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recipe", ["none", "int4", "fp8"])
def test_a_models_buffers(session: Any, recipe: str, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.tensor_parallel import layers

    from megatron_edge.compose import compose
    from megatron_edge.quantize import fp8_gemm, written_inputs
    from megatron_edge.train import step

    llama, calls = random_llama(tie_word_embeddings=tied), []
    product = layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32

    def counted(x: Tensor, gradient: Tensor, buffer: Tensor) -> None:
        calls.append(len(x))
        product(x, gradient, buffer)

    monkeypatch.setattr(layers.fused_weight_gradient_mlp_cuda, "wgrad_gemm_accum_fp32", counted)
    if recipe == "none":
        model = megatron_twin(llama, session, torch.bfloat16).train()
    else:
        model = quantised(llama, session, RECIPES[recipe], torch.bfloat16).train()
    if recipe == "fp8" and not fp8_gemm.absent():
        assert fp8_gemm.use(model) == {"used": 8}
    written_inputs.use(model)
    wrapped, _ = step.make_trainable(model, compose(["train.steps=8"]).train, torch.bfloat16)
    ours = filled(wrapped, session)
    assert calls == [64] * 2 * 9, "two micro-batches of four layers in each of two, and the output layer"
    monkeypatch.setattr(weight_gradients, "ADDED_ON", {})
    theirs = filled(wrapped, session)
    assert len(calls) == 2 * 9 and ours.keys() == theirs.keys() and len(ours) > 10
    apart = {name: float((one - theirs[name]).norm() / theirs[name].norm()) for name, one in ours.items()}
    print(f"{recipe}, tied {tied}: relative difference of a gradient {max(apart.values()):.1e}")
    assert 0 < max(apart.values()) < NOISE, apart
