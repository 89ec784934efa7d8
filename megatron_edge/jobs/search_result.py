"""What a search found: a recipe file for quant.recipe=, all figures as search.json, and a table. Rank 0 alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_edge.config import QuantConfig, RunConfig
from megatron_edge.log import console
from megatron_edge.quantize.search import Option, Unit
from megatron_edge.verify.statistics import Difference, paired_means

log = logging.getLogger("megatron_edge")

RECIPE_KEYS = ("name", "weight", "activation", "group_size", "algorithm", "exclude")
CALIBRATION_KEYS = ("calibration", "percentile")
TABLE_KEYS = ("embedding", "head", "embedding_group_size")


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


def write(
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
            {key: getattr(recipe, key) for key in _keys(recipe)},
            sort_keys=False,
        ).rstrip(),
        "overrides:" if recipe.overrides else "overrides: []",
    ]
    for one in recipe.overrides:
        comment = ", ".join(f"{option.name} {option.divergence:.1e}" for option in own.get(one.pattern, ()))
        entry = yaml.safe_dump(asdict(one), default_flow_style=True, sort_keys=False, width=1000).strip()
        lines.append(f"  - {entry}" + (f"  # KL alone: {comment}" if comment else ""))
    return "\n".join(lines) + "\n"


def _keys(recipe: QuantConfig) -> list[str]:
    """What the file says beside the overrides: of tables and calibration only what is not the default."""
    tables = () if {recipe.embedding, recipe.head} == {"bf16"} else TABLE_KEYS
    calibration = () if recipe.calibration == "max" else CALIBRATION_KEYS
    return [*RECIPE_KEYS, *calibration, *tables]


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
