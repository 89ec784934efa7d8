"""From a run's checkpoint to a proven artifact: export, verify, and the closing summary. One process."""

from __future__ import annotations

import hashlib
import json
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megatron_edge import checkpoint as checkpoints
from megatron_edge import compose, deployment
from megatron_edge.artifact.store import MANIFEST_FILE, ArtifactReader, ArtifactWriter, sha256_of_file
from megatron_edge.config import RunConfig
from megatron_edge.contracts import (
    InputError,
    QuantPlan,
    StoppedBySignal,
    VerificationFailed,
    WriteFailed,
    disk_error,
)
from megatron_edge.export import targets
from megatron_edge.export.compress import compress
from megatron_edge.families import dims_of
from megatron_edge.jobs.preflight import CONFIG_FILE
from megatron_edge.log import console
from megatron_edge.model.source import ModelSource, load_tokenizer, open_model
from megatron_edge.quantize import policy
from megatron_edge.report.facts import bf16_bytes
from megatron_edge.report.page import write_report
from megatron_edge.runtime.launcher import Launch
from megatron_edge.train.data import load_data
from megatron_edge.verify.quality import Windows
from megatron_edge.verify.report import Limits, Verification, table, verify_artifact

log = logging.getLogger("megatron_edge")

PACKAGE = Path(__file__).resolve().parents[1]
EXPORT_FILE = "export.json"  # in a run directory: what its artifact was made from
PACKAGES = ("megatron-core", "nvidia-modelopt", "torch", "transformers")


def finish(config: RunConfig, threads: int) -> None:
    """Export, verify and summary of a trained run; `threads` is the number of CPU threads of this process.

    Raises:
        VerificationFailed: a check does not hold; everything is on disk nevertheless.
    """
    source = open_model(config.model)
    _export(config, source, threads)
    report = _verify(config, source.hf_config)
    _summary(config, report)
    _raise_unless_ok(report, Path(config.run_dir) / "verify.json")


def export(config: RunConfig, launch: Launch) -> None:
    """run_dir's newest checkpoint as the canonical artifact and export.targets. Rank 0 does it, and needs no others.

    Raises:
        StoppedBySignal: SIGTERM; the same command goes on with the tensors that are written.
        WriteFailed: the disk refused; so it does with room for the rest.
    """
    if launch.rank == 0:
        _export(config, open_model(config.model), launch.threads)


def verify(config: RunConfig, launch: Launch) -> None:
    """Checks artifact= against reference= (run directories by default). Rank 0 does it.

    Raises:
        VerificationFailed: a check does not hold.
    """
    if launch.rank != 0:
        return
    artifact = Path(config.artifact) if config.artifact else artifact_dir(config)
    run_dir = Path(config.reference or config.run_dir)
    if not (run_dir / CONFIG_FILE).is_file():
        raise InputError(
            f"reference={run_dir}: no {CONFIG_FILE}; allowed: the directory of the run that trained {artifact}"
        )
    of_run = replace(compose.of_run(run_dir), runtimes=config.runtimes)
    report = _verify(of_run, _intact_config(artifact), artifact, run_dir, _text(config, of_run, run_dir))
    console().print(table(report))
    log.info("report: %s", write_report(run_dir))
    _raise_unless_ok(report, run_dir / "verify.json")


def _text(config: RunConfig, of_run: RunConfig, run_dir: Path) -> Windows | None:
    """Held-out windows for the runtimes, where the command line asks for other ones than the run had."""
    if (config.data.heldout, config.data.eval_tokens) == (of_run.data.heldout, of_run.data.eval_tokens):
        return None
    tokenizer = load_tokenizer(artifact_dir(of_run) if config.artifact is None else Path(config.artifact))
    data = replace(of_run.data, heldout=config.data.heldout, eval_tokens=config.data.eval_tokens)
    found = load_data(data, tokenizer, of_run.train.seq_length_tokens, of_run.train.seed, run_dir / "data")
    batch = found.heldout.evaluation(data.eval_tokens)
    return Windows(batch.tokens, batch.documents, batch.positions, batch.loss_mask)


