"""The target onnx: onnxruntime-genai's own builder makes it, its runtime runs it, and a wrong one is caught."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny_artifact import Tiny, make_tiny, windows

from megatron_edge import checks, compose
from megatron_edge.artifact.store import ArtifactReader
from megatron_edge.contracts import InputError
from megatron_edge.export.targets import convert
from megatron_edge.verify import onnxruntime
from megatron_edge.verify.agreement import Answers, compare
from megatron_edge.verify.quality import Windows
from megatron_edge.verify.references import References
from megatron_edge.verify.runtimes import check_target

needs_runtime = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_genai") is None, reason="onnxruntime-genai is not installed"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("onnx"), "int4")


@pytest.fixture(scope="module")
def built(tiny: Tiny) -> Path:
    directory = tiny.artifact.parent / "onnx"
    report = convert("onnx", ArtifactReader(tiny.artifact), directory)
    assert any("int8 KV cache" in line for line in report.dropped)
    return directory


@needs_runtime
def test_the_runtime_answers_as_the_artifact(tiny: Tiny, built: Path) -> None:
    assert sorted(path.name for path in built.parent.iterdir()) == ["canonical", "onnx"], "nothing is left over"
    found = check_target(References(ArtifactReader(tiny.artifact), Windows(**windows(4))), "onnx", built)
    for check in found.checks:
        print(f"{check.name}: {check.metric}: {check.value} (limit {check.limit}) {check.detail}")
    assert not found.not_run and all(check.ok for check in found.checks)
    ran = found.runtimes["onnxruntime-genai"]
    assert ran["status"] == "ran" and ran["target"] == "onnx"
    assert "int4 weights in groups of 64, 128, fp32 inputs, float KV cache" in ran["recipe"]
    assert ran["tokens_per_second"] > 0 and ran["peak_rss_bytes"] < 300e6, "torch is not in that process"


@needs_runtime
def test_the_builders_own_choices_are_caught(tiny: Tiny, built: Path, tmp_path: Path) -> None:
    """A code, a scale and inputs in int8 (what the builder does unless it is told not to) are each named."""
    import onnx

    reader, wrong = ArtifactReader(tiny.artifact), tmp_path / "onnx"
    shutil.copytree(built, wrong)
    assert onnxruntime.read_recipe(reader, wrong)[1] == []
    model = onnx.load(wrong / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for item in node.attribute:
            if item.name == "accuracy_level":
                item.i = 4
    data = bytearray((wrong / "model.onnx.data").read_bytes())
    for tensor in model.graph.initializer:
        place = int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
        if tensor.name in (
            "model.layers.1.attn.qkv_proj.MatMulNBits.qweight",
            "model.layers.0.mlp.up_proj.MatMulNBits.scales",
        ):
            data[place + 1] ^= 0x10
    (wrong / "model.onnx.data").write_bytes(data)
    (wrong / "model.onnx").write_bytes(model.SerializeToString())
    recipe, problems = onnxruntime.read_recipe(reader, wrong)
    assert "inputs at accuracy levels [4]" in recipe
    named = ["model.layers.0.mlp.up_proj: scales", "model.layers.1.self_attn.q_proj: codes"]
    assert sorted(problems[:2]) == named and problems[2].startswith("inputs of its linears"), problems


@needs_runtime
def test_what_the_builder_says_is_passed_on(tiny: Tiny, tmp_path: Path) -> None:
    artifact = tmp_path / "canonical"
    shutil.copytree(tiny.artifact, artifact)
    config = json.loads((artifact / "config.json").read_text())
    (artifact / "config.json").write_text(json.dumps({**config, "architectures": ["UnheardOfForCausalLM"]}))
    with pytest.raises(InputError, match=r"builder ended with 1: .*not currently supported.*LlamaForCausalLM"):
        convert("onnx", ArtifactReader(artifact), tmp_path / "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["canonical"]


def test_without_the_package_it_is_refused_and_reported(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    config = compose.compose(["quant=int4", "export.targets=[onnx]"])
    with pytest.raises(InputError, match=r"onnxruntime-genai, which is not installed"):
        checks.check_config(config)
    with pytest.raises(InputError, match=r"onnxruntime-genai, which is not installed"):
        convert("onnx", ArtifactReader(tiny.artifact), tiny.artifact.parent / "absent")
    found = check_target(
        References(ArtifactReader(tiny.artifact), Windows(**windows(1))), "onnx", tiny.artifact.parent / "onnx"
    )
    assert not found.checks and "onnxruntime_genai not installed" in found.not_run["target onnx"]


def test_differences_are_told_from_agreement() -> None:
    """The paired error against a plain computation, and what is too much."""
    text = Windows(**windows(4))
    generator = torch.Generator().manual_seed(3)
    nll = torch.rand(text.tokens.shape, generator=generator) * text.loss_mask
    moved = 0.01 * torch.randn(text.tokens.shape, generator=generator) * text.loss_mask
    ours, theirs = Answers(nll, text.tokens), Answers(nll + moved, text.tokens)
    perplexity, choices = compare("x", text, ours, theirs)
    sums, counts = moved.sum(1), text.loss_mask.sum(1)
    mean = float(sums.sum() / counts.sum())
    error = float(((sums - mean * counts).square().sum() * 4 / 3).sqrt() / counts.sum())
    assert f"{mean:+.3g} nats/token" in perplexity.detail and f"paired standard error {error:.2g}" in perplexity.detail
    assert perplexity.ok and choices.ok and choices.value == 1
    shifted = Answers(nll + 0.006 * text.loss_mask, text.tokens.roll(1, dims=0))
    assert [check.ok for check in compare("x", text, ours, shifted)] == [False, False]


@needs_runtime
def test_windows_that_no_sequence_can_be_are_refused(tiny: Tiny, built: Path) -> None:
    text = windows(1)
    text["positions"] = text["positions"] + 1
    with pytest.raises(InputError, match="positions do not start at 0"):
        onnxruntime.ask(built, Windows(**text))


def test_models_that_no_packed_layout_holds_are_refused_before_anything_is_spent() -> None:
    from test_recipe import MIXTRAL, SMOLLM2

    onnx, gptq = (compose.compose(["quant=int4", f"export.targets=[{target}]"]) for target in ("onnx", "gptq"))
    for run in (onnx, gptq):
        checks.check_model_dims(run, SMOLLM2)
    with pytest.raises(InputError, match="takes no packed MixtralForCausalLM; allowed for onnx: LlamaForCausalLM"):
        checks.check_model_dims(onnx, MIXTRAL)
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 36}
    with pytest.raises(InputError, match=r"gptq and onnx pack 8 codes a word.* \[288, 36, 576\] of .*q_proj"):
        checks.check_model_dims(gptq, {**SMOLLM2, **sizes})
