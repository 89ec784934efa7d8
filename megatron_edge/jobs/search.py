"""The search job: import -> measure each layer in each format -> choose -> measure the choice -> a recipe file.

Beside the choice it measures what the same bytes give without a search; the least divergence is what is written.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_edge import checks, devices, memory
from megatron_edge.artifact.tables import tables_of
from megatron_edge.config import EmbeddingFormat, QuantConfig, RunConfig, targets_able
from megatron_edge.contracts import InputError, ParallelPlan
from megatron_edge.jobs import search_result
from megatron_edge.jobs.preflight import check_backend
from megatron_edge.jobs.search_result import Measured
from megatron_edge.jobs.training import DTYPES, job_session
from megatron_edge.leaves import expected, refuse_unknown
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

log = logging.getLogger("megatron_edge")

LAYERS_FILE = "layer_divergence.json"
CHOSEN_KEYS = ("name", "weight", "activation", "group_size", "algorithm")


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
        search_result.write(config, found, units, options, budget, job.heldout.tokens.tolist())


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
        self.evaluated = batches(data.heldout.evaluation(config.data.eval_tokens))
        self.forward_loop = lambda _: step.run_forward(model, calibration, session)
        mark("the plain model's predictions")
        self.plain_loss = step.evaluate(model, self.evaluated, session)
        log.info("held-out loss, the model as it came: %.4f nats/token", self.plain_loss)
        self.divergence, self.heldout = (Divergence(model, text, session) for text in (measured, self.evaluated))
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
        return [*found.values(), *self._with_plain_tables(options), *([refined] if refined else [])]

    def _with_plain_tables(self, options: list[list[Option]]) -> list[Measured]:
        """What the bytes give that a quantised embedding and output layer save: the largest format that fits in all
        layers beside tables in bf16, whose further bytes count with the layers'."""
        quant = self.config.quant
        if {quant.embedding, quant.head} == {"bf16"}:
            return []
        plain = replace(quant, embedding="bf16", head="bf16")
        extra = sum(
            sign * memory.table_bytes(table)
            for sign, of in ((1, plain), (-1, quant))
            for table in tables_of(of, self.hf_config)
        )
        fitting = [
            (size, name)
            for index, name in enumerate(self.recipes)
            if (size := sum(unit[index].size_bytes for unit in options) + extra) <= self.budget
        ]
        if not fitting:
            return []
        size, name = max(fitting)
        picked = [next(one for one in unit if one.name == name) for unit in options]
        return [replace(self._measure_whole(f"{name}, bf16 tables", picked, embedding="bf16"), size_bytes=size)]

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

    def _measure_whole(self, name: str, picked: list[Option], embedding: EmbeddingFormat | None = None) -> Measured:
        """`embedding` is another format of embedding and output layer than quant's."""
        recipe = searching.as_recipe(name, self.units, [one.name for one in picked], self.recipes)
        if embedding is not None:
            recipe = replace(recipe, embedding=embedding, head=embedding)
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
