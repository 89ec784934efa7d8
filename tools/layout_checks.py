"""What one rank does for tools/layout_parity.py, which starts it under torchrun: one launch, many layouts and formats.

In: job.json (`Job`), and what the layout `REFERENCE` (one process, in the first launch) has written. Out: a
`<layout>.json` with, for each format, the measured values; the driver judges them. Only the product's own public
functions build, calibrate, load, save and train.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from megatron_edge.contracts import QuantPlan
from tools.layout_parity import (
    CALIBRATION_WINDOWS,
    EVALUATION_BATCH,
    REFERENCE,
    REORDERED,
    SEQ_LENGTH_TOKENS,
    Float64Sums,
    Job,
    compose,
    layout_plan,
)
from tools.layout_state import (
    against_reference,
    data_quantizers,
    input_of,
    keep,
    num_differing,
    raw_maxima,
    read_checkpoint,
    state_of,
    watched,
)


@dataclass(frozen=True)
class Case:
    """One format on one layout."""

    config: Any
    plan: QuantPlan
    data: Any
    source: Any
    session: Any
    directory: Path
    layout: str
    load_from: str
    name: str

    @property
    def is_reference(self) -> bool:
        return self.layout == REFERENCE

    def file(self, what: str) -> Path:
        return self.directory / REFERENCE / self.name / f"{what}.safetensors"

    def checkpoints(self, layout: str) -> Path:
        return self.directory / layout / self.name / "checkpoints"


def examine(case: Case) -> dict[str, Any]:
    """Everything about one format. All ranks call it; the result is the same on all of them."""
    model = new_model(case)
    found: dict[str, Any] = {"values": {}, "maxima": {}, "noise": {}, "choices": {}}
    calibrate(case, model, found)
    if case.is_reference:
        save(case, model)
    else:
        found["values"] |= reload(case, model)
    on_data = data_quantizers(model)
    if on_data:
        found["values"] |= recorded_inputs(case, model, on_data)
        found["values"]["mean_loss"] = evaluate(case, model)
    with switched_off(list(on_data.values())):
        losses = train(case, model, found["values"])
    return merge(found, case.session.plan.world_size) | {"losses": losses, "on_data": bool(on_data)}


def merge(found: dict[str, Any], world_size: int) -> dict[str, Any]:
    """The ranks' findings as one: of several numbers the largest."""
    import torch.distributed as dist

    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, found)
    whole: dict[str, Any] = {kind: {} for kind in found}
    for one in everyone:
        for kind, entries in one.items():
            for name, value in entries.items():
                known = whole[kind].get(name)
                whole[kind][name] = value if known is None or kind == "choices" else max(known, value)
    return whole


def new_model(case: Case) -> nn.Module:
    from megatron_edge.model.build import build_model, load_weights

    gc.collect()
    session = case.session
    recompute = "full" if case.layout.endswith("RC") else "none"
    model = build_model(case.source.hf_config, session.plan, torch.float32, session.device, recompute)
    load_weights(model, case.source.read, case.source.hf_config, session)
    return model


def calibrate(case: Case, model: nn.Module, found: dict[str, Any]) -> None:
    """AWQ or SmoothQuant where the recipe says so, quantizers, maxima: as jobs/training.py does it.

    Into `found`: AWQ's choices; "maxima", how many elements of each maximum are not the reference's; "noise", how far
    each is from the reference's before both are snapped, relative; and whether all are what weights and data say.
    """
    from megatron_edge.quantize import apply, awq, clip, smoothquant
    from megatron_edge.train import step

    batches = case.data.train.calibration(CALIBRATION_WINDOWS).split(EVALUATION_BATCH)
    seen: dict[str, Tensor] = {}

    def see(name: str, x: Tensor, _: Tensor) -> None:
        if x.numel():  # no token of a batch may reach an expert
            seen[name] = torch.maximum(seen.get(name, x.new_zeros(())), x.abs().max())

    def forward_loop(_: nn.Module) -> None:
        with watched(data_quantizers(model), see):
            step.run_forward(model, batches, case.session)

    if case.plan.algorithm in ("awq", "awq_clip"):
        tokens = CALIBRATION_WINDOWS * SEQ_LENGTH_TOKENS
        wanted = case.config.quant.awq_tokens
        choices = awq.search_and_fold(model, case.plan, forward_loop, calib_tokens=tokens, awq_tokens=wanted)
        found["choices"] = {name: asdict(choice) for name, choice in choices.items()}
    elif case.plan.algorithm == "smoothquant":
        smoothquant.smooth_and_fold(model, case.plan, forward_loop)
    clipped = clip.clip_weights(model, case.plan, forward_loop) if case.plan.algorithm == "awq_clip" else {}
    apply.calibrate(model, case.plan, apply.insert_quantizers(model, case.plan), forward_loop, clipped)
    state, raw = state_of(model), raw_maxima(model, seen)
    kinds = {name: q.backend_extra_args for name, q in apply.enabled_quantizers(model).items()}
    if keeps_maxima(case.plan):
        wrong = [num_differing(snapped(kinds[n], value.float()), state[n + ".amax"]) for n, value in raw.items()]
        found["values"]["unexplained"] = float(sum(wrong))
    if case.is_reference:
        keep(case.file("state"), state | {name + ".raw": value for name, value in raw.items()})
        return
    for name in raw:
        both = {name + ".amax": state[name + ".amax"], name + ".raw": raw[name]}
        (_, a, b), (_, raw_a, raw_b) = against_reference(case.file("state"), both, case.session)
        found["maxima"][name] = num_differing(a, b)
        found["noise"][name] = float(((raw_a - raw_b).abs() / raw_b.clamp_min(1e-30)).max())


