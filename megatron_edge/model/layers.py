"""The layers that we put in place of Megatron's: norm, rotary embedding, attention, experts (arithmetic: fused.py).

Same code on CPU and CUDA, with and without TransformerEngine; numerics are those of the Hugging Face model, so
that import and artifact can be compared with it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_edge.model import fused, segments
from megatron_edge.runtime import weight_gradients


class RMSNorm(nn.Module):
    """y = weight * x / rms(x), the statistic in fp32. Usable with sequence parallelism, which upstream's
    torch norm refuses (torch_norm.py:33): the weight is tagged so that its gradient is summed over TP ranks.

    `function(x, weight, eps)` calculates it; quantize/written_inputs.py may put another in its place."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.eps = eps
        self.function: Callable[[Tensor, Tensor, float], Tensor] = fused.rms_norm
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.eps)


class FusedRMSNorm(RMSNorm):
    """apex's kernel: the product with the weight is in fp32 too, and rounded once."""

    def forward(self, x: Tensor) -> Tensor:
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine

        return fused_rms_norm_affine(x, self.weight, self.weight.shape, self.eps)


def rotary_inverse_frequencies(head_dim: int, theta: float, scaling: dict | None) -> Tensor:
    """fp32 [head_dim / 2]. Scaling types: none, linear, llama3 (arXiv 2407.21783; transformers' modeling_rope)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / theta**exponent
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    if scaling is None or kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequencies
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return frequencies * ((1 - smooth) / scaling["factor"] + smooth)


class PackedRotaryEmbedding(nn.Module):
    """Rotations for packed windows, whose positions restart at each document.

    Stands in for megatron's RotaryEmbedding. `position_ids` [b, s] is set before each forward of the model; the result
    is fp32 [s, b, 1, head_dim], cosines of half the size followed by sines, once for all layers (fused.rotate).
    """

    def __init__(self, head_dim: int, theta: float, scaling: dict | None, device: torch.device) -> None:
        super().__init__()
        frequencies = rotary_inverse_frequencies(head_dim, theta, scaling).to(device)
        self.register_buffer("inverse_frequencies", frequencies, persistent=False)
        self.position_ids: Tensor | None = None

    def get_rotary_seq_len(self, *_: Any) -> int:
        assert self.position_ids is not None, "position_ids must be set before the model runs"
        return self.position_ids.shape[1]

    def forward(self, seq_len: int, **_: Any) -> Tensor:
        assert self.position_ids is not None
        angles = self.position_ids.t().float()[..., None] * self.inverse_frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=-1)[:, :, None, :]


@functools.cache
def rotating_attention_class() -> type[nn.Module]:
    """Megatron's SelfAttention, which turns query and key by PackedRotaryEmbedding's rotations itself, as soon as it
    has them: upstream's unfused rope is ten operations on each."""
    from megatron.core.transformer.attention import SelfAttention

    class RotatingSelfAttention(SelfAttention):
        def forward(self, *args: Any, rotary_pos_emb: Tensor, **others: Any) -> Any:
            self._rotation = rotary_pos_emb
            try:
                return super().forward(*args, rotary_pos_emb=None, **others)
            finally:
                del self._rotation

        def get_query_key_value_tensors(self, *args: Any, **others: Any) -> tuple[Tensor, Tensor, Tensor]:
            query, key, value = super().get_query_key_value_tensors(*args, **others)
            return fused.rotate(query, self._rotation), fused.rotate(key, self._rotation), value

    return RotatingSelfAttention


def _gather_parts(x: Tensor) -> Tensor:
    """[s / cp, ...] of each context-parallel rank -> [s, ...] on each; gradients are summed back to the parts."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    return gather_from_sequence_parallel_region(x, group=parallel_state.get_context_parallel_group())


def _keys_of_part(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Of each context-parallel rank's part -> for the pieces of this rank (segments.keys_of_part), in one exchange."""
    from megatron.core import parallel_state

    rank, size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    return segments.keys_of_part(_gather_parts(torch.cat((key, value))), rank, size)


@functools.cache
def experts_class() -> type[nn.Module]:
    """Megatron's SequentialMLP, but a token's routing weight multiplies its expert's output: upstream multiplies the
    input of fc2, which is the same until that input is quantised, and no runtime does so."""
    from megatron.core.transformer.moe.experts import SequentialMLP

    class OutputWeightedExperts(SequentialMLP):
        def forward(self, tokens: Tensor, tokens_per_expert: Tensor, weights: Tensor) -> tuple[Tensor, None]:
            """tokens [n, h] sorted by expert, weights [n] -> [n, h]."""
            counts, outputs = tokens_per_expert.tolist(), []
            for expert, x, weight in zip(self.local_experts, tokens.split(counts), weights.split(counts), strict=True):
                outputs.append((expert(x)[0] * weight[:, None]).to(x.dtype))
            return torch.cat(outputs), None

    return OutputWeightedExperts


