"""All checks of an artifact in order, written to verify.json and shown as a table.

In: an artifact, the reference of its training, the device's budget; out: a `Verification`. Called by the verify job,
which raises `VerificationFailed` where it does not hold.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_edge.artifact.store import MANIFEST_FILE, ArtifactReader, sha256_of_file
from megatron_edge.contracts import OWN_READER, Check, DeviceProfile, InputError, MemoryPlan, VerifyReport
from megatron_edge.verify import behaviour, parity, runtimes
from megatron_edge.verify.quality import Scores, Windows
from megatron_edge.verify.references import References

if TYPE_CHECKING:
    from rich.table import Table

logger = logging.getLogger("megatron_edge")

PACKAGES = ("torch", "transformers", "compressed-tensors", "safetensors")
BASELINES = ("bf16", "fp32")
NO_REFERENCE = "no reference of the trained model was given"


@dataclass(frozen=True)
class Verification(VerifyReport):
    """A `VerifyReport` that also says what could not be checked here, and why: that never counts as passed.

    `losses` are nats per token on the reference's held-out text: what training measured, `artifact`, and what a runtime
    had of its target. `runtimes` is what each one really ran, by name. `size_bytes` is a whole artifact's.
    """

    not_run: dict[str, str] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    runtimes: dict[str, dict[str, Any]] = field(default_factory=dict)
    device_runtime: str | None = None
    size_bytes: int | None = None

    @property
    def deployable(self) -> tuple[bool, str]:
        """Whether it may go to the device, and why (not): only what the device's own runtime ran."""
        ran = [name for name, row in self.runtimes.items() if row["status"] == "ran"]
        if not self.ok:
            return False, "a check does not hold"
        if self.device_runtime == OWN_READER:
            return True, "verify itself is the runtime of this device, and ran it"
        if not ran:
            return False, "no runtime ran it here"
        if self.device_runtime in (*ran, None):
            return True, f"it ran in {', '.join(ran)}"
        return False, f"it ran in {', '.join(ran)}, but not in {self.device_runtime}, which is to run it on the device"


@dataclass(frozen=True)
class Limits:
    """What was promised. None leaves the check out, and the report says so; `runtimes` are those that must run it."""

    device: DeviceProfile | None = None
    memory: MemoryPlan | None = None
    max_loss_rise: float | None = None
    runtimes: tuple[str, ...] = ()


def verify_artifact(
    artifact_dir: Path,
    reference_dir: Path | None,
    limits: Limits,
    targets: dict[str, Path] | None = None,
    output: Path | None = None,
    text: Windows | None = None,
) -> Verification:
    """Run every check on one process and write verify.json to `output`.

    Args:
        artifact_dir: canonical artifact.
        reference_dir: what training wrote of its own model; without it only bytes, budget and targets are checked.
        targets: name -> directory of the converted targets; None takes those beside the artifact.
        text: what runtimes are asked; None takes the reference's held-out windows.

    Raises:
        InputError: a directory is no artifact, or no reference.
    """
    integrity, size_bytes = _check_integrity(artifact_dir), None
    found = runtimes.Findings([integrity])
    if not integrity.ok:
        found.not_run["everything else"] = "the artifact itself is damaged"
    else:
        reader = ArtifactReader(artifact_dir)
        size_bytes = reader.size_bytes()
        reference = None if reference_dir is None else parity.read_reference(reference_dir)
        asked = None if reference is None else References(reader, reference.windows, len(reference.logits))
        _merge(found, _check_model(reader, reference, asked, limits))
        _merge(found, check_device(reader, limits))
        if asked is not None and text is not None and not text.equal(asked.windows):
            asked = References(reader, text, asked.keep_logits)
        targets = runtimes.find_targets(artifact_dir) if targets is None else targets
        _merge(found, _check_targets(asked, reference, targets))
        found.checks += check_runtime_memory(found, limits) + check_asked(found, limits.runtimes)
    device = None if limits.device is None else limits.device.runtime
    report = Verification(tuple(found.checks), found.not_run, found.losses, found.runtimes, device, size_bytes)
    if output is not None:
        _write(report, artifact_dir, output)
    return report


