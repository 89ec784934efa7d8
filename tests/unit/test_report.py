"""A run's page: what it says is what the files say, it refers to nowhere, and "you may ship this" is said of nothing
that was not proven."""

from __future__ import annotations

import fcntl
import json
import math
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import IMPOSSIBLE, STEPS, Page, make_tiny_run, write_metrics, write_outcome

from megatron_edge.config import from_yaml
from megatron_edge.contracts import (
    Diverged,
    InputError,
    ParallelPlan,
    StoppedBySignal,
    VerificationFailed,
    WriteFailed,
)
from megatron_edge.jobs.outcome import recorded
from megatron_edge.report.facts import read_run
from megatron_edge.report.page import write_report
from megatron_edge.runtime.launcher import Launch


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For a device on which the reader that verify uses is the runtime."""
    return make_tiny_run(tmp_path_factory.mktemp("finished") / "run", "device=x86_laptop")


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def page_of(run_dir: Path) -> Page:
    return Page(write_report(run_dir).read_text())


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# ---------------------------------------------------------------- what the page says


def test_a_proven_run_may_be_shipped(finished: Path) -> None:
    page = page_of(finished)
    verify = json.loads((finished / "verify.json").read_text())
    assert verify["ok"] and page.level == "ship" and page.headline == "You may ship this"
    assert f"All {len(verify['checks'])} checks hold" in page.text
    for what, reason in verify["not_run"].items():
        assert [what + reason, "", "", "not run"] in page.tables["checks"]


def test_losses_and_how_sure_they_are(finished: Path) -> None:
    page = page_of(finished)
    losses = json.loads((finished / "verify.json").read_text())["losses_nats_per_token"]
    labels = {"bf16": "as it came (bf16)", "trained": "trained", "artifact": "the artifact"}
    assert set(losses) == set(labels)
    for name, label in labels.items():
        _, loss, perplexity, difference = page.row("losses", label)
        assert float(loss) == pytest.approx(losses[name], abs=5e-5)
        assert float(perplexity.replace(",", "")) == pytest.approx(math.exp(losses[name]), rel=1e-3)
        if name != "bf16":
            rise = losses[name] - losses["bf16"]
            assert float(difference.replace("\N{MINUS SIGN}", "-")) == pytest.approx(rise, abs=5e-5)
    said = load_file(finished / "reference" / "reference.safetensors")
    means = [row[mask].mean() for row, mask in zip(said["nll"], said["loss_mask"], strict=True)]  # windows of one size
    half = 3.182446 * np.std(means, ddof=1) / len(means) ** 0.5  # Student's t, 3 degrees of freedom, 95%
    (shown,) = re.findall(r"up to ± ([\d.]+) \(95%\)", page.text)
    assert len(means) == 4 and float(shown) == pytest.approx(half, abs=1e-4)


def test_every_check_stands_there_with_its_numbers(finished: Path) -> None:
    page, verify = page_of(finished), json.loads((finished / "verify.json").read_text())
    for check in verify["checks"]:
        row = next(r for r in page.tables["checks"] if r[0] == f"{check['name']}: {check['metric']}{check['detail']}")
        assert row[3] == "✓ holds"
        for shown, value in zip(row[1:3], (check["value"], check["limit"]), strict=True):
            if isinstance(value, str):
                assert shown == value
            else:
                assert float(shown.replace(",", "")) == pytest.approx(value, rel=6e-3)


def test_memory_is_the_artifact_s_own_bytes_and_the_plan_s(finished: Path) -> None:
    page, plan = page_of(finished), json.loads((finished / "plan.json").read_text())["device"]
    manifest = json.loads((finished / "artifact" / "canonical" / "manifest.json").read_text())
    sizes = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4}
    stored = sum(math.prod(t["shape"]) * sizes[t["dtype"]] for t in manifest["tensors"].values())
    total = stored + plan["kv_bytes"] + plan["activations_bytes"] + plan["workspace_bytes"]
    assert f"It fits x86_laptop: {total / 2**20:,.0f} MiB of the 1,536 MiB" in page.text
    widths = [float(value[6:-1]) for name, value in page.attributes if name == "style" and value.startswith("width:")]
    assert sum(widths) == pytest.approx(100, abs=0.05)
    assert widths[1] == pytest.approx(100 * plan["kv_bytes"] / plan["budget_bytes"], abs=0.01)
    assert page.row("training", "rank 0 at most")[1] == "5" and page.row("training", "planned")[1] == "64"


def test_curves_hold_every_step_of_metrics(finished: Path) -> None:
    html = write_report(finished).read_text()
    pictures = re.findall(r"<svg .*?</svg>", html, flags=re.DOTALL)
    assert len(pictures) == 4
    titles = [re.search(r'aria-label="(\w+)', picture) for picture in pictures]
    assert [title and title[1] for title in titles] == ["loss", "learning", "gradient", "speed"]
    lines = re.findall(r'<path d="(M[^"]*)" clip-path[^>]*stroke: var\(--series\)', pictures[0])
    points = [tuple(map(float, point.split())) for point in re.findall(r"[ML] ([\d. -]+?) *\n", lines[0])]
    assert len(points) == STEPS
    steps = np.diff([y for _, y in points])  # the loss falls by a tenth at each step: equal distances, downwards
    assert np.all(steps > 0) and np.ptp(steps) < 1e-3
    gradient = re.findall(r'<path d="(M[^"]*)" clip-path[^>]*stroke: var\(--series\)', pictures[2])
    assert gradient[0].count("M") == 2, "the skipped step is a gap"
    assert "1 steps were skipped" in html


def test_nothing_is_loaded_from_anywhere(finished: Path) -> None:
    page = page_of(finished)
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            assert value.startswith(("#", "data:")), (name, value)
        assert not name.startswith("xmlns")
    styles = page.styles + " ".join(value for name, value in page.attributes if name == "style")
    assert "@import" not in styles and re.findall(r"url\((?!#)", styles) == []
    assert "<script" not in write_report(finished).read_text()
    assert len((finished / "report.html").read_bytes()) < 200_000


def test_what_a_file_says_is_text_and_no_html(run_dir: Path) -> None:
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(re.sub(r"(?m)^  source: .*$", "  source: <b>$x_1$</b>", config, count=1))
    html = write_report(run_dir).read_text()
    assert "<b>$x_1$</b>" not in html and "&lt;b&gt;$x_1$&lt;/b&gt;" in html


# ---------------------------------------------------------------- when not to ship


def test_a_failed_check_forbids_it_in_its_own_words(tmp_path: Path) -> None:
    directory = make_tiny_run(tmp_path / "run", "device=x86_laptop", max_loss_rise=IMPOSSIBLE)
    page = page_of(directory)
    (check,) = [c for c in json.loads((directory / "verify.json").read_text())["checks"] if not c["ok"]]
    assert page.level == "no" and page.headline == "Do not ship this"
    assert f"{check['name']}: {check['metric']}: found" in page.text and check["detail"] in page.text
    assert page.tables["checks"][1][3] == "✗ FAILED", "it comes first"


def test_the_device_s_own_runtime_must_have_run_it(run_dir: Path) -> None:
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(re.sub(r"runtime: megatron_edge", "runtime: llama.cpp", config))
    page = page_of(run_dir)
    assert page.level == "wait" and "llama.cpp, which is to run it on x86_laptop, has not run it" in page.text
    ran = {"status": "ran", "recipe": "Q4_0", "tokens_per_second": 12.34, "peak_rss_bytes": 2**28, "threads": 2}
    change(run_dir / "verify.json", runtimes={"llama.cpp": ran})
    page = page_of(run_dir)
    assert page.level == "ship" and "12.3" in page.text
    change(run_dir / "verify.json", runtimes={"llama.cpp": {**ran, "status": "parsed"}})
    page = page_of(run_dir)
    assert page.level == "wait" and "has parsed it and not run it" in page.text


def damage_manifest(run_dir: Path) -> None:
    manifest = run_dir / "artifact" / "canonical" / "manifest.json"
    manifest.write_text(manifest.read_text()[:100])


def exported_anew(run_dir: Path) -> None:
    manifest = run_dir / "artifact" / "canonical" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")


NOT_PROVEN = {
    "never verified": (lambda path: (path / "verify.json").unlink(), "never verified"),
    "no artifact": (lambda path: shutil.rmtree(path / "artifact"), "no artifact"),
    "damaged since": (damage_manifest, "no artifact that can be read"),
    "another artifact": (exported_anew, "made anew after it was verified"),
    "diverged": (lambda path: write_outcome(path, "diverged", 4, "step 5: nan"), "diverged: step 5: nan"),
    "stopped": (lambda path: write_outcome(path, "stopped", 75, "by a signal"), "stopped: by a signal"),
    "crashed": (lambda path: write_outcome(path, "crashed", 1, "KeyError: 'x'"), "crashed: KeyError: 'x'"),
}


@pytest.mark.parametrize("name", NOT_PROVEN)
def test_what_was_not_proven_is_not_to_be_shipped(name: str, run_dir: Path) -> None:
    damage, words = NOT_PROVEN[name]
    damage(run_dir)
    page = page_of(run_dir)
    assert page.level == "no" and page.headline == "Do not ship this" and words in page.text


def test_a_job_that_is_killed_or_at_work_is_told_of(run_dir: Path) -> None:
    for name in ("verify.json", "outcome.json"):
        (run_dir / name).unlink()
    shutil.rmtree(run_dir / "artifact")
    write_metrics(run_dir, 2)
    page = page_of(run_dir)
    assert page.level == "no" and "after 2 of 6 steps without a word" in page.text
    with (run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        page = page_of(run_dir)
    assert page.level == "wait" and "still at work here: 2 of 6 steps" in page.text


def test_what_is_no_run_is_refused(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run_dir=.*: no config.yaml; allowed: the directory of a run"):
        write_report(tmp_path)
    (run_dir / "plan.json").write_text("{")
    with pytest.raises(InputError, match=r"plan.json: is no JSON"):
        write_report(run_dir)


# ---------------------------------------------------------------- how a job ended


@pytest.fixture
def sigterm() -> Iterator[None]:
    """A failed job ignores it until it has left; this process goes on."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


