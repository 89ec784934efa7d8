"""Distillation and adapters are the same on every layout: steps of a model with weight quantizers against those of one
process, with gloo; and the distillation's loss on logits that ranks share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.dist.distill_ranks import WITH_EXPERTS
from tools.layout_parity import LIMITS, REFERENCE, REORDERED
from tools.random_models import RANDOM_MODELS, make_random_model

pytestmark = pytest.mark.timeout(900)

WORKER = Path(__file__).with_name("distill_ranks.py")
LAYOUTS = ("TP2SP", "PP2", "PP2VPP2", "CP2", "DP2DO", *WITH_EXPERTS)
# A teacher with more layers than the student, and an output layer of its own.
DEEP = RANDOM_MODELS["untied"] | {"num_hidden_layers": 6}
LOSS_LIMIT = LIMITS["losses"][1]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each layout wrote. One thread each: threads decide the order of sums on a CPU."""
    directory = tmp_path_factory.mktemp("distill")
    for name, sizes in {"tiny": RANDOM_MODELS["tiny"], "deep": DEEP, "mixtral": RANDOM_MODELS["mixtral"]}.items():
        make_random_model(sizes, directory / name)
    for processes, layouts in ((1, (REFERENCE, REORDERED)), (2, LAYOUTS)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        done = subprocess.run(
            [*command, str(WORKER), str(directory), *layouts],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    return {name: json.loads((directory / f"{name}.json").read_text()) for name in (REFERENCE, REORDERED, *LAYOUTS)}


def largest(ours: list[dict[str, float]], theirs: list[dict[str, float]], names: set[str]) -> float:
    return max(abs(a[name] - b[name]) for a, b in zip(ours, theirs, strict=True) for name in names)


def compare(found: dict[str, Any], layout: str, case: str) -> list[dict[str, float]]:
    """The steps of one process, after a layout's have been held against them: norms within thrice the noise of sums, or
    1e-5, everything else within the losses' limit."""
    one, again, here = (found[which][case] for which in (REFERENCE, REORDERED, layout))
    norms, losses = {"gradient_norm"}, set(one[0]) - {"gradient_norm"}
    floor, apart, norm = largest(again, one, norms), largest(here, one, losses), largest(here, one, norms)
    print(f"{layout} {case}: losses {apart:.1e} (limit {LOSS_LIMIT}), norms {norm:.1e} (noise {floor:.1e})")
    assert apart <= LOSS_LIMIT and norm <= max(3 * floor, 1e-5)
    return one


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_distils_as_one_process(found: dict[str, Any], layout: str) -> None:
    """Loss, KL, label loss, hidden loss and gradient norm of three steps."""
    one = compare(found, layout, "experts" if layout in WITH_EXPERTS else "dense")
    assert set(one[0]) - {"layers_loss_per_token"} == {
        "loss", "kl_nats_per_token", "label_loss_nats_per_token", "hidden_loss_per_token", "gradient_norm"
    }  # fmt: skip
    assert one[0]["kl_nats_per_token"] > 0.01 and one[0]["hidden_loss_per_token"] > 0.01


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_are_drawn_to_the_teachers_on_every_layout(found: dict[str, Any], layout: str) -> None:
    """The same, and the layers' part of the loss, which stages find each for themselves."""
    one = compare(found, layout, "experts" if layout in WITH_EXPERTS else "layers")
    assert one[0]["layers_loss_per_token"] > 1e-3
    whole = 0.8 * one[0]["kl_nats_per_token"] + 0.2 * one[0]["label_loss_nats_per_token"]
    whole += 0.5 * (one[0]["hidden_loss_per_token"] + one[0]["layers_loss_per_token"])
    assert one[0]["loss"] == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_are_the_same_on_every_layout(found: dict[str, Any], layout: str) -> None:
    """Two steps each by itself, and one from the checkpoint that one process saved after two."""
    one = compare(found, layout, "experts_adapters" if layout in WITH_EXPERTS else "adapters")
    assert all(record["gradient_norm"] > 0.1 for record in one)


@pytest.mark.parametrize("layout", ["TP2SP"])
def test_the_loss_of_shared_logits_is_that_of_the_whole(found: dict[str, Any], layout: str) -> None:
    """Against float64; the noise floor is what one process is off."""
    for name, value in found[layout]["shared_loss"].items():
        floor = found[REFERENCE]["shared_loss"][name]
        print(f"{layout} {name}: {value:.1e} (noise {floor:.1e})")
        assert value <= 3 * floor
