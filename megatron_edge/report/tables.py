"""What the tables, tiles and bars of a run's page say. Pure: facts in, text out."""

from __future__ import annotations

import math
from typing import Any

from scipy import stats

from megatron_edge.report.facts import BASELINES, RunFacts

MIB, MB = 2**20, 1e6
LABELS = {
    "bf16": "as it came (bf16)",
    "fp32": "as it came (fp32)",
    "ptq": "calibrated, not trained (PTQ)",
    "trained": "trained, quantizers on",
    "artifact": "the artifact, in transformers",
}
PARTS = (
    ("weights", "weights_bytes", "part-1"),
    ("weights again, in the runtime's layout", "layout_bytes", "part-2"),
    ("draft model", "draft_bytes", "part-5"),
    ("KV cache", "kv_bytes", "part-3"),
    ("activations", "activations_bytes", "part-6"),
    ("runtime", "workspace_bytes", "part-4"),
)


def tiles_of(run: RunFacts) -> list[dict[str, str]]:
    """What is known of quality, size, memory, speed and proof: label, value, note."""
    found = [_progress(run), _quality(run), _size(run), _memory(run), *_speeds(run), _checks(run)]
    return [dict(zip(("label", "value", "note"), tile, strict=True)) for tile in found if tile is not None]


def _progress(run: RunFacts) -> tuple[str, str, str] | None:
    if run.verify is not None or run.artifact is not None:
        return None
    saved = f"the last checkpoint is of step {run.newest_checkpoint}" if run.newest_checkpoint is not None else ""
    return "Progress", f"{run.steps_done} of {run.config['train']['steps']}", "steps; " + (saved or "no checkpoint yet")


def _quality(run: RunFacts) -> tuple[str, str, str] | None:
    base, limit = run.baseline_loss, run.config["export"]["max_loss_rise"]
    key = next((key for key in ("artifact", "trained") if key in run.losses), None)
    if base is None or key is None:
        return None
    what = {"artifact": "The artifact", "trained": "Trained"}[key]
    rise = run.losses[key] - base
    than = "worse" if rise > 0 else "better"
    note = f"nats/token of loss. {what}, {than} than the model as it came; up to {limit:+g} was declared."
    return "Quality", signed(rise), note


def _size(run: RunFacts) -> tuple[str, str, str] | None:
    if run.artifact is None:
        return None
    share = run.artifact.size_bytes / run.artifact.bf16_bytes
    return "Size", megabytes(run.artifact.size_bytes), f"{share:.0%} of {megabytes(run.artifact.bf16_bytes)} in bf16"


def _memory(run: RunFacts) -> tuple[str, str, str] | None:
    if run.plan is None:
        return None
    device = run.plan["device"]
    note = f"MiB on {device['name']}, planned for {device['max_batch']} x {device['max_seq_len']:,} tokens"
    return "Memory", f"{_total(run) / MIB:,.0f} of {device['budget_bytes'] / MIB:,.0f}", note


def _speeds(run: RunFacts) -> list[tuple[str, str, str]]:
    """Predicted of the device and measured on this machine, which are two things."""
    found = []
    predicted = (run.plan or {}).get("predicted")
    if predicted:
        note = f"ms per token, predicted for {run.config['device']['name']}: not measured there"
        found.append(("Speed", f"{predicted['ms_per_token']:.3g}", note))
    for name, row in (run.verify or {}).get("runtimes", {}).items():
        if row.get("tokens_per_second"):
            note = f"tokens/s in {name} on the machine that verified it, {row.get('threads', '?')} thread(s)"
            found.append(("Speed here", f"{row['tokens_per_second']:.1f}", note))
    return found


def _checks(run: RunFacts) -> tuple[str, str, str]:
    if run.verify is None:
        return "Proof", "none", "not verified"
    checks, not_run = run.verify["checks"], len(run.verify["not_run"])
    note = "checks hold" + (f"; {not_run} could not be run here" if not_run else "")
    return "Proof", f"{sum(check['ok'] for check in checks)} of {len(checks)}", note