ENDS = {
    "failed": (VerificationFailed("1 checks do not hold"), 3, "1 checks do not hold"),
    "diverged": (Diverged("step 7: nan"), 4, "step 7: nan"),
    "disk": (WriteFailed("no space"), 6, "no space"),
    "stopped": (StoppedBySignal("after step 3"), 75, "after step 3"),
    "crashed": (ZeroDivisionError("by zero"), 1, "ZeroDivisionError: by zero"),
    "interrupted": (KeyboardInterrupt(), 130, "KeyboardInterrupt"),
}


@pytest.mark.parametrize("label", ENDS)
def test_how_a_job_ended_is_kept(label: str, run_dir: Path, sigterm: None) -> None:
    error, exit_code, reason = ENDS[label]

    @recorded
    def job(config: Any, launch: Launch) -> None:
        assert not (run_dir / "outcome.json").exists(), "that of the job before is gone"
        raise error

    config = from_yaml((run_dir / "config.yaml").read_text())
    object.__setattr__(config, "run_dir", str(run_dir))
    with pytest.raises(type(error)):
        job(config, Launch(0, 1, 0, 1, 1, ParallelPlan(), None))
    found = json.loads((run_dir / "outcome.json").read_text())
    assert (found["label"], found["exit_code"], found["reason"]) == (label, exit_code, reason)
    assert (run_dir / "report.html").exists()


def test_a_refused_command_leaves_the_outcome_that_was(run_dir: Path) -> None:
    @recorded
    def job(config: Any, launch: Launch) -> None:
        raise InputError("data: other data")

    config = from_yaml((run_dir / "config.yaml").read_text())
    object.__setattr__(config, "run_dir", str(run_dir))
    before = (run_dir / "outcome.json").read_bytes()
    with pytest.raises(InputError):
        job(config, Launch(0, 1, 0, 1, 1, ParallelPlan(), None))
    assert (run_dir / "outcome.json").read_bytes() == before
    assert read_run(run_dir).outcome == json.loads(before)
