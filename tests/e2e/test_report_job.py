"""What a real job leaves of itself for people: its page, and how it ended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import STEPS, Run
from tests.e2e.launches import run

pytestmark = pytest.mark.timeout(300)


def test_a_job_leaves_its_page_and_its_outcome(gateway_run: Run, tmp_path: Path) -> None:
    """Two pipeline stages: every linear of both has its error; the launcher makes the same page again, of a copy."""
    run_dir = gateway_run.directory
    outcome = json.loads((run_dir / "outcome.json").read_text())
    assert (outcome["label"], outcome["exit_code"]) == ("done", 0) and outcome["seconds"] > 0
    assert f"report: {run_dir / 'report.html'}" in gateway_run.done.stderr
    manifest = json.loads((run_dir / "artifact" / "canonical" / "manifest.json").read_text())
    errors = json.loads((run_dir / "weight_errors.json").read_text())["linears"]
    assert set(errors) == set(manifest["linears"])
    # Blocks of 16 values on e2m1's grid lose about 0.9% of a Gaussian's squares.
    assert all(0.006 < error["relative_squared_error"] < 0.012 for error in errors.values())
    html = (run_dir / "report.html").read_text()
    losses = json.loads((run_dir / "verify.json").read_text())["losses_nats_per_token"]
    for text in (f"{losses['artifact']:.4f}", f"{losses['ptq']:.4f}", f"{STEPS} of {STEPS} steps", "down_proj"):
        assert text in html

    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy, ignore=shutil.ignore_patterns("report.html", "data"))
    done = run("report", f"run_dir={copy}", directory=tmp_path)
    assert done.returncode == 0 and not done.noise, done.stderr
    again = (copy / "report.html").read_text()
    assert again.count("<svg") == html.count("<svg") == 4 and f"{losses['artifact']:.4f}" in again


def test_the_report_launcher_refuses_what_is_no_run(tmp_path: Path) -> None:
    done = run("report", f"sweep={tmp_path / 'none'}", directory=tmp_path)
    assert done.returncode == 2 and done.lines("error: sweep=")
