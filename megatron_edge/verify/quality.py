"""The artifact as a running model, and its loss on text.

In: an `ArtifactReader` and windows of tokens; out: nats per token and logits. The model is transformers' own, filled
with decoded weights; activations and the KV cache are quantised as the artifact says. Called by behaviour.py,
runtimes.py and the evaluate job.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from megatron_edge.artifact import formats
from megatron_edge.artifact.store import ArtifactReader
from megatron_edge.contracts import BRANCH, InputError
from megatron_edge.log import track
from megatron_edge.verify import experts

ATTENTION = "megatron_edge_quantised_cache"
TOKENS_PER_FORWARD = 1024
CUDA_TOKENS_PER_FORWARD = 8192  # fewer are calculated there before their kernels are launched
CUDA_LOGITS_BYTES = 2**31  # what the fp32 logits of one forward may take there


@dataclass(frozen=True)
class Windows:
    """Packed text. All [n, s]; attention is causal and stays inside a document, whose positions restart at 0.

    Attributes:
        tokens: int64 token ids.
        documents: int32 number of the document inside its window; contracts.BRANCH tells those that share a beginning.
        positions: int64 position inside the document.
        loss_mask: bool, True where position i predicts token i+1 and counts; the last column is False.
    """

    tokens: torch.Tensor
    documents: torch.Tensor
    positions: torch.Tensor
    loss_mask: torch.Tensor

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    def first(self, count: int) -> Windows:
        return self.slice(0, count)

    def slice(self, begin: int, end: int) -> Windows:
        return Windows(*(t[begin:end] for t in (self.tokens, self.documents, self.positions, self.loss_mask)))

    def equal(self, other: Windows) -> bool:
        mine, theirs = (vars(windows).values() for windows in (self, other))
        return all(torch.equal(one, two) for one, two in zip(mine, theirs, strict=True))

    @property
    def counted_tokens(self) -> int:
        return int(self.loss_mask.sum())


@dataclass(frozen=True)
class Scores:
    """nll: fp32 [n, s] in nats, 0 where nothing counts. logits: fp32 [m, s, vocabulary] of the first m windows.
    top: int64 [n, s], the likeliest next token."""

    nll: torch.Tensor
    logits: torch.Tensor
    counted_tokens: int
    top: torch.Tensor

    @property
    def nats_per_token(self) -> float:
        return float(self.nll.double().sum()) / max(self.counted_tokens, 1)


def nats_per_token(model: torch.nn.Module, windows: Windows) -> float:
    """Mean loss of `model` (from `load_model`, or any transformers causal LM) over the tokens that count."""
    return score(model, windows, keep_logits=0).nats_per_token


@torch.no_grad()
def score(model: torch.nn.Module, windows: Windows, keep_logits: int) -> Scores:
    """Run `model` over all windows; keep the logits of the first `keep_logits`.

    Raises:
        InputError: no token counts.
    """
    if windows.counted_tokens == 0:
        raise InputError(
            "windows.loss_mask: no position counts, so there is no loss to speak of; allowed: at least one"
        )
    device = next(model.parameters()).device
    losses, kept, top = [], [], []
    per_forward = windows_per_forward(model, windows)
    begins = range(0, len(windows), per_forward)
    for begin in track(begins, "running the model", len(begins)):
        part = windows.slice(begin, begin + per_forward)
        logits = forward(model, part).float()
        losses.append((token_nll(logits, part.tokens.to(device)) * part.loss_mask.to(device)).cpu())
        top.append(logits.argmax(-1).cpu())
        if begin < keep_logits:
            kept.append(logits[: keep_logits - begin].cpu())
    logits = torch.cat(kept) if kept else torch.empty(0)
    return Scores(torch.cat(losses), logits, windows.counted_tokens, torch.cat(top))


def windows_per_forward(model: Any, windows: Windows) -> int:
    """As many as a device is fast with, and has room for."""
    tokens = TOKENS_PER_FORWARD
    if next(model.parameters()).is_cuda:
        tokens = min(CUDA_TOKENS_PER_FORWARD, CUDA_LOGITS_BYTES // (4 * model.config.vocab_size))
    return max(1, tokens // windows.tokens.shape[1])


def token_nll(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """fp32 [n, s] nats of each next token; the last column means nothing.

    In fp64, window by window: torch 2.13's fp32 cross_entropy on CPU is 1.8e-5 too low over 49,152 words, more than two
    right implementations differ by.
    """
    rows = []
    for window, targets in zip(logits, tokens.roll(-1, dims=1), strict=True):
        wide = window.double()
        rows.append((wide.logsumexp(-1) - wide.gather(-1, targets[:, None]).squeeze(-1)).float())
    return torch.stack(rows)


def forward(model: torch.nn.Module, windows: Windows) -> torch.Tensor:
    """Logits [n, s, vocabulary] in the model's data type under the windows' own mask and positions."""
    return model(**_inputs(model, windows)).logits


def counted_logits(model: Any, windows: Windows) -> torch.Tensor:
    """The same [counted tokens, vocabulary], of the tokens that count alone, in order: where few do, the output layer
    is most of the work."""
    states = model.get_decoder()(**_inputs(model, windows)).last_hidden_state
    return model.get_output_embeddings()(states[windows.loss_mask.to(states.device)])


def _inputs(model: torch.nn.Module, windows: Windows) -> dict[str, Any]:
    parameter = next(model.parameters())
    device, dtype = parameter.device, getattr(model, "dtype", parameter.dtype)
    documents = windows.documents.to(device)
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    query, key = documents[:, :, None], documents[:, None, :]
    allowed = causal & ((query == key) | (query % BRANCH == key))
    mask = torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(~allowed, torch.finfo(dtype).min)
    return {
        "input_ids": windows.tokens.to(device),
        "attention_mask": mask[:, None],
        "position_ids": windows.positions.to(device),
        "use_cache": False,
    }


def load_model(
    reader: ArtifactReader,
    dtype: torch.dtype,
    device: str = "cpu",
    activations: bool = True,
    cache: bool = True,
    tables: torch.dtype = torch.float32,
) -> torch.nn.Module:
    """transformers' model of the artifact: weights decoded to `dtype`, activations and KV cache fake-quantised.

    `activations` and `cache` False leave those as they are, to compare with a runtime that cannot quantise them;
    `tables` is the data type in which such a one has the values of a quantised embedding or output layer.

    Raises:
        InputError: a parameter of the model is not in the artifact.
    """
    model = _empty_model(reader, dtype)
    tied = {"lm_head.weight"} if getattr(model.config, "tie_word_embeddings", False) else set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in tied:
                parameter.copy_(weight_of(reader, name, dtype, tables))
    model.tie_weights()
    model.to(device).eval().requires_grad_(False)
    experts.run_plainly(reader, model, activations)
    if activations:
        _quantise_inputs(reader, model)
    _quantise_cache(reader, model, reader.manifest.kv.get("format", "none") if cache else "none")
    return model


def _empty_model(reader: ArtifactReader, dtype: torch.dtype) -> Any:
    import transformers
    from transformers.initialization import no_init_weights

    transformers.AttentionInterface.register(ATTENTION, _attention)
    config = transformers.AutoConfig.for_model(**json.loads((reader.directory / "config.json").read_text()))
    with no_init_weights():
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)


def weight_of(
    reader: ArtifactReader, name: str, dtype: torch.dtype, tables: torch.dtype = torch.float32
) -> torch.Tensor:
    """The decoded value of a parameter of transformers' model, of a quantised table by way of the data type `tables`.

    Raises:
        InputError: it is not in the artifact.
    """
    if experts.is_fused(name):
        return experts.fused_weight(reader, name, lambda part: weight_of(reader, part, dtype))
    name = experts.stored_name(reader, name)
    linear = name.removesuffix(".weight")
    if linear in reader.manifest.tables:
        return reader.dequantized(linear, tables).to(dtype)
    if linear in reader.manifest.linears:
        return reader.dequantized(linear, dtype)
    if name not in reader.manifest.tensors:
        raise InputError(f"artifact {reader.directory}: tensor {name} is missing, but config.json describes it")
    return reader.tensor(name).to(dtype)


def _quantise_inputs(reader: ArtifactReader, model: torch.nn.Module) -> None:
    """Linears with the same input (q, k, v; gate, up) share one quantisation of it, as they share its scale."""
    last: dict[str, Any] = {"input": None, "key": None, "output": None}
    for name, linear in reader.manifest.linears.items():
        if linear.activation == "none" or ".experts." in name:
            continue
        scale = reader.tensor(linear.tensors["input_scale"])
        amax = formats.amax_of_scale(linear.activation, scale)
        model.get_submodule(name).register_forward_pre_hook(_input_hook(linear.activation, amax, last))


def _input_hook(activation: str, amax: torch.Tensor, last: dict[str, Any]) -> Callable[..., Any]:
    key = (activation, float(amax))

    def quantise(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if last["input"] is not args[0] or last["key"] != key:
            quantised = formats.fake_quantize_input(activation, args[0], amax.to(args[0].device))
            last.update(input=args[0], key=key, output=quantised)
        return (last["output"], *args[1:])

    return quantise


def _quantise_cache(reader: ArtifactReader, model: torch.nn.Module, cache: str) -> None:
    """Give each attention module its cache format; `_attention` reads it."""
    for name, module in model.named_modules():
        if not name.endswith(".self_attn"):
            continue
        module.cache_format, module.cache_amax, module.core = cache, (None, None), "sdpa"
        if cache in formats.STATIC_KV_FORMATS:
            scales = (reader.tensor(f"{name}.{which}_scale") for which in ("k", "v"))
            module.cache_amax = tuple(formats.amax_of_scale(cache, scale) for scale in scales)


def _attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
) -> tuple[torch.Tensor, Any]:
    """Attention over a quantised cache: post-RoPE key and value [b, heads, s, head_dim] as a reader gets them back."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import eager_attention_forward

    if module.cache_format != "none":
        key, value = (
            formats.fake_quantize_kv(module.cache_format, x, None if amax is None else amax.to(x.device))
            for x, amax in zip((key, value), module.cache_amax, strict=True)
        )
    core = eager_attention_forward if module.core == "eager" else ALL_ATTENTION_FUNCTIONS[module.core]
    return core(module, query, key, value, mask, **options)


@contextmanager
def reordered(model: torch.nn.Module, cut: float = 0.5) -> Iterator[None]:
    """Same mathematics, other order of roundings: what two right implementations differ by.

    Linears sum their inputs in two parts (as tensor parallelism does), of which the first is `cut` of them; attention
    runs unfused, norms fused.
    """
    changed = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.forward = _in_two_parts(module, int(cut * module.in_features))
            changed.append(module)
        elif type(module).__name__.endswith("RMSNorm"):
            module.forward = _fused_norm(module)
            changed.append(module)
        elif name.endswith(".self_attn"):
            module.core = "eager"
        elif name.endswith(".mlp.experts"):
            module.cut = cut
    try:
        yield
    finally:
        for module in changed:
            del module.forward
        for name, module in model.named_modules():
            if name.endswith(".self_attn"):
                module.core = "sdpa"
            elif name.endswith(".mlp.experts"):
                module.cut = None


def _in_two_parts(linear: torch.nn.Linear, at: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x[..., :at], linear.weight[:, :at], linear.bias) + F.linear(x[..., at:], linear.weight[:, at:])

    return run


def _fused_norm(norm: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
