"""The accuracy study: its jobs are jobs, its shares and rises are what their definitions say, and it goes on."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_edge.checks import check_config
from megatron_edge.compose import compose
from tools import accuracy_report as report
from tools.accuracy_study import METHODS, TUNED, jobs_of, parse, tuned_job

FORMATS = ("int4_awq+fp8:3", "nvfp4_awq+fp8:2", "w4a8_awq", "fp8", "nvfp4_w4a16")


def arguments(*more: str) -> Any:
    args = parse(["--train-text", "a.txt", "--heldout-text", "b.txt", "--formats", *FORMATS, *more])
    return args


def test_every_job_is_one_that_the_launcher_takes() -> None:
    args = arguments("--steps", "7", "--set", "qad", "train.learning_rate=2e-4", "--", "data.eval_tokens=64")
    jobs = jobs_of(args, Path("tuned"))
    assert len({job.name for job in jobs}) == len(jobs) == 1 + 3 + 8 + 8 + 8  # bf16, rtn; ptq, qat and qad by seed
    first = [job.method for job in jobs[:12]]
    assert set(first) == {"ptq", "rtn", "bf16"}, "what is compared with comes first"
    for job in [tuned_job(args), *jobs]:
        config = compose([*job.overrides, "run_dir=x"])
        check_config(config)
        assert (config.data.train, config.data.heldout, config.data.eval_tokens) == ("a.txt", "b.txt", 64)
        assert config.train.steps == (200 if job.method == TUNED else 0 if job.method in ("ptq", "rtn") else 7)
        assert config.train.seed == job.seed
        assert config.kv.format == ("fp8" if "+fp8" in job.format else "none")
        assert (config.quant.algorithm == "awq") == ("_awq" in job.format and job.method != "rtn")
        assert config.model.source == ("tuned" if job.method != TUNED else args.model_source)
        assert config.train.learning_rate == {"qad": 2e-4}.get(job.method, config.train.learning_rate)


def test_the_same_tokens_and_steps_for_every_method() -> None:
    jobs = jobs_of(arguments(), Path("tuned"))
    data = {}
    for job in jobs:
        config = compose([*job.overrides, "run_dir=x"])
        if config.train.steps:
            key = (config.train.steps, config.train.global_batch, config.train.seq_length_tokens, config.data)
            data.setdefault(job.seed, set()).add(repr(key))
    assert all(len(kinds) == 1 for kinds in data.values()) and len(data) == 3


def test_variants_stand_beside_their_method() -> None:
    args = arguments("--methods", "qad", "qad@hot", "--set", "qad@hot", "train.learning_rate=1e-3")
    jobs = {job.name: job for job in jobs_of(args, Path("tuned"))}
    assert "train.learning_rate=1e-3" in jobs["fp8__qad@hot__s1"].overrides
    assert "train.learning_rate=1e-3" not in jobs["fp8__qad__s1"].overrides
    with pytest.raises(SystemExit):
        arguments("--methods", "lora")
    with pytest.raises(SystemExit):
        arguments("--methods", TUNED)
    assert set(METHODS) == {"bf16", "rtn", "ptq", "qat", "qad"}


def result(format: str, method: str, seed: int, loss: float, kl: float) -> dict[str, Any]:
    """Ten windows of 10 tokens around `loss`, the same scatter for every model."""
    scatter = [0.01 * (i - 4.5) for i in range(10)]
    wobble = [0.002 * ((i + seed) % 3 - 1) for i in range(10)]  # so that differences have a spread
    losses = [10 * (loss + s + (w if method != TUNED else 0)) for s, w in zip(scatter, wobble, strict=True)]
    curve = {"loss_nats_per_token": [3.0, 2.9], "tokens_per_second": [100.0, 300.0], "memory_bytes_rank0": [1, 2**30]}
    return {
        "name": f"{format}__{method}__{seed}", "format": format, "method": method, "seed": seed, "overrides": [],
        "loss": losses, "kl": [10 * kl] * 10, "tokens": [10] * 10, "verified": True, "failed": [],
        "seconds": 60.0, "curve": curve if method in ("qat", "qad") else {},
    }  # fmt: skip


@pytest.fixture
def results() -> dict[str, Any]:
    rows = [result("", TUNED, 0, 2.0, 0.0), result("int4_awq", "rtn", 1, 2.4, 0.6)]
    for seed, closed in ((1, 0.9), (2, 0.8)):
        rows += [result("int4_awq", "ptq", seed, 2.2, 0.3), result("int4_awq", "qad", seed, 2.2 - 0.2 * closed, 0.06)]
    rows += [result("fp8", "ptq", 1, 2.0001, 0.01), result("fp8", "qad", 1, 2.0001, 0.005)]
    return {"rows": rows, "device": "CPU", "versions": {"torch": "2"}, "arguments": ["--out", "x"], "parallel": 2,
            "num_devices": 1, "not_done": ["fp8__qad__s1"]}  # fmt: skip


def test_shares_and_rises_by_their_definitions(results: dict[str, Any]) -> None:
    rows = {(row.format, row.method, row.seed): row for row in report.rows_of(results)}
    for seed, closed in ((1, 0.9), (2, 0.8)):
        row = rows["int4_awq", "qad", seed]
        assert row.closed_loss == pytest.approx(closed, abs=0.01) and row.closed_kl == pytest.approx(0.8)
        assert row.closed_rtn_loss == pytest.approx((0.2 + 0.2 * closed) / 0.4, abs=0.01)
        assert row.closed_rtn_kl == pytest.approx(0.9) and rows["int4_awq", "ptq", seed].closed_rtn_kl == 0.5
        assert row.rise == pytest.approx((2.2 - 0.2 * closed - 2.0) / 2.0, abs=1e-3)
        assert row.low < row.difference < row.high
    assert rows["fp8", "qad", 1].closed_loss is None, "PTQ's difference is noise: there is no gap to close"
    assert rows["fp8", "qad", 1].closed_kl == pytest.approx(0.5)
    assert rows["int4_awq", "qad", 1].tokens_per_second == 200 and rows["int4_awq", "ptq", 1].memory_bytes is None
    goals = {(row[0], row[1]): row[2:] for row in report.goals_table(list(rows.values()))}
    assert goals["int4_awq", "at least 80% of the PTQ gap closed, loss"] == ["85%", "met"]
    assert goals["int4_awq", "rise below 3%"][1] == "met"
    results["rows"].pop(0)
    with pytest.raises(ValueError, match="no bf16_ft among"):
        report.rows_of(results)


def test_the_report_needs_results_json_alone(results: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    results = json.loads(json.dumps(results))
    report.write(results, tmp_path, tmp_path / "docs")
    with (tmp_path / "results.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == len(results["rows"])
    text = (tmp_path / "docs" / "accuracy.md").read_text()
    assert re.search(r"\| int4_awq \| QAD \| 2 \| 2\.03\d\d ± 0\.01\d\d \| 0\.0600 ± 0\.0000 \|", text), text
    assert "| fp8 | QAD | 1 |" in text and "no gap" in text and "noise" in text
    assert (tmp_path / "docs" / "accuracy.png").is_file() == ("accuracy.png" in text)