def keeps_maxima(plan: QuantPlan) -> bool:
    """Whether scales cover the maxima of weights and data, or what percentile, error or clipping made of them."""
    return plan.calibration == "max" and plan.algorithm != "awq_clip"


def snapped(args: dict[str, Any], value: Tensor) -> Tensor:
    """A raw maximum as its quantizer (of these backend arguments) keeps it."""
    from megatron_edge.artifact import formats

    return (formats.snap_amax if args["role"] == "weight" else formats.snap_tensor_amax)(args["format"], value)


def save(case: Case, model: nn.Module) -> Path:
    from megatron_edge import checkpoint

    directory = case.checkpoints(case.layout)
    return checkpoint.save_checkpoint(directory, 0, model, None, case.plan, case.session, extra={}, keep=1)


def reload(case: Case, model: nn.Module) -> dict[str, float]:
    """Loads the checkpoint of the layout before this one, saves it again, and counts what is not the reference's."""
    from megatron_edge import checkpoint
    from megatron_edge.artifact import formats
    from megatron_edge.quantize.policy import rule_for

    found = checkpoint.find_newest(case.checkpoints(case.load_from), case.session)
    assert found is not None, case.load_from
    checkpoint.load_checkpoint(found, model, None, case.plan, case.session)
    state = state_of(model)
    values = {
        "loaded": float(
            sum(num_differing(a, b) for _, a, b in against_reference(case.file("state"), state, case.session))
        )
    }
    blocks = [name for name, tensor in state.items() if name.endswith(".weight_quantizer.amax") and tensor.dim() == 2]
    if not keeps_maxima(case.plan):
        blocks = []
    if blocks:  # of this rank's own rows and columns: needs no other rank
        values["own_blocks"] = 0.0
    for name in blocks:
        linear = name.removesuffix(".weight_quantizer.amax")
        rule = rule_for(linear, case.plan)
        assert rule is not None
        if rule.weight == "int8" and name.split(".")[-3] in ("linear_proj", "linear_fc2"):
            continue  # its rows lie on several ranks
        own = formats.weight_amax(rule.weight, state[linear + ".weight"], rule.group_size)
        values["own_blocks"] += num_differing(formats.snap_amax(rule.weight, own), state[name])
    saved = save(case, model)
    if case.session.rank == 0:
        reference = read_checkpoint(case.checkpoints(REFERENCE) / saved.name)
        again = read_checkpoint(saved)
        assert again.keys() == reference.keys(), again.keys() ^ reference.keys()
        values["saved"] = float(sum(num_differing(again[name], reference[name]) for name in reference))
    return values


def recorded_inputs(case: Case, model: nn.Module, quantizers: dict[str, Any]) -> dict[str, float]:
    """The reference keeps what each data quantizer got and gave; other layouts feed it the same and count."""
    from safetensors import safe_open

    from megatron_edge.train import step

    session = case.session
    if case.is_reference:
        seen: dict[str, Tensor] = {}
        with watched(quantizers, lambda name, x, y: seen.update({name + ".in": x, name + ".out": y})):
            step.run_forward(model, case.data.train.calibration(1).split(1), session)
        keep(case.file("recorded"), seen)
        return {}
    differing = 0
    with safe_open(str(case.file("recorded")), framework="pt") as stored, torch.no_grad():
        for name, quantizer in quantizers.items():
            given, expected = (input_of(name, stored.get_tensor(name + end), session) for end in (".in", ".out"))
            differing += num_differing(quantizer(given.contiguous().to(session.device)), expected)
    return {"recorded": float(differing)}


def evaluate(case: Case, model: nn.Module) -> float:
    """Nats per token over data.eval_tokens held-out tokens with every quantizer on."""
    from megatron_edge.train import step

    windows = case.data.heldout.evaluation(case.config.data.eval_tokens)
    whole = len(windows.tokens) // EVALUATION_BATCH * EVALUATION_BATCH
    return step.evaluate(
        model, type(windows)(*(part[:whole] for part in windows)).split(EVALUATION_BATCH), case.session
    )


@contextlib.contextmanager
def switched_off(quantizers: list[Any]) -> Iterator[None]:
    for quantizer in quantizers:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.enable()


