"""Adam in one pass over memory beside torch's and beside fp64, on Megatron's optimizers; and how fast.

Run by pytest (marked gpu), or as a program that prints a table of speeds:

    python tests/gpu/test_triton_adam_cuda.py
    TRITON_INTERPRET=1 pytest tests/gpu/test_triton_adam_cuda.py      on a CPU, in Triton's interpreter

The interpreter (3.6) cuts fp32 to bf16 where hardware rounds to nearest: there, that is what is expected of weights.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from plain_adam import PlainAdam, apart, divided_by
from tiny_megatron import megatron_twin, random_batches, random_experts, random_llama
from triton_device import ABSENT, DEVICE, INTERPRETED

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(ABSENT), reason=ABSENT)]

# In elements; gradients lie one after the other, so that those after the first odd size are not aligned.
SHAPES = ((2, 1024), (64, 33), (1024,), (4096,), (1,), (7,), (1025,), (3, 1000), (33, 65))
BETAS, EPSILON, TOKENS = (0.9, 0.95), 1e-8, 4099
ROUNDING = 2.0**-23


def one_process() -> Any:
    from megatron_edge.contracts import ParallelPlan
    from megatron_edge.runtime.session import open_session

    return open_session(ParallelPlan(), rank=0, local_rank=0, store=None, timeout_seconds=300, seed=1)


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[Any]:
    with one_process() as opened:
        yield opened


def tiny_llama() -> Any:
    return random_llama(hidden_size=128, intermediate_size=256)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def megatron_optimizer(dtype: torch.dtype, shapes: Any = SHAPES) -> Any:
    """Two groups and one without tensors; with main_grad, as DistributedDataParallel gives it, in one buffer."""
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    params = [nn.Parameter(random(*shape, seed=at).to(dtype)) for at, shape in enumerate(shapes)]
    buffer, begin = torch.zeros(sum(param.numel() for param in params), device=DEVICE), 0
    for param in params:
        param.main_grad = buffer[begin : begin + param.numel()].view(param.shape)  # type: ignore[attr-defined]
        begin += param.numel()
    adam = torch.optim.AdamW(
        [
            {"params": params[::2], "weight_decay": 0.1, "lr": 0.01},
            {"params": params[1::2], "weight_decay": 0.0, "lr": 0.003},
            {"params": []},
        ],
        betas=BETAS, eps=EPSILON, fused=True,
    )  # fmt: skip
    if dtype is torch.float32:
        return FP32Optimizer(adam, OptimizerConfig(), lambda *_: None), params
    return Float16OptimizerWithFloat16Params(adam, OptimizerConfig(bf16=True), None, lambda *_: None), params


def draw(params: list[Any], seed: int) -> None:
    """Gradients of TOKENS tokens, from large to tiny, and some of them zero."""
    for at, param in enumerate(params):
        gradient = random(*param.shape, seed=1000 * seed + at) * 10.0 ** -(at % 5)
        param.main_grad.copy_(torch.where(gradient.abs() < 0.01 * 10.0 ** -(at % 5), 0.0, gradient) * TOKENS)


def mains_of(adam: Any) -> list[Tensor]:
    return [main for group in adam.param_groups for main in group["params"]]


def states_of(adam: Any) -> list[list[Tensor]]:
    """[main, first moment, second moment] of each, copied."""
    found = [[main, adam.state[main]["exp_avg"], adam.state[main]["exp_avg_sq"]] for main in mains_of(adam)]
    return [[each.detach().clone() for each in one] for one in found]


def rounded(main: Tensor, dtype: torch.dtype) -> Tensor:
    """What the kernel stores of a main weight: cut, not rounded, in the interpreter."""
    if dtype is torch.bfloat16 and INTERPRETED:
        return ((main.view(torch.int32) >> 16) << 16).view(torch.float32).to(torch.bfloat16)
    return main.to(dtype)


def taken(inner: Any) -> set[float]:
    return {float(state["step"]) for state in inner.optimizer.state.values()}


def update(adam: Any) -> None:
    adam.step(torch.tensor([0.5 / TOKENS, 1.0], device=DEVICE))
    adam.count(True)


def run(inner: Any, params: list[Any], adam: Any, steps: range) -> None:
    for seed in steps:
        inner.zero_grad()
        draw(params, seed)
        inner.prepare_grads()
        adam.gradient_square()
        update(adam)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_torch_s_within_roundings(dtype: torch.dtype) -> None:
    """Each from the same state. A rounding is that of the largest number that goes into a sum, and 0.01, Adam's step,
    goes into a main weight, which torch's kernel on CUDA makes of other operations (`fused_adam_utils.cuh`)."""
    from megatron_edge.train.triton_adam import TritonAdam

    inner, params = megatron_optimizer(dtype)
    ours, worst = TritonAdam(inner, torch.device(DEVICE)), torch.zeros(3)
    for seed in range(5):
        inner.zero_grad()
        draw(params, seed)
        inner.prepare_grads()
        ours.gradient_square()  # makes the first state
        theirs, old = copy.deepcopy(inner.optimizer), states_of(inner.optimizer)
        for main, own in zip(mains_of(theirs), mains_of(inner.optimizer), strict=True):
            main.grad = own.grad * torch.tensor(0.5 / TOKENS)  # type: ignore[operator]
        update(ours)
        theirs.step()
        gradients = [main.grad for main in mains_of(theirs)]
        for one, other, was, gradient in zip(
            states_of(inner.optimizer), states_of(theirs), old, gradients, strict=True
        ):
            sizes = (was[0].abs() + 0.01, was[1].abs().maximum(gradient.abs()), was[2].maximum(gradient**2))  # type: ignore[operator, union-attr]
            for at in range(3):
                found = (one[at] - other[at]).abs() / (sizes[at] * ROUNDING).clamp(min=1e-38)
                worst[at] = max(worst[at], float(found.max()))
        for param in params:
            main = getattr(param, "main_param", param)
            assert torch.equal(param.detach(), rounded(main.detach(), dtype))
    print(f"{dtype}: roundings between ours and torch's main weights and moments: {worst.tolist()}; limits 3, 2, 2")
    assert taken(inner) == {5.0} and worst[0] <= 3 and worst[1:].max() <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_five_steps_are_as_near_to_fp64_as_torch_s(dtype: torch.dtype) -> None:
    from megatron_edge.train.triton_adam import TritonAdam

    inner, params = megatron_optimizer(dtype)
    plain = PlainAdam(inner, SimpleNamespace(adam_beta1=BETAS[0], adam_beta2=BETAS[1]))
    ours, theirs = TritonAdam(inner, torch.device(DEVICE)), copy.deepcopy(inner.optimizer)
    for seed in range(5):
        run(inner, params, ours, range(seed, seed + 1))
        plain.step(0.5 / TOKENS)
        for main, own in zip(mains_of(theirs), mains_of(inner.optimizer), strict=True):
            main.grad = own.grad * torch.tensor(0.5 / TOKENS)  # type: ignore[operator]
        theirs.step()
    floor = apart([main.detach().double() for main in mains_of(theirs)], plain.values)
    print(f"{dtype}: {plain.apart():.1e} from fp64 after 5 steps, torch's {floor:.1e}; limit 3 times that")
    assert plain.apart() <= 3 * floor


