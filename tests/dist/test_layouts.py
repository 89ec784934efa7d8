"""Every layout is the same model as one process: tools/layout_parity.py on Llamas made on the spot, with gloo."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FORMATS = (
    "int4_awq", "nvfp4_w4a16+int8:embedding=int8", "nvfp4+fp8:embedding=int4", "fp8+fp8:embedding=fp8", "int8_sq+nvfp4",
)  # fmt: skip
WORLD_2, WORLD_3 = ("PP2VPP2", "DP2DO", "TP2SP", "CP2"), ("TP3",)
EXPERT_FORMATS, EXPERT_LAYOUTS = ("int4_awq", "nvfp4+fp8"), ("EP2", "TP2SP", "TP2ETP2SP")
# The long table: dense and experts, one to four processes.
TABLE_FORMATS = (
    "int4_awq", "nvfp4", "nvfp4:algorithm=awq", "fp8+fp8", "int8_sq", "w4a8_awq+nvfp4", "int4_awq:algorithm=awq_clip",
    "fp8+fp8:calibration=percentile", "int8_sq+nvfp4:calibration=mse",
)  # fmt: skip
TABLE = {
    "random:tiny": (
        "PP2", "TP2SP", "DP2DO", "CP2", "PP2VPP2", "TP3", "TP2PP2", "TP2CP2SP", "PP4", "TP2DP2SPDO", "PP2VPP2DP2",
    ),
    "random:mixtral": (
        "EP2", "TP2SP", "TP2DP2SPDO", "TP2ETP2SP", "TP2EP2SP", "EP4", "PP2EP2", "TP2EP2DP2SP", "PP2TP2ETP2SPDO",
    ),
}  # fmt: skip

# Imports alone take 20 s for each of 8 processes; an engineer's other work may share the cores.
pytestmark = pytest.mark.timeout(1500)

Report = list[dict[str, Any]]


def run_tool(directory: Path, source: str | None, layouts: tuple[str, ...], formats: tuple[str, ...]) -> Report:
    """The rows of the tool's report; the tool exits with 1 where one of them fails, which the tests then name."""
    command = [sys.executable, str(REPOSITORY / "tools" / "layout_parity.py"), "--out", str(directory)]
    command += [
        "--layouts",
        *layouts,
        "--quant",
        *formats,
        *(["--source", source, "--eval-tokens", "2048"] if source else []),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode in (0, 1) and (directory / "report.json").is_file(), done.stderr
    return json.loads((directory / "report.json").read_text())


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return run_tool(tmp_path_factory.mktemp("two"), "random:tiny", WORLD_2, FORMATS)


@pytest.fixture(scope="module")
def three_processes_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("three")
    run_tool(directory, "random:untied", WORLD_3, FORMATS)
    return directory


def expected_checks(layout: str, name: str) -> set[str]:
    checks = {"noise", "maxima", "unexplained", "loaded", "saved", "losses", "gradient", "restored"}
    if "DO" in layout:  # a distributed optimizer leaves no rank the whole gradient
        checks.remove("gradient")
    if "awq" in name:
        checks.add("alpha")
    if name.startswith(("int4", "w4a8", "int8_sq")) or name.endswith(("embedding=int4", "embedding=int8")):
        checks.add("own_blocks")
    if "+" in name or name.split(":")[0] in ("nvfp4", "fp8", "int8_sq"):
        checks |= {"recorded", "mean_loss"}
    if ":algorithm=awq_clip" in name or ":calibration" in name:  # scales that do not cover the maxima of weights and data
        checks -= {"unexplained", "own_blocks"}
    return checks


def check_rows(rows: Report, layout: str, name: str) -> None:
    """All the checks of a layout and a format are there, and hold."""
    found = {row["check"]: row for row in rows if (row["layout"], row["format"]) == (layout, name)}
    assert set(found) == (expected_checks(layout, name) if name != "none" else {"import"})
    assert all(row["ok"] for row in found.values()), [row for row in found.values() if not row["ok"]]


@pytest.mark.parametrize("name", ["none", *FORMATS])
@pytest.mark.parametrize("layout", WORLD_2)
def test_two_processes_are_the_same_model(two_processes: Report, layout: str, name: str) -> None:
    """ "none" is the import: logits against transformers. Embeddings are tied: under PP2 two stages hold them."""
    check_rows(two_processes, layout, name)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return run_tool(tmp_path_factory.mktemp("experts"), "random:mixtral", EXPERT_LAYOUTS, EXPERT_FORMATS)


@pytest.mark.parametrize("name", ["none", *EXPERT_FORMATS])
@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_experts_are_the_same_on_two_processes(experts: Report, layout: str, name: str) -> None:
    """Experts on different ranks, and experts that two ranks share, beside a tensor-parallel model."""
    check_rows(experts, layout, name)


@pytest.mark.parametrize("name", ["none", *FORMATS])
def test_three_tensor_parallel_processes_are_the_same_model(three_processes_dir: Path, name: str) -> None:
    """Embeddings are not tied here."""
    check_rows(json.loads((three_processes_dir / "report.json").read_text()), "TP3", name)


def _wrong_loss(found: dict[str, Any]) -> None:
    found["losses"][3] += 2e-5
    found["values"]["flipped"] = 0.0


def _loss_moved_by_rounding(found: dict[str, Any]) -> None:
    found["losses"][3] += 2e-5
    found["values"]["flipped"] = 14.0


def _loss_moved_by_more_than_rounding(found: dict[str, Any]) -> None:
    _loss_moved_by_rounding(found)
    found["values"]["restored"] += 2e-5


def _wrong_gradient(found: dict[str, Any]) -> None:
    found["values"]["gradient"] = 1e-3


def _wrong_exponent(found: dict[str, Any]) -> None:
    choice = found["choices"]["decoder.layers.1.mlp.linear_fc1"]
    choice["alpha"] = 0.0 if choice["alpha"] == 1.0 else 1.0


def _wrong_maximum(found: dict[str, Any]) -> None:
    name = "decoder.layers.1.mlp.linear_fc1.weight_quantizer"
    found["maxima"][name], found["noise"][name] = 1, 1e-3


@pytest.mark.parametrize(
    ("spoil", "checks"),
    [
        (_wrong_loss, {"losses"}),
        (_loss_moved_by_rounding, {"losses"}),
        (_loss_moved_by_more_than_rounding, {"losses", "restored"}),
        (_wrong_gradient, {"gradient"}),
        (_wrong_exponent, {"alpha"}),
        (_wrong_maximum, {"maxima", "noise"}),
    ],
)
def test_a_difference_fails_its_check(
    three_processes_dir: Path, tmp_path: Path, spoil: Callable[[dict[str, Any]], None], checks: set[str]
) -> None:
    """The judge, given what a real run found but for one thing."""
    from tools.layout_parity import REFERENCE, REORDERED, judge

    for layout in (REFERENCE, REORDERED, "TP3"):
        found = json.loads((three_processes_dir / f"{layout}.json").read_text())
        if layout == "TP3":
            spoil(found["int4_awq"])
        (tmp_path / f"{layout}.json").write_text(json.dumps(found))
    rows = judge(["TP3"], ["int4_awq"], tmp_path, import_floor=1.0)
    assert {row.check for row in rows if not row.ok} == checks


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("source", TABLE)
def test_the_table_of_layouts(tmp_path: Path, source: str) -> None:
    rows = run_tool(tmp_path, source, TABLE[source], TABLE_FORMATS)
    for layout in TABLE[source]:
        for name in ("none", *TABLE_FORMATS):
            check_rows(rows, layout, name)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3", "mixtral", "qwen3_moe"])
def test_every_family_imports_as_transformers_has_it(tmp_path: Path, family: str) -> None:
    """Largest logit difference in fp32; RoPE scaling, biases and norms of queries and keys have random weights."""
    layouts = ("TP2SP", "PP2", *(("EP2",) if family in ("mixtral", "qwen3_moe") else ()))
    rows = run_tool(tmp_path, f"random:{family}", layouts, ())
    assert [(row["layout"], row["ok"]) for row in rows] == [(layout, True) for layout in ("TP1", *layouts)]


@pytest.mark.long
@pytest.mark.timeout(5400)
def test_smollm2_is_the_same_model_on_every_layout(tmp_path: Path) -> None:
    formats = ("int4_awq", "nvfp4_w4a16", "nvfp4")
    rows = run_tool(tmp_path, None, ("PP2", "TP3", "DP2"), formats)
    for layout in ("PP2", "TP3", "DP2"):
        for name in ("none", *formats):
            check_rows(rows, layout, name)
