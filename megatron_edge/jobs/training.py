"""The qat job: import -> evaluate -> calibrate -> train -> reference -> export -> verify. Also: a checkpoint evaluated.

Stages meet in the run directory: what a checkpoint already holds is not done again, and export and verify can be run
alone on it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from megatron_edge import checkpoint as checkpoints
from megatron_edge.artifact.formats import STATIC_KV_FORMATS
from megatron_edge.checks import check_model_dims
from megatron_edge.contracts import InputError, QuantPlan, QuantReport
from megatron_edge.jobs import evaluation
from megatron_edge.jobs.delivery import finish
from megatron_edge.jobs.outcome import recorded
from megatron_edge.jobs.preflight import records_steps
from megatron_edge.jobs.teacher import teacher_source
from megatron_edge.log import MetricsWriter, TrainingProgress
from megatron_edge.model.build import build_model, load_weights
from megatron_edge.model.source import ModelSource, open_model
from megatron_edge.quantize import adapters, apply, awq, clip, policy, smoothquant, written_inputs
from megatron_edge.runtime.session import Session, open_session
from megatron_edge.runtime.watchdog import mark
from megatron_edge.tracking import tracked
from megatron_edge.train import graph, reference, step
from megatron_edge.train.batches import WINDOWS, even_batches, in_batches
from megatron_edge.train.data import Batch, BatchPlan, TrainingData, load_data
from megatron_edge.train.distill import Distillation
from megatron_edge.train.loop import fit

if TYPE_CHECKING:
    from megatron_edge.config import RunConfig
    from megatron_edge.runtime.launcher import Launch

log = logging.getLogger("megatron_edge")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class _Run:
    """What the stages of one job share."""

    config: RunConfig
    session: Session
    source: ModelSource
    plan: QuantPlan
    data: TrainingData
    heldout: list[Batch]
    teacher: ModelSource | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def checkpoint_dir(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.train.precision]

    @property
    def losses(self) -> dict[str, float]:
        return self.extra.setdefault("losses_nats_per_token", {})


@recorded
def qat(config: RunConfig, launch: Launch) -> None:
    """The whole job. Every rank calls it; export and verify run on rank 0 after the others are gone."""
    source = open_model(config.model)
    plan = policy.make_plan(config.quant, config.kv, source.hf_config)
    with job_session(config, launch) as session:
        run = _prepare_run(config, session, source, plan)
        run.teacher = teacher_source(config, source)
        model = _build(run, run.source)
        found = _checkpoint_to_resume(run)
        if found is None:
            _import_and_calibrate(run, model)
            found = checkpoints.find_newest(run.checkpoint_dir, session)
            assert found is not None
        else:
            run.extra = found.extra
            apply.insert_quantizers(model, plan)
        trained = _train(run, model, found)
        _write_reference(run, trained)
    if launch.rank == 0:
        finish(config, launch.threads)


def evaluate(config: RunConfig, launch: Launch) -> None:
    """Held-out loss and accuracy of run_dir's newest checkpoint, quantizers on, over any layout. Every rank calls it.

    Raises:
        InputError: no intact checkpoint, or a layout that the model does not divide into.
    """
    source = open_model(config.model)
    check_model_dims(config, source.hf_config)
    plan = policy.make_plan(config.quant, config.kv, source.hf_config)
    with job_session(config, launch) as session:
        run = _prepare_run(config, session, source, plan)
        found = checkpoints.find_newest(run.checkpoint_dir, session)
        if found is None:
            raise InputError(f"run_dir={config.run_dir!r}: no intact checkpoint there; allowed: a run that saved one")
        model = _build(run, run.source)
        apply.insert_quantizers(model, plan)
        checkpoints.load_checkpoint(found, model, None, plan, session)
        reference.round_unquantised(model)  # as the artifact stores it
        mark("evaluating")
        context, multiple = source.hf_config["max_position_embeddings"], _window_multiple(session)
        vocab_size = source.hf_config["vocab_size"]
        examination = evaluation.Examination(config, source.tokenizer(), run.data, context, multiple)
        answers = examination.take(lambda windows: _window_losses(model, windows, vocab_size, session))
    if launch.rank == 0:
        del model
        evaluation.report(config, examination, answers, str(found.path), source.tokenizer(), run.dtype)


def _window_multiple(session: Session) -> int:
    """What the length of a window must be a multiple of in this layout."""
    plan = session.plan
    return 2 * plan.cp * plan.tp if plan.cp > 1 else plan.tp


def _window_losses(model: nn.Module, windows: evaluation.Windows, vocab_size: int, session: Session) -> torch.Tensor:
    """fp32 nats [n, s] of each next token, on every rank; data-parallel ranks share the windows. All ranks call it."""
    labels = windows.tokens.roll(-1, dims=1).masked_fill(~windows.loss_mask, 0)
    whole = Batch(windows.tokens, windows.documents, windows.positions, windows.loss_mask, labels)
    batches = in_batches(whole, vocab_size, session)
    size = len(batches[0].tokens)
    filled = batches + batches[:1] * (-len(batches) % session.plan.dp)  # all ranks run as often, for their experts
    mine = step.token_losses(model, filled[session.dp_rank :: session.plan.dp], session)
    speaks = session.is_last_stage and session.tp_rank == 0 and session.cp_rank == 0
    said = session.gather((session.dp_rank, mine) if speaks else None)
    parts = {found[0]: found[1].split(size) for found in said if found is not None}
    ordered = [parts[at % session.plan.dp][at // session.plan.dp] for at in range(len(filled))]
    return torch.cat(ordered)[: len(windows)]


def job_session(config: RunConfig, launch: Launch) -> AbstractContextManager[Session]:
    """The process groups of a job, as its configuration and its launch have them. All ranks call it."""
    return open_session(
        launch.plan,
        rank=launch.rank,
        local_rank=launch.local_rank,
        store=launch.store,
        timeout_seconds=config.parallel.timeout_seconds,
        seed=config.train.seed,
    )


def _prepare_run(config: RunConfig, session: Session, source: ModelSource, plan: QuantPlan) -> _Run:
    data = load_data(
        config.data,
        source.tokenizer(),
        config.train.seq_length_tokens,
        config.train.seed,
        Path(config.run_dir) / "data",
        session.on_rank_0,
    )
    windows = data.heldout.evaluation(config.data.eval_tokens)
    heldout = in_batches(windows, source.hf_config["vocab_size"], session)
    return _Run(config, session, source, plan, data, heldout)


def _build(run: _Run, source: ModelSource) -> nn.ModuleList:
    plan, device, config = run.session.plan, run.session.device, run.config
    return build_model(
        source.hf_config, plan, run.dtype, device, config.parallel.recompute, backend=config.model.backend
    )


def _checkpoint_to_resume(run: _Run) -> checkpoints.CheckpointInfo | None:
    """Raises InputError where resume=must finds nothing, or the data are not those of the checkpoint."""
    if run.config.resume == "never":
        return None
    mark("reading the checkpoints")
    found = checkpoints.find_newest(run.checkpoint_dir, run.session)
    if found is None:
        if run.config.resume == "must":
            raise InputError(f"resume=must: no intact checkpoint in {run.checkpoint_dir}; allowed: auto, never")
        return None
    if found.extra["data"] != run.data.fingerprint:
        raise InputError(
            f"data: {found.path} was trained on other data than data.train gives now; allowed: the same text"
        )
    if found.extra["model"] != run.source.fingerprint():
        raise InputError(f"model.source: {found.path} was trained from another model than {run.source.path}")
    if run.teacher is not None and found.extra["teacher"] != run.teacher.fingerprint():
        raise InputError(f"train.teacher: {found.path} was taught by another model than {run.teacher.path}")
    log.info("resuming from %s", found.path)
    return found


def _import_and_calibrate(run: _Run, model: nn.Module) -> None:
    """Weights in, losses of the model as it came and as calibrated, and the checkpoint of step 0."""
    session, plan = run.session, run.plan
    mark("importing the model")
    load_weights(model, run.source.read, run.source.hf_config, session)
    run.extra |= {"data": run.data.fingerprint, "model": run.source.fingerprint()}
    if run.teacher is not None:
        run.extra["teacher"] = run.teacher.fingerprint()
    run.losses["bf16" if run.dtype is torch.bfloat16 else "fp32"] = _evaluate(run, model, "the model as it came")
    report = _calibrate(run, model)
    if plan.rules or plan.kv != "none":
        run.losses["ptq"] = _evaluate(run, model, "calibrated, not trained")
    _write_report(run, report)
    _save(run, 0, model, None)


def _write_report(run: _Run, mine: QuantReport) -> None:
    """quant_report.json: what all stages' quantizers are and hold. All ranks call it."""
    reports = [asdict(report) for report in run.session.gather(mine)]
    unseen = sorted({name for report in reports for name in report["unseen"]})
    if unseen:
        log.warning(
            "%d experts saw no calibration token and take the scales of their layer's others: %s; "
            "more data, or a larger quant.calib_size, would reach them",
            len(unseen),
            ", ".join(unseen[:8]) + (" ..." if len(unseen) > 8 else ""),
        )
    merged = {
        "experts_without_tokens": unseen,
        "matches_per_rule": mine.matches_per_rule,
        "disabled": sorted({name for report in reports for name in report["disabled"]}),
        "amax": {name: value for report in reports for name, value in sorted(report["amax"].items())},
        "awq_alpha": {name: value for report in reports for name, value in sorted(report["awq_alpha"].items())},
    }
    if run.session.rank == 0:
        (run.directory / "quant_report.json").write_text(json.dumps(merged, indent=1))


