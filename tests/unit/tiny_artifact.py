"""A tiny Llama made on the spot, its canonical artifact in any format, and the reference that training would write.

`TrainedModel` is the reference: Llama's forward in plain torch, on fake-quantised weights, without transformers.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from megatron_edge.artifact import formats
from megatron_edge.artifact.store import ArtifactWriter
from megatron_edge.contracts import LinearEntry

HIDDEN, HIDDEN_FFN, HEADS, KV_HEADS, LAYERS, VOCABULARY, LENGTH = 192, 256, 6, 2, 2, 256, 48
HEAD_DIM = HIDDEN // HEADS
ROPE, EPS = 10000.0, 1e-6
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
RECIPES = {  # weight, activation, kv
    "int4": ("int4", "none", "int8"),
    "int4_kv8": ("int4", "none", "fp8"),
    "fp8": ("fp8", "fp8", "fp8"),
    "nvfp4": ("nvfp4", "nvfp4", "fp8"),
    "nvfp4_w4a16": ("nvfp4", "none", "int8"),
    "fp8_kv4": ("fp8", "fp8", "nvfp4"),
    "w4a8": ("int4", "fp8", "nvfp4"),
    "int8": ("int8", "int8", "nvfp4"),
    "none": ("none", "none", "none"),
}
SHARED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "fc1", "up_proj": "fc1"}


@dataclass
class Tiny:
    """A directory with `canonical`, a directory `reference`, and the model that both came from."""

    artifact: Path
    reference: Path
    trained: TrainedModel


def llama_config(**changes):
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN_FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        max_position_embeddings=128,
        **changes,
    )


def master_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random bf16-representable weights of a size that makes logits differ between tokens; fp32."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config())
    weights = {name: p.detach() * (3 if p.dim() == 2 else 1) for name, p in model.named_parameters()}
    return {name: weight.to(torch.bfloat16).float() for name, weight in weights.items()}


def save_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {bytes([i]).decode("latin-1"): i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="\x00"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="\x00").save_pretrained(directory)


def windows(count: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    """Each window holds two documents; positions restart, the loss does not cross."""
    generator = torch.Generator().manual_seed(seed)
    cut = LENGTH // 3
    place = torch.arange(LENGTH)
    documents = (place >= cut).int().expand(count, -1).contiguous()
    positions = torch.where(place >= cut, place - cut, place).expand(count, -1).contiguous()
    mask = torch.ones(count, LENGTH, dtype=torch.bool)
    mask[:, [cut - 1, LENGTH - 1]] = False
    tokens = torch.randint(0, VOCABULARY, (count, LENGTH), generator=generator)
    return {"tokens": tokens, "documents": documents, "positions": positions, "loss_mask": mask}


class TrainedModel:
    """The fake-quantised model: plain torch over `values` (weights as used) in `dtype`."""

    def __init__(self, recipe: str, dtype: torch.dtype, seed: int = 0) -> None:
        self.weight, self.activation, self.kv = RECIPES[recipe]
        self.dtype, self.masters = dtype, master_weights(seed)
        self.linears = [name.removesuffix(".weight") for name in self.masters if name.endswith("_proj.weight")]
        self.groups = {name: self._group(self.masters[f"{name}.weight"].shape[1]) for name in self.linears}
        self.amax = self._weight_amax() if self.weight != "none" else {}
        self.values = {name: weight.to(dtype) for name, weight in self.masters.items()}
        for name in self.amax:
            weight = self.values[f"{name}.weight"]
            self.values[f"{name}.weight"] = formats.fake_quantize(
                self.weight, weight, self.amax[name], self.groups[name]
            )
        self.input_amax: dict[str, torch.Tensor] = {}
        self.kv_amax: dict[str, torch.Tensor] = {}
        if self.activation != "none" or self.kv in formats.STATIC_KV_FORMATS:
            self._calibrate()

    def _group(self, in_features: int) -> int:
        if self.weight == "int4":
            return formats.effective_group_size(in_features, 128)
        return 16 if self.weight == "nvfp4" else 0

    def _shared_name(self, name: str) -> str:
        """Megatron fuses q, k, v and gate, up: those share per-tensor maxima."""
        module, _, leaf = name.rpartition(".")
        return f"{module}.{SHARED.get(leaf, leaf)}"

    def _weight_amax(self) -> dict[str, torch.Tensor]:
        found = {
            name: formats.weight_amax(self.weight, self.masters[f"{name}.weight"].to(self.dtype), self.groups[name])
            for name in self.linears
        }
        if self.weight not in ("int4", "int8"):
            shared: dict[str, torch.Tensor] = {}
            for name, amax in found.items():
                key = self._shared_name(name)
                shared[key] = torch.maximum(shared.get(key, amax), amax)
            found = {name: shared[self._shared_name(name)] for name in found}
        return {name: formats.snap_amax(self.weight, amax) for name, amax in found.items()}

    def _calibrate(self) -> None:
        seen: dict[str, float] = {}
        self.observe = seen
        self.logits(windows(2, seed=7))
        self.observe = None
        for name, amax in seen.items():
            if name.endswith(("k_scale", "v_scale")):
                if self.kv in formats.STATIC_KV_FORMATS:
                    self.kv_amax[name] = formats.snap_tensor_amax(self.kv, torch.tensor(amax))
            elif self.activation != "none":
                self.input_amax[name] = formats.snap_tensor_amax(self.activation, torch.tensor(amax))

    observe: dict[str, float] | None = None

    def input_scale(self, linear: str) -> torch.Tensor:
        return formats.tensor_scale(self.activation, self.input_amax[self._shared_name(linear)])

    def _see(self, name: str, x: torch.Tensor) -> None:
        if self.observe is not None:
            self.observe[name] = max(self.observe.get(name, 0.0), float(x.abs().max()))

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        key = self._shared_name(name)
        self._see(key, x)
        if key in self.input_amax:
            x = formats.fake_quantize_input(self.activation, x, self.input_amax[key])
        return x @ self.values[f"{name}.weight"].T

    def _cache(self, name: str, x: torch.Tensor) -> torch.Tensor:
        self._see(name, x)
        if self.kv == "int8" or name in self.kv_amax:
            return formats.fake_quantize_kv(self.kv, x, self.kv_amax.get(name))
        return x

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS)
        return self.values[f"{name}.weight"] * y.to(x.dtype)

    def _attention(self, name: str, x: torch.Tensor, positions: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = (
            self._linear(f"{name}.{part}_proj", x).view(b, s, -1, HEAD_DIM).transpose(1, 2) for part in ("q", "k", "v")
        )
        frequencies = ROPE ** -(torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
        angles = (positions[..., None].float() * frequencies).repeat(1, 1, 2)[:, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)

        def rotate(t: torch.Tensor) -> torch.Tensor:
            left, right = t.chunk(2, dim=-1)
            return t * cos + torch.cat((-right, left), dim=-1) * sin

        k, v = self._cache(f"{name}.k_scale", rotate(k)), self._cache(f"{name}.v_scale", v)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        scores = rotate(q) @ k.transpose(-1, -2) / HEAD_DIM**0.5
        weights = scores.float().masked_fill(~allowed[:, None], float("-inf")).softmax(-1).to(x.dtype)
        return self._linear(f"{name}.o_proj", (weights @ v).transpose(1, 2).reshape(b, s, -1))

    @torch.no_grad()
    def logits(self, text: dict[str, torch.Tensor]) -> torch.Tensor:
        documents = text["documents"]
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        allowed = causal & (documents[:, :, None] == documents[:, None, :])
        x = F.embedding(text["tokens"], self.values["model.embed_tokens.weight"])
        for layer in range(LAYERS):
            name = f"model.layers.{layer}"
            x = x + self._attention(
                f"{name}.self_attn", self._norm(f"{name}.input_layernorm", x), text["positions"], allowed
            )
            y = self._norm(f"{name}.post_attention_layernorm", x)
            gated = F.silu(self._linear(f"{name}.mlp.gate_proj", y)) * self._linear(f"{name}.mlp.up_proj", y)
            x = x + self._linear(f"{name}.mlp.down_proj", gated)
        return (self._norm("model.norm", x) @ self.values["model.embed_tokens.weight"].T).float()

    def nll(self, text: dict[str, torch.Tensor]) -> torch.Tensor:
        logits, targets = self.logits(text).double(), text["tokens"].roll(-1, dims=1)
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").float() * text["loss_mask"]

    def loss(self, text: dict[str, torch.Tensor]) -> float:
        return float(self.nll(text).sum() / text["loss_mask"].sum())


def make_tiny(directory: Path, recipe: str, dtype_name: str = "float32", count: int = 4) -> Tiny:
    """Artifact and reference of one recipe, as export and training write them."""
    trained = TrainedModel(recipe, DTYPES[dtype_name])
    artifact, reference = directory / "artifact" / "canonical", directory / "reference"
    write_artifact(artifact, trained, dtype_name)
    write_reference(reference, trained, dtype_name, windows(count))
    return Tiny(artifact, reference, trained)


def write_artifact(directory: Path, trained: TrainedModel, dtype_name: str, shard_bytes: int = 200_000) -> None:
    writer = ArtifactWriter(directory, shard_bytes)
    plain = {"bfloat16": "bf16", "float32": "fp32"}[dtype_name]
    linears = {}
    for name, master in trained.masters.items():
        linear = name.removesuffix(".weight")
        if linear not in trained.amax:
            writer.add(name, master.to(trained.dtype), plain)
            continue
        encoded = formats.encode(trained.weight, master.to(trained.dtype), trained.amax[linear], trained.groups[linear])
        tensors = {"codes": f"{linear}.weight_codes", "scale": f"{linear}.weight_scale"}
        writer.add(tensors["codes"], encoded.codes, trained.weight)
        writer.add(tensors["scale"], encoded.scale, "scale")
        if encoded.global_scale is not None:
            tensors["global_scale"] = f"{linear}.weight_global_scale"
            writer.add(tensors["global_scale"], encoded.global_scale, "scale")
        if trained.activation != "none":
            tensors["input_scale"] = f"{linear}.input_scale"
            writer.add(tensors["input_scale"], trained.input_scale(linear), "scale")
        linears[linear] = LinearEntry(trained.weight, trained.activation, encoded.group_size, encoded.shape, tensors)
    for name, amax in trained.kv_amax.items():
        writer.add(name, formats.tensor_scale(trained.kv, amax), "scale")
    finish(writer, linears, trained, dtype_name)


def finish(writer: ArtifactWriter, linears: dict[str, LinearEntry], trained: TrainedModel, dtype_name: str) -> None:
    from transformers import GenerationConfig

    config = llama_config(dtype=dtype_name)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(writer.side_files)
    GenerationConfig().save_pretrained(writer.side_files)
    save_tokenizer(writer.side_files)
    tokenizer = (writer.side_files / "tokenizer.json").read_bytes()
    writer.finish(
        family="llama",
        dims={"layers": LAYERS, "hidden": HIDDEN},
        dtype=dtype_name,
        linears=linears,
        quant={"weight": trained.weight, "activation": trained.activation},
        kv={"format": trained.kv},
        tokenizer_sha=hashlib.sha256(tokenizer).hexdigest(),
        source={"name": "made on the spot"},
        versions={"torch": torch.__version__},
    )


def write_reference(directory: Path, trained: TrainedModel, dtype_name: str, text: dict[str, torch.Tensor]) -> None:
    """As two tensor-parallel ranks would: rows in halves, row-parallel linears in columns where groups allow it."""
    weights = []
    for name, master in trained.masters.items():
        for rows, cols in halves(name, master, trained):
            weights.append(slice_facts(trained, name, rows, cols))
    facts = {
        "dtype": dtype_name,
        "weights": weights,
        "activations": {
            name: {"format": trained.activation, "input_scale": float(trained.input_scale(name))}
            for name in trained.amax
            if trained.activation != "none"
        },
        "kv": {"format": trained.kv, "layers": kv_facts(trained)},
        "losses": {"bf16": TrainedModel("none", trained.dtype).loss(text), "trained": trained.loss(text)},
    }
    directory.mkdir(parents=True)
    (directory / "reference.json").write_text(json.dumps(facts))
    said = {"nll": trained.nll(text), "logits": trained.logits({k: v[:2] for k, v in text.items()})}
    save_file({**text, **said}, directory / "reference.safetensors")


def kv_facts(trained: TrainedModel) -> dict[str, dict[str, float]]:
    layers: dict[str, dict[str, float]] = {}
    for name, amax in trained.kv_amax.items():
        _, _, layer, _, which = name.split(".")
        layers.setdefault(layer, {})[which] = float(formats.tensor_scale(trained.kv, amax))
    return layers


def halves(name: str, weight: torch.Tensor, trained: TrainedModel) -> list:
    if weight.dim() == 1:
        return [((0, weight.shape[0]), None)]
    height, width = weight.shape
    group = trained.groups.get(name.removesuffix(".weight"), 0) or 1
    if name.endswith(("o_proj.weight", "down_proj.weight")) and width // 2 % group == 0:
        return [((0, height), (0, width // 2)), ((0, height), (width // 2, width))]
    return [((0, height // 2), (0, width)), ((height // 2, height), (0, width))]


def slice_facts(trained: TrainedModel, name: str, rows: tuple[int, int], cols: tuple[int, int] | None) -> dict:
    def cut(tensor: torch.Tensor, per_column: int = 1) -> torch.Tensor:
        tensor = tensor[rows[0] : rows[1]]
        return tensor if cols is None else tensor[:, cols[0] // per_column : cols[1] // per_column]

    linear = name.removesuffix(".weight")
    facts = {"tensor": name, "rows": list(rows), "cols": cols and list(cols), "format": str(trained.dtype)[6:]}
    facts["dequantized_sha256"] = sha256(cut(trained.values[name]))
    if linear in trained.amax:
        # A rank encodes its own part of the weight, with its own part of the maxima.
        amax = trained.amax[linear]
        if amax.dim() == 2:
            amax = amax[rows[0] : rows[1]] if trained.weight == "int8" else cut(amax, trained.groups[linear])
        own = formats.encode(trained.weight, cut(trained.masters[name].to(trained.dtype)), amax, trained.groups[linear])
        facts |= {
            "format": trained.weight,
            "group_size": own.group_size,
            "codes_sha256": sha256(formats.unpacked_codes(own)),
            "scale_sha256": sha256(own.scale),
            "global_scale": None if own.global_scale is None else float(own.global_scale),
        }
    return facts


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
