"""Gradients of weights that the product adds to the fp32 buffer, against plain autograd's of the same model.

A CPU does so for fp32 weights, and is told to here for bf16 too, so that who adds what to where is tried on it
(layouts: tests/dist/test_fp8_layouts.py, the CUDA product: tests/gpu/test_weight_gradient_cuda.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import layers
from test_direct import RECIPES, loss_and_gradients, quantised, watched
from tiny_megatron import megatron_twin, random_batches, random_experts, random_llama
from torch import Tensor, nn

from megatron_edge.compose import compose
from megatron_edge.model.build import chunks_of, forward, named_shards
from megatron_edge.quantize import adapters, apply, fp8_gemm, plain_modelopt, written_inputs
from megatron_edge.runtime import compat, weight_gradients
from megatron_edge.train import placement, step

TRAIN = compose(["train.learning_rate=0.01", "train.steps=8"]).train
TOLERANCE = 1e-6  # relative, in the norm: fp32 sums in another order were 2e-7 at most
MICRO_BATCHES = 2
LINEARS = 4 * 2 + 1  # of two layers, and the output layer


@pytest.fixture(autouse=True)
def installed() -> None:
    compat.install()


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Whatever the dtype; the number of tokens of each product that added."""
    calls: list[int] = []
    product = layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32

    def spy(x: Tensor, gradient: Tensor, buffer: Tensor) -> None:
        calls.append(len(x))
        product(x, gradient, buffer)

    monkeypatch.setattr(layers.fused_weight_gradient_mlp_cuda, "wgrad_gemm_accum_fp32", spy)
    monkeypatch.setattr(weight_gradients, "ADDED_ON", {"cpu": (torch.float32, torch.bfloat16)})
    yield calls