def _calibrate(run: _Run, model: nn.Module) -> QuantReport:
    config, session, plan = run.config, run.session, run.plan
    calibration: list[Batch] = []
    mark("calibrating")
    on_data = any(rule.activation != "none" for rule in plan.rules)
    if plan.algorithm != "max" or on_data or plan.kv in STATIC_KV_FORMATS:
        windows = run.data.train.calibration(config.quant.calib_size)
        calibration = even_batches(windows, WINDOWS)  # AWQ's choice of tokens is of these on any device

    def forward_loop(_: nn.Module) -> None:
        step.run_forward(model, calibration, session)

    choices: dict[str, awq.AwqChoice] = {}
    if plan.algorithm in ("awq", "awq_clip"):
        tokens = config.quant.calib_size * config.train.seq_length_tokens
        choices = awq.search_and_fold(
            model, plan, forward_loop, calib_tokens=tokens, awq_tokens=config.quant.awq_tokens
        )
    elif plan.algorithm == "smoothquant":
        smoothquant.smooth_and_fold(model, plan, forward_loop)
    clipped = clip.clip_weights(model, plan, forward_loop) if plan.algorithm == "awq_clip" else {}
    matches = apply.insert_quantizers(model, plan)
    report = apply.calibrate(model, plan, matches, forward_loop, clipped)
    if matches:
        log.info("quantizers: %s", ", ".join(f"{pattern} x{count}" for pattern, count in matches.items()))
    return replace(report, awq_alpha={name: choice.alpha for name, choice in choices.items()})


