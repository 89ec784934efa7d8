"""The frozen records that stages hand each other. Standard library only; every stage may import this.

A record describes; it never computes on tensors. JSON is its form on disk (`to_dict` / `from_dict`).
"""

from __future__ import annotations

import dataclasses
import errno
from dataclasses import dataclass, field
from typing import Any

# Windows of text number their segments from 0. A segment may go on in several ways, which see what came before them and
# themselves, but not each other: number d + k * BRANCH is the k-th such way (from 1) of segment d.
BRANCH = 2**20


class InputError(ValueError):
    """The user's input is at fault: launchers print the message alone and exit with code 2.

    The message names the field, the value found and what is allowed.
    """


class VerificationFailed(RuntimeError):
    """At least one check of verify does not hold: launchers exit with code 3."""


class Diverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite: launchers exit with code 4."""


# What the operating system says where the disk, and not the program, is at fault.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def disk_error(error: BaseException | None) -> OSError | None:
    """What the disk said, behind what writers made of it; None where the disk is not at fault."""
    while error is not None and not (isinstance(error, OSError) and error.errno in DISK_ERRORS):
        error = error.__cause__ or error.__context__
    return error


class RankLost(RuntimeError):
    """Another rank is gone or hangs, so that this one cannot go on: launchers exit with code 5."""


class WriteFailed(RuntimeError):
    """The disk refused (full, over quota, read only); what was complete before is untouched: launchers exit with 6."""


class StoppedBySignal(RuntimeError):
    """A signal stopped the job after its state was saved: launchers exit with code 75."""


@dataclass(frozen=True)
class ParallelPlan:
    """Degrees of parallelism; `dp` is what the world leaves after the others.

    `ep` and `etp` cut the experts alone, over the ranks that data, context and tensor parallelism give to the rest.
    `stage_layers` are the layers of each of pp x vpp chunks, in the order of the model; empty: spread evenly.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1
    dp: int = 1
    world_size: int = 1
    sequence_parallel: bool = False
    stage_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class ParamRule:
    """One row of a family's name table: a Megatron parameter and the Hugging Face tensors it holds.

    Attributes:
        pattern: Megatron parameter name; `{layer}` and `{expert}` stand for indices in the whole model.
        targets: Hugging Face names in the order in which `merge` lays them out.
        split_axis: dimension that tensor parallelism splits (0 or 1; for experts: their own), None where replicated.
        merge: replicate | concat | qkv | gated.
        shape: names of the sizes of one target (of all three for qkv), as in families/table.py.
    """

    pattern: str
    targets: tuple[str, ...]
    split_axis: int | None
    merge: str = "concat"
    shape: tuple[str, ...] = ()

    @property
    def is_expert(self) -> bool:
        return ".local_experts." in self.pattern

    @property
    def is_linear(self) -> bool:
        """A weight matrix of a decoder layer that may be quantised: not the router, nor an embedding."""
        return ".layers." in self.pattern and len(self.shape) == 2 and self.merge != "replicate"

    @property
    def module(self) -> str:
        """Name of the Megatron module that holds the parameter."""
        return self.pattern.rsplit(".", 1)[0]


@dataclass(frozen=True)
class QuantRule:
    """Quantise what `pattern` (fnmatch, over Megatron module names) matches among the layers of the kind `linear` (such
    a pattern too: kinds differ in their group size); later rules win. weight="none" leaves a layer alone."""

    pattern: str
    weight: str
    activation: str
    group_size: int
    linear: str = "*"


@dataclass(frozen=True)
class QuantPlan:
    """What is quantised, how. Formats are names from `artifact.formats`; "none" leaves a tensor alone, and "bf16" the
    embedding or the output layer (`head`)."""

    weight: str
    activation: str
    kv: str
    group_size: int
    algorithm: str
    rules: tuple[QuantRule, ...] = ()
    excluded: tuple[str, ...] = ()
    embedding: str = "bf16"
    head: str = "bf16"
    smoothquant_alpha: float = 0.5
    calibration: str = "max"
    percentile: float = 99.9