def _check_integrity(artifact_dir: Path) -> Check:
    """A manifest that cannot be read is damage too; InputError only where there is none."""
    try:
        return parity.check_integrity(ArtifactReader(artifact_dir))
    except InputError as error:
        if not (artifact_dir / MANIFEST_FILE).is_file():
            raise
        return parity.failures("integrity", "tensors and files at fault", [str(error)])


def _merge(found: runtimes.Findings, more: runtimes.Findings) -> None:
    found.checks.extend(more.checks)
    found.not_run.update(more.not_run)
    found.losses.update(more.losses)
    found.runtimes.update(more.runtimes)


def _check_model(
    reader: ArtifactReader, reference: parity.Reference | None, references: References | None, limits: Limits
) -> runtimes.Findings:
    names = ("trained equals shipped", "logits", "loss", "perplexity")
    if reference is None or references is None:
        return runtimes.Findings([], dict.fromkeys(names, NO_REFERENCE))
    logger.info("verify: comparing the artifact's bytes with the trained model's")
    found = runtimes.Findings(parity.check_trained(reader, reference))
    logger.info("verify: running the artifact over %d held-out tokens", reference.windows.counted_tokens)
    run = references.run(reference.dtype, "cuda" if torch.cuda.is_available() else "cpu")
    found.checks += behaviour.check_behaviour(reader, reference, run)
    _merge(found, check_perplexity(reference, run.scores, limits))
    return found


def check_perplexity(reference: parity.Reference, scores: Scores, limits: Limits) -> runtimes.Findings:
    """The artifact's loss against the unquantised model's on the same held-out text, and the rise that was declared."""
    losses = {name: loss for name, loss in (reference.facts.get("losses") or {}).items() if loss is not None}
    found = runtimes.Findings(losses={**losses, "artifact": scores.nats_per_token})
    baseline = next((name for name in BASELINES if name in losses), None)
    if baseline is None or limits.max_loss_rise is None:
        missing = "reference.json has no unquantised loss" if baseline is None else "no limit was declared"
        found.not_run["perplexity"] = missing
        return found
    rise = scores.nats_per_token - losses[baseline]
    detail = ", ".join(f"{name} {loss:.4f}" for name, loss in found.losses.items()) + " nats/token"
    metric, ok = f"rise over {baseline}, nats/token", rise <= limits.max_loss_rise
    found.checks.append(Check("perplexity", metric, rise, limits.max_loss_rise, ok, detail))
    return found


def check_device(reader: ArtifactReader, limits: Limits) -> runtimes.Findings:
    """Bytes against the budget, and formats against what the device's runtime runs."""
    found = runtimes.Findings()
    if limits.memory is None:
        found.not_run["memory"] = "no memory plan was given"
    else:
        found.checks.append(_check_memory(reader, limits.memory))
    if limits.device is None:
        found.not_run["device"] = "no device was given"
        return found
    manifest, device = reader.manifest, limits.device
    linears, tables = manifest.layer_linears.values(), manifest.tables.values()
    groups = {linear.group_size for linear in manifest.linears.values() if linear.format == "int4"}
    used = {
        "weight formats": ({linear.format for linear in linears}, device.weight_formats),
        "activation formats": ({linear.activation for linear in linears} - {"none"}, device.activation_formats),
        "KV formats": ({manifest.kv.get("format", "none")} - {"none"}, device.kv_formats),
        "embedding formats": ({table.format for table in tables}, device.embedding_formats),
        "int4 groups": (groups, device.group_sizes),
    }
    for metric, (values, allowed) in used.items():
        strangers = sorted(str(value) for value in values - set(allowed))
        shown = ", ".join(sorted(map(str, values))) or "none"
        detail = f"{device.runtime} on {device.name} does not run {', '.join(strangers)}" if strangers else ""
        found.checks.append(Check("device", metric, shown, ", ".join(map(str, allowed)), not strangers, detail))
    return found


