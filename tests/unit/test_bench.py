"""The bench job: what it refuses, its arithmetic against sums by hand, and a whole run of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_edge.compose import compose
from megatron_edge.config import RunConfig
from megatron_edge.contracts import InputError, ParallelPlan
from megatron_edge.jobs import bench, contenders, whole_job
from megatron_edge.log import read_metrics
from megatron_edge.runtime.launcher import Launch

ALONE = Launch(rank=0, world_size=1, local_rank=0, local_world_size=1, threads=1, plan=ParallelPlan(), store=None)


def prepared(directory: Path, *arguments: str) -> RunConfig:
    return bench.prepare(compose([f"run_dir={directory}", "bench.size=tiny", *arguments]), ParallelPlan())


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("bench.formats=[int5]", "int5"),
        ("bench.formats=[none]", "against=modelopt"),
        ("bench.formats=[nvfp4]", "needs CUDA"),
        ("bench.shapes=[4x]", "windows x tokens"),
        ("bench.shapes=[1x16384]", "8192"),
        ("bench.accumulate=[0]", "from 1 up"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, argument: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        prepared(tmp_path, "bench.formats=[int4]", argument)


def test_flops_and_bytes_by_hand() -> None:
    layers, hidden, ffn, heads, vocabulary, tokens = 8, 2048, 8192, 64 * 32, 32768, 4096
    linears = layers * (hidden * (heads + 2 * 64 * 8) + heads * hidden + 3 * hidden * ffn)
    scores = layers * tokens * heads * 2 / 2  # q k' and p v, of which causality leaves a half
    flops = 6 * (linears + vocabulary * hidden) + 3 * 2 * scores
    config = compose([])
    hf_config = contenders.hf_config_of(config)
    assert contenders.flops_per_token(hf_config, tokens) == flops
    fp8, int4, nvfp4 = (contenders.quant_of(config, name) for name in ("fp8", "int4", "nvfp4"))
    assert contenders.moved_bytes(nvfp4, hf_config, tokens, 8) == 4 * linears + 8 * layers * 4 * heads * tokens
    assert contenders.moved_bytes(int4, hf_config, tokens, 8) == 4 * linears
    moved = 4 * linears + 8 * layers * (3 * heads + 2 * hidden + ffn) * tokens
    assert contenders.moved_bytes(fp8, hf_config, tokens, 8) == moved
    assert contenders.bound(int4, hf_config, tokens, 8, (1e15, 1e12), 0.5) == 1 + 4 * linears / 1e12 / 0.5
    faster = 8 * 2 * linears * tokens / 2e15
    assert contenders.bound(fp8, hf_config, tokens, 8, (1e15, 1e12), 0.5) == pytest.approx(
        1 + 2 * (moved / 1e12 - faster)
    )


def test_a_tiny_run(tmp_path: Path) -> None:
    config = prepared(
        tmp_path, "bench.formats=[int4]", "bench.shapes=[1x16]", "bench.accumulate=[1,2]", "bench.steps=1",
        "bench.repeats=2", "train.precision=fp32", "bench.against=[ours,ours_uncached,modelopt]", "bench.profile=true",
    )  # fmt: skip
    bench.run(config, ALONE)
    report = json.loads((tmp_path / "bench_qat_step.json").read_text())
    rows = {(row["contender"], row["accumulate"]): row for row in report["rows"]}
    names = ["plain", "ours", "ours_uncached", "modelopt"]
    assert list(rows) == [(name, count) for count in (1, 2) for name in names] and report["device"] == "cpu"
    assert rows["plain", 2]["ratio"] == rows["plain", 2]["ratio_max"] == 1
    for row in rows.values():
        assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"] and row["step_ms"] > 0
        assert row["tflops_per_rank"] > 0 and row["mfu"] is None and row["peak_gib"] is None
        assert row["launched"] == "one by one"
    assert report["attention"] == {"1x16": "flash"} and report["first_step_seconds"].keys() == {
        f"int4 {name} one by one" for name in names
    }
    assert report["notes"] == [] and report["modelopt_kernels"] == {}
    assert [one["contender"] for one in report["profiles"]] == names * 2
    for one in report["profiles"]:
        groups = one["groups_ms"]
        assert {"attention", "GEMM", "loss", "optimizer", "elementwise"} <= groups.keys() and min(groups.values()) >= 0
        assert 0 < sum(groups.values()) <= 1.01 * one["wall_ms"]


def test_a_tiny_whole_job(tmp_path: Path) -> None:
    config = prepared(
        tmp_path, "job=whole_job", "bench.formats=[int4]", "bench.shapes=[2x64]", "bench.accumulate=[2]",
        "bench.repeats=2", "train.steps=3", "train.precision=fp32", "data.eval_tokens=512",
    )  # fmt: skip
    bench.run(config, ALONE)
    (row,) = json.loads((tmp_path / "bench_whole_job.json").read_text())["rows"]
    assert row["steps"] == 3 and row["eval_tokens"] == 512 and row["bare_ms"] > 0
    assert row["loop_ratio"] < row["job_ratio"] and row["job_ratio_min"] <= row["job_ratio"] <= row["job_ratio_max"]
    steps = [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    first = whole_job.WARM_UP_STEPS + 1
    assert steps == list(range(first, first + 2 * 3)), "the loop's own metrics, each step once"


def test_what_is_said_of_memory() -> None:
    def row(name: str, launched: str, gib: float | None) -> bench.Row:
        return bench.Row("int4", name, launched, "1x16", 8, 1.0, 1.0, 1.0, 1.0, gib, 1.0, None, None, None)

    rows = [row(name, "one by one", gib) for name, gib in (("ours", 9.0), ("ours_uncached", 8.0), ("modelopt", 10.0))]
    recorded = [row("ours", "graph", 9.5), row("ours_uncached", "graph", 8.25)]
    assert bench._memory_notes(rows + recorded) == [
        "int4 1x16 x8, one by one: peak without cached weights 8.00 GiB, 0.800 of modelopt's; the cache adds 1.00",
        "int4 1x16 x8, graph: peak without cached weights 8.25 GiB; the cache adds 1.25",
    ]
    assert bench._memory_notes([row("ours_uncached", "graph", None)]) == []
