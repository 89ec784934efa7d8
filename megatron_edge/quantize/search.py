"""Mixed precision: how much each layer loses in each format, and the formats that lose least within a size.

`measure` gives one unit at a time (a Megatron linear layer, or that of all experts of a layer) another format and asks
how far the model's predictions moved; `choose` takes a format for each unit so that the sum of those is least;
`as_recipe` makes an ordinary recipe of it. That sums of single units predict the whole is an assumption, and errors of
layers do add up to more, or less, than their sum: the job measures the whole too, and `refine` measures units again
from the mix itself.
"""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

from torch import nn

from megatron_edge.artifact.formats import storage_bytes
from megatron_edge.config import KvConfig, OverrideConfig, QuantConfig
from megatron_edge.families import all_rules, dims_of, hf_shape, rules_of
from megatron_edge.log import track
from megatron_edge.quantize import apply, policy
from megatron_edge.quantize.candidates import Candidates, PartialRuns
from megatron_edge.recipe import quant_rules, rule_of

log = logging.getLogger("megatron_edge")

PLAIN_KV = KvConfig(name="none", format="none")
Recipes = Mapping[str, QuantConfig]  # formats that a unit may have, by the name of their preset
PRICE_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Unit:
    """Layers that have one format together: `pattern` matches their Megatron modules, `module` is one of them, `shapes`
    are (out, in) of their Hugging Face linears."""

    pattern: str
    module: str
    shapes: tuple[tuple[int, int], ...]

    @property
    def num_weights(self) -> int:
        return sum(out * into for out, into in self.shapes)

    @property
    def kind(self) -> str:
        return re.sub(r"^decoder\.layers\.\d+", "*", self.pattern)

    @property
    def layer(self) -> int:
        return int(self.pattern.split(".")[2])


@dataclass(frozen=True)
class Option:
    """One format of one unit: bytes in the artifact, scales included, and KL in nats per token of it alone."""

    name: str
    size_bytes: int
    divergence: float


def units_of(hf_config: Mapping[str, Any], excluded: Sequence[str] = ()) -> list[Unit]:
    """In the order of the forward pass, without those that `excluded` leaves alone."""
    dims = dims_of(hf_config)
    found: dict[str, Unit] = {}
    for rule in all_rules(rules_of(hf_config), dims):
        if not rule.is_linear or any(fnmatch(rule.module, pattern) for pattern in excluded):
            continue
        pattern = re.sub(r"(?<=\.local_experts\.)\d+", "*", rule.module)
        shapes = tuple((shape[0], shape[1]) for shape in (hf_shape(target, rule, dims) for target in rule.targets))
        unit = found.get(pattern, Unit(pattern, rule.module, ()))
        found[pattern] = replace(unit, shapes=unit.shapes + shapes)
    return list(found.values())


def size_bytes(unit: Unit, recipe: QuantConfig, hf_config: Mapping[str, Any]) -> int:
    """Of a unit in the artifact; what is not quantised is stored in bf16."""
    rule = rule_of(unit.module, quant_rules(recipe, hf_config), recipe.exclude)
    if rule is None:
        return sum(storage_bytes("bf16", shape) for shape in unit.shapes)
    input_scale = 4 if rule.activation != "none" else 0
    return sum(storage_bytes(rule.weight, shape, rule.group_size) + input_scale for shape in unit.shapes)


def quantize(
    model: nn.Module, recipe: QuantConfig, hf_config: Mapping[str, Any], forward_loop: Callable[[nn.Module], None]
) -> None:
    """Calibrated quantizers of `recipe` in the place of those that the model has. All ranks call it."""
    plan = policy.make_plan(recipe, PLAIN_KV, hf_config)
    apply.calibrate(model, plan, apply.insert_quantizers(model, plan), forward_loop)


def candidates_of(
    model: nn.Module,
    units: Sequence[Unit],
    recipes: Recipes,
    hf_config: Mapping[str, Any],
    forward_loop: Callable[[nn.Module], None],
) -> Candidates:
    """Every unit's quantizers in every recipe, calibrated by `forward_loop`. All ranks call it."""
    patterns = [unit.pattern for unit in units]
    return Candidates(model, patterns, recipes, lambda one: quantize(model, one, hf_config, forward_loop))