def _check_memory(reader: ArtifactReader, memory: MemoryPlan) -> Check:
    weights_bytes = reader.size_bytes()
    total_bytes = memory.total_bytes - memory.weights_bytes + weights_bytes
    layout = round(memory.layout_bytes / 1e6, 1) + 0.0  # no -0.0
    detail = (
        f"weights {weights_bytes / 1e6:.1f} MB ({layout:+.1f} in the runtime's layout), KV "
        f"{memory.kv_bytes / 1e6:.1f} MB (batch {memory.max_batch} x {memory.max_seq_len} tokens), activations "
        f"{memory.activations_bytes / 1e6:.1f} MB, "
        f"workspace {memory.workspace_bytes / 1e6:.1f} MB"
    )
    fits = total_bytes <= memory.budget_bytes
    return Check("memory", "bytes on the device", float(total_bytes), float(memory.budget_bytes), fits, detail)


def check_runtime_memory(found: runtimes.Findings, limits: Limits) -> list[Check]:
    """What a runtime's process held here at most, with the interpreter around it, against the device's budget."""
    checks = []
    for name, row in found.runtimes.items():
        is_devices_own = limits.device is not None and name == limits.device.runtime
        if limits.memory is not None and is_devices_own and row.get("peak_rss_bytes"):
            peak, budget = float(row["peak_rss_bytes"]), float(limits.memory.budget_bytes)
            detail = f"{row['context_tokens']} tokens of context, {row['threads']} thread(s); {row['recipe']}"
            checks.append(Check(f"runtime {name}", "peak resident bytes", peak, budget, peak <= budget, detail))
    return checks


def check_asked(found: runtimes.Findings, asked: tuple[str, ...]) -> list[Check]:
    """Each runtime that was asked for by name must have run a target of this artifact."""
    checks = []
    for name in asked:
        ran = found.runtimes.get(name, {}).get("status") == "ran"
        reasons = [why for what, why in found.not_run.items() if any(t in what for t in runtimes.RUNTIMES[name])]
        missing = "; ".join(reasons) or f"there is no target {' or '.join(runtimes.RUNTIMES[name])} beside the artifact"
        checks.append(
            Check(f"runtime {name}", "status", "ran" if ran else "not run", "ran", ran, "" if ran else missing)
        )
    return checks


def _check_targets(
    references: References | None, reference: parity.Reference | None, targets: dict[str, Path]
) -> runtimes.Findings:
    found = runtimes.Findings()
    if references is None or reference is None:
        return runtimes.Findings([], {f"target {name}": NO_REFERENCE for name in targets})
    trained_nll = reference.nll if references.windows.equal(reference.windows) else None
    for name, directory in targets.items():
        logger.info("verify: target %s, %d tokens", name, references.windows.counted_tokens)
        try:
            _merge(found, runtimes.check_target(references, name, directory, trained_nll))
        except Exception as error:  # noqa: BLE001 - another project's loader raises what it likes: all of it is a failed check
            message = f"{type(error).__name__}: {error}"
            found.checks.append(Check(f"target {name}", "loads", "failed", "loads", False, message))
    return found


def _write(report: Verification, artifact_dir: Path, output: Path) -> None:
    facts = {
        "ok": report.ok,
        "artifact": {
            "directory": str(artifact_dir),
            "manifest_sha256": sha256_of_file(artifact_dir / MANIFEST_FILE),
            "size_bytes": report.size_bytes,
        },
        "checks": [dataclasses.asdict(check) for check in report.checks],
        "not_run": report.not_run,
        "losses_nats_per_token": report.losses,
        "runtimes": report.runtimes,
        "deployable": dict(zip(("ok", "why"), report.deployable, strict=True)),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    partial = output.with_suffix(".partial")
    partial.write_text(json.dumps(facts, indent=2) + "\n")
    partial.replace(output)


def table(report: Verification) -> Table:
    """The report for a terminal: one row a check, with what it found below its name; then what did not run."""
    from rich.table import Table

    shown = Table("check", "value", "limit", "", title="verify", title_justify="left")
    for check in report.checks:
        detail = f"\n[dim]{_plain(check.detail)}[/]" if check.detail else ""
        result = "[green]ok" if check.ok else "[red]FAILED"
        shown.add_row(f"{check.name}: {check.metric}{detail}", _number(check.value), _number(check.limit), result)
    for name, reason in report.not_run.items():
        shown.add_row(f"{name}\n[dim]{_plain(reason)}[/]", "", "", "[yellow]not run")
    return shown


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _number(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:,.0f}" if value == int(value) else f"{value:.3g}"
    return _plain(str(value))
