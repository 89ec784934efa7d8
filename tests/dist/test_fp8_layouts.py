"""FP8 products, and products that add gradients of weights, where layouts cut or exchange what a linear layer multiplies,
two processes with gloo: the gradients of fake-quantised ones that Megatron's hook adds, in fp32. Likewise nvfp4 inputs
that norms and SwiGLU round. And attention where context parallelism cuts the text."""

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
# Layout -> linear layers of a rank with FP8 products (two layers of four; of a MoE's, two and those of its experts), and
# those among them that round their input themselves: after attention, and of an expert the first.
LAYOUTS = {
    "TP2": (8, 2), "TP2SPRC": (8, 2), "EP2": (12, 6), "TP2ETP2SP": (20, 10), "PP2": (4, 1), "CP2": (8, 2), "DP2": (8, 2),
}  # fmt: skip
# Layout -> inputs of a rank that a norm or SwiGLU writes: three of a layer; of one with experts, that of attention and
# one of each expert.
NVFP4_LAYOUTS = {"TP2SPRC:nvfp4": 6, "TP2:nvfp4": 6, "EP2:nvfp4": 6, "PP2:nvfp4": 3, "CP2:nvfp4": 6}
CONTEXT_LAYOUTS = ("CP2:ways", "CP2RC:ways")
MICRO_BATCHES = 4
LIMIT = 1e-5  # of fp32 sums in another order


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    output = tmp_path_factory.mktemp("fp8") / "found.json"
    done = subprocess.run(
        [*TORCHRUN, str(WORKER), str(output), *LAYOUTS, *NVFP4_LAYOUTS, *CONTEXT_LAYOUTS],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_every_layout(found: dict[str, list[dict[str, Any]]], layout: str) -> None:
    for rank in found[layout]:
        print(f"{layout}: losses {rank['losses']:.1e}, gradients {rank['gradients']:.1e}")
        used, kept = LAYOUTS[layout]
        assert rank["used"] == {"used": used} and rank["norm"] > 0
        assert rank["kept"] == MICRO_BATCHES * kept, "inputs are kept as codes, recomputed or not"
        assert rank["same"], "written by a norm or SwiGLU or by the layer itself"
        assert rank["losses"] < LIMIT and rank["gradients"] < LIMIT


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_gradients_that_products_add(found: dict[str, list[dict[str, Any]]], layout: str) -> None:
    """Of every linear layer, the output layer's too, that of a tied table or its copy on the last stage."""
    for index, rank in enumerate(found[layout]):
        print(f"{layout}: gradients {rank['gradients_added']:.1e}")
        has_output = layout != "PP2" or index == 1
        assert rank["added"] == [MICRO_BATCHES * (LAYOUTS[layout][0] + has_output)] * 2
        assert rank["gradients_added"] < LIMIT


@pytest.mark.parametrize("layout", NVFP4_LAYOUTS)
def test_nvfp4_inputs_are_the_same_bits(found: dict[str, list[dict[str, Any]]], layout: str) -> None:
    for rank in found[layout]:
        uses, passes = NVFP4_LAYOUTS[layout], MICRO_BATCHES * (2 if "RC" in layout else 1)
        assert rank["uses"] == uses and rank["norm"] > 0
        assert 0 < rank["written"] <= uses * passes, "an expert may have no tokens"
        assert rank["written"] == uses * passes or "EP" in layout
        assert rank["rounded"] == rank["by_layers"], "each input once"
        assert rank["same"], "written by a norm or SwiGLU or by the layer itself"


@pytest.mark.parametrize("layout", CONTEXT_LAYOUTS)
def test_every_way_to_attend_to_a_part(found: dict[str, list[dict[str, Any]]], layout: str) -> None:
    """What flash attention gets on CUDA, which here becomes a mask; documents are cut within and between pieces."""
    for rank in found[layout]:
        for way, (losses, gradients) in rank.items():
            print(f"{layout} {way}: losses {losses:.1e}, gradients {gradients:.1e}")
            assert losses < LIMIT and gradients < LIMIT
