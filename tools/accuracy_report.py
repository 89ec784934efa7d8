"""Tables and picture of accuracy_study.py, from its results.json alone: on any machine, without torch or the models."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_edge.verify.statistics import Difference, paired_means

RESULTS, CSV_FILE, MARKDOWN, PICTURE = "results.json", "results.csv", "accuracy.md", "accuracy.png"
TUNED = "bf16_ft"
TITLES = {
    TUNED: "BF16-FT", "bf16": "BF16-FT, trained on", "rtn": "RTN", "ptq": "PTQ", "qat": "QAT", "qad": "QAD",
}  # fmt: skip
# What the project set out for: share of the PTQ gap that is closed, and rise over BF16-FT, by method QAD.
GOAL_CLOSED = {"int4_awq": 0.80, "nvfp4": 0.80, "nvfp4_awq": 0.80}
GOAL_RISE = {"fp8": 0.01, "nvfp4": 0.02, "nvfp4_awq": 0.02, "w4a8_awq": 0.02, "int4_awq": 0.03}
SMOOTH_STEPS = 15


@dataclass(frozen=True)
class Row:
    """One artifact. Losses and KL in nats per held-out token; `rise` is relative to BF16-FT; a share of the PTQ gap is
    None where there is no gap to speak of: PTQ's difference to BF16-FT is noise; likewise of RTN's. Of training: the
    median speed, and the peak memory of its process."""

    format: str
    method: str
    seed: int
    nats_per_token: float
    kl: float
    difference: float
    low: float
    high: float
    rise: float
    closed_loss: float | None
    closed_kl: float | None
    closed_rtn_loss: float | None
    closed_rtn_kl: float | None
    verified: bool
    seconds: float
    tokens_per_second: float | None
    memory_bytes: int | None


def rows_of(results: dict[str, Any]) -> list[Row]:
    """Raises ValueError where the baseline is not among the results."""
    found = {row["name"]: row for row in results["rows"]}
    base = next((row for row in found.values() if row["method"] == TUNED), None)
    if base is None:
        raise ValueError(f"results: no {TUNED} among {sorted(found)}; allowed: a study whose first job is measured")
    base_loss = sum(base["loss"]) / sum(base["tokens"])
    starts = {(row["format"], row["method"], row["seed"]): row for row in found.values()}
    rows = []
    for row in found.values():
        tokens = sum(row["tokens"])
        loss, kl = sum(row["loss"]) / tokens, sum(row["kl"]) / tokens
        apart = paired_means(row["loss"], base["loss"], row["tokens"])
        closed: list[float | None] = []
        for start in (starts.get((row["format"], "ptq", row["seed"])), starts.get((row["format"], "rtn", 1))):
            told = start is not None and start is not row and row["method"].split("@")[0] in ("ptq", "qat", "qad")
            closed += _closed(start, base, loss, kl) if told and start is not None else (None, None)
        rows.append(_row(row, loss, kl, apart, apart.value / base_loss, *closed))
    return rows


def _closed(start: dict[str, Any], base: dict[str, Any], loss: float, kl: float) -> tuple[float | None, float]:
    """Shares of the gap between `start` and the baseline that a model of this loss and KL has closed."""
    gap = paired_means(start["loss"], base["loss"], start["tokens"])
    tokens = sum(start["tokens"])
    start_loss, start_kl, base_loss = sum(start["loss"]) / tokens, sum(start["kl"]) / tokens, sum(base["loss"]) / tokens
    return None if gap.is_noise else (start_loss - loss) / (start_loss - base_loss), (start_kl - kl) / start_kl


def _row(row: dict[str, Any], loss: float, kl: float, apart: Difference, rise: float, *closed: float | None) -> Row:
    identity = (row["format"], row["method"], row["seed"])
    speeds, memory = (known(row["curve"].get(key)) for key in ("tokens_per_second", "memory_bytes_rank0"))
    cost = (statistics.median(speeds) if speeds else None, int(max(memory)) if memory else None)
    told = (row["verified"], row["seconds"])
    return Row(*identity, loss, kl, apart.value, apart.low, apart.high, rise, *closed, *told, *cost)


def known(values: list[float | None] | None) -> list[float]:
    return [value for value in values or [] if value is not None]


def groups_of(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """(format, method) -> its seeds; formats in the order of the study, methods in that of TITLES."""
    order, formats = list(TITLES), list(dict.fromkeys(row.format for row in rows))
    ranked = sorted(
        rows, key=lambda r: (formats.index(r.format), order.index(r.method.split("@")[0]), r.method, r.seed)
    )
    found: dict[tuple[str, str], list[Row]] = {}
    for row in ranked:
        found.setdefault((row.format, row.method), []).append(row)
    return found


def title(method: str) -> str:
    kind, _, label = method.partition("@")
    return TITLES[kind] + (f" ({label})" if label else "")


def spread(values: list[float], pattern: str) -> str:
    """The mean, and the standard deviation over seeds where there are several."""
    mean = format(statistics.fmean(values), pattern)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), pattern.lstrip('+'))}"


def summary_table(rows: list[Row]) -> list[list[str]]:
    heads = ["format", "model", "seeds", "nats/token", "KL to BF16-FT", "rise over BF16-FT, 95% interval", "",
             "PTQ gap closed: loss", "KL", "RTN gap closed: loss", "KL", "verify"]  # fmt: skip
    table = [heads]
    for (name, method), group in groups_of(rows).items():
        shares = ("closed_loss", "closed_kl", "closed_rtn_loss", "closed_rtn_kl")
        closed = [known([getattr(r, field) for r in group]) for field in shares]
        base_loss = group[0].nats_per_token - group[0].difference
        low, high = (statistics.fmean(getattr(r, end) for r in group) / base_loss for end in ("low", "high"))
        verdict = "" if method == TUNED else "noise" if low <= 0 <= high else ""
        trains = method.split("@")[0] in ("qat", "qad")
        table.append(
            [
                name or "–",
                title(method),
                str(len(group)),
                spread([r.nats_per_token for r in group], ".4f"),
                "" if method == TUNED else spread([r.kl for r in group], ".4f"),
                "" if method == TUNED else f"{spread([r.rise for r in group], '+.2%')} ({low:+.2%} to {high:+.2%})",
                verdict,
                (spread(closed[0], ".0%") if len(closed[0]) == len(group) else "no gap") if trains else "",
                *(spread(values, ".0%") if values else "" for values in closed[1:]),
                f"{sum(r.verified for r in group)} of {len(group)}",
            ]
        )
    return table


def goals_table(rows: list[Row]) -> list[list[str]]:
    table = [["format", "goal", "QAD", ""]]
    for (name, method), group in groups_of(rows).items():
        quant = name.split("+")[0]
        if method.split("@")[0] != "qad":
            continue
        label = f"{name} ({method.partition('@')[2]})" if "@" in method else name
        closed = [r.closed_loss for r in group if r.closed_loss is not None]
        divergence = [r.closed_kl for r in group if r.closed_kl is not None]
        for what, values in (("loss", closed), ("KL", divergence)):
            if quant in GOAL_CLOSED and values:
                goal, mean = GOAL_CLOSED[quant], statistics.fmean(values)
                said = "met" if mean >= goal else "not met"
                table.append([label, f"at least {goal:.0%} of the PTQ gap closed, {what}", f"{mean:.0%}", said])
        if quant in GOAL_RISE:
            goal, mean = GOAL_RISE[quant], statistics.fmean(r.rise for r in group)
            table.append([label, f"rise below {goal:.0%}", f"{mean:+.2%}", "met" if mean < goal else "not met"])
    return table


def cost_table(rows: list[Row]) -> list[list[str]]:
    table = [["format", "training", "tokens/s, median", "peak memory"]]
    for (name, method), group in groups_of(rows).items():
        speeds, memory = (known([getattr(r, f) for r in group]) for f in ("tokens_per_second", "memory_bytes"))
        if speeds and memory:
            cells = [f"{statistics.median(speeds):,.0f}", f"{max(memory) / 2**30:.2f} GiB"]
            table.append([name or "–", title(method), *cells])
    return table


def markdown(table: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])


def write(results: dict[str, Any], directory: Path, docs: Path | None) -> None:
    """results.csv in `directory`, the tables on the terminal; accuracy.md and accuracy.png in `docs` where it is given,
    the picture else in `directory`."""
    rows = rows_of(results)
    with (directory / CSV_FILE).open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    for table in (summary_table(rows), goals_table(rows), cost_table(rows)):
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for line in table:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        print()
    place = docs or directory
    place.mkdir(parents=True, exist_ok=True)
    drawn = draw(results, rows, place / PICTURE)
    if docs is not None:
        (docs / MARKDOWN).write_text(document(results, rows, drawn))


def document(results: dict[str, Any], rows: list[Row], drawn: bool) -> str:
    base = next(row for row in results["rows"] if row["method"] == TUNED)
    failed = sorted({f"{row['name']}: {check}" for row in results["rows"] for check in row["failed"]})
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    picture = f"![learning curves and held-out losses]({PICTURE})\n\n" if drawn else ""
    checks = (
        "All checks of verify hold." if not failed else "Checks of verify that do not hold:\n\n- " + "\n- ".join(failed)
    )
    if results["not_done"]:
        checks += f"\n\nNot here, as they did not end: {', '.join(results['not_done'])}."
    return f"""# Accuracy: what quantising costs, and what training wins back

