"""A checkpoint of one layout under another: tools/reshard_matrix.py on models made on the spot, with gloo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.whole_export import check_artifact
from tools.layout_parity import compose

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(1500)


def run_tool(directory: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    command = [sys.executable, str(REPOSITORY / "tools" / "reshard_matrix.py"), "--out", str(directory), *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode in (0, 1) and (directory / "matrix.json").is_file(), done.stderr
    return json.loads((directory / "matrix.json").read_text())


def check_matrix(found: dict[str, dict[str, Any]], least_tensors: int) -> None:
    for saved, cells in found.items():
        for loaded, cell in cells.items():
            assert (cell["differing"], cell["files"]) == (0, 0), f"{saved} -> {loaded}: {cell['first']}"
            assert cell["tensors"] >= least_tensors, "weights, quantizers and two moments"


def check_artifacts(directory: Path) -> None:
    """Each layout's own checkpoint: exported by rows, it is what its whole tensors give."""
    job = json.loads((directory / "job.json").read_text())
    config = compose(job["arguments"], job["format"])
    for layout in job["layouts"]:
        run_dir = directory / layout / "trained"
        check_artifact(run_dir / "artifact" / "canonical", next((run_dir / "checkpoints").glob("step_*")), config)


def test_dense_on_two_processes(tmp_path: Path) -> None:
    check_matrix(run_tool(tmp_path, "--layouts", "DP2DO", "TP2SP", "PP2VPP2"), 110)
    check_artifacts(tmp_path)


def test_experts_on_two_processes(tmp_path: Path) -> None:
    """Between expert-parallel layouts Megatron's own optimizer state does not reshard."""
    layouts = ("--layouts", "EP2", "TP2ETP2SPDO", "PP2")
    check_matrix(run_tool(tmp_path, "--source", "random:mixtral", *layouts), 270)
    check_artifacts(tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("source", ["random:tiny", "random:mixtral"])
def test_four_processes(tmp_path: Path, source: str) -> None:
    check_matrix(run_tool(tmp_path, "--source", source), 110)