def measure(
    candidates: Candidates,
    units: Sequence[Unit],
    base: Sequence[str | None],
    names: Sequence[str],
    divergence: Callable[[nn.Module], float],
    at: float,
    rank: int,
) -> dict[str, list[float]]:
    """`divergence` from the plain model, by recipe of `names`, of the model with each unit alone in it and all others
    as `base` says, whose own divergence is `at`. Layers before a unit's are not run again. All ranks call it and have
    the same result."""
    found = {name: [at] * len(units) for name in names}
    model, runs = candidates.model, PartialRuns(candidates.model)
    count, began = 0, time.monotonic()
    with candidates.placed(base), apply.constant_weights(model):
        for index, unit in enumerate(track(units, f"measuring {', '.join(names)}", len(units), rank)):
            runs.move_to(unit.layer, lambda: divergence(model))
            for name in names:
                if not candidates.is_same(name, base[index]):
                    with candidates.swapped(index, name), runs.begun():
                        found[name][index] = divergence(model)
                    count += 1
    log.info("%d runs from a layer on in %.1f s", count, time.monotonic() - began)
    return found


def refine(
    candidates: Candidates,
    units: Sequence[Unit],
    options: Sequence[Sequence[Option]],
    picked: Sequence[Option],
    budget_bytes: int,
    divergence: Callable[[nn.Module], float],
    rounds: int,
    rank: int,
) -> tuple[list[Option], float]:
    """A choice whose whole diverges less than that of `picked`, and its divergence; `picked` where none was found.

    Each round measures every unit in every other format while all others are as in the mix so far, chooses anew by
    what that changed, and measures the choice. As changes are only right one at a time, choices with fewer of them are
    tried too: each change is given a price, from none to more than most are worth. All ranks call it and have the same
    result."""

    def whole(mix: Sequence[Option]) -> float:
        with candidates.placed([one.name for one in mix]):
            return divergence(candidates.model)

    best, least = list(picked), whole(picked)
    names = [one.name for one in options[0]]
    for round_ in range(1, rounds + 1):
        moved = measure(candidates, units, [one.name for one in best], names, divergence, least, rank)
        changes = [
            [replace(one, divergence=moved[one.name][index] - least) for one in unit_options]
            for index, unit_options in enumerate(options)
        ]
        tried, before = [names_of(best)], least
        start = list(best)
        for price in _prices(changes):
            priced = [
                [one if one.name == old.name else replace(one, divergence=one.divergence + price) for one in unit]
                for unit, old in zip(changes, start, strict=True)
            ]
            chosen = choose(priced, budget_bytes)
            if chosen is None or names_of(chosen) in tried:
                continue
            tried.append(names_of(chosen))
            mix = [next(one for one in unit if one.name == new.name) for unit, new in zip(options, chosen, strict=True)]
            if (found := whole(mix)) < least:
                best, least = mix, found
        log.info("round %d: divergence %.5f, after %.5f, of %d mixes tried", round_, least, before, len(tried) - 1)
        if least == before:
            break
    return best, least


def names_of(picked: Sequence[Option]) -> list[str]:
    return [one.name for one in picked]


def _prices(changes: Sequence[Sequence[Option]]) -> list[float]:
    """Of a change: none, and quantiles of what single changes move."""
    sizes = sorted(abs(one.divergence) for unit in changes for one in unit if one.divergence)
    return [0.0, *(sizes[int(part * (len(sizes) - 1))] for part in PRICE_QUANTILES if sizes)]


def options_of(
    units: Sequence[Unit], recipes: Recipes, hf_config: Mapping[str, Any], moved: Mapping[str, Sequence[float]]
) -> list[list[Option]]:
    """Options of each unit, in the order of `recipes`; `moved` has what `measure` found, by the recipe's name."""
    return [
        [Option(name, size_bytes(unit, recipe, hf_config), moved[name][i]) for name, recipe in recipes.items()]
        for i, unit in enumerate(units)
    ]