def loss_rows(run: RunFacts) -> list[dict[str, Any]]:
    base = run.baseline_loss
    order = sorted(run.losses, key=lambda name: list(LABELS).index(name) if name in LABELS else len(LABELS))
    return [
        {
            "label": LABELS.get(name, f"in {name}"),
            "loss": run.losses[name],
            "perplexity": f"{math.exp(run.losses[name]):,.2f}" if run.losses[name] < 700 else "over 1e300",
            "difference": "" if name in BASELINES or base is None else signed(run.losses[name] - base),
        }
        for name in order
    ]


def loss_notes(run: RunFacts) -> list[str]:
    """How sure these numbers are: the sample of text, and the noise of reordered sums as verify measured it."""
    notes = []
    if run.heldout is not None:
        half = float(stats.t.ppf(0.975, run.heldout.windows - 1)) * run.heldout.error
        notes.append(
            f"Measured on {run.heldout.tokens:,} tokens in {run.heldout.windows:,} windows. Another text of this size "
            f"and kind would move the trained model's loss by up to ± {half:.4f} (95%); all rows are of the same text, "
            "so that their differences are surer than that."
        )
    for check in (run.verify or {}).get("checks", []):
        if check["name"] == "loss" and check.get("detail"):
            notes.append(f"Artifact against trained model: {check['detail']}.")
    return notes


def _total(run: RunFacts) -> int:
    assert run.plan is not None
    device = run.plan["device"]
    return sum(_part(run, key) for _, key, _ in PARTS if key in device)


def _part(run: RunFacts, key: str) -> int:
    """Bytes as planned; the artifact's own where there is one, as verify counts them."""
    assert run.plan is not None
    if key == "weights_bytes" and run.artifact is not None:
        return run.artifact.size_bytes
    return int(run.plan["device"].get(key, 0))


def memory_of(run: RunFacts) -> dict[str, Any] | None:
    """The bar of the device's memory: parts of what is planned, and what its budget leaves."""
    if run.plan is None:
        return None
    device, total = run.plan["device"], _total(run)
    budget = device["budget_bytes"]
    whole = max(total, budget)
    parts = [
        {"name": name, "size": mebibytes(size), "percent": f"{100 * size / whole:.2f}", "colour": colour}
        for name, key, colour in PARTS
        if (size := _part(run, key)) > 0
    ]
    if budget > total:
        free = f"{100 * (budget - total) / whole:.2f}"
        parts.append({"name": "free", "size": mebibytes(budget - total), "percent": free, "colour": "free"})
    fits = "It fits" if total <= budget else "It does not fit"
    words = (
        f"{fits} {device['name']}: {mebibytes(total)} of the {mebibytes(budget)} that its system leaves, for "
        f"{device['max_batch']} sequence(s) of {device['max_seq_len']:,} tokens in {device['runtime']}."
    )
    return {"words": words, "parts": parts, "notes": _memory_notes(run)}


def _memory_notes(run: RunFacts) -> list[str]:
    notes = []
    saved = -_part(run, "layout_bytes")
    if saved > 0:
        notes.append(f"The runtime's own layout of the weights takes {mebibytes(saved)} less than the artifact.")
    predicted = (run.plan or {}).get("predicted")
    if predicted:
        limits = "; ".join(predicted["limits"])
        largest = f"{predicted['largest_batch']:,} sequences at once, or {predicted['largest_seq_len']:,} tokens"
        speed = f"{predicted['ms_per_token']:.3g} ms and at most {predicted['joules_per_token']:.3g} J per token"
        notes.append(f"It would take up to {largest}. What limits: {limits}. Predicted there: {speed}.")
        notes += predicted["doubts"]
    return notes


