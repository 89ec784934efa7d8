"""Weight formats x KV formats through the whole job, in one process: tools/format_matrix.py on the tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_edge.compose import options
from tests.e2e.launches import REPOSITORY
from tests.e2e.tiny_model import write_text


def run_matrix(
    tiny_model: Path, directory: Path, *arguments: str, leaves: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """The cells of matrix.json, which must all be as they should be."""
    overrides = (f"data.train={write_text(directory / 'text.txt')}", *leaves)
    command = [sys.executable, str(REPOSITORY / "tools" / "format_matrix.py"), *arguments]
    command += ["--source", str(tiny_model), "--out", str(directory), "--", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = json.loads((directory / "matrix.json").read_text())
    assert all(cell["ok"] and cell["checks"] > 15 and not cell["failed"] for cell in cells)
    return cells


@pytest.mark.timeout(400)
def test_some_formats_are_trained_compressed_and_proven(tiny_model: Path, tmp_path: Path) -> None:
    cells = run_matrix(tiny_model, tmp_path, "--quant", "w4a8_awq", "int8_sq", "--kv", "nvfp4")
    saved = {cell["quant"]: cell["saved"] for cell in cells}
    assert saved["w4a8_awq"] >= 0.72 and saved["int8_sq"] >= 0.49
    for cell in cells:
        losses = cell["losses"]
        assert losses["trained"] < losses["ptq"], "it learns"
        report = json.loads((tmp_path / f"{cell['quant']}+nvfp4" / "verify.json").read_text())
        assert {"target compressed_tensors", "logits", "loss"} <= {check["name"] for check in report["checks"]}


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_format_is_trained_compressed_and_proven(tiny_model: Path, tmp_path: Path) -> None:
    cells = run_matrix(tiny_model, tmp_path)
    assert len(cells) == (len(options("quant")) - 1) * len(options("kv")) >= 7 * 4


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("quant", "leaves"),
    [
        ("fp8", ("quant.calibration=percentile", "quant.percentile=99.5")),
        ("int8_sq", ("quant.calibration=mse",)),
        ("nvfp4", ("quant.calibration=mse",)),
        ("int4_awq", ("quant.algorithm=awq_clip",)),
    ],
)
def test_every_calibration_is_trained_compressed_and_proven(
    tiny_model: Path, tmp_path: Path, quant: str, leaves: tuple[str, ...]
) -> None:
    run_matrix(tiny_model, tmp_path, "--quant", quant, "--kv", "fp8", leaves=leaves)