def test_the_same_bits_every_time_and_after_a_load() -> None:
    from megatron_edge.train.triton_adam import TritonAdam

    found = []
    for interrupted in (False, False, True):
        inner, params = megatron_optimizer(torch.bfloat16)
        ours = TritonAdam(inner, torch.device(DEVICE))
        run(inner, params, ours, range(2))
        if interrupted:  # other tensors, in other places; twice, so that old places may be taken again
            for _ in range(2):
                inner.optimizer.load_state_dict(copy.deepcopy(inner.optimizer.state_dict()))
        run(inner, params, ours, range(2, 4))
        assert taken(inner) == {4.0}
        found.append(
            [each for state in states_of(inner.optimizer) for each in state] + [param.detach() for param in params]
        )
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_count_of_steps_that_was_set_is_believed() -> None:
    from megatron_edge.train.triton_adam import TritonAdam

    inner, params = megatron_optimizer(torch.float32)
    ours = TritonAdam(inner, torch.device(DEVICE))
    run(inner, params, ours, range(1))
    for main in mains_of(inner.optimizer):
        inner.optimizer.state[main]["step"] = torch.full((), 10.0, device=DEVICE)
    run(inner, params, ours, range(1, 2))
    assert taken(inner) == {11.0}
    inner.optimizer.state[params[0]]["step"] = torch.full((), 3.0, device=DEVICE)
    with pytest.raises(ValueError, match=r"different numbers of steps: \[3.0, 11.0\]"):
        run(inner, params, ours, range(2, 3))


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_of_a_model(session: Any, monkeypatch: Any, dtype: torch.dtype, distributed: bool, experts: bool) -> None:
    """Beside the same with torch's Adam on divided gradients, and beside a plain loop in fp64 on its own gradients."""
    from megatron_edge.compose import compose
    from megatron_edge.runtime import optimizer_state
    from megatron_edge.train import step, update

    options = ("train.learning_rate=0.01", "train.steps=8", "train.weight_decay=0.1", "train.clip_norm=0.1")
    train, results = compose(list(options)).train, {}
    for on in ((), (DEVICE,)):
        monkeypatch.setattr(update, "ONE_PASS_ON", on)
        model = random_experts(session).to(dtype) if experts else megatron_twin(tiny_llama(), session, dtype)
        chunks, optimizer = step.make_trainable(model, train, dtype, distributed_optimizer=distributed)
        if on and optimizer.in_one_pass is None:
            pytest.skip("Megatron uses the Adam of TransformerEngine or apex here")
        schedule, plain = step.learning_rate_schedule(optimizer, train), PlainAdam(optimizer, train)
        results[on] = []
        for _ in range(3):
            schedule.step(1)
            results[on].append(step.train_step(chunks, optimizer, random_batches(), session))
            plain.step(divided_by(optimizer, results[on][-1], train))
        assert plain.apart() < 5e-6
        for param, slot in optimizer_state._slots(optimizer).items():
            main = slot.main.detach().flatten()
            expected = rounded(main, dtype) if on else main.to(dtype)
            assert torch.equal(param.detach().flatten()[slot.begin : slot.end], expected)
    first, other = (results[on][0] for on in results)
    assert (first.tokens, first.applied) == (other.tokens, other.applied) and other.applied
    assert other.loss == pytest.approx(first.loss, rel=1e-5)
    assert other.gradient_norm == pytest.approx(first.gradient_norm, rel=1e-5 if dtype is torch.float32 else 1e-3)
    if dtype is torch.float32:  # bf16 weights on two sides of a rounding boundary would lead apart
        for one, two in zip(*results.values(), strict=True):
            assert two.loss == pytest.approx(one.loss, rel=1e-3)


