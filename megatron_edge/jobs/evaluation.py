"""The evaluate job: held-out loss and multiple-choice accuracy of an artifact or a checkpoint, against a baseline.

An artifact runs in transformers, in one process. A checkpoint runs in Megatron under any layout (jobs/training.py);
rank 0 then reports. A baseline always runs in transformers, on rank 0.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megatron_edge.artifact.store import MANIFEST_FILE, ArtifactReader
from megatron_edge.config import RunConfig
from megatron_edge.contracts import InputError, ParallelPlan
from megatron_edge.log import console
from megatron_edge.model.source import ModelSource, load_tokenizer, open_model, open_source, resolve_source
from megatron_edge.runtime.launcher import Launch
from megatron_edge.train.data import TrainingData, load_data, tokenizer_hash
from megatron_edge.verify import evaluation
from megatron_edge.verify.choices import (
    Answers,
    PackedChoices,
    answers_of,
    log_likelihoods,
    next_token_losses,
    pack_choices,
)
from megatron_edge.verify.quality import Windows, load_model
from megatron_edge.verify.tasks import Task, load_tasks

log = logging.getLogger("megatron_edge")

FILE = "evaluation.json"
PACKAGES = ("torch", "transformers", "megatron-core", "nvidia-modelopt")
LossesOf = Callable[[Windows], torch.Tensor]


class Examination:
    """Text and questions as every model of the evaluation gets them. Every rank makes the same one."""

    def __init__(
        self, config: RunConfig, tokenizer: Any, data: TrainingData, context_tokens: int, multiple: int = 1
    ) -> None:
        batch = data.heldout.evaluation(config.data.eval_tokens)
        self.windows = Windows(batch.tokens, batch.documents, batch.positions, batch.loss_mask)
        self.tasks: list[Task] = load_tasks(config.eval.tasks, config.eval.limit) if config.eval.tasks else []
        self._packed = [pack_choices(task, tokenizer, context_tokens, multiple) for task in self.tasks]

    def take(self, losses_of: LossesOf) -> evaluation.Findings:
        """`losses_of` gives fp32 nats [n, s] of each next token of windows of one size."""
        nll = losses_of(self.windows)
        return evaluation.Findings(
            nll, {t.name: self._answer(t, p, losses_of) for t, p in zip(self.tasks, self._packed, strict=True)}
        )

    def _answer(self, task: Task, packed: PackedChoices, losses_of: LossesOf) -> Answers:
        shapes = ", ".join(f"{len(windows)} of {windows.tokens.shape[1]}" for windows in packed.windows)
        log.info("%s: %d questions in windows: %s", task.name, len(task.questions), shapes)
        return answers_of(task, log_likelihoods(packed, losses_of))


def prepare(config: RunConfig, layout: ParallelPlan) -> RunConfig:
    """Rank 0, before anything is spent: tasks can be read (and are downloaded), the baseline is there, the report can
    be written.

    Raises:
        InputError: it is not so.
    """
    if config.eval.tasks:
        load_tasks(config.eval.tasks, config.eval.limit)
    place, field = _place(config).parent, "artifact" if config.artifact else "run_dir"
    if place.is_dir() and not os.access(place, os.W_OK):
        raise InputError(
            f"{field}={config.artifact or config.run_dir}: {FILE} cannot be written into {place}; "
            "allowed: a copy where this user can write"
        )
    if _baseline(config) is not None:
        _open_baseline(config)
    return config


def evaluate(config: RunConfig, launch: Launch) -> None:
    """Held-out loss, perplexity and accuracy of artifact=DIR. Rank 0 does it."""
    if launch.rank != 0:
        return
    directory = Path(str(config.artifact))
    reader = ArtifactReader(directory)
    tokenizer = load_tokenizer(directory)
    cache = Path(config.run_dir) / "data"
    data = load_data(config.data, tokenizer, config.train.seq_length_tokens, config.train.seed, cache)
    examination = Examination(config, tokenizer, data, _context(directory))
    dtype = getattr(torch, reader.manifest.dtype)
    found = examination.take(_transformers(load_model(reader, dtype, _device())))
    report(config, examination, found, str(directory), tokenizer, dtype)


def report(
    config: RunConfig,
    examination: Examination,
    found: evaluation.Findings,
    what: str,
    tokenizer: Any,
    dtype: torch.dtype,
) -> None:
    """The baseline on the same text and questions, the comparison as a table and as evaluation.json. Rank 0 alone."""
    name, theirs = _baseline(config), None
    if name is not None:
        gc.collect()  # the model before it, which need not be there twice
        source = _open_baseline(config)
        _check_tokenizer(name, source, tokenizer)
        log.info("the baseline: %s", source.directory if isinstance(source, ArtifactReader) else source.path)
        theirs = examination.take(_transformers(_load_baseline(source, dtype)))
    text = evaluation.text_result(examination.windows, found.nll, theirs.nll if theirs else None)
    log.info(
        "%s: %.4f nats/token, perplexity %.3f over %d tokens", what, text.nats_per_token, text.perplexity, text.tokens
    )
    results = [
        result
        for task in examination.tasks
        for result in evaluation.task_results(
            task, found.answers[task.name], theirs.answers[task.name] if theirs else None
        )
    ]
    versions = {package: version(package) for package in PACKAGES}
    done = evaluation.Report(what, name, text, tuple(results), versions)
    console().print(evaluation.table(done))
    evaluation.write(done, _place(config))
    log.info("written to %s", _place(config))


def _transformers(model: torch.nn.Module) -> LossesOf:
    return lambda windows: next_token_losses(model, windows)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _context(directory: Path) -> int:
    return int(json.loads((directory / "config.json").read_text())["max_position_embeddings"])


def _place(config: RunConfig) -> Path:
    """evaluation.json: in the run directory of a checkpoint, beside an artifact."""
    return (Path(config.artifact).absolute().parent if config.artifact else Path(config.run_dir)) / FILE


def _baseline(config: RunConfig) -> str | None:
    """eval.baseline, where null is the model as it came if there are tasks; None for no comparison."""
    chosen = config.eval.baseline or ("source" if config.eval.tasks else "none")
    return None if chosen == "none" else chosen


def _open_baseline(config: RunConfig) -> ModelSource | ArtifactReader:
    """Raises InputError where it is no model, or not the one that the artifact was made from."""
    chosen = _baseline(config)
    assert chosen is not None
    if chosen == "source":
        return _open_source_of(config)
    for directory in (Path(chosen), Path(chosen) / "artifact" / "canonical"):
        if (directory / MANIFEST_FILE).is_file():
            return ArtifactReader(directory)
    try:
        return open_source(resolve_source(chosen, None))
    except InputError as error:
        raise InputError(
            f"eval.baseline={chosen}: no artifact, run with one, or model ({error}); allowed also: source, none"
        ) from None


def _open_source_of(config: RunConfig) -> ModelSource:
    if config.artifact is None:
        return open_model(config.model)
    told = ArtifactReader(Path(config.artifact)).manifest.source
    try:
        described_by = told.get("hf_config")
        source = open_source(
            resolve_source(str(told.get("model")), None), resolve_source(described_by, None) if described_by else None
        )
    except InputError as error:
        raise InputError(
            f"eval.baseline=source: {config.artifact} was made from model.source={told.get('model')}, which is not to "
            f"be had here ({error}); allowed: none, or eval.baseline=DIRECTORY"
        ) from None
    if source.fingerprint() != told.get("fingerprint"):
        raise InputError(
            f"eval.baseline=source: {source.path} is another model than {config.artifact} was made from; "
            "allowed: eval.baseline=DIRECTORY, to compare with it all the same"
        )
    return source


def _check_tokenizer(name: str, source: ModelSource | ArtifactReader, tokenizer: Any) -> None:
    own = load_tokenizer(source.directory) if isinstance(source, ArtifactReader) else source.tokenizer()
    if own.get_vocab() != tokenizer.get_vocab() or tokenizer_hash(own) != tokenizer_hash(tokenizer):
        raise InputError(
            f"eval.baseline={name}: its tokenizer is another one, so that losses and choices are not of the same "
            "tokens; allowed: a model with the same tokenizer"
        )


def _load_baseline(source: ModelSource | ArtifactReader, dtype: torch.dtype) -> torch.nn.Module:
    """transformers' model in `dtype`, the data type of what is compared with it."""
    if isinstance(source, ArtifactReader):
        return load_model(source, dtype, _device())
    import transformers

    if source.kind == "safetensors":
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            model = transformers.AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype, local_files_only=True)
    else:
        config = transformers.AutoConfig.for_model(**source.hf_config)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name not in tied:
                    parameter.copy_(source.read(name))
        model.tie_weights()
    return model.to(_device()).eval().requires_grad_(False)
