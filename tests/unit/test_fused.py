"""Norm, SwiGLU and rope of fused.py in plain torch: the bits of the same operations one by one, the gradients that
torch derives from those, and nothing kept for backward but what their docstrings say."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import eager_layers as eager
import pytest
import torch
from torch import Tensor

from megatron_edge.model import fused

EPS = 1e-5
Function = Callable[..., Tensor]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype)


def cases(dtype: torch.dtype) -> dict[str, tuple[Function, Function, list[Tensor]]]:
    """(ours, one by one, inputs): rows of a model, of heads, and parts of a wider tensor."""
    angles = eager.random_angles(7, 3, 8)
    norms = partial(fused.rms_norm, eps=EPS), partial(eager.rms_norm, eps=EPS)
    turns = partial(fused.rotate, rotation=eager.rotation_of(angles)), partial(eager.rotate, angles=angles)
    part = random(7, 3, 4, 48, dtype=dtype)[..., 16:32]
    return {
        "norm": (*norms, [random(7, 3, 24, dtype=dtype), random(24, dtype=dtype, seed=1)]),
        "norm of keys": (*norms, [part, random(16, dtype=dtype, seed=1)]),
        "norm of nothing": (*norms, [random(0, 24, dtype=dtype), random(24, dtype=dtype, seed=1)]),
        "swiglu": (fused.swiglu, eager.swiglu, [random(7, 3, 20, dtype=dtype)]),
        "swiglu of nothing": (fused.swiglu, eager.swiglu, [random(0, 20, dtype=dtype)]),
        "rope": (*turns, [random(7, 3, 4, 16, dtype=dtype)]),
        "rope of keys": (*turns, [part]),
    }


NAMES = tuple(cases(torch.float32))


def differentiated(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    gradient = random(*out.shape, dtype=out.dtype, seed=2)
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_as_one_by_one(name: str, dtype: torch.dtype) -> None:
    """Gradients are no further from float64's than those of the operations one by one, which round more often."""
    ours, plain, inputs = cases(dtype)[name]
    found, expected = differentiated(ours, inputs), differentiated(plain, inputs)
    exact = differentiated(plain, [x.double() for x in inputs])
    assert torch.equal(found[0], expected[0]) and found[0].dtype is dtype
    for mine, theirs, reference in zip(found[1:], expected[1:], exact[1:], strict=True):
        assert mine.dtype is dtype and mine.shape == theirs.shape
        if mine.numel():
            scale = float(reference.abs().max())
            limit = 1.5 * float((theirs - reference).abs().max()) + 1e-6 * scale
            assert float((mine - reference).abs().max()) <= limit


@pytest.mark.parametrize("name", [name for name in NAMES if "nothing" not in name])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    ours, _, inputs = cases(torch.float64)[name]
    assert torch.autograd.gradcheck(ours, [x.detach().requires_grad_() for x in inputs])


def kept(function: Function, inputs: list[Tensor]) -> list[tuple[int, ...]]:
    """Shapes of what autograd keeps, parameters left out."""
    found: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: found.append(tuple(x.shape)) or x, lambda x: x):
        function(*[x.detach().requires_grad_() for x in inputs])
    return found


def test_only_inputs_are_kept() -> None:
    of = {name: kept(ours, inputs) for name, (ours, _, inputs) in cases(torch.bfloat16).items()}
    assert of["norm"] == [(7, 3, 24), (24,), (7, 3, 1)]
    assert of["swiglu"] == [(7, 3, 20)]
    assert of["rope"] == [(7, 3, 1, 16)]


def test_a_frozen_weight_has_no_gradient() -> None:
    x, weight = random(5, 24).requires_grad_(), random(24, seed=1)
    fused.rms_norm(x, weight, EPS).sum().backward()
    assert x.grad is not None and weight.grad is None
    with torch.no_grad():
        assert not fused.rms_norm(x, weight, EPS).requires_grad
