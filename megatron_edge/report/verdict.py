"""May this be shipped? What a run's files say, in words. Pure.

Three answers: "ship", "wait" (nothing speaks against it, but something that must be known is not) and "no".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from megatron_edge.contracts import OWN_READER
from megatron_edge.report.facts import RunFacts


@dataclass(frozen=True)
class Verdict:
    """`headline` answers, `why` gives the reason in a sentence or two, `reasons` are its parts, one a line."""

    level: Literal["ship", "wait", "no"]
    headline: str
    why: str
    reasons: tuple[str, ...] = ()


def verdict_of(run: RunFacts) -> Verdict:
    ended = _of_outcome(run)
    if ended is not None:
        return ended
    if run.verify is None:
        return Verdict("no", "Do not ship this", "It was never verified: there is no verify.json.")
    if run.verify_is_stale:
        why = "The artifact was made anew after it was verified: run launch/verify.py on it."
        return Verdict("no", "Do not ship this", why)
    checks = run.verify["checks"]
    failed = [check for check in checks if not check["ok"]]
    if failed or not run.verify["ok"]:
        why = f"{len(failed)} of {len(checks)} checks do not hold."
        return Verdict("no", "Do not ship this", why, tuple(words_of(check) for check in failed))
    if run.artifact is None:
        why = "There is no artifact that can be read: what verify.json speaks of is gone."
        return Verdict("no", "Do not ship this", why)
    device = run.config["device"]
    absent = runtime_absence(run)
    if absent is not None:
        why = f"All {len(checks)} checks made here hold, but {absent}."
        return Verdict("wait", "Do not ship this yet", why)
    why = (
        f"All {len(checks)} checks hold: the artifact is the trained model, its loss is within what was declared, and "
        f"it fits {device['name']}."
    )
    return Verdict("ship", "You may ship this", why)


def _of_outcome(run: RunFacts) -> Verdict | None:
    """Where the job itself did not come to its end; a failed verification is judged by verify.json, which is newer
    where it was run again."""
    outcome, steps = run.outcome, run.config["train"]["steps"]
    if run.is_running:
        why = f"A job is still at work here: {run.steps_done} of {steps} steps are done."
        return Verdict("wait", "Do not ship this yet", why)
    if outcome is None and run.verify is None:
        why = (
            f"The job ended after {run.steps_done} of {steps} steps without a word: it was killed, its host is gone, "
            "or it was started before outcomes were kept. The same command goes on from its last checkpoint."
        )
        return Verdict("no", "Do not ship this", why)
    if outcome is None or outcome["label"] in ("done", "failed"):
        return None
    words = {
        "stopped": "The job was stopped before its end; the same command goes on there.",
        "diverged": "Training diverged.",
        "lost": "A process of the job was lost or hung; the same command goes on from the last checkpoint.",
        "disk": "The disk refused.",
        "error": "The job's input was refused.",
        "interrupted": "The job was interrupted from the keyboard.",
    }
    why = words.get(outcome["label"], "The job broke off with an error of the program.")
    why += f" {run.steps_done} of {steps} steps were done."
    return Verdict("no", "Do not ship this", why, (f"{outcome['label']}: {outcome['reason']}",))


def runtime_absence(run: RunFacts) -> str | None:
    """Why it is not known that the device's runtime runs this artifact; None where it has run it."""
    device, verify = run.config["device"], run.verify or {}
    runtime = device["runtime"]
    if runtime == OWN_READER:
        return None
    row = verify.get("runtimes", {}).get(runtime)
    if row is None:
        return f"{runtime}, which is to run it on {device['name']}, has not run it"
    if row.get("status", "ran") != "ran":
        return f"{runtime}, which is to run it on {device['name']}, has {row['status']} it and not run it"
    return None


def words_of(check: dict[str, Any]) -> str:
    """One check in words: what, how much, how much was allowed, and the detail."""
    text = f"{check['name']}: {check['metric']}: found {number(check['value'])}, allowed {number(check['limit'])}"
    return f"{text}. {check['detail']}" if check.get("detail") else text


def number(value: Any) -> str:
    """As people read it: whole numbers with thousands, others to three digits, text as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if value == int(value) else f"{value:.3g}"