def _evaluate(run: _Run, model: nn.Module, what: str) -> float:
    mark(f"evaluating {what}")
    loss = step.evaluate(model, run.heldout, run.session)
    _log_loss(what, loss)
    return loss


def _log_loss(what: str, loss: float) -> None:
    log.info("held-out loss, %s: %.4f nats/token (perplexity %.2f)", what, loss, torch.tensor(loss).exp())


def _train(run: _Run, model: nn.Module, found: checkpoints.CheckpointInfo) -> nn.Module:
    """Trains from `found` to the last step; gives the model to go on with."""
    config, session = run.config, run.session
    steps = config.train.steps if config.train.mode != "ptq" else 0
    if found.step == 0 or found.step >= steps:
        checkpoints.load_checkpoint(found, model, None, run.plan, session)
    if found.step >= steps:
        return model
    if config.train.lora_rank is not None and config.train.lora_alpha is not None:
        rank, alpha = config.train.lora_rank, config.train.lora_alpha
        count = adapters.attach(model, session, rank=rank, alpha=alpha, seed=config.train.seed)
        log.info("adapters of rank %d on %d linear layers of rank 0; everything else is frozen", rank, count)
    stream = None
    if records_steps(config, run.source.hf_config):
        stream = torch.cuda.Stream()
        log.info("steps run as one CUDA graph from step %d on", found.step + graph.EAGER_STEPS + 1)
    wrapped, optimizer = step.make_trainable(
        model, config.train, run.dtype, distributed_optimizer=config.parallel.distributed_optimizer, stream=stream
    )
    if found.step > 0:
        checkpoints.load_checkpoint(found, wrapped, optimizer, run.plan, session)
    batches = BatchPlan(run.data.train, config.train.global_batch, config.train.micro_batch)
    written_inputs.use(wrapped, config.train.fp8_gemm)
    objective = _objective(run)
    with recorded_steps(config, session, found.step, steps) as report:
        fit(
            wrapped,
            optimizer,
            batches,
            config.train,
            session,
            start_step=found.step,
            save=lambda at: _save(run, at, wrapped, optimizer),
            report=report,
            objective=objective,
            gradients=graph.StepGraph(stream) if stream is not None else step.forward_backward,
        )
    adapters.detach(wrapped)
    return wrapped


@contextmanager
def recorded_steps(config: RunConfig, session: Session, done: int, steps: int) -> Iterator[Callable[..., None]]:
    """A function that takes each step's metrics, after `done` of `steps`: to run_dir, the log and the tracker."""
    with (
        MetricsWriter(config.run_dir, session.rank, after_step=done) as metrics,
        TrainingProgress(steps, done, session.rank, config.train.log_every_steps) as progress,
        tracked(config, session.rank) as track_metrics,
    ):

        def report(values: dict[str, float]) -> None:
            metrics.write(values)
            progress.update(values)
            track_metrics(values)

        yield report


def _objective(run: _Run) -> step.Objective:
    """What training minimises; under train=qad it holds the teacher: in the student's layout and dtype, plain."""
    if run.teacher is None:
        return step.LABELS
    mark("building the teacher")
    teacher = _build(run, run.teacher)
    load_weights(teacher, run.teacher.read, run.teacher.hf_config, run.session)
    return Distillation(teacher, run.config.train, run.session)


def _save(run: _Run, at: int, model: nn.Module, optimizer: Any | None) -> None:
    mark(f"saving step {at}")
    checkpoints.save_checkpoint(
        run.checkpoint_dir,
        at,
        model,
        optimizer,
        run.plan,
        run.session,
        extra=run.extra,
        keep=run.config.train.keep_checkpoints,
    )
    log.info("saved %s", run.checkpoint_dir / f"step_{at:08d}")


def _write_reference(run: _Run, model: nn.Module) -> None:
    """The trained model's own word, for verify; all ranks call it."""
    mark("writing the reference")
    loss = reference.write_reference(
        run.directory / "reference", model, run.source.hf_config, run.plan, run.session, run.heldout, run.losses
    )
    _log_loss("trained", loss)