def choose(options: Sequence[Sequence[Option]], budget_bytes: int) -> list[Option] | None:
    """One option of each unit with the least summed divergence within the budget; None where nothing fits.

    Exact: units are added one by one, and of the sums so far only those are kept that no other beats in bytes and
    divergence, and that could still beat the best that is known (a Lagrangian bound over the units to come). Ties go to
    fewer bytes.
    """
    price, best = _relaxed(options, budget_bytes)
    if best is None:
        return None
    limit = _total(best) + 1e-9 * (abs(_total(best)) + price * budget_bytes)  # sums of floats
    after = [0.0]  # least of divergence + price x bytes over the units to come
    least = [0]
    for unit in reversed(options):
        after.append(after[-1] + min(one.divergence + price * one.size_bytes for one in unit))
        least.append(least[-1] + min(one.size_bytes for one in unit))
    partial: list[tuple[int, float, Any]] = [(0, 0.0, None)]  # bytes, divergence, (option, what came before)
    for index, unit in enumerate(options):
        bound, smallest = after[len(options) - index - 1], least[len(options) - index - 1]
        grown = [
            (size + o.size_bytes, moved + o.divergence, (o, before)) for size, moved, before in partial for o in unit
        ]
        grown.sort(key=lambda entry: entry[:2])
        partial = []
        for size, moved, chosen in grown:
            fits = size + smallest <= budget_bytes
            promising = moved + bound - price * (budget_bytes - size) <= limit
            if fits and promising and (not partial or moved < partial[-1][1]):
                partial.append((size, moved, chosen))
    chain, picked = partial[-1][2] if partial else None, []
    while chain is not None:
        picked.append(chain[0])
        chain = chain[1]
    return picked[::-1] or best


def _relaxed(options: Sequence[Sequence[Option]], budget_bytes: int) -> tuple[float, list[Option] | None]:
    """A price per byte, by bisection, and the best choice within the budget that it gives."""
    smallest = [min(unit, key=lambda one: (one.size_bytes, one.divergence)) for unit in options]
    if sum(one.size_bytes for one in smallest) > budget_bytes:
        return 0.0, None

    def at(price: float) -> list[Option]:
        return [
            min(unit, key=lambda one: (one.divergence + price * one.size_bytes, one.size_bytes)) for unit in options
        ]

    if sum(one.size_bytes for one in at(0.0)) <= budget_bytes:
        return 0.0, at(0.0)
    low, high, best = 0.0, 1.0, smallest
    while sum(one.size_bytes for one in at(high)) > budget_bytes and high < 1e12:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        picked = at(middle)
        if sum(one.size_bytes for one in picked) > budget_bytes:
            low = middle
        else:
            high = middle
            best = min(best, picked, key=_total)
    return high, best


def _total(picked: Sequence[Option]) -> float:
    return sum(one.divergence for one in picked)


def as_recipe(name: str, units: Sequence[Unit], chosen: Sequence[str], recipes: Recipes) -> QuantConfig:
    """The base is the format that most units have; each kind of layer that has another one throughout is one override,
    each other unit its own."""
    base = Counter(chosen).most_common(1)[0][0]
    by_kind: dict[str, set[str]] = {}
    for unit, one in zip(units, chosen, strict=True):
        by_kind.setdefault(unit.kind, set()).add(one)
    patterns = {
        unit.kind if len(by_kind[unit.kind]) == 1 else unit.pattern: one
        for unit, one in zip(units, chosen, strict=True)
        if one != base
    }
    overrides = [
        OverrideConfig(pattern, recipes[one].weight, recipes[one].activation, recipes[one].group_size)
        for pattern, one in patterns.items()
    ]
    return replace(recipes[base], name=name, overrides=overrides)


def spread_evenly(units: Sequence[Unit], options: Sequence[Sequence[Option]], budget_bytes: int) -> list[Option] | None:
    """Without any measurement: the largest uniform format that fits, and the next larger one in as many whole layers
    as fit, evenly spaced. None where there is no such pair."""
    names = [one.name for one in options[0]]
    picks = {name: [unit[i] for unit in options] for i, name in enumerate(names)}
    sizes = {name: sum(one.size_bytes for one in picks[name]) for name in names}
    below = max((n for n in names if sizes[n] <= budget_bytes), key=sizes.__getitem__, default=None)
    above = min((n for n in names if sizes[n] > budget_bytes), key=sizes.__getitem__, default=None)
    if below is None or above is None:
        return None
    layers = sorted({unit.layer for unit in units})
    for count in range(len(layers), 0, -1):
        larger = {layers[i * len(layers) // count] for i in range(count)}
        picked = [picks[above if unit.layer in larger else below][i] for i, unit in enumerate(units)]
        if sum(one.size_bytes for one in picked) <= budget_bytes:
            return picked
    return None
