"""The bench job: what it refuses, its arithmetic against sums by hand, and a whole run of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_edge.compose import compose
from megatron_edge.config import RunConfig
from megatron_edge.contracts import InputError, ParallelPlan
from megatron_edge.jobs import bench
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
    hf_config = bench._hf_config(config)
    assert bench._flops_per_token(hf_config, tokens) == flops
    fp8, int4 = bench._quant(config, "fp8"), bench._quant(config, "int4")
    assert bench._moved_bytes(int4, hf_config, tokens, 8) == 4 * linears
    inputs = layers * (hidden + heads + hidden + ffn) * tokens
    assert bench._moved_bytes(fp8, hf_config, tokens, 8) == 4 * linears + 8 * 4 * inputs


def test_a_tiny_run(tmp_path: Path) -> None:
    config = prepared(
        tmp_path, "bench.formats=[int4]", "bench.shapes=[1x16]", "bench.accumulate=[2]", "bench.steps=1",
        "bench.repeats=2", "train.precision=fp32",
    )  # fmt: skip
    bench.qat_step(config, ALONE)
    report = json.loads((tmp_path / "bench_qat_step.json").read_text())
    rows = {row["contender"]: row for row in report["rows"]}
    assert list(rows) == ["plain", "ours", "modelopt"] and report["device"] == "cpu"
    assert rows["plain"]["ratio"] == rows["plain"]["ratio_max"] == 1
    for row in rows.values():
        assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"] and row["step_ms"] > 0
        assert row["tflops_per_rank"] > 0 and row["mfu"] is None and row["peak_gib"] is None
