"""What verify says of the runtimes that ran an artifact: which, with what recipe, and whether it may be deployed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from tiny_artifact import Tiny, make_tiny, windows

from megatron_edge.artifact.store import ArtifactReader
from megatron_edge.compose import compose
from megatron_edge.export.targets import convert
from megatron_edge.verify.quality import Windows
from megatron_edge.verify.report import Limits, verify_artifact


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("int4") / "artifact", "int4", "float32", count=4)


def limits(*runtimes: str) -> Limits:
    device = dataclasses.replace(compose(["device=board_2gb"]).device, group_sizes=(64, 128))
    return Limits(device, runtimes=runtimes)


def test_what_no_runtime_ran_is_not_deployable(tiny: Tiny) -> None:
    report = verify_artifact(tiny.artifact, tiny.reference, limits(), {})
    assert report.ok and report.deployable == (False, "no runtime ran it here")
    asked = verify_artifact(tiny.artifact, tiny.reference, limits("transformers"), {})
    (check,) = [check for check in asked.checks if not check.ok]
    assert check.name == "runtime transformers" and check.value == "not run"
    assert check.detail == "there is no target compressed_tensors or hf beside the artifact"
    assert asked.deployable == (False, "a check does not hold")


def test_a_runtime_that_ran_is_in_the_report(tiny: Tiny, tmp_path: Path) -> None:
    directory, output = tmp_path / "compressed_tensors", tmp_path / "verify.json"
    convert("compressed_tensors", ArtifactReader(tiny.artifact), directory)
    targets = {"compressed_tensors": directory}
    report = verify_artifact(tiny.artifact, tiny.reference, limits("transformers"), targets, output)
    assert report.ok, [check for check in report.checks if not check.ok]
    facts = json.loads(output.read_text())
    row = facts["runtimes"]["transformers"]
    assert (row["status"], row["target"]) == ("ran", "compressed_tensors")
    assert row["recipe"] == "decoded weights with float32 inputs, KV cache in float32"
    assert (row["compared_tokens"], row["likeliest_agree"]) == (int(windows(4)["loss_mask"].sum()), 1.0)
    assert row["perplexity_ratio"] == pytest.approx(1, abs=1e-6) and row["paired_error_nats"] < 1e-6
    words = "it ran in transformers, but not in llama.cpp, which is to run it on the device"
    assert facts["deployable"] == {"ok": False, "why": words}
    assert dataclasses.replace(report, device_runtime="megatron_edge").deployable[0]
    assert dataclasses.replace(report, device_runtime="transformers").deployable == (True, "it ran in transformers")


def test_runtimes_are_asked_about_another_text(tiny: Tiny, tmp_path: Path) -> None:
    """More of it than training measured, of which the trained model's word is not there: the artifact's own is."""
    directory = tmp_path / "compressed_tensors"
    convert("compressed_tensors", ArtifactReader(tiny.artifact), directory)
    text = Windows(**windows(9))
    report = verify_artifact(tiny.artifact, tiny.reference, limits(), {"compressed_tensors": directory}, text=text)
    assert report.ok and report.runtimes["transformers"]["compared_tokens"] == text.counted_tokens
    (loss,) = [check for check in report.checks if check.name == "loss"]
    assert f"over {int(windows(4)['loss_mask'].sum())} tokens" in loss.detail, "the trained model's own windows"
