"""A random Llama in transformers and the same one in Megatron, in one process with gloo, for tests of a few seconds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from megatron_edge.contracts import ParallelPlan
from megatron_edge.model.build import Recompute, build_model, load_weights
from megatron_edge.model.hf_config import checked_config
from megatron_edge.runtime.session import Session, open_session
from megatron_edge.train.data import Batch


@contextlib.contextmanager
def one_process() -> Iterator[Session]:
    """Megatron's groups of a world of one, closed again at the end."""
    with open_session(ParallelPlan(), rank=0, local_rank=0, store=None, timeout_seconds=60, seed=1) as session:
        yield session


def random_llama(seed: int = 3, **changes: Any) -> Any:
    """Norm weights differ from channel to channel, a few of them by far, as in trained models."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(seed)
    config = LlamaConfig(**{**sizes, **changes}, initializer_range=0.1, rms_norm_eps=1e-5)
    config.architectures = ["LlamaForCausalLM"]
    model = LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            weight.data.uniform_(0.5, 1.5)
            weight.data[:: len(weight) // 4] *= 12
    return model


def hf_config_of(llama: Any) -> dict[str, Any]:
    return checked_config(llama.config.to_dict(), "the test's model")


def megatron_twin(
    llama: Any, session: Session, dtype: torch.dtype = torch.float32, recompute: Recompute = "none"
) -> nn.ModuleList:
    """The same weights in Megatron, through the product's own import."""
    tensors, config = llama.state_dict(), hf_config_of(llama)
    model = build_model(config, session.plan, dtype, session.device, recompute)

    def read(name: str, rows: slice | None, cols: slice | None) -> torch.Tensor:
        part = tensors[name][rows if rows else slice(None)]
        return part if cols is None else part[:, cols]

    load_weights(model, read, config, session)
    return model


def random_experts(session: Session) -> nn.ModuleList:
    """A Mixtral in Megatron with random weights, this rank's shard."""
    raw: dict[str, Any] = {
        "architectures": ["MixtralForCausalLM"], "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64,
        "num_local_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    model = build_model(checked_config(raw, "the test's model"), session.plan, torch.float32, session.device)
    torch.manual_seed(6)
    for weight in model.parameters():
        weight.data.normal_(0, 0.1)
    return model


def random_batches(num: int = 2, windows: int = 2, tokens: int = 32, vocab_size: int = 96) -> list[Batch]:
    """Windows of one document each."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, vocab_size, (num * windows, tokens), generator=generator)
    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[:, -1] = False
    places = torch.arange(tokens).expand_as(ids).contiguous()
    return Batch(ids, torch.zeros_like(ids, dtype=torch.int32), places, counted, ids.roll(-1, 1)).split(windows)
