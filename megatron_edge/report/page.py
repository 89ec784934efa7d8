"""report.html of a run: what its directory holds, for a stranger who has ten seconds, and then for who has more.

In: a run directory at any stage, also of a job that failed. Out: one file without a script and without a reference to
anywhere else. What is not there is left out or named as missing, never made up.
"""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import megatron_edge
from megatron_edge.report import weight_errors
from megatron_edge.report.facts import RunFacts, read_run, write_text
from megatron_edge.report.layers import heat_of
from megatron_edge.report.pictures import curve
from megatron_edge.report.tables import (
    loss_notes,
    loss_rows,
    memory_of,
    runtime_rows,
    summary_of,
    tiles_of,
    training_memory,
)
from megatron_edge.report.verdict import number, verdict_of

REPORT_FILE = "report.html"
TEMPLATES = Path(__file__).parent / "templates"
CURVES: tuple[tuple[str, str, str, dict[str, bool]], ...] = (
    ("loss_nats_per_token", "loss", "nats/token", {}),
    ("learning_rate", "learning rate", "", {"from_zero": True}),
    ("gradient_norm", "gradient norm", "logarithmic", {"logarithmic": True}),
    ("tokens_per_second", "speed", "tokens/s", {"from_zero": True}),
)


def write_report(run_dir: Path) -> Path:
    """Writes report.html of a run, and weight_errors.json where its artifact has none yet. One process.

    Raises:
        InputError: `run_dir` is no run directory, or a file in it is damaged.
    """
    run = read_run(run_dir)
    path = run_dir / REPORT_FILE
    write_text(path, run_page(replace(run, weight_errors=weight_errors.measure(run))))
    return path


def run_page(run: RunFacts) -> str:
    verify = run.verify or {}
    heat = heat_of(run)
    return render(
        "run.html",
        directory=run.directory,
        name=run.config["scenario"] or run.directory.name,
        config=run.config,
        config_text=run.config_text,
        verdict=verdict_of(run),
        tiles=tiles_of(run),
        not_run=verify.get("not_run", {}),
        losses=loss_rows(run),
        loss_notes=loss_notes(run),
        memory=memory_of(run),
        runtimes=runtime_rows(run),
        checks=sorted(verify.get("checks", []), key=lambda check: check["ok"]),  # what failed comes first
        curves=_curves(run),
        training_words=_training_words(run),
        training_memory=training_memory(run),
        heat=heat,
        heat_missing="" if heat or run.artifact is None else _why_no_heat(run),
        summary=summary_of(run),
        versions=_versions(run),
    )


def render(template: str, **values: Any) -> str:
    """A page of templates/; every value is escaped but for pictures, which are Markup."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return environment.get_template(template).render(made=made, version=megatron_edge.__version__, **values)


def _curves(run: RunFacts) -> list[dict[str, Any]]:
    return [
        {"name": name, "unit": unit, "svg": Markup(curve(run.metrics, key, name, **style))}
        for key, name, unit, style in CURVES
        if any(record.get(key) is not None for record in run.metrics)
    ]


def _training_words(run: RunFacts) -> str:
    train, skipped = run.config["train"], sum(bool(record.get("skipped")) for record in run.metrics)
    words = (
        f"{run.steps_done} of {train['steps']} steps of {train['global_batch']} x {train['seq_length_tokens']} tokens, "
        f"{train['mode']}, in {train['precision']}."
    )
    if skipped:
        words += f" {skipped} steps were skipped, as their loss or gradient was not finite: red marks at the foot."
    return words


def _why_no_heat(run: RunFacts) -> str:
    if run.config["quant"]["weight"] == "none" and not run.config["quant"]["overrides"]:
        return "No linear layer is quantised."
    if not run.is_whole:
        return "Not measured: verify did not find this artifact whole."
    return "Not measured: the checkpoint that the artifact was made from is not in this run directory any more."


def _versions(run: RunFacts) -> dict[str, str]:
    of_export = run.artifact.versions if run.artifact else {}
    of_verify = (run.verify or {}).get("versions", {})
    found = {"megatron-edge (this page)": megatron_edge.__version__}
    for name in sorted({*of_export, *of_verify}):
        said = sorted({versions[name] for versions in (of_export, of_verify) if name in versions})
        found[name] = " (export and verify differ) ".join(said)
    return found
