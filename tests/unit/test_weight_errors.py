"""The error of each shipped linear against whole tensors that torch's own reader gives, of any layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_edge.artifact.store import ArtifactReader
from megatron_edge.contracts import ParallelPlan
from megatron_edge.jobs import delivery
from megatron_edge.report.facts import read_run
from megatron_edge.report.layers import heat_of
from megatron_edge.report.weight_errors import WEIGHT_ERRORS_FILE, measure, weight_errors
from megatron_edge.runtime.launcher import Launch
from tests.unit.whole_export import hugging_face_tensors
from tools.layout_parity import layout_plan
from tools.layout_state import read_checkpoint
from tools.random_checkpoint import SIZES, make_run, write_source

CASES = {
    "int4": ("tiny", "TP2PP2", ["quant=int4", "quant.group_size=64", "quant.embedding=int8"]),
    "experts": ("tiny_experts", "EP2", ["quant=nvfp4_w4a16"]),
}


@pytest.mark.parametrize("case", CASES)
def test_errors_are_those_of_whole_tensors(case: str, tmp_path: Path) -> None:
    model, layout, arguments = CASES[case]
    source = write_source(tmp_path / "model", SIZES[model])
    config, _ = make_run(
        tmp_path / "run", source, layout_plan(layout), [*arguments, "export.targets=[]"], torch.bfloat16
    )
    delivery.export(config, Launch(0, 1, 0, 1, 2, ParallelPlan(), None))
    run_dir, artifact = tmp_path / "run", tmp_path / "run" / "artifact" / "canonical"
    reader, hf_config = ArtifactReader(artifact), json.loads((artifact / "config.json").read_text())
    found = weight_errors(run_dir / "checkpoints" / "step_00000001", reader, hf_config)

    stored = read_checkpoint(run_dir / "checkpoints" / "step_00000001")
    trained = {name: cut(stored[key]) for name, _, (key, cut) in hugging_face_tensors(stored, hf_config)}
    assert set(found) == set(reader.manifest.linears) and len(found) > 10
    for name, error in found.items():
        shipped, whole = reader.dequantized(name, torch.float64), trained[name].double()
        expected = float((shipped - whole.reshape(shipped.shape)).square().sum() / whole.square().sum())
        assert error.relative_squared_error == pytest.approx(expected, rel=1e-5) and expected > 1e-5

    # Only of an artifact that verify found whole, once, and again for another artifact.
    run = read_run(run_dir)
    assert measure(run) is None and not (run_dir / WEIGHT_ERRORS_FILE).exists()
    sha256 = run.artifact.manifest_sha256
    checks = [{"name": "integrity", "metric": "", "value": 0.0, "limit": 0.0, "ok": True, "detail": ""}]
    (run_dir / "verify.json").write_text(json.dumps({"artifact": {"manifest_sha256": sha256}, "checks": checks}))
    assert measure(read_run(run_dir))["linears"].keys() == found.keys()
    heat = heat_of(read_run(run_dir))
    assert heat["count"] == len(found) and {len(row["cells"]) for row in heat["rows"]} == {4 if case == "int4" else 2}
    largest = max(error.relative_squared_error for error in found.values())
    assert heat["worst"][0]["error"] == f"{100 * largest:.3g}%"