def _intact_config(artifact: Path) -> dict[str, Any] | None:
    """config.json of an artifact; None where it is damaged, which verify is going to say."""
    path = artifact / "config.json"
    try:
        listed = ArtifactReader(artifact).manifest.files.get(path.name)
    except InputError:
        return None
    return json.loads(path.read_text()) if path.is_file() and sha256_of_file(path) == listed else None


def artifact_dir(config: RunConfig) -> Path:
    return Path(config.run_dir) / "artifact" / "canonical"


def _export(config: RunConfig, source: ModelSource, threads: int) -> None:
    found = checkpoints.newest_intact(Path(config.run_dir) / "checkpoints")
    if found is None:
        raise InputError(
            f"run_dir={config.run_dir!r}: no intact checkpoint to export; allowed: a run that has saved one"
        )
    quant_plan = policy.make_plan(config.quant, config.kv, source.hf_config)
    directory = artifact_dir(config)
    directory.parent.mkdir(parents=True, exist_ok=True)
    key = _key(config, found, source, quant_plan)
    with _stopped_by_sigterm():
        if _is_there(config, key):
            log.info("%s holds what follows from %s: every hash is right", directory, found.path)
        else:
            log.info("exporting %s", found.path)
            try:
                _write_artifact(config, found, source, quant_plan, key, threads)
            except OSError as error:
                if disk_error(error) is None:
                    raise
                raise WriteFailed(
                    f"{directory} cannot be written: {error}; with room for it the same command goes on there"
                ) from error
            _note_export(config, key)
        reader = ArtifactReader(directory)
        for name in config.export.targets:
            targets.convert(name, reader, directory.parent / name, config.export.shard_bytes)


def _write_artifact(
    config: RunConfig,
    found: checkpoints.CheckpointInfo,
    source: ModelSource,
    quant_plan: QuantPlan,
    key: str,
    threads: int,
) -> None:
    hf_config = source.hf_config
    with ArtifactWriter(artifact_dir(config), config.export.shard_bytes, key) as writer:
        done = compress(found.path, writer, hf_config, quant_plan, threads)
        source.save_tokenizer(writer.side_files)
        source.save_config(writer.side_files, getattr(torch, done.dtype))
        writer.finish(
            family=hf_config["architectures"][0],
            dims=asdict(dims_of(hf_config)),
            dtype=done.dtype,
            linears=done.linears,
            quant=asdict(quant_plan),
            kv=done.kv,
            tokenizer_sha=sha256_of_file(writer.side_files / "tokenizer.json"),
            source={
                "model": config.model.source,
                "hf_config": config.model.hf_config,
                # What training read; reading it again takes as long as the export does.
                "fingerprint": found.extra.get("model") or source.fingerprint(),
                "step": found.step,
            },
            versions={name: version(name) for name in PACKAGES},
        )


