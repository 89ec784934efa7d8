"""The teacher of train=qad: which model it is, and whether it can teach the student.

Called by preflight (rank 0, before anything is spent) and by training (every rank).
"""

from __future__ import annotations

from megatron_edge import checks
from megatron_edge.config import RunConfig
from megatron_edge.contracts import InputError, ParallelPlan
from megatron_edge.model.source import ModelSource, open_source, resolve_source


def teacher_source(config: RunConfig, student: ModelSource) -> ModelSource | None:
    """The model of train.teacher, the student's own where that is null; None but under train=qad.

    Raises:
        InputError: no model, or a Megatron checkpoint that train.teacher_hf_config does not describe.
    """
    if config.train.mode != "qad":
        return None
    if config.train.teacher is None:
        return student
    described_by = config.train.teacher_hf_config
    try:
        home = None if described_by is None else resolve_source(described_by, None)
        return open_source(resolve_source(config.train.teacher, None), home)
    except InputError as error:
        words = str(error).replace("model.hf_config", "train.teacher_hf_config")
        raise InputError(f"train.teacher={config.train.teacher}: {words}") from error


def check_teacher(config: RunConfig, student: ModelSource, teacher: ModelSource, layout: ParallelPlan) -> None:
    """Raises InputError where the teacher has other tokens than the student, or does not divide into the layout."""
    field = f"train.teacher={config.train.teacher}"
    sizes = [source.hf_config["vocab_size"] for source in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise InputError(f"{field}: its vocab_size={sizes[0]}; allowed is the student's, {sizes[1]} (model.source)")
    theirs, ours = (source.tokenizer().get_vocab() for source in (teacher, student))
    differing = sorted(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token))
    if differing:
        raise InputError(
            f"{field}: its tokenizer is not the student's: {len(differing)} tokens have other ids, {differing[0]!r} "
            f"{theirs.get(differing[0])} there and {ours.get(differing[0])} here; allowed: the same tokenizer"
        )
    widths = [source.hf_config["hidden_size"] for source in (teacher, student)]
    for name in ("distill_hidden_weight", "distill_layers_weight"):
        if getattr(config.train, name) and widths[0] != widths[1]:
            raise InputError(
                f"train.{name}={getattr(config.train, name)}: compares hidden states, and those of {field} have "
                f"{widths[0]} channels, the student's {widths[1]}; allowed is 0"
            )
    layers = [source.hf_config["num_hidden_layers"] for source in (teacher, student)]
    if config.train.distill_layers_weight and layers[0] != layers[1]:
        raise InputError(
            f"train.distill_layers_weight={config.train.distill_layers_weight}: compares layer by layer, and {field} "
            f"has {layers[0]} layers, the student {layers[1]}; allowed is 0"
        )
    try:
        checks.check_teacher_dims(config, teacher.hf_config)
        checks.layers_per_chunk(teacher.hf_config["num_hidden_layers"], layout)
    except InputError as error:
        raise InputError(f"{field}: {error}") from error