def train(case: Case, model: nn.Module, values: dict[str, float]) -> list[float]:
    """The losses of the first steps; into `values` the largest difference of a gradient after the first one, and what
    `quantised_alike` says before the last."""
    from megatron_edge.model.build import named_shards
    from megatron_edge.train import step, update
    from megatron_edge.train.data import BatchPlan

    settings, session = case.config.train, case.session
    splits = case.layout.endswith(("DO", "DORC"))
    wrapped, optimizer = step.make_trainable(model, settings, torch.float32, distributed_optimizer=splits)
    schedule = step.learning_rate_schedule(optimizer, settings)
    schedule.step(1)
    batches = BatchPlan(case.data.train, settings.global_batch, settings.micro_batch)
    losses = []
    for at in range(settings.steps):
        if at == settings.steps - 1:
            values |= quantised_alike(case, wrapped, batches.micro_batches(at, 0, 1))
        micro_batches = batches.micro_batches(at, session.dp_rank, session.plan.dp)
        result = step.train_step(wrapped, optimizer, micro_batches, session)
        losses.append(result.loss)
        schedule.step(1)
        if at or splits:  # a distributed optimizer leaves each rank a part of the sum, and rubbish beside it
            continue
        divisor = update.undivided_by(optimizer, result.tokens)
        gradients = {name: param.main_grad / divisor for name, param in named_shards(wrapped).items()}
        if case.is_reference:
            keep(case.file("gradients"), gradients)
            continue
        compared = against_reference(case.file("gradients"), gradients, session)
        values["gradient"] = max(float((a - b).abs().max()) for _, a, b in compared)
    return losses


@torch.no_grad()
def quantised_alike(case: Case, model: nn.Module, batches: list[Any]) -> dict[str, float]:
    """Weights that differ in their last bits may lie on two sides of a rounding boundary, and the scale of a block may.

    Returns:
        How many weights are quantised to another value than the reference's, and the loss of `batches` with those, and
        only those, put back.
    """
    from megatron_edge.model.build import named_shards
    from megatron_edge.quantize.apply import enabled_quantizers, quantizers_off
    from megatron_edge.train import step

    weights, quantizers = named_shards(model), enabled_quantizers(model)
    if case.is_reference:
        keep(case.file("trained"), weights)
        return {}
    flipped, kept = 0, {}
    for name, _, theirs in against_reference(case.file("trained"), weights, case.session):
        quantizer = quantizers.get(name + "_quantizer")
        if quantizer is not None:
            kept[name] = weights[name].detach().clone()
            used, wanted = quantizer(kept[name]), quantizer(theirs.contiguous().to(case.session.device))
            flipped += int((used != wanted).sum())
            weights[name].copy_(torch.where(used != wanted, wanted, used))
    with quantizers_off(model):
        loss = step.evaluate(model, batches, case.session)
    for name, weight in kept.items():
        weights[name].copy_(weight)
    return {"flipped": float(flipped), "restored": loss}


def import_difference(case: Case) -> float:
    """Largest difference of a logit from transformers' own, on the windows of import.safetensors."""
    from safetensors.torch import load_file

    from megatron_edge.train import step
    from megatron_edge.train.data import Batch

    given = load_file(case.directory / "import.safetensors")
    fields = {name: given[name] for name in ("tokens", "documents", "positions")}
    batch = Batch(**fields, loss_mask=torch.ones_like(given["tokens"], dtype=torch.bool), labels=given["tokens"])
    logits = step.token_logits(new_model(case), batch.split(1), case.session)
    return 0.0 if logits is None else float((logits - given["logits"]).abs().max())


def run(job: Job) -> None:
    from torch.distributed import PrefixStore, rendezvous

    from megatron_edge.runtime.session import open_session

    store, rank, _ = next(iter(rendezvous("env://")))
    for layout in job.layouts:
        sums = Float64Sums() if layout == REORDERED else contextlib.nullcontext()
        with (
            open_session(
                layout_plan(layout),
                rank=rank,
                local_rank=int(os.environ["LOCAL_RANK"]),
                store=PrefixStore(layout, store),
                timeout_seconds=1200,
                seed=1,
            ) as session,
            sums,
        ):
            run_layout(job, layout, session)


def run_layout(job: Job, layout: str, session: Any) -> None:
    from megatron_edge.model.source import open_source
    from megatron_edge.quantize import policy
    from megatron_edge.train.data import load_data

    directory = Path(job.directory)
    found: dict[str, Any] = {}
    case: Case | None = None
    for name in ("none", *job.formats):
        config = compose(job.arguments, name)
        if case is None:
            source = open_source(Path(config.model.source))
            tokenizer, cache = source.tokenizer(), directory / "data"
            data = load_data(config.data, tokenizer, SEQ_LENGTH_TOKENS, config.train.seed, cache, session.on_rank_0)
        plan = policy.make_plan(config.quant, config.kv, source.hf_config)
        load_from = ([REFERENCE, *job.chain])[job.chain.index(layout)] if layout in job.chain else REFERENCE
        case = Case(config, plan, data, source, session, directory, layout, load_from, name)
        if name == "none":
            found[name] = merge({"values": {"import": import_difference(case)}}, session.plan.world_size)
        else:
            found[name] = examine(case)
    if session.rank == 0:
        (directory / f"{layout}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    run(Job(**json.loads(Path(sys.argv[1]).read_text())))
