"""The optimizer's part of a step on CUDA: beside a plain loop in fp64, without temporaries, without waiting, through a
checkpoint's state, and the milliseconds of an update of 0.5 B parameters beside those of torch's default."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1] / "unit")]

from plain_adam import PlainAdam, apart, divided_by, mains_of  # noqa: E402
from tiny_megatron import megatron_twin, random_batches, random_llama  # noqa: E402

# Where update.FUSED_ON and update.ONE_PASS_ON hold: torch's default, torch's fused Adam, ours.
WAYS = {"default": ((), ()), "fused": (("cuda",), ()), "one pass": (("cuda",), ("cuda",))}

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
MIB = 2**20


@pytest.fixture(scope="module")
def session() -> Iterator[Any]:
    from megatron_edge.contracts import ParallelPlan
    from megatron_edge.runtime.session import open_session

    with open_session(ParallelPlan(), rank=0, local_rank=0, store=None, timeout_seconds=300, seed=1) as opened:
        yield opened


def settings() -> Any:
    from megatron_edge.compose import compose

    overrides = ("train.learning_rate=0.01", "train.steps=8", "train.weight_decay=0.1", "train.clip_norm=0.1")
    return compose(list(overrides)).train


def trainable(llama: Any, session: Any, dtype: torch.dtype, distributed: bool = False) -> Any:
    from megatron_edge.train import step

    model = megatron_twin(llama, session, dtype)
    chunks, optimizer = step.make_trainable(model, settings(), dtype, distributed_optimizer=distributed)
    step.learning_rate_schedule(optimizer, settings()).step(4)
    return chunks, optimizer


def take(monkeypatch: Any, way: str) -> None:
    from megatron_edge.train import update

    for name, where in zip(("FUSED_ON", "ONE_PASS_ON"), WAYS[way], strict=True):
        monkeypatch.setattr(update, name, where)


def is_torch_adam(optimizer: Any) -> bool:
    from megatron_edge.runtime import optimizer_state

    return all(optimizer_state.is_torch_adam(inner) for inner in optimizer_state.inner_optimizers(optimizer))


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_are_those_of_a_plain_loop(session: Any, dtype: torch.dtype, distributed: bool) -> None:
    from megatron_edge.runtime import optimizer_state
    from megatron_edge.train import step

    chunks, optimizer = trainable(random_llama(hidden_size=128, intermediate_size=256), session, dtype, distributed)
    plain = PlainAdam(optimizer, settings())
    for _ in range(4):
        result = step.train_step(chunks, optimizer, random_batches(), session)
        plain.step(divided_by(optimizer, result, settings()))
    print(f"{dtype}, distributed {distributed}: {plain.apart():.1e} apart after 4 steps; limit 5e-6")
    assert plain.apart() < 5e-6
    for param, slot in optimizer_state._slots(optimizer).items():
        assert torch.equal(param.detach().flatten()[slot.begin : slot.end], slot.main.detach().flatten().to(dtype))
        if is_torch_adam(optimizer):
            assert slot.inner.optimizer.state[slot.main]["step"].is_cuda


@pytest.mark.parametrize("loaded", ["fused", "one pass"])
@pytest.mark.parametrize("saved", list(WAYS))
def test_a_state_is_continued(session: Any, monkeypatch: Any, saved: str, loaded: str) -> None:
    """That of the same way bit for bit; torch's default counts steps on the CPU."""
    from megatron_edge.runtime import optimizer_state
    from megatron_edge.train import step

    llama = random_llama(hidden_size=128, intermediate_size=256)
    take(monkeypatch, saved)
    chunks, optimizer = trainable(llama, session, torch.bfloat16)
    for _ in range(2):
        step.train_step(chunks, optimizer, random_batches(), session)
    mine = [param for param in chunks.parameters() if hasattr(param, "main_grad")]
    held, steps = optimizer_state.gather_state(optimizer, mine)
    take(monkeypatch, loaded)
    others, other = trainable(llama, session, torch.bfloat16)
    theirs = [param for param in others.parameters() if hasattr(param, "main_grad")]
    pairs = list(zip(theirs, mine, strict=True))
    for target, source in pairs:
        target.data.copy_(source.data)
    optimizer_state.set_state(other, {target: held[source] for target, source in pairs}, steps)
    # The same gradients for both: a backward's own sums may differ from run to run.
    for target, source in pairs:
        source.main_grad.copy_(torch.randn_like(source.main_grad))
        target.main_grad.copy_(source.main_grad)
    for one in (optimizer, other):
        one.prepare_grads()
        updated(one, torch.ones((), dtype=torch.float64, device="cuda"))
    found = apart(mains_of(other), mains_of(optimizer))
    limit = 0.0 if saved == loaded else 5e-6
    print(f"saved by {saved}, continued by {loaded}: {found:.1e} apart after the next step; limit {limit}")
    assert steps == 2 and found <= limit
    assert optimizer_state.gather_state(other, theirs)[1] == 3