def _key(config: RunConfig, found: checkpoints.CheckpointInfo, source: ModelSource, quant_plan: QuantPlan) -> str:
    """Names all that decides the bytes of the artifact, this project's code among it."""
    code = sorted(path for room in ("artifact", "export", "families") for path in (PACKAGE / room).rglob("*.py"))
    decides = {
        "checkpoint": sha256_of_file(found.path / "manifest.json"),
        "model": [config.model.source, config.model.hf_config, source.hf_config],
        "quant": asdict(quant_plan),
        "shard_bytes": config.export.shard_bytes,
        "versions": {name: version(name) for name in (*PACKAGES, "safetensors")},
        "code": [sha256_of_file(path) for path in code],
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _is_there(config: RunConfig, key: str) -> bool:
    """Whether an earlier export with this key finished, and nothing of it changed since."""
    noted, manifest = Path(config.run_dir) / EXPORT_FILE, artifact_dir(config) / MANIFEST_FILE
    if not (noted.is_file() and manifest.is_file()) or noted.read_bytes() != _made_from(config, key):
        return False
    return not ArtifactReader(artifact_dir(config)).check()


def _note_export(config: RunConfig, key: str) -> None:
    noted = Path(config.run_dir) / EXPORT_FILE
    partial = noted.with_suffix(".partial")
    partial.write_bytes(_made_from(config, key))
    partial.replace(noted)


def _made_from(config: RunConfig, key: str) -> bytes:
    return json.dumps({"key": key, "manifest": sha256_of_file(artifact_dir(config) / MANIFEST_FILE)}).encode()


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """What is written at any moment is good for the next start, so that a signal may come at any."""

    def stop(number: int, frame: Any) -> None:
        raise StoppedBySignal("stopped by a signal while exporting; the same command continues there")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _verify(
    config: RunConfig,
    hf_config: dict[str, Any] | None,
    artifact: Path | None = None,
    run_dir: Path | None = None,
    text: Windows | None = None,
) -> Verification:
    artifact, run_dir = artifact or artifact_dir(config), run_dir or Path(config.run_dir)
    limits = Limits(
        device=config.device,
        memory=deployment.plan(config, hf_config) if hf_config else None,
        max_loss_rise=config.export.max_loss_rise,
        runtimes=tuple(config.runtimes),
    )
    log.info("verifying %s", artifact)
    return verify_artifact(artifact, run_dir / "reference", limits, output=run_dir / "verify.json", text=text)


def _raise_unless_ok(report: Verification, written: Path) -> None:
    failed = [f"{check.name} ({check.detail or check.value})" for check in report.checks if not check.ok]
    if not report.ok:
        raise VerificationFailed(f"{len(failed)} checks do not hold: {'; '.join(failed)[:800]}; all of it: {written}")


def _summary(config: RunConfig, report: Verification) -> None:
    """What the run brought: losses, bytes, the artifact, the next command."""
    from rich.table import Table

    run_dir = Path(config.run_dir)
    losses = json.loads((run_dir / "reference" / "reference.json").read_text())["losses"]
    shown = Table(
        "model", "held-out nats/token", "perplexity", title=f"{config.scenario or 'run'}: {config.quant.name}"
    )
    labels = {"bf16": "as it came (bf16)", "fp32": "as it came (fp32)", "ptq": "calibrated (PTQ)", "trained": "trained"}
    for key, label in labels.items():
        if key in losses:
            shown.add_row(label, f"{losses[key]:.4f}", f"{torch.tensor(losses[key]).exp():.2f}")
    for check in report.checks:
        if check.name == "perplexity" and isinstance(check.value, float):  # the artifact's rise over the first row
            loss = check.value + next(losses[key] for key in labels if key in losses)
            shown.add_row("artifact", f"{loss:.4f}", f"{torch.tensor(loss).exp():.2f}")
    console().print(table(report))
    console().print(shown)
    reader = ArtifactReader(artifact_dir(config))
    before = bf16_bytes(reader.manifest.linears, reader.manifest.tensors)
    plan = json.loads((run_dir / "plan.json").read_text())
    log.info(
        "weights: %.1f MB, %.1f MB in bf16 (%.3f)",
        reader.size_bytes() / 1e6,
        before / 1e6,
        reader.size_bytes() / before,
    )
    log.info(
        "device %s: %.0f of %.0f MiB",
        config.device.name,
        plan["device_total_bytes"] / 2**20,
        plan["device"]["budget_bytes"] / 2**20,
    )
    for name, ran in report.runtimes.items():
        log.info("%s on the target %s: %s", name, ran["target"], ran["recipe"])
        if "text" in ran:
            log.info("> %s", ran["prompt"])
            log.info("%s", " ".join(ran["text"].split()))
        if "tokens_per_second" in ran:
            speed, peak = ran["tokens_per_second"], ran["peak_rss_bytes"] / 2**20
            log.info("%.1f tokens/s with %d thread(s), %.0f MiB resident at most", speed, ran["threads"], peak)
    deployable, why = report.deployable
    log.info("deployable: %s, %s", "yes" if deployable else "not yet", why)
    log.info("artifact: %s", artifact_dir(config))
    log.info("next: python launch/evaluate.py artifact=%s data.heldout=YOUR_TEXT", artifact_dir(config))
