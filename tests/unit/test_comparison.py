"""A sweep's comparison: the front against its definition, differences against a library's paired test, and who is on
it: only runs that hold."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.numpy import load_file, save_file
from scipy import stats
from tiny_run import IMPOSSIBLE, Page, make_tiny_run, write_outcome

from megatron_edge.contracts import InputError
from megatron_edge.report.comparison import compare, table, write_comparison
from megatron_edge.runtime.sweep import front_of

Jobs = list[dict[str, Any]]


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), max_size=12))
def test_the_front_is_what_nothing_beats(values: list[tuple[int, ...]]) -> None:
    points = [(number, tuple(map(float, value))) for number, value in enumerate(values)]
    front = front_of(points)
    for number, value in points:
        better = [v for _, v in points if np.all(np.array(v) <= value) and np.any(np.array(v) < value)]
        assert (number in front) == (not better)
    assert bool(front) == bool(points)


def write_sweep(directory: Path, jobs: Jobs) -> Path:
    (directory / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    return directory


def job(run_dir: Path | str, *overrides: str, status: str = "done", **more: Any) -> dict[str, Any]:
    usual = {"exit_code": 0, "reason": None, "seconds": 2.0}
    return {"overrides": ["+scenario=gateway", *overrides], "run_dir": str(run_dir), "status": status, **usual, **more}


def set_result(run_dir: Path, loss_change: float, ms: float) -> None:
    """As if this run had come to another loss, of every token, and a plan had predicted `ms`."""
    file = run_dir / "reference" / "reference.safetensors"
    said = load_file(file)
    noise = np.random.default_rng(3).normal(0, 0.01, said["nll"].shape)
    said["nll"] = ((said["nll"] + loss_change + noise) * said["loss_mask"]).astype(np.float32)
    save_file(said, file)
    verify = json.loads((run_dir / "verify.json").read_text())
    verify["losses_nats_per_token"]["artifact"] += loss_change
    (run_dir / "verify.json").write_text(json.dumps(verify))
    plan = json.loads((run_dir / "plan.json").read_text())
    plan["predicted"] = {
        "ms_per_token": ms, "joules_per_token": 0.1, "largest_batch": 3, "largest_seq_len": 4096,
        "limits": ["memory"], "doubts": ["a doubt"],
    }  # fmt: skip
    (run_dir / "plan.json").write_text(json.dumps(plan))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs of one size: the best, a slower and worse one, a worse but faster one, one that verify refused; one
    that diverged before anything was made, and one that was refused."""
    directory = tmp_path_factory.mktemp("sweep")
    best = make_tiny_run(directory / "best")
    for name, change, ms in (("beaten", 0.2, 9.0), ("fast", 0.3, 4.0), ("best", 0.0, 8.0)):
        if name != "best":
            shutil.copytree(best, directory / name)
        set_result(directory / name, change, ms)
    set_result(make_tiny_run(directory / "refused", max_loss_rise=IMPOSSIBLE), -1.0, 1.0)
    (directory / "diverged").mkdir()
    shutil.copy(best / "config.yaml", directory / "diverged")
    write_outcome(directory / "diverged", "diverged", 4, "step 5: nan")
    jobs = [
        job(directory / "beaten", "quant=int4", "train.seed=1"),
        job("best", "quant=int4", "train.seed=2", status="skipped"),  # relative: to the sweep's directory
        job(directory / "fast", "quant=int4", "train.seed=3"),
        job(directory / "refused", "quant=int4", "train.seed=4", status="failed", exit_code=3),
        job(directory / "diverged", "quant=int4", "train.seed=5", status="failed", exit_code=4),
        job(
            directory / "gone", "quant=fp8", "train.seed=6", status="failed", exit_code=2, reason="error: quant.weight"
        ),
    ]
    write_sweep(directory, jobs)
    write_comparison(directory)
    return directory


def test_only_what_holds_and_is_not_beaten_is_on_the_front(sweep: Path) -> None:
    found = compare(sweep)
    assert [row.on_front for row in found.rows] == [False, True, True, False, False, False]
    assert [row.is_comparable for row in found.rows] == [True, True, True, False, False, False]
    assert found.time_name == "predicted for board_2gb"
    assert [row.label for row in found.rows][:2] == ["quant=int4 train.seed=1", "quant=int4 train.seed=2"]
    assert "step 5: nan" in found.rows[4].reason and found.rows[5].reason == "error: quant.weight"