@dataclass(frozen=True)
class QuantReport:
    """What insertion did: matches per rule pattern, disabled quantizers, calibrated maxima by name, and the experts
    that saw no token (their inputs have the maximum of the layer's other experts)."""

    matches_per_rule: dict[str, int]
    disabled: tuple[str, ...]
    amax: dict[str, float]
    awq_alpha: dict[str, float] = field(default_factory=dict)
    unseen: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainResult:
    checkpoint_dir: str
    step: int
    tokens: int
    losses_path: str
    config_hash: str
    quant_hash: str


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor. `format` says what its bytes mean: bf16 | fp32 | fp16 | int4 | int8 | nvfp4 | fp8 | scale."""

    shape: tuple[int, ...]
    dtype: str
    format: str
    file: str
    sha256: str


@dataclass(frozen=True)
class LinearEntry:
    """One quantised linear layer of the artifact, or a table: which stored tensors make it up.

    `tensors` maps a role (codes, scale, global_scale, input_scale) to a tensor name.
    `shape` is (out_features, in_features) of the dequantised weight.
    """

    format: str
    activation: str
    group_size: int
    shape: tuple[int, int]
    tensors: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """Everything that is in an artifact. `files` maps the other files (config, tokenizer) to sha256."""

    schema: str
    family: str
    dims: dict[str, Any]
    dtype: str
    tensors: dict[str, TensorEntry]
    linears: dict[str, LinearEntry]
    quant: dict[str, Any]
    kv: dict[str, Any]
    files: dict[str, str]
    tokenizer_sha: str
    source: dict[str, Any]
    versions: dict[str, str]
    draft: dict[str, Any] | None = None

    @property
    def tables(self) -> dict[str, LinearEntry]:
        """The quantised embedding and output layer: tables of one row per word, among `linears`."""
        return {name: entry for name, entry in self.linears.items() if ".layers." not in name}

    @property
    def layer_linears(self) -> dict[str, LinearEntry]:
        """The quantised linears of decoder layers: `linears` without `tables`."""
        return {name: entry for name, entry in self.linears.items() if ".layers." in name}

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Manifest:
        """Raises InputError naming the key where `data` is not a manifest of this schema."""
        known = {f.name for f in dataclasses.fields(cls)}
        missing = sorted(known - {"draft"} - set(data))
        if missing:
            raise InputError(f"manifest.json: keys {missing} are missing")
        unknown = sorted(set(data) - known)
        if unknown:
            raise InputError(f"manifest.json: keys {unknown} are unknown to schema {data.get('schema')!r}")
        fields = dict(data)
        fields["tensors"] = {
            name: TensorEntry(**{**entry, "shape": tuple(entry["shape"])}) for name, entry in data["tensors"].items()
        }
        fields["linears"] = {
            name: LinearEntry(**{**entry, "shape": tuple(entry["shape"])}) for name, entry in data["linears"].items()
        }
        return cls(**fields)


@dataclass(frozen=True)
class PowerMode:
    """One mode that a device can be set to: what it draws at most, and its memory bandwidth there (null: the device's
    own)."""

    power_w: float
    bandwidth_bytes_per_second: int | None = None


@dataclass(frozen=True)
class DeviceProfile:
    """A device and the runtime that is to run the artifact on it.

    `weight_formats`, `activation_formats`, `kv_formats` and `embedding_formats` (also of the output layer) list what
    `runtime` really runs on this device; of `repacked_formats` it keeps linear layers a second time, in an order of its
    own. `reserved_bytes` is what the operating system keeps, `overhead_bytes` what the runtime takes for itself.
    `power_w` is what the device is held to, which its largest of `power_modes` within that obeys. `decode_efficiency`
    is the share of the bandwidth that decoding attains. `compute_capability` is CUDA's, times ten (87: sm87); null
    where nothing runs on CUDA. `sources` says where each of these comes from, by its name.
    """

    name: str
    runtime: str
    memory_bytes: int
    reserved_bytes: int
    overhead_bytes: int
    bandwidth_bytes_per_second: int
    decode_efficiency: float
    power_w: float
    power_modes: tuple[PowerMode, ...]
    compute_capability: int | None
    weight_formats: tuple[str, ...]
    activation_formats: tuple[str, ...]
    kv_formats: tuple[str, ...]
    embedding_formats: tuple[str, ...]
    group_sizes: tuple[int, ...]
    repacked_formats: tuple[str, ...]
    sources: dict[str, str]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device. `weights_bytes` are the artifact's, `layout_bytes` what the runtime's own layout of them
    takes more (or less); `draft_bytes` a draft's for speculative decoding. `evictable_bytes` lie in memory too but are
    never read again, such as a mapped file whose weights were repacked: part of what a process shows as resident, not
    of what it needs. `budget_bytes` is memory less what the system keeps, or budget.memory_bytes."""

    weights_bytes: int
    kv_bytes: int
    activations_bytes: int
    workspace_bytes: int
    budget_bytes: int
    max_batch: int
    max_seq_len: int
    layout_bytes: int = 0
    draft_bytes: int = 0
    evictable_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        weights = self.weights_bytes + self.layout_bytes + self.draft_bytes
        return weights + self.kv_bytes + self.activations_bytes + self.workspace_bytes

    @property
    def resident_bytes(self) -> int:
        return self.total_bytes + self.evictable_bytes


@dataclass(frozen=True)
class Check:
    """One line of a verify report: `value` of `metric` against `limit`; `detail` names what failed."""

    name: str
    metric: str
    value: float | str
    limit: float | str
    ok: bool
    detail: str = ""


@dataclass(frozen=True)
class VerifyReport:
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return bool(self.checks) and all(check.ok for check in self.checks)


def _doc(doc: str, low: float | None = None) -> Any:
    return field(metadata={"doc": doc, "low": low})


OWN_READER = "megatron_edge"  # runtime of devices that have no other: verify itself runs the artifact in it


@dataclass(frozen=True)
class ClusterConfig:
    """What a Slurm job is asked for; null leaves it to the cluster. Its defaults are in conf/cluster/."""

    partition: str | None = _doc("Slurm partition")
    account: str | None = _doc("account that is charged")
    time_minutes: int | None = _doc("time limit of a job; one that reaches it saves, and is queued again", low=1)
    nodes: int = _doc("hosts of a job", low=1)
    ranks_per_node: int | None = _doc("processes on each host; null is as few as the layout needs", low=1)
    gpus_per_node: int | None = _doc("GPUs on each host", low=1)
    cpus_per_rank: int = _doc("CPUs of each process", low=1)
    memory_gib: int | None = _doc("memory on each host", low=1)
    container: str | None = _doc("image that the ranks run in (srun --container-image, of pyxis)")
    container_mounts: str | None = _doc("its mounts, as A:B,C:D (srun --container-mounts)")
    at_once: int | None = _doc("jobs of an array at a time", low=1)
    signal_seconds: int = _doc("how long before the time limit a job is told to save", low=1)
    requeues: int = _doc("how often a job may be queued again after it was stopped", low=0)
    options: list[str] = _doc("further options of sbatch, such as ['--qos=high']")
    before: list[str] = _doc("lines of shell before the ranks start, such as ['module load cuda']")