def trainable(model: nn.Module, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[nn.ModuleList, Any]:
    wrapped, optimizer = step.make_trainable(model, TRAIN, dtype, **settings)
    step.learning_rate_schedule(optimizer, TRAIN).step(3)
    return wrapped, optimizer


def buffers(wrapped: nn.ModuleList, session: Any) -> dict[str, Tensor]:
    """What two micro-batches leave in the fp32 buffers."""
    with apply.constant_weights(wrapped):
        for batch in random_batches(MICRO_BATCHES):
            on_device = placement.to_device(batch, session)
            forward(wrapped[0], on_device, labels=on_device.labels).sum().backward()
    return {name: param.main_grad.clone() for name, param in named_shards(wrapped).items() if param.requires_grad}


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def furthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys() and len(ours) > 10
    found = max(relative(gradient, theirs[name]) for name, gradient in ours.items())
    print(f"relative difference of a gradient {found:.1e}")
    return found


def autograds(model: nn.Module, session: Any) -> dict[str, Tensor]:
    """Before DistributedDataParallel: the sums that autograd leaves in `grad`."""
    _, gradients, _ = loss_and_gradients(model, session)
    return {name.removeprefix("0."): gradient for name, gradient in gradients.items()}


# ---------------------------------------------------------------- the product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(64, 48, 32), (37, 19, 5), (1, 1, 7), (0, 8, 16)])
def test_it_adds_to_a_view(dtype: torch.dtype, tokens: int, rows: int, columns: int) -> None:
    whole = torch.randn(rows * columns + 6)
    buffer, before = whole[3:-3].view(rows, columns), whole.clone()
    x, gradient = torch.randn(tokens, columns).to(dtype), torch.randn(tokens, rows).to(dtype)
    weight_gradients.add_product(x, gradient, buffer)
    expected = before[3:-3].view(rows, columns).double() + gradient.double().t() @ x.double()
    torch.testing.assert_close(buffer.double(), expected, rtol=1e-5, atol=1e-5)
    assert whole[:3].equal(before[:3]) and whole[-3:].equal(before[-3:])
    if not tokens:
        assert whole.equal(before)


def test_nothing_is_rounded_to_bf16(added: list[int]) -> None:
    """Three micro-batches of Megatron's own function: as near to float64 as fp32 is; by its hook, as bf16 is."""
    generator = torch.Generator().manual_seed(7)
    weight = nn.Parameter(torch.randn(48, 32, generator=generator).bfloat16())
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(48, 32), False  # type: ignore[attr-defined]
    exact, rounded = torch.zeros(48, 32, dtype=torch.float64), torch.zeros(48, 32)
    for _ in range(3):
        x, gradient = (torch.randn(16, 2, size, generator=generator).bfloat16() for size in (32, 48))
        out = layers.linear_with_grad_accumulation_and_async_allreduce(x, weight, None, False, False, False)
        out.backward(gradient)
        assert weight.grad is None and not weight.grad_added_to_main_grad  # type: ignore[attr-defined]
        exact += gradient.double().flatten(0, 1).t() @ x.double().flatten(0, 1)
        rounded += gradient.flatten(0, 1).t() @ x.flatten(0, 1)
    assert added == [32] * 3
    assert relative(weight.main_grad, exact) < 1e-6 < 1e-3 < relative(rounded, exact)  # type: ignore[attr-defined]


def test_upstream_needs_it(added: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without our class the hook adds: layers do not ask for apex's extension. Without our product that is absent."""
    weight = nn.Parameter(torch.randn(8, 4))
    weight.main_grad = torch.zeros(8, 4)  # type: ignore[attr-defined]

    def backward(fused: bool) -> None:
        layers.linear_with_grad_accumulation_and_async_allreduce(
            torch.randn(2, 3, 4), weight, None, fused, False, False
        ).sum().backward()

    with monkeypatch.context() as without:
        ours = layers.LinearWithGradAccumulationAndAsyncCommunication
        without.setattr(layers, "LinearWithGradAccumulationAndAsyncCommunication", ours.__mro__[1])
        backward(False)
        assert weight.grad is not None and not added
        without.delattr(layers, "fused_weight_gradient_mlp_cuda")
        with pytest.raises(NameError, match="fused_weight_gradient_mlp_cuda"):
            backward(True)
    weight.grad = None
    backward(False)
    assert weight.grad is None and added == [6]


# ---------------------------------------------------------------- in a model


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_models_gradients(session: Any, added: list[int], tied: bool, recompute: Any) -> None:
    llama = random_llama(tie_word_embeddings=tied)
    expected = autograds(megatron_twin(llama, session), session)
    wrapped, _ = trainable(megatron_twin(llama, session, recompute=recompute))
    assert furthest(buffers(wrapped, session), expected) < TOLERANCE
    assert added == [64] * MICRO_BATCHES * LINEARS
    assert all(param.grad is None for param in wrapped.parameters())


@pytest.mark.parametrize("recipe", [*RECIPES, "codes"])
def test_quantised_layers(llama: Any, session: Any, added: list[int], recipe: str) -> None:
    """Values, codes, and a quantised tied table, whose lookup's gradient comes beside the output layer's."""
    model = quantised(llama, session, RECIPES["fp8" if recipe == "codes" else recipe], torch.float32).train()
    if recipe == "codes":
        assert fp8_gemm.use(model) == {"used": LINEARS - 1}
    written_inputs.use(model)
    expected = autograds(model, session)
    wrapped, _ = trainable(model)
    assert furthest(buffers(wrapped, session), expected) < TOLERANCE
    assert added == [64] * MICRO_BATCHES * LINEARS


def test_modelopts_way_leaves_it_to_the_hook(llama: Any, session: Any, added: list[int]) -> None:
    """There a layer multiplies a tensor that is no parameter; its output layer, unquantised, the parameter."""
    model = quantised(llama, session, RECIPES["int4"], torch.float32)
    for quantizer in watched(model):
        quantizer.register_forward_hook(lambda *_: None)
    expected = autograds(model, session)
    wrapped, _ = trainable(model)
    assert furthest(buffers(wrapped, session), expected) < TOLERANCE
    assert added == [64] * MICRO_BATCHES


def test_modelopts_own_layers(llama: Any, session: Any, added: list[int]) -> None:
    theirs = megatron_twin(llama, session)
    plain_modelopt.quantize(theirs, "fp8", lambda _: step.run_forward(theirs, random_batches(), session))
    expected = autograds(theirs, session)
    wrapped, _ = trainable(theirs)
    assert furthest(buffers(wrapped, session), expected) < TOLERANCE
    assert added == [64] * MICRO_BATCHES


def norms(model: nn.Module, session: Any, dtype: torch.dtype = torch.float32, **settings: Any) -> list[float]:
    """Of three steps' gradients, and the last step's loss."""
    wrapped, optimizer = trainable(model, dtype, **settings)
    results = [step.train_step(wrapped, optimizer, random_batches(), session) for _ in range(3)]
    assert all(result.applied for result in results)
    return [*(result.gradient_norm for result in results), results[-1].loss]


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_steps_of_experts(session: Any, added: list[int], monkeypatch: Any, distributed_optimizer: bool) -> None:
    """Each expert's tokens; buffers of a distributed optimizer are padded views."""
    ours = norms(random_experts(session), session, distributed_optimizer=distributed_optimizer)
    assert len(added) == 3 * MICRO_BATCHES * (2 * (2 + 2 * 4) + 1) and len(set(added)) > 2
    monkeypatch.setattr(weight_gradients, "ADDED_ON", {})
    theirs = norms(random_experts(session), session, distributed_optimizer=distributed_optimizer)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_an_expert_without_tokens(session: Any, added: list[int]) -> None:
    wrapped, _ = trainable(random_experts(session))
    expert = chunks_of(wrapped)[0].decoder.layers[0].mlp.experts.local_experts[0]
    expert(torch.zeros(0, 64, requires_grad=True))[0].sum().backward()
    assert added == [0, 0]
    assert not any(param.main_grad.any() for param in expert.parameters())


def test_adapters_and_frozen_weights(llama: Any, session: Any, added: list[int], monkeypatch: Any) -> None:
    """Adapters take the gradient of a weight, which has no buffer; other weights are frozen."""

    def adapted() -> nn.Module:
        model = quantised(llama, session, RECIPES["fp8"], torch.float32)
        adapters.attach(model, session, rank=2, alpha=4.0, seed=1)
        return model

    ours = norms(adapted(), session)
    assert not added and ours[0] > 0
    monkeypatch.setattr(weight_gradients, "ADDED_ON", {})
    assert ours == norms(adapted(), session)


def test_a_bf16_models_gradients(llama: Any, session: Any, added: list[int], monkeypatch: Any) -> None:
    """Activations and their gradients have the same bits; what differs is that no gradient of a weight is rounded."""
    wrapped, _ = trainable(quantised(llama, session, RECIPES["int4"], torch.bfloat16), torch.bfloat16)
    ours = buffers(wrapped, session)
    assert added == [64] * MICRO_BATCHES * LINEARS
    monkeypatch.setattr(weight_gradients, "ADDED_ON", {})
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    assert 1e-4 < furthest(ours, buffers(wrapped, session)) < 2.0**-8