def updated(optimizer: Any, square: Any) -> None:
    """The update with gradients of one token, whose square is that, as `step.train_step` does it."""
    from megatron_edge.train import update

    zero = torch.zeros_like(square)
    update.start(optimizer, total=zero, tokens=zero + 1, are_bad=zero, square=square)
    update.finish(optimizer, float(square) ** 0.5, True)


class Update:
    """What `step.train_step` does after the gradients, on random ones of one token that are clipped, to a Llama of 66 M
    parameters and 51 M in each layer, with 18 bytes each: weight, gradient, main weight, moments."""

    def __init__(self, session: Any, layers: int) -> None:
        from megatron_edge.model.build import build_model
        from megatron_edge.model.hf_config import checked_config
        from megatron_edge.train import step

        raw = {
            "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 5504,
            "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 32000,
            "max_position_embeddings": 64, "tie_word_embeddings": True,
        }  # fmt: skip
        config = checked_config(raw, "the test's model")
        model = build_model(config, session.plan, torch.bfloat16, session.device)
        for weight in model.parameters():
            weight.data.normal_(0, 0.02)
        self.chunks, self.optimizer = step.make_trainable(model, settings(), torch.bfloat16)
        self.parameters = sum(param.numel() for param in self.chunks.parameters())
        for param in self.chunks.parameters():
            param.main_grad.normal_(0, 1e-3)  # type: ignore[attr-defined]
        self._device = session.device
        self._tokens = torch.ones((), dtype=torch.int, device=session.device)

    def run(self) -> None:
        from megatron_edge.train import update

        if self.optimizer.in_one_pass is None:  # as update.finalize
            for chunk in self.chunks:
                chunk.scale_gradients(1.0 / self._tokens.clamp(min=1))  # type: ignore[operator]
        self.optimizer.prepare_grads()
        updated(self.optimizer, update.gradient_square(self.optimizer, self._device))

    def milliseconds(self, times: int = 10) -> float:
        for _ in range(2):
            self.run()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(times):
            self.run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / times

    def temporary_bytes(self) -> int:
        self.run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        resident = torch.cuda.memory_allocated()
        self.run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - resident


def test_an_update_takes_no_memory(session: Any) -> None:
    made = Update(session, layers=1)
    taken = made.temporary_bytes()
    print(f"update of {made.parameters / 1e6:.0f} M parameters: {taken / MIB:.1f} MiB beside the state; limit 64")
    assert taken < 64 * MIB


def test_an_update_waits_for_nothing(session: Any) -> None:
    """But for the norm's fetch, which `train_step` does with the loss's."""
    from megatron_edge.model.build import chunks_of
    from megatron_edge.train import update

    made = Update(session, layers=1)
    made.run()
    torch.cuda.synchronize()
    tokens = torch.tensor(7, dtype=torch.int, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for chunk in made.chunks:
            chunk.zero_grad_buffer()
        made.optimizer.zero_grad()
        chunks_of(made.chunks)[0].config.finalize_model_grads_func(list(made.chunks), tokens)
        made.optimizer.prepare_grads()
        square, zero = update.gradient_square(made.optimizer, tokens.device), torch.zeros_like(tokens).double()
        update.start(made.optimizer, total=zero, tokens=tokens.double(), are_bad=zero, square=square)
        update.finish(made.optimizer, 1.0, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_update_is_faster_than_torch_s(session: Any, monkeypatch: Any) -> None:
    found = {}
    for way in WAYS:
        take(monkeypatch, way)
        made = Update(session, layers=9)
        found[way] = made.milliseconds()
        taken = made.temporary_bytes() / MIB
        print(f"{way}: {found[way]:.2f} ms an update of {made.parameters / 1e6:.0f} M parameters, {taken:.0f} MiB")
        fused_by_torch = is_torch_adam(made.optimizer)
        del made
        gc.collect()
        torch.cuda.empty_cache()
    assert not fused_by_torch or found["fused"] < 0.7 * found["default"]
    assert not fused_by_torch or found["one pass"] < 0.85 * found["fused"]
