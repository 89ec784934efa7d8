"""FP8 products where layouts cut or exchange what a linear layer multiplies, two processes with gloo: the gradients of
fake-quantised ones, in fp32. And attention where context parallelism cuts the text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(300)

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
WORKER = Path(__file__).with_name("fp8_ranks.py")
# Layout -> layers of a rank with FP8 products (two layers of four; of a MoE's, two and those of its experts).
LAYOUTS = {"TP2": 8, "TP2SPRC": 8, "EP2": 12, "TP2ETP2SP": 20}
CONTEXT_LAYOUTS = ("CP2", "CP2RC")
MICRO_BATCHES = 4
LIMIT = 1e-5  # of fp32 sums in another order


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    output = tmp_path_factory.mktemp("fp8") / "found.json"
    done = subprocess.run(
        [*TORCHRUN, str(WORKER), str(output), *LAYOUTS, *CONTEXT_LAYOUTS],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_every_layout(found: dict[str, list[dict[str, Any]]], layout: str) -> None:
    for rank in found[layout]:
        print(f"{layout}: losses {rank['losses']:.1e}, gradients {rank['gradients']:.1e}")
        assert rank["used"] == {"used": LAYOUTS[layout]} and rank["norm"] > 0
        assert rank["kept"] == MICRO_BATCHES * LAYOUTS[layout], (
            "each product's input is kept as codes, recomputed or not"
        )
        assert rank["losses"] < LIMIT and rank["gradients"] < LIMIT


@pytest.mark.parametrize("layout", CONTEXT_LAYOUTS)
def test_every_way_to_attend_to_a_part(found: dict[str, list[dict[str, Any]]], layout: str) -> None:
    """What flash attention gets on CUDA, which here becomes a mask; documents are cut within and between pieces."""
    for rank in found[layout]:
        for way, (losses, gradients) in rank.items():
            print(f"{layout} {way}: losses {losses:.1e}, gradients {gradients:.1e}")
            assert losses < LIMIT and gradients < LIMIT