SmolLM2-135M, fine-tuned in BF16 first (its weights as they came lie on a 4-bit grid, which flatters 4-bit formats).
That model, BF16-FT, is the baseline, the teacher of QAD, and where every other row starts from: the same tokens in the
same order, the same number of steps. *PTQ* calibrates by the format's own algorithm, *RTN* rounds to nearest;
*BF16-FT, trained on* is not quantised: what more training alone does. Every row is an exported artifact, run by
transformers over {sum(base["tokens"]):,} held-out tokens in {len(base["tokens"])} windows, of another source than the
training text.

- KL: mean over those tokens of KL(BF16-FT || model), in nats.
- Rise: relative, in nats per token; its interval is that of a paired t-test over windows (the mean over seeds);
  *noise* where it holds 0.
- PTQ gap closed: (PTQ - model) / (PTQ - BF16-FT) of the loss, and of the KL; RTN gap: the same from RTN, which for
  nvfp4 is what PTQ commonly means. ±: standard deviation over seeds.

{markdown(summary_table(rows))}

{markdown(goals_table(rows))}

{picture}{checks}

What training took, with {results["parallel"]} job(s) at a time on {results["num_devices"]} device(s):

{markdown(cost_table(rows))}

Done on {results["device"]} with {versions}:

```
python tools/accuracy_study.py {" ".join(results["arguments"])}
```
BF16-FT: `{" ".join(_telling(base["overrides"]))}`
"""


def _telling(overrides: list[str]) -> list[str]:
    """Without what is about this machine."""
    return [o for o in overrides if not o.startswith(("data.train", "data.heldout", "model.source", "threads"))]


def draw(results: dict[str, Any], rows: list[Row], path: Path) -> bool:
    """The picture; False, said aloud, where matplotlib is not installed: --report-only draws it elsewhere."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed here (pip install matplotlib, then --report-only)")
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    formats = list(dict.fromkeys(row.format for row in rows if row.format))
    figure, axes = pyplot.subplots(1, 3, figsize=(18, 5.5), layout="constrained")
    colours = dict(zip(formats, pyplot.get_cmap("tab10").colors, strict=False))
    plain = next((_label_loss(row) for row in results["rows"] if row["method"] == "bf16"), [])
    for row in results["rows"]:
        kind = row["method"].split("@")[0]
        if row["seed"] > 1 or kind not in ("qat", "qad"):
            continue
        style = {"color": colours.get(row["format"], "black"), "linestyle": {"qat": "--"}.get(kind, "-")}
        curve, label = row["curve"], " ".join(part for part in (row["format"], title(row["method"])) if part)
        losses = _label_loss(row)
        if len(plain) == len(losses):  # of the same batches: what they have in common is no difference of methods
            losses = [ours - theirs for ours, theirs in zip(losses, plain, strict=True)]
        _plot(axes[0], losses, label, style)
        _plot(axes[1], curve.get("kl_nats_per_token"), label, style)
    title_0 = "loss on the training text" + (f", above {TITLES['bf16']!r} on the same batches" if plain else "")
    axes[0].set(title=title_0, xlabel="step", ylabel=f"nats/token, mean of {SMOOTH_STEPS} steps")
    axes[1].set(title="QAD: KL to BF16-FT, training text", xlabel="step", ylabel="nats/token", yscale="log")
    _draw_heldout(axes[2], rows, formats, colours)
    for axis in axes[:2]:
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _label_loss(row: dict[str, Any]) -> list[float]:
    """Each step's cross-entropy, which QAD reports beside what it minimises."""
    curve = row["curve"]
    return known(curve.get("label_loss_nats_per_token")) or known(curve.get("loss_nats_per_token"))