@pytest.mark.parametrize("distributed", [False, True])
def test_a_checkpoint_is_continued_bit_for_bit(
    session: Any, monkeypatch: Any, tmp_path: Path, distributed: bool
) -> None:
    from megatron_edge import checkpoint
    from megatron_edge.compose import compose
    from megatron_edge.contracts import QuantPlan
    from megatron_edge.runtime import optimizer_state
    from megatron_edge.train import step, update

    monkeypatch.setattr(update, "ONE_PASS_ON", (DEVICE,))
    train, plan, ends = compose([]).train, QuantPlan("none", "none", "none", 0, "max"), []
    for resumed in (False, True):
        model = megatron_twin(tiny_llama(), session, torch.bfloat16)
        chunks, optimizer = step.make_trainable(model, train, torch.bfloat16, distributed_optimizer=distributed)
        begin, found = 0, checkpoint.find_newest(tmp_path, session)
        if resumed:
            assert found is not None
            checkpoint.load_checkpoint(found, chunks, optimizer, plan, session)
            begin = 2
        for at in range(begin, 4):

            def drawn(*inputs: Any, seed: int = at) -> Any:  # a backward's own sums may differ from run to run
                found = step.forward_backward(*inputs)
                for place, param in enumerate(chunks.parameters()):  # noqa: B023
                    param.main_grad.copy_(random(*param.shape, seed=1000 * seed + place))
                return found

            step.train_step(chunks, optimizer, random_batches(), session, gradients=drawn)
            if at == 1:
                checkpoint.save_checkpoint(tmp_path, 2, chunks, optimizer, plan, session, extra={}, keep=1)
        ends.append([slot.main for slot in optimizer_state._slots(optimizer).values()] + [*chunks.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


@pytest.mark.parametrize("wrong", ["gradient", "loss"])
def test_what_is_not_finite_changes_nothing(session: Any, monkeypatch: Any, wrong: str) -> None:
    """Nor does it count: what follows is the first step."""
    from megatron_edge.compose import compose
    from megatron_edge.runtime import optimizer_state
    from megatron_edge.train import step, update

    monkeypatch.setattr(update, "ONE_PASS_ON", (DEVICE,))
    model, train = megatron_twin(tiny_llama(), session), compose([]).train
    chunks, optimizer = step.make_trainable(model, train, torch.float32)
    step.learning_rate_schedule(optimizer, train).step(1)
    before = [param.detach().clone() for param in chunks.parameters()]
    plain = PlainAdam(optimizer, train)

    def bad(*inputs: Any) -> Any:
        found = step.forward_backward(*inputs)
        if wrong == "loss":
            found[0]["total"] = found[0]["total"] * torch.nan
        else:
            next(chunks.parameters()).main_grad[0, 0] = torch.inf  # type: ignore[attr-defined]
        return found

    assert not step.train_step(chunks, optimizer, random_batches(), session, gradients=bad).applied
    assert all(torch.equal(a, b) for a, b in zip(before, chunks.parameters(), strict=True))
    (inner,) = optimizer_state.inner_optimizers(optimizer)
    assert taken(inner) == {0.0}
    assert not any(moment.any() for states in states_of(inner.optimizer) for moment in states[1:])
    result = step.train_step(chunks, optimizer, random_batches(), session)
    plain.step(divided_by(optimizer, result, train))
    assert result.applied and taken(inner) == {1.0} and plain.apart() < 1e-6


def test_the_norm_is_that_of_what_megatron_counts() -> None:
    from megatron_edge.train.triton_adam import TritonAdam

    inner, params = megatron_optimizer(torch.bfloat16, (*SHAPES, (5, 8192), (20001,)))
    params[2].shared = inner.optimizer.param_groups[0]["params"][1].shared = True  # counted elsewhere
    ours = TritonAdam(inner, torch.device(DEVICE))
    for seed in range(2):
        inner.zero_grad()
        draw(params, seed)
        inner.prepare_grads()
        gradients = inner.get_main_grads_for_grad_norm()
        assert len(gradients) == len(params) - 1
        square, twice = float(ours.gradient_square()), float(ours.gradient_square())
        exact = sum(float(gradient.double().square().sum()) for gradient in gradients)
        print(f"square of the norm: {square / exact - 1:.1e} from fp64; limit 8e-7")
        assert square == twice == pytest.approx(exact, rel=8e-7)  # 13 levels of sums in fp32
    for wrong in (torch.inf, torch.nan):
        params[-1].main_grad[-1] = wrong
        assert not torch.isfinite(ours.gradient_square())


def milliseconds(run: Any, times: int = 10) -> float:
    for _ in range(3):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / times


def main() -> None:
    """Milliseconds and TB/s of norm and update of 0.5 B bf16 parameters, at several sizes of a program."""
    from megatron_edge.train import triton_adam

    shapes = ((32000, 2048), *((11008, 2048), (2048, 5504), (6144, 2048), (2048, 2048), (2048,)) * 9)
    inner, params = megatron_optimizer(torch.bfloat16, shapes)
    inner.prepare_grads()
    numel = sum(param.numel() for param in params)
    gradients = inner.get_main_grads_for_grad_norm()
    took = milliseconds(lambda: nn.utils.get_total_norm(gradients))
    print(f"{numel / 1e6:.0f} M parameters, torch's norm: {took:.2f} ms, {4 * numel / took / 1e9:.2f} TB/s")
    for tile, warps in ((8192, 8), (4096, 4), (4096, 8), (16384, 8), (16384, 16)):
        triton_adam.SQUARE_TILE, triton_adam.SQUARE_WARPS = tile, warps
        took = milliseconds(triton_adam.TritonAdam(inner, torch.device(DEVICE)).gradient_square)
        print(f"norm, {tile} elements in {warps} warps: {took:.2f} ms, {4 * numel / took / 1e9:.2f} TB/s")
    for tile, warps in ((1024, 4), (2048, 8), (2048, 4), (512, 4), (1024, 8), (4096, 8)):
        triton_adam.TILE, triton_adam.WARPS = tile, warps
        ours = triton_adam.TritonAdam(inner, torch.device(DEVICE))
        ours.gradient_square()
        took = milliseconds(lambda: update(ours))  # noqa: B023
        print(f"Adam, {tile} elements in {warps} warps: {took:.2f} ms, {30 * numel / took / 1e9:.2f} TB/s")


if __name__ == "__main__":
    with one_process():
        main()