def test_differences_are_a_paired_test_over_windows(sweep: Path) -> None:
    rows = compare(sweep).rows
    said = {name: load_file(sweep / name / "reference" / "reference.safetensors") for name in ("best", "fast")}
    means = {  # windows of one size: their means weigh the same
        name: np.array([row[mask].mean(dtype=np.float64) for row, mask in zip(x["nll"], x["loss_mask"], strict=True)])
        for name, x in said.items()
    }
    test = stats.ttest_rel(means["fast"], means["best"])
    low, high = test.confidence_interval(0.95)
    difference = rows[2].difference
    assert rows[1].difference is None, "the best"
    assert difference.value == pytest.approx((means["fast"] - means["best"]).mean(), rel=1e-6)
    assert (difference.low, difference.high) == pytest.approx((low, high), rel=1e-6) and not difference.is_noise


def test_time_that_not_all_have_is_left_out_with_the_reason(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep / "best", tmp_path / "best")
    plan = json.loads((tmp_path / "best" / "plan.json").read_text())
    del plan["predicted"]
    (tmp_path / "best" / "plan.json").write_text(json.dumps(plan))
    jobs = [job(sweep / "fast", "train.seed=1"), job(tmp_path / "best", "train.seed=2")]
    found = write_comparison(write_sweep(tmp_path, jobs))
    assert found.time_name == "" and [row.on_front for row in found.rows] == [False, True], "loss and bytes alone"
    assert "not all runs have one" in Page(found.page.read_text()).text


def test_page_csv_and_table_say_the_same(sweep: Path) -> None:
    found = compare(sweep)
    page = Page((sweep / "comparison.html").read_text())
    lines = list(csv.DictReader((sweep / "comparison.csv").open()))
    assert [line["label"] for line in lines] == [row.label for row in found.rows]
    shown = {row[0]: row for row in page.tables["runs"] if row and row[0].isdigit()}
    assert list(shown) == ["2", "3", "1", "4", "5", "6"], "the front, what it beats, what failed"
    for row, line in zip(found.rows, lines, strict=True):
        cells = shown[str(row.number)]
        assert cells[1].startswith(row.label) and line["on_front"] == str(row.on_front)
        assert (cells[-1] == "on the front") == row.on_front
        if row.loss is not None:
            assert float(cells[2]) == pytest.approx(float(line["heldout_nats_per_token"]), abs=5e-5)
            assert float(line["heldout_nats_per_token"]) == row.loss and int(line["weights_bytes"]) == row.size_bytes
            assert float(cells[5]) == pytest.approx(row.predicted_ms, rel=1e-2)
    assert page.headline == "Choose among 2 of 6 runs" and page.level == "wait"
    for reason in ("step 5: nan", "error: quant.weight", "perplexity"):
        assert reason in page.text
    console = Console(file=io.StringIO(), width=160)
    console.print(table(found))
    said = console.file.getvalue()
    assert said.count("on the front") == 2 and said.count("beaten") == 1 and said.count("failed") >= 3


def test_the_page_links_to_the_runs_and_nowhere_else(sweep: Path) -> None:
    page = Page((sweep / "comparison.html").read_text())
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href") and value[0] != "#"]
    assert sorted(links) == [f"{n}/report.html" for n in ("beaten", "best", "diverged", "fast", "refused")]
    assert all((sweep / link).is_file() for link in links)


def test_the_picture_has_a_point_for_each_run_with_a_result(sweep: Path) -> None:
    html = (sweep / "comparison.html").read_text()
    for row in compare(sweep).rows:
        assert (f">{row.number}  {row.label}<" in html) == (row.loss is not None)
    png = (sweep / "comparison.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and len(png) > 10_000
    assert not re.search(r"#0[1-7]0[2-8]0[3-9]", html), "a stand-in colour is left"


BAD = {
    "no jobs": ({"jobs": []}, r"jobs=\[\]"),
    "no run_dir": ({"jobs": [{"overrides": [], "status": "done"}]}, r"jobs\[0\].run_dir is missing"),
    "status": ({"jobs": [{"overrides": [], "run_dir": "a", "status": "ok"}]}, r"status='ok'; allowed: done, failed"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_sweep_is_refused(name: str, tmp_path: Path) -> None:
    data, words = BAD[name]
    (tmp_path / "sweep.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=words):
        write_comparison(tmp_path)


def test_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no sweep.json; allowed: the directory of a sweep"):
        write_comparison(tmp_path)
    jobs = [job(f"none{i}", f"train.seed={i}", status="cancelled") for i in range(2)]
    page = Page(write_comparison(write_sweep(tmp_path, jobs)).page.read_text())
    assert page.level == "no" and page.headline == "Nothing to choose from in 2 runs"
