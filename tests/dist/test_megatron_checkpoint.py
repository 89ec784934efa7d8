"""Jobs that start from what Megatron-LM saved over several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_edge.model.source import open_source
from tests.e2e.launches import hashes, run, run_all

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(600)

LAYOUTS = {"tiny": "TP2", "qwen3": "PP2", "mixtral": "EP2"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME/hf, and NAME/LAYOUT as Megatron-LM saves it."""
    directory = tmp_path_factory.mktemp("megatron")
    program = REPOSITORY / "tests" / "unit" / "megatron_checkpoint.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(
        [*command, str(directory), *(f"{name}={layout}" for name, layout in LAYOUTS.items())],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tensor_comes_back(saved: Path, name: str) -> None:
    hf = saved / name / "hf"
    found, tensors = open_source(saved / name / LAYOUTS[name], hf), load_file(hf / "model.safetensors")
    assert len(list(found.path.glob("*.distcp"))) == 4, "two files of each process"
    for tensor in found.names():
        assert torch.equal(found.read(tensor), tensors[tensor]), tensor


def test_a_job_from_it_is_the_job_from_hugging_faces(saved: Path, tmp_path: Path) -> None:
    hf, megatron = saved / "tiny" / "hf", saved / "tiny" / "TP2"
    common = ("quant=int4_awq", "train=ptq", "train.precision=fp32", "train.seq_length_tokens=64", "threads=1",
              "quant.calib_size=4", "data.eval_tokens=256", "export.targets=[]", "export.max_loss_rise=9")  # fmt: skip
    sources = {"hf": (f"model.source={hf}",), "megatron": (f"model.source={megatron}", f"model.hf_config={hf}")}
    done = run_all(
        {
            name: lambda name=name, source=source: run(
                "qat", *source, *common, f"run_dir={tmp_path / name}", directory=tmp_path / f"{name}_started"
            )
            for name, source in sources.items()
        }
    )
    artifacts = []
    for name, finished in done.items():
        assert finished.returncode == 0, finished.stderr
        assert not finished.noise
        files = hashes(tmp_path / name / "artifact" / "canonical")
        artifacts.append({file: digest for file, digest in files.items() if file != "manifest.json"})
    assert artifacts[0] == artifacts[1], "manifest.json alone names its source"