def runtime_rows(run: RunFacts) -> list[dict[str, Any]]:
    """What each runtime really ran, as verify.json has it."""
    units = (
        ("tokens_per_second", "tokens/s, answering", 1.0, "{:,.1f}"),
        ("prefill_tokens_per_second", "tokens/s, reading", 1.0, "{:,.1f}"),
        ("peak_rss_bytes", "resident at most, MiB", MIB, "{:,.0f}"),
        ("rss_before_bytes", "of these before the model was loaded, MiB", MIB, "{:,.0f}"),
        ("threads", "threads", 1, "{:g}"),
        ("context_tokens", "tokens of context", 1, "{:,g}"),
        ("compared_tokens", "held-out tokens compared with the artifact", 1, "{:,g}"),
        ("perplexity_ratio", "perplexity, times the artifact's under the same recipe", 1, "{:.6f}"),
        ("paired_error_nats", "its paired standard error, nats/token", 1, "{:.1e}"),
        ("likeliest_agree", "likeliest tokens that agree", 0.01, "{:.2f}%"),
        ("decoded_perplexity_ratio", "perplexity with its weights decoded to F32, times the artifact's", 1, "{:.6f}"),
        ("decoded_paired_error_nats", "its paired standard error, nats/token", 1, "{:.1e}"),
        ("decoded_likeliest_agree", "likeliest tokens that agree then", 0.01, "{:.2f}%"),
    )
    return [
        {
            "name": name,
            "status": row.get("status", "ran"),
            "recipe": row.get("recipe", ""),
            "facts": [
                (label, form.format(row[key] / unit)) for key, label, unit, form in units if row.get(key) is not None
            ],
            "prompt": row.get("prompt", ""),
            "text": row.get("text", ""),
        }
        for name, row in (run.verify or {}).get("runtimes", {}).items()
    ]


def training_memory(run: RunFacts) -> list[tuple[str, str]]:
    """What each stage was planned to take, and what each rank was seen to take at most."""
    rows = [
        (f"planned for a rank of stage {stage['stage']}", f"{stage['total_bytes'] / MIB:,.0f}")
        for stage in (run.plan or {}).get("training", [])
    ]
    ranks = sorted({key for record in run.metrics for key in record if key.startswith("memory_bytes_rank")})
    for key in ranks:
        most = max(record[key] for record in run.metrics if record.get(key) is not None)
        rank = key.removeprefix("memory_bytes_rank")
        rows.append((f"rank {rank} at most (GPU memory; without one its process, libraries too)", f"{most / MIB:,.0f}"))
    return rows


def summary_of(run: RunFacts) -> list[tuple[str, str]]:
    config = run.config
    quant, train, data = config["quant"], config["train"], config["data"]
    layout = (run.plan or {}).get("layout", {})
    degrees = ", ".join(f"{name} {size}" for name, size in layout.items() if type(size) is int and size > 1)
    recipe = f"{quant['name']}: weights {quant['weight']}, activations {quant['activation']}, KV cache "
    recipe += f"{config['kv']['format']}, embedding {quant['embedding']}, {quant['algorithm']}"
    if quant["overrides"]:
        recipe += f", {len(quant['overrides'])} override(s)"
    how = f"{train['mode']}, {train['steps']} steps, {train['global_batch']} x {train['seq_length_tokens']} tokens each"
    how += f", learning rate {train['learning_rate']:g}, {train['precision']}, seed {train['seed']}"
    return [
        ("model", config["model"]["source"]),
        ("recipe", recipe),
        ("training", how),
        ("text", data["train"] or "CPython's own documentation"),
        ("held-out text", data["heldout"] or f"{data['heldout_fraction']:.0%} of the documents"),
        ("processes", degrees or "one"),
        ("device", f"{config['device']['name']}, {config['device']['runtime']}"),
    ]


def signed(value: float) -> str:
    """With a sign of full width, where it is not nothing."""
    return f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")


def megabytes(size: float) -> str:
    return f"{size / MB:,.1f} MB" if size >= 10 * MB else f"{size / MB:,.2f} MB"


def mebibytes(size: float) -> str:
    return f"{size / MIB:,.0f} MiB" if size >= 10 * MIB else f"{size / MIB:,.2f} MiB"
