"""The search job: import -> measure each layer in each format -> choose -> measure the choice -> a recipe file.

Beside the choice it measures what the same bytes give without a search; the least divergence is what is written.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_edge import checks, devices, memory
from megatron_edge.config import QuantConfig, RunConfig, targets_able
from megatron_edge.contracts import InputError, ParallelPlan
from megatron_edge.jobs.preflight import check_backend
from megatron_edge.jobs.training import DTYPES, job_session
from megatron_edge.leaves import expected, refuse_unknown
from megatron_edge.log import console
from megatron_edge.model.build import build_model, load_weights
from megatron_edge.model.source import open_model
from megatron_edge.quantize import search as searching
from megatron_edge.quantize.search import Option, Unit
from megatron_edge.recipe import quant_rules
from megatron_edge.runtime.launcher import Launch
from megatron_edge.runtime.session import Session
from megatron_edge.runtime.watchdog import mark
from megatron_edge.train import step
from megatron_edge.train.batches import in_batches
from megatron_edge.train.data import Batch, TrainingData, load_data
from megatron_edge.train.divergence import Divergence
from megatron_edge.verify.statistics import Difference, paired_means

log = logging.getLogger("megatron_edge")

LAYERS_FILE = "layer_divergence.json"
CHOSEN_KEYS = ("name", "weight", "activation", "group_size", "algorithm")
RECIPE_KEYS = (*CHOSEN_KEYS, "calibration", "percentile", "exclude")


@dataclass(frozen=True)
class Measured:
    """One recipe for the whole model: bytes of the linear layers; KL on the search's text, summed over single units and
    measured, and on held-out text; the loss on held-out text, in nats per token; the held-out KL of each window."""

    name: str
    size_bytes: int
    bits_per_weight: float
    predicted: float
    measured: float
    heldout: float
    heldout_loss: float
    recipe: QuantConfig
    windows: tuple[float, ...] = ()


def recipes_of(config: RunConfig) -> dict[str, QuantConfig]:
    """search.formats as recipes of the whole model, by name.

    Raises:
        InputError: no such preset, or one that cannot be judged layer by layer.
    """
    presets, found = devices.presets("quant"), {}
    for name in config.search.formats:
        if name not in presets:
            raise refuse_unknown(f"search.formats: {name}", name, presets)
        preset = presets[name]
        if preset["algorithm"] != "max":
            able = ", ".join(key for key, one in presets.items() if one["algorithm"] == "max")
            raise InputError(
                f"search.formats: {name} scales a layer together with its neighbours (algorithm="
                f"{preset['algorithm']}), which has no loss of its own; allowed: {able}"
            )
        own = {key: preset[key] for key in CHOSEN_KEYS}
        found[name] = replace(config.quant, **own, recipe=[], overrides=[])
    if len(found) < 2 or len(found) < len(config.search.formats):
        raise expected("search.formats", config.search.formats, "at least two different presets of quant=")
    return found


def budget_of(config: RunConfig, hf_config: Mapping[str, Any], units: list[Unit]) -> int:
    """Bytes for the linear layers of `units`.

    Raises:
        InputError: no target or two.
    """
    wanted = config.search
    if (wanted.target_bits is None) == (wanted.target_bytes is None):
        values = f"search.target_bits={wanted.target_bits} search.target_bytes={wanted.target_bytes}"
        raise InputError(f"{values}: allowed is exactly one of them, such as search.target_bits=4.5")
    if wanted.target_bits is not None:
        return math.floor(wanted.target_bits * sum(unit.num_weights for unit in units) / 8)
    assert wanted.target_bytes is not None
    plain = replace(config.quant, weight="none", activation="none", group_size=0, overrides=[])
    plain_run = replace(config, quant=plain, train=replace(config.train, precision="bf16"))
    of_units = sum(searching.size_bytes(unit, plain, hf_config) for unit in units)
    return wanted.target_bytes - (memory.weights_bytes(plain_run, hf_config) - of_units)


def prepare(config: RunConfig, layout: ParallelPlan) -> RunConfig:
    """Rank 0, before anything is spent: model, layout, formats and target fit each other, and the text can be read.

    Raises:
        InputError: any of it is not so.
    """
    if config.train.precision == "auto":
        # One layer's change is smaller than what bf16 makes of any change: KL 0.001 a layer on SmolLM2, whatever it is.
        config = replace(config, train=replace(config.train, precision="fp32"))
    recipes = recipes_of(config)
    checks.check_run_dir(config)
    check_backend(config)
    source = open_model(config.model)
    for recipe in recipes.values():
        alone = replace(recipe, calibration="max")  # not each format has what the asked one acts on
        one = replace(
            config,
            quant=alone,
            export=replace(config.export, targets=targets_able(recipe, config.kv.format, config.device.runtime)),
        )
        checks.check_config(one)
        checks.check_model_dims(one, source.hf_config)
        quant_rules(recipe, source.hf_config)
    checks.layers_per_chunk(source.hf_config["num_hidden_layers"], layout)
    units = searching.units_of(source.hf_config, config.quant.exclude)
    budget = budget_of(config, source.hf_config, units)
    sizes = [[searching.size_bytes(unit, one, source.hf_config) for one in recipes.values()] for unit in units]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    if budget < least:
        extra = ("target_bits", 8 / sum(unit.num_weights for unit in units), 0)
        if config.search.target_bytes is not None:
            extra = ("target_bytes", 1, config.search.target_bytes - budget)
        name, per_byte, rest = extra
        raise InputError(
            f"search.{name}={getattr(config.search, name)}: too small for {', '.join(recipes)}; allowed: at least "
            f"{least * per_byte + rest:.10g}, up to {most * per_byte + rest:.10g} for the largest of them everywhere"
        )
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    load_data(config.data, source.tokenizer(), config.train.seq_length_tokens, config.train.seed, _data_dir(config))
    return config


def search(config: RunConfig, launch: Launch) -> None:
    """Writes search.output (a recipe) and run_dir/search.json. Every rank calls it."""
    source = open_model(config.model)
    hf_config, recipes = source.hf_config, recipes_of(config)
    units = searching.units_of(hf_config, config.quant.exclude)
    budget = budget_of(config, hf_config, units)
    with job_session(config, launch) as session:
        data = load_data(
            config.data,
            source.tokenizer(),
            config.train.seq_length_tokens,
            config.train.seed,
            _data_dir(config),
            session.on_rank_0,
        )
        mark("importing the model")
        model = build_model(
            hf_config, launch.plan, DTYPES[config.train.precision], session.device, backend=config.model.backend
        )
        load_weights(model, source.read, hf_config, session)
        job = _Search(config, session, model, hf_config, data, units, recipes, budget, source.fingerprint())
        options = job.measure()
        found = job.compare(options)
    if launch.rank == 0:
        _write(config, found, units, options, budget, job.heldout.tokens.tolist())


class _Search:
    """What the steps of one search share."""

    def __init__(
        self,
        config: RunConfig,
        session: Session,
        model: Any,
        hf_config: Mapping[str, Any],
        data: TrainingData,
        units: list[Unit],
        recipes: Mapping[str, QuantConfig],
        budget: int,
        fingerprint: Any,
    ) -> None:
        self.config, self.session, self.model, self.hf_config = config, session, model, hf_config
        self.units, self.recipes, self.budget = units, recipes, budget
        self.measured_on = {"model": fingerprint, "data": data.fingerprint, "windows": config.search.windows}
        self.measured_on |= {"seed": config.train.seed, "precision": config.train.precision}

        def batches(windows: Batch) -> list[Batch]:
            return in_batches(windows, hf_config["vocab_size"], session)

        calibration = batches(data.train.calibration(config.quant.calib_size))
        measured = batches(data.train.calibration(config.search.windows))
        heldout = batches(data.heldout.evaluation(config.search.windows * config.train.seq_length_tokens))
        self.evaluated = batches(data.heldout.evaluation(config.data.eval_tokens))
        self.forward_loop = lambda _: step.run_forward(model, calibration, session)
        mark("the plain model's predictions")
        self.plain_loss = step.evaluate(model, self.evaluated, session)
        log.info("held-out loss, the model as it came: %.4f nats/token", self.plain_loss)
        self.divergence, self.heldout = (Divergence(model, text, session) for text in (measured, heldout))
        mark("calibrating")
        self.candidates = searching.candidates_of(model, units, recipes, hf_config, self.forward_loop)

    def measure(self) -> list[list[Option]]:
        """What run_dir holds already of the same measurement is not made again: another target costs seconds."""
        mark("measuring layers")
        known = self.session.on_rank_0(self._read_layers)
        missing = [name for name in self.recipes if name not in known]
        if missing:
            plain = [None] * len(self.units)
            known |= searching.measure(
                self.candidates, self.units, plain, missing, self.divergence, 0.0, self.session.rank
            )
            self.session.on_rank_0(lambda: self._write_layers(known))
        return searching.options_of(self.units, self.recipes, self.hf_config, known)

    def _write_layers(self, known: dict[str, list[float]]) -> None:
        path, units = Path(self.config.run_dir) / LAYERS_FILE, [unit.pattern for unit in self.units]
        partial = path.with_suffix(".partial")
        recipes = {name: asdict(self.recipes[name]) for name in known if name in self.recipes}
        record = {"measured_on": self.measured_on, "units": units, "recipes": recipes, "divergence": known}
        partial.write_text(json.dumps(record, indent=1))
        partial.replace(path)

    def _read_layers(self) -> dict[str, list[float]]:
        path = Path(self.config.run_dir) / LAYERS_FILE
        record = json.loads(path.read_text()) if path.exists() else {}
        if record.get("measured_on") != self.measured_on or record["units"] != [unit.pattern for unit in self.units]:
            return {}
        return {
            name: record["divergence"][name]
            for name, recipe in self.recipes.items()
            if record["recipes"].get(name) == asdict(recipe)
        }

    def compare(self, options: list[list[Option]]) -> list[Measured]:
        """The choice first, then what the same bytes give without a search, and the best that fits refined: whole
        recipes, all measured."""
        mark("measuring whole recipes")
        chosen = searching.choose(options, self.budget)
        assert chosen is not None, "prepare has seen that something fits"
        wanted = {f"mixed_{self._bits(chosen):.2f}": chosen}
        for index, name in enumerate(self.recipes):
            wanted[name] = [unit[index] for unit in options]
        if (spread := searching.spread_evenly(self.units, options, self.budget)) is not None:
            wanted["spread evenly"] = spread
        found = {name: self._measure_whole(name, picks) for name, picks in wanted.items() if self._is_asked(picks)}
        refined = self._refine(options, wanted, found) if self.config.search.rounds else None
        return [*found.values(), *([refined] if refined else [])]

    def _refine(
        self, options: list[list[Option]], wanted: dict[str, list[Option]], found: dict[str, Measured]
    ) -> Measured | None:
        """None where nothing better was found."""
        mark("measuring layers in the mix")
        fitting = [one for one in found.values() if one.size_bytes <= self.budget]
        start = wanted[min(fitting, key=lambda one: one.measured).name]
        picked, _ = searching.refine(
            self.candidates,
            self.units,
            options,
            start,
            self.budget,
            self.divergence,
            self.config.search.rounds,
            self.session.rank,
        )
        return None if picked == start else self._measure_whole(f"refined_{self._bits(picked):.2f}", picked)

    def _is_asked(self, picked: list[Option]) -> bool:
        return any(self.recipes[one.name].weight != "none" for one in picked)

    def _measure_whole(self, name: str, picked: list[Option]) -> Measured:
        recipe = searching.as_recipe(name, self.units, [one.name for one in picked], self.recipes)
        searching.quantize(self.model, recipe, self.hf_config, self.forward_loop)
        moved, windows = self.divergence(self.model), self.heldout.of_windows(self.model)
        heldout = float(windows.sum()) / int(self.heldout.tokens.sum())
        loss = step.evaluate(self.model, self.evaluated, self.session)
        size, predicted = sum(one.size_bytes for one in picked), sum(one.divergence for one in picked)
        return Measured(
            name, size, self._bits(picked), predicted, moved, heldout, loss, recipe, tuple(windows.tolist())
        )

    def _bits(self, picked: list[Option]) -> float:
        return 8 * sum(one.size_bytes for one in picked) / sum(unit.num_weights for unit in self.units)


def _data_dir(config: RunConfig) -> Path:
    return Path(config.run_dir) / "data"


def _write(
    config: RunConfig,
    found: list[Measured],
    units: list[Unit],
    options: list[list[Option]],
    budget: int,
    tokens: list[int],
) -> None:
    """The recipe of least measured divergence among those that fit, as a file, and all figures. `tokens` are those of
    each held-out window."""
    fitting = [one for one in found if one.size_bytes <= budget]
    best = min(fitting, key=lambda one: one.measured)
    if best is not found[0] and not best.name.startswith("refined"):
        log.warning("the sum over single layers misled: %s diverges less than the choice, and is taken", best.name)
    output = Path(config.search.output or Path(config.run_dir) / "recipe.yaml")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(recipe_text(best, found, units, options))
    apart = {}
    if sum(count > 0 for count in tokens) > 1:
        apart = {one.name: paired_means(one.windows, best.windows, tokens) for one in found if one is not best}
    record = {
        "budget_bytes": budget,
        "written": best.name,
        "recipes": [
            {key: value for key, value in asdict(one).items() if key not in ("recipe", "windows")} for one in found
        ],
        "heldout_more_than_written": {name: asdict(one) for name, one in apart.items()},
        "units": {
            unit.pattern: {one.name: [one.size_bytes, one.divergence] for one in unit_options}
            for unit, unit_options in zip(units, options, strict=True)
        },
    }
    (Path(config.run_dir) / "search.json").write_text(json.dumps(record, indent=1))
    console().print(_table(found, budget, best, apart))
    log.info("recipe: %s (figures: %s)", output, Path(config.run_dir) / "search.json")
    log.info("next: python launch/qat.py quant.recipe=%s", output)


def recipe_text(best: Measured, found: list[Measured], units: list[Unit], options: list[list[Option]]) -> str:
    """YAML that quant.recipe= reads, with what was measured as comments."""
    recipe, own = best.recipe, {unit.pattern: unit_options for unit, unit_options in zip(units, options, strict=True)}
    lines = [
        f"# {best.bits_per_weight:.3f} bits per weight: {best.size_bytes:,} bytes of linear layers, scales included.",
        f"# KL from the plain model, nats/token: {best.measured:.5f} (single layers sum to {best.predicted:.5f}; "
        f"held-out text {best.heldout:.5f}, loss {best.heldout_loss:.4f}).",
        *(
            f"#   beside it: {one.name}, {one.bits_per_weight:.3f} bits: {one.measured:.5f}, {one.heldout:.5f}, loss "
            f"{one.heldout_loss:.4f}"
            for one in found
            if one is not best
        ),
        "# Later overrides win; edit them as you like. Use: python launch/qat.py quant.recipe=THIS_FILE",
        yaml.safe_dump(
            {
                key: getattr(recipe, key)
                for key in ("name", "weight", "activation", "group_size", "algorithm", "exclude")
            },
            sort_keys=False,
        ).rstrip(),
        "overrides:" if recipe.overrides else "overrides: []",
    ]
    for one in recipe.overrides:
        comment = ", ".join(f"{option.name} {option.divergence:.1e}" for option in own.get(one.pattern, ()))
        entry = yaml.safe_dump(asdict(one), default_flow_style=True, sort_keys=False, width=1000).strip()
        lines.append(f"  - {entry}" + (f"  # KL alone: {comment}" if comment else ""))
    return "\n".join(lines) + "\n"


def _table(found: list[Measured], budget: int, best: Measured, apart: Mapping[str, Difference]) -> Any:
    from rich.table import Table

    shown = Table("recipe", "bits/weight", "bytes", "KL, sum", "KL", "KL, held-out", "more than written", "loss", "")
    shown.title = (
        f"linear layers in {budget:,} bytes; KL from the plain model (of layers alone, summed; measured; on held-out "
        "text, with the 95% interval of what it has more than the recipe that is written) and held-out loss, nats/token"
    )
    for one in found:
        note = "written" if one is best else "" if one.size_bytes <= budget else "too large"
        more = apart.get(one.name)
        interval = "" if more is None else f"{more.low:+.5f} to {more.high:+.5f}"
        numbers = (f"{one.predicted:.5f}", f"{one.measured:.5f}", f"{one.heldout:.5f}", interval)
        shown.add_row(
            one.name, f"{one.bits_per_weight:.3f}", f"{one.size_bytes:,}", *numbers, f"{one.heldout_loss:.4f}", note
        )
    return shown
