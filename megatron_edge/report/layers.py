"""The error of each linear layer as a field of layers by kinds, for a page. Pure."""

from __future__ import annotations

import re
import statistics
from typing import Any

from megatron_edge.report.facts import RunFacts

MOST_LISTED = 10
_LAYER = re.compile(r".*\.layers\.(\d+)\.(.+)$")
FOLDING = {"awq": "AWQ", "awq_clip": "AWQ", "smoothquant": "SmoothQuant"}


def heat_of(run: RunFacts) -> dict[str, Any] | None:
    """Rows of kinds (q_proj, ...), a cell for each layer; the experts of a layer share one. None where nothing was
    measured for the artifact that is there."""
    found = run.weight_errors
    if found is None or run.artifact is None or found["manifest_sha256"] != run.artifact.manifest_sha256:
        return None
    errors: dict[str, float] = {n: e["relative_squared_error"] for n, e in found["linears"].items()}
    cells: dict[str, dict[int, list[float]]] = {}
    for name, error in errors.items():
        match = _LAYER.match(name)
        if match:
            kind = re.sub(r"\.\d+\.", ".", match[2]).replace("self_attn.", "").replace("mlp.", "")
            cells.setdefault(kind, {}).setdefault(int(match[1]), []).append(error)
    layers = 1 + max((layer for row in cells.values() for layer in row), default=-1)
    highest = max(errors.values(), default=0.0)
    worst = sorted(errors, key=lambda name: errors[name], reverse=True)[:MOST_LISTED]
    return {
        "rows": [
            {
                "kind": kind,
                "mean": percent(_mean(row)),
                "cells": [_cell(kind, layer, row.get(layer), highest) for layer in range(layers)],
            }
            for kind, row in cells.items()
        ],
        "last_layer": layers - 1,
        "highest": percent(highest),
        "count": len(errors),
        "folded": FOLDING.get(run.config["quant"]["algorithm"], ""),
        "worst": [
            {"name": name, "format": found["linears"][name]["format"], "error": percent(errors[name])} for name in worst
        ],
    }


def _mean(row: dict[int, list[float]]) -> float:
    return statistics.fmean(error for errors in row.values() for error in errors)


def _cell(kind: str, layer: int, errors: list[float] | None, highest: float) -> dict[str, str] | None:
    if errors is None:
        return None
    mean = statistics.fmean(errors)
    title = f"layer {layer}, {kind}: {percent(mean)}"
    if len(errors) > 1:
        title += f" (mean of {len(errors)} experts, largest {percent(max(errors))})"
    return {"much": f"{8 + 92 * mean / highest if highest else 8:.1f}", "title": title}


def percent(value: float) -> str:
    return f"{100 * value:.3g}%"