def vocab_embedding_class() -> type[nn.Module]:
    """Megatron's embedding, whose rows tensor parallelism splits."""
    from megatron.core.tensor_parallel import VocabParallelEmbedding

    return VocabParallelEmbedding


def linear_classes() -> tuple[type[nn.Module], ...]:
    """Megatron's own linear layers, which tensor parallelism splits."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    return ColumnParallelLinear, RowParallelLinear


def transformer_engine_classes() -> tuple[type[nn.Module], ...]:
    """TransformerEngine's, as Megatron wraps them and model.backend=te builds them; none where it is not installed."""
    from megatron.core.extensions import transformer_engine as te

    return (te.TEColumnParallelLinear, te.TERowParallelLinear) if te.HAVE_TE else ()


def read_by_one(module: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """What of one of Megatron's modules is read by one linear layer, and by nothing else: the norms of a layer, but for
    one before experts, which their router reads too, and a MLP's activation.

    Returns:
        (module, the name of its attribute that is the function, the linear layer) of each.
    """
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.transformer_layer import TransformerLayer

    found: list[tuple[nn.Module, str, nn.Module]] = []
    if isinstance(module, TransformerLayer):
        pairs = [(module.input_layernorm, module.self_attention.linear_qkv)]
        if isinstance(module.mlp, MLP):
            pairs.append((module.pre_mlp_layernorm, module.mlp.linear_fc1))
        found += [(norm, "function", linear) for norm, linear in pairs if type(norm) is RMSNorm]
    if isinstance(module, MLP):
        found.append((module, "activation_func", module.linear_fc2))
    return found


@functools.cache
def linear_of_values() -> Callable[..., Tensor]:
    """Megatron's linear function (tensor_parallel/layers.py, LinearWithGradAccumulationAndAsyncCommunication) of
    `x_value` and `weight_value`; their gradients are those of `x` and `weight`, unchanged (straight through, arXiv
    1308.3432), without a node of their own in the graph; that of `weight` goes where runtime/weight_gradients.py says.

    Returns:
        f(x, weight, x_value, weight_value, *settings), settings as upstream's after the weight.
    """
    from megatron.core.tensor_parallel.layers import LinearWithGradAccumulationAndAsyncCommunication as Linear

    class LinearOfValues(Linear):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, x_value: Tensor, weight_value: Tensor, *settings: Any) -> Any:
            out = Linear.forward(ctx, x_value, weight_value.detach(), *settings)
            weight_gradients.add_to(ctx, weight_gradients.buffer_of(weight))
            return out

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            of_x, of_weight, *others = Linear.backward(ctx, *gradients)
            return of_x, of_weight, None, None, *others

    return LinearOfValues.apply


class PackedAttention(nn.Module):
    """Core attention on torch's fused kernels: causal, or confined to documents as the data says.

    `attention_mask` is None for causal attention over the whole window; or int32 [segments + 1], where segments of the
    windows begin (model/segments.py); or bool [b, 1, s, t], True where attention is not allowed. Flash attention takes
    the first two, over grouped keys and values as they are. KV quantizers act on key and value after rotation, as a
    runtime's cache sees them. Under context parallelism s is this rank's part of the text; where segments of its
    queries and of its keys begin is int32 [2, segments + 1] (segments.starts_of_part), for causal attention too; and of
    a mask t is the whole text as the ranks' parts follow each other (train/placement.py makes both).
    """

    def __init__(self, config: Any, *_: Any, **__: Any) -> None:
        super().__init__()
        self.config = config
        self.scale = 1.0 / math.sqrt(config.kv_channels)
        self.gathers = config.context_parallel_size > 1

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """query [s, b, heads, d], key and value [s, b, kv_heads, d] -> [s, b, heads * d]."""
        assert attention_mask is not None or not self.gathers
        cut = attention_mask is not None and attention_mask.dim() <= 2
        if self.gathers and cut:
            key, value = _keys_of_part(key, value)
        elif self.gathers:
            key, value = (_gather_parts(x) for x in (key, value))
        if attention_mask is not None and cut:
            if segments.takes(query):
                return segments.attention(query, key, value, attention_mask, self.scale)
            attention_mask = segments.mask(attention_mask, query.shape[1], query.shape[0], key.shape[0])
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        causal, repeats = attention_mask is None, q.shape[1] // k.shape[1]
        grouped = repeats > 1 and causal and _flash_takes_groups(q, k, v)
        if repeats > 1 and not grouped:
            k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        allowed = None if attention_mask is None else ~attention_mask
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, is_causal=causal, scale=self.scale, enable_gqa=grouped
        )
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


def _flash_takes_groups(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether flash attention runs here on fewer keys than queries; torch's other fused kernels never do, and what is
    left to them would be computed unfused."""
    if not q.is_cuda:
        return False
    return torch.backends.cuda.can_use_flash_attention(torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, True))