def _plot(axis: Any, values: list[float | None] | None, label: str, style: dict[str, Any]) -> None:
    found = known(values)
    width = min(SMOOTH_STEPS, len(found))
    if width:
        smooth = [statistics.fmean(found[i - width : i]) for i in range(width, len(found) + 1)]
        axis.plot(range(width, len(found) + 1), smooth, label=label, **style)


def _draw_heldout(axis: Any, rows: list[Row], formats: list[str], colours: dict[str, Any]) -> None:
    """One column a format: its methods' held-out losses, a mark a seed, over the line of BF16-FT."""
    marks = {"rtn": "x", "ptq": "v", "qat": "s", "qad": "o"}
    named: set[str] = set()
    for row in rows:
        kind = row.method.split("@")[0]
        if row.method == TUNED:
            axis.axhline(row.nats_per_token, color="black", linewidth=1, label=TITLES[TUNED])
        elif kind == "bf16":
            axis.axhline(row.nats_per_token, color="grey", linewidth=1, linestyle=":", label=title(row.method))
        else:
            at = formats.index(row.format) + 0.18 * (list(marks).index(kind) - 1.5)
            label = TITLES[kind] if kind not in named else None
            named.add(kind)
            axis.plot(at, row.nats_per_token, marks[kind], color=colours[row.format], label=label)
    axis.set_xticks(range(len(formats)), formats, rotation=20)
    axis.set(title="loss on held-out text of another source", ylabel="nats/token")
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
