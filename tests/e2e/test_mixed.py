"""A mixed recipe from search to artifact, through the launchers, and the same search over another layout."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.conftest import SMALL
from tests.e2e.launches import Finished, hashes, run, run_all
from tests.e2e.test_job import assert_complete

pytestmark = pytest.mark.timeout(400)

SEARCH = (
    "search.formats=[nvfp4,fp8,none]", "search.target_bits=5.3", "search.windows=4", "search.rounds=1",
    "quant.calib_size=8", *SMALL,
)  # fmt: skip


@pytest.fixture(scope="module")
def searches(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Finished]]:
    directory = tmp_path_factory.mktemp("search")

    def launch(name: str, *layout: str) -> Finished:
        arguments = (*SEARCH, *layout, f"model.source={tiny_model}", f"run_dir={directory / name}")
        return run("search", *arguments, directory=directory, processes=2 if layout else 1)

    pipeline = ("parallel.pipeline=2", "parallel.virtual_pipeline=2")
    done = run_all(
        {
            "one": lambda: launch("one"),
            "tp2": lambda: launch("tp2", "parallel.tensor=2"),
            "pp2": lambda: launch("pp2", *pipeline),
        }
    )
    for name, finished in done.items():
        assert finished.returncode == 0, f"{name}: {finished.stderr}"
    return directory, done


def figures(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "search.json").read_text())


def test_the_search_is_no_worse_than_the_uniform_recipe(searches: tuple[Path, dict[str, Finished]]) -> None:
    directory, done = searches
    assert not done["one"].noise, done["one"].noise
    found = figures(directory / "one")
    mixed, *others = found["recipes"]
    assert {one["name"] for one in others} >= {"nvfp4", "fp8"}
    assert mixed["size_bytes"] <= found["budget_bytes"] < next(o["size_bytes"] for o in others if o["name"] == "fp8")
    fitting = [one for one in found["recipes"] if one["size_bytes"] <= found["budget_bytes"]]
    written = min(fitting, key=lambda one: one["measured"])
    assert written["name"] == found["written"]
    unrefined = [one for one in fitting if not one["name"].startswith("refined")]
    assert mixed["measured"] <= min(one["measured"] for one in unrefined)
    assert mixed["predicted"] == pytest.approx(mixed["measured"], rel=0.5), "single layers predict the whole"
    assert len(found["units"]) == 16


def test_the_search_is_the_same_over_two_tensor_parallel_ranks(searches: tuple[Path, dict[str, Finished]]) -> None:
    """Up to the order of sums, which moves a few codes of activations: see verify/behaviour.py."""
    directory, _ = searches
    one, two = figures(directory / "one"), figures(directory / "tp2")
    assert two["budget_bytes"] == one["budget_bytes"]
    worst = 0.0
    for pattern, options in one["units"].items():
        for name, (size, divergence) in options.items():
            other = two["units"][pattern][name]
            assert other[0] == size
            worst = max(worst, abs(math.log(max(other[1], 1e-9) / max(divergence, 1e-9))))
    print(f"largest relative difference of a divergence {worst:.2e}")
    assert worst < 0.05
    mixed = [figures(directory / name)["recipes"][0] for name in ("one", "tp2")]
    assert mixed[0]["size_bytes"] == mixed[1]["size_bytes"], "the same choice"
    assert mixed[0]["measured"] == pytest.approx(mixed[1]["measured"], rel=0.05)


def test_the_search_is_the_same_over_a_virtual_pipeline(searches: tuple[Path, dict[str, Finished]]) -> None:
    """Runs begin at a layer that another stage has; the arithmetic is the same."""
    one, two = (figures(searches[0] / name) for name in ("one", "pp2"))
    assert one["units"] == two["units"]
    recipes = [yaml.safe_load((searches[0] / name / "recipe.yaml").read_text()) for name in ("one", "pp2")]
    assert recipes[0] == recipes[1]


def test_the_found_recipe_edited_trained_exported_and_verified(
    searches: tuple[Path, dict[str, Finished]], tiny_model: Path, tmp_path: Path
) -> None:
    """int4 with AWQ beside nvfp4, fp8 and a layer left alone, on two pipeline stages; then export without the file."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text((searches[0] / "one" / "recipe.yaml").read_text())
    edits = "{pattern:'*.layers.2.*',weight:int4,group_size:64},{pattern:'*.3.mlp.*',weight:none}"
    arguments = (f"quant.recipe={recipe}", f"quant.overrides=[{edits}]", "quant.algorithm=awq", "parallel.pipeline=2")
    run_dir = tmp_path / "run"
    small = (f"model.source={tiny_model}", "train.steps=4", "quant.calib_size=8", f"run_dir={run_dir}", *SMALL)
    done = run("qat", *arguments, "kv=fp8", *small, directory=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert not done.noise, done.noise
    assert_complete(run_dir, 4, {"modelopt", "compressed_tensors"})
    manifest = json.loads((run_dir / "artifact" / "canonical" / "manifest.json").read_text())
    linears = {name.removeprefix("model.layers."): entry["format"] for name, entry in manifest["linears"].items()}
    assert {linears[name] for name in linears if name.startswith("2.")} == {"int4"}
    assert not [name for name in linears if name.startswith("3.mlp")]
    assert set(linears.values()) == {"int4", "nvfp4", "fp8"}
    report = json.loads((run_dir / "quant_report.json").read_text())
    first = {
        "self_attention.linear_qkv": "self_attn.q_proj",
        "mlp.linear_fc1": "mlp.gate_proj",
        "mlp.linear_fc2": "mlp.down_proj",
    }
    scaled = {name.replace(inside, first[inside]) for name in report["awq_alpha"] for inside in first if inside in name}
    blocks = {f"decoder.layers.{name}" for name, format in linears.items() if format in ("int4", "nvfp4")}
    assert scaled == {name for name in blocks if name.endswith(tuple(first.values()))}, "AWQ where scales are of blocks"
    assert any(".2." in name for name in scaled)
    before = hashes(run_dir / "artifact")
    recipe.unlink()
    shutil.rmtree(run_dir / "artifact")
    done = run("export", f"run_dir={run_dir}", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert hashes(run_dir / "artifact") == before
