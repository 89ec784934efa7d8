"""tools/step_curves.py: its verdict by hand, and a run of a tiny model with both kinds of quantizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools import step_curves
from tools.random_models import RANDOM_MODELS, make_random_model


def measured(loss: float) -> dict[str, Any]:
    return {"losses": [9.0] * 9 + [loss], "heldout_before": 9.0, "heldout": loss}


def runs(ours: list[float], theirs: list[float]) -> list[dict[str, Any]]:
    return [
        {"format": "int4", "kind": kind, "seed": seed, **measured(loss)}
        for kind, losses in (("ours", ours), ("modelopt", theirs))
        for seed, loss in enumerate(losses)
    ]


@pytest.mark.parametrize(("shift", "holds"), [(0.19, True), (-0.19, True), (0.21, False), (-0.21, False)])
def test_two_sigma_of_modelopts_own_spread(shift: float, holds: bool) -> None:
    theirs = [2.0, 2.1, 2.2]  # sigma 0.1
    found = step_curves.verdict(runs([loss + shift for loss in theirs], theirs))
    assert found["holds"] == holds
    assert found["heldout"]["apart"] == found["training"]["apart"] == pytest.approx(shift)
    assert found["start"] == {"ours": 9.0, "modelopt": 9.0, "apart": 0.0}
    assert found["heldout"]["sigma"] == pytest.approx(0.1) and found["heldout"]["paired"] == pytest.approx(0, abs=1e-9)


def test_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_random_model(RANDOM_MODELS["tiny"] | {"num_hidden_layers": 1}, tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n\n\n".join(f"document {at} " + "abc def " * (30 + at) for at in range(40)))
    own = ["--out", str(tmp_path / "out"), "--model-source", str(model), "--seeds", "1", "2", "--steps", "4"]
    overrides = [
        f"data.train={text}", "train.micro_batch=2", "train.global_batch=4", "train.seq_length_tokens=32",
        "data.eval_tokens=256", "train.precision=fp32", "train.learning_rate=1e-3",
    ]  # fmt: skip
    code = step_curves.main([*own, "--parallel", "0", "--", *overrides])
    report = json.loads((tmp_path / "out" / "step_curves.json").read_text())
    found = {(run["kind"], run["seed"]): run for run in report["runs"]}
    assert set(found) == {(kind, seed) for kind in step_curves.KINDS for seed in (1, 2)}
    for run in found.values():
        assert len(run["losses"]) == 4 and run["heldout"] < run["heldout_before"], "it learns"
    assert found["ours", 1]["losses"] != found["ours", 2]["losses"], "another order of the windows"
    for seed in (1, 2):  # the same windows, values and gradients, to the last bit
        ours, theirs = found["ours", seed], found["modelopt", seed]
        for what in ("heldout_before", "losses", "heldout"):
            assert ours[what] == theirs[what], what
    plain = step_curves.train(step_curves.parse([*own, "--scales", "own", "--", *overrides]), "int4", "modelopt", 1)
    assert 0 < abs(found["ours", 1]["losses"][0] - plain["losses"][0]) < 0.02, "the rounding of scales"
    assert code == (0 if report["verdicts"][0]["holds"] else 1)
    assert "int4: training" in capsys.readouterr().out
    picture = tmp_path / "out" / "step_curves.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    picture.unlink()
    assert step_curves.main(["--out", str(tmp_path / "out"), "--redraw"]) == code and picture.exists()
