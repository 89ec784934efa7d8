"""Targets are read back by others: compressed-tensors through transformers, modelopt's own tensor classes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_artifact import RECIPES, TrainedModel, make_tiny, windows

from megatron_edge.artifact.store import ArtifactReader
from megatron_edge.contracts import InputError
from megatron_edge.export.targets import TARGETS, convert

ROOT = Path(__file__).resolve().parents[2]
CARRIED = [
    *(("compressed_tensors", recipe) for recipe in RECIPES if recipe != "none"),
    *(("modelopt", recipe) for recipe in ("fp8", "fp8_kv4", "int4", "int4_kv8", "nvfp4", "nvfp4_w4a16")),
    ("gptq", "int4"),
    *(("hf", recipe) for recipe in RECIPES),
]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Gives (artifact reader, trained model, target directory, report), each made once."""
    made: dict = {}

    def get(target: str, recipe: str, dtype: str = "bfloat16"):
        key = (recipe, dtype)
        if key not in made:
            made[key] = make_tiny(tmp_path_factory.mktemp(recipe), recipe, dtype)
        tiny = made[key]
        reader, directory = ArtifactReader(tiny.artifact), tiny.artifact.parent / target
        report = convert(target, reader, directory, shard_bytes=150_000)
        return reader, tiny.trained, directory, report

    return get


def load_all(directory: Path) -> dict[str, torch.Tensor]:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return {
        name: tensor
        for file in set(index["weight_map"].values())
        for name, tensor in load_file(directory / file).items()
    }


@pytest.mark.parametrize("target, recipe", CARRIED)
def test_every_target_is_complete_and_says_what_it_drops(converted, target, recipe):
    _, trained, directory, report = converted(target, recipe)
    said = json.loads((directory / "target_report.json").read_text())
    assert said["name"] == target
    assert (said["dropped"], said["carried"]) == (list(report.dropped), list(report.carried))
    assert {"config.json", "generation_config.json", "tokenizer.json", "target_report.json"} <= {
        file.name for file in directory.iterdir()
    }
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1, "the tiny model is larger than a shard"
    assert sorted(index["weight_map"]) == sorted(load_all(directory))
    dropped = " ".join(report.dropped)
    carries = {"hf": (), "compressed_tensors": ("fp8",), "modelopt": ("fp8", "nvfp4"), "gptq": ()}[target]
    assert ("KV cache" in dropped) == (trained.kv not in ("none", *carries))
    assert any(name.endswith("k_scale") for name in index["weight_map"]) == (trained.kv in carries)
    assert ("activations" in dropped) == (target == "hf" and trained.activation != "none")


@pytest.mark.parametrize(
    "target, recipe, named",
    [
        ("gptq", "nvfp4", "weight=nvfp4 activation=nvfp4"),
        ("gptq", "w4a8", "weight=int4 activation=fp8"),
        ("gptq", "int4_kv8", "scales of kv.format=fp8"),
        ("onnx", "int4_kv8", "onnx cannot carry the scales of kv.format=fp8"),
        ("onnx", "fp8", "onnx cannot carry weight=fp8"),
        ("modelopt", "w4a8", "weight=int4 activation=fp8"),
        ("modelopt", "int8", "weight=int8 activation=int8"),
        ("modelopt", "none", "weight=none"),
        ("compressed_tensors", "none", "weight=none"),
    ],
)
def test_weights_that_a_target_cannot_carry_are_refused(converted, target, recipe, named, tmp_path):
    with pytest.raises(InputError, match=named):
        converted(target, recipe)


def test_an_unknown_target_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"'gguff' is unknown; allowed: \['compressed_tensors'"):
        convert("gguff", None, tmp_path / "x")
    assert sorted(TARGETS) == ["compressed_tensors", "gguf", "gptq", "hf", "modelopt", "onnx"]


# The data type in which transformers + compressed-tensors decode exactly; see verify/runtimes.py.
LOADING = {"int4": torch.float32, "int4_kv8": torch.float32, "fp8": torch.float32, "nvfp4": torch.bfloat16}
LOADING |= {"nvfp4_w4a16": torch.bfloat16, "w4a8": torch.float32, "int8": torch.float32}


@pytest.mark.parametrize("recipe", LOADING)
def test_transformers_decodes_compressed_tensors_to_the_trained_weights(converted, recipe):
    from transformers import AutoModelForCausalLM

    _, trained, directory, _ = converted("compressed_tensors", recipe, "float32")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=LOADING[recipe])
    model.hf_quantizer.compressor.decompress_model(model)
    weights = model.state_dict()
    for name, expected in trained.values.items():
        assert torch.equal(weights[name], expected.to(LOADING[recipe])), name


def test_two_group_sizes_become_two_config_groups(converted):
    _, trained, directory, _ = converted("compressed_tensors", "int4")
    section = json.loads((directory / "config.json").read_text())["quantization_config"]
    groups = {group["weights"]["group_size"]: group["targets"] for group in section["config_groups"].values()}
    assert sorted(groups) == sorted(set(trained.groups.values())) == [64, 128]
    assert groups[128] == [r"re:^model\.layers\.\d+\.mlp\.down_proj$"]
    assert section["ignore"] == ["lm_head"]


def test_modelopt_decodes_its_nvfp4_layout_to_the_trained_weights(converted):
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    _, trained, directory, _ = converted("modelopt", "nvfp4")
    stored = load_all(directory)
    for linear in trained.linears:
        packed = stored[f"{linear}.weight"]
        tensor = NVFP4QTensor((packed.shape[0], packed.shape[1] * 2), torch.bfloat16, packed)
        values = tensor.dequantize(
            scale=stored[f"{linear}.weight_scale"],
            double_scale=stored[f"{linear}.weight_scale_2"],
            block_sizes={-1: 16},
        )
        assert torch.equal(values, trained.values[f"{linear}.weight"]), linear
        assert stored[f"{linear}.input_scale"] == trained.input_scale(linear)


def test_modelopt_decodes_its_fp8_layout_to_the_trained_weights(converted):
    from modelopt.torch.quantization.qtensor import FP8QTensor

    _, trained, directory, _ = converted("modelopt", "fp8", "float32")
    stored = load_all(directory)
    for linear in trained.linears:
        packed = stored[f"{linear}.weight"]
        values = FP8QTensor(packed.shape, torch.float32, packed).dequantize(scale=stored[f"{linear}.weight_scale"])
        assert torch.equal(values, trained.values[f"{linear}.weight"]), linear


@pytest.mark.parametrize(
    "recipe, algorithm", [("fp8", "FP8"), ("fp8_kv4", "FP8"), ("nvfp4", "NVFP4"), ("nvfp4_w4a16", "W4A16_NVFP4")]
)
def test_modelopt_configs_are_those_that_modelopt_makes(converted, recipe, algorithm):
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    _, trained, directory, _ = converted("modelopt", recipe)
    sidecar = json.loads((directory / "hf_quant_config.json").read_text())
    assert sidecar["quantization"]["quant_algo"] == algorithm
    assert sidecar["quantization"]["kv_cache_quant_algo"] == {"fp8": "FP8", "nvfp4": "NVFP4"}.get(trained.kv)
    section = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert section == convert_hf_quant_config_format(sidecar)
    stored = load_all(directory)
    expected = {"model.layers.0.self_attn.k_proj.k_scale", "model.layers.1.self_attn.v_proj.v_scale"}
    assert (expected <= set(stored)) == (trained.kv in ("fp8", "nvfp4"))


@pytest.mark.parametrize(
    "target, recipe, dtype", [("compressed_tensors", "int4", "float16"), ("modelopt", "fp8", "bfloat16")]
)
def test_config_names_the_data_type_to_compute_in(converted, target, recipe, dtype):
    _, _, directory, _ = converted(target, recipe)
    config = json.loads((directory / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype


def test_hf_target_is_the_trained_model_in_bf16(converted):
    from transformers import AutoModelForCausalLM

    _, trained, directory, _ = converted("hf", "none")
    model = AutoModelForCausalLM.from_pretrained(directory)
    text = windows(1)
    text["documents"] = torch.zeros_like(text["documents"])
    text["positions"] = torch.arange(text["tokens"].shape[1]).expand_as(text["tokens"])
    with torch.no_grad():
        answered = model(text["tokens"]).logits.float()
    for name, expected in trained.values.items():
        assert torch.equal(model.state_dict()[name], expected), name
    exact = TrainedModel("none", torch.float32).logits(text)
    noise = (trained.logits(text) - exact).abs().max()  # bf16 against fp32: the same roundings, differently ordered
    print(f"difference {(answered - exact).abs().max():.4f}, noise floor {noise:.4f}")
    assert (answered - exact).abs().max() <= 3 * noise


@pytest.mark.parametrize(
    "recipe, limit", [("int4", 0.28), ("w4a8", 0.28), ("nvfp4", 0.29), ("fp8", 0.51), ("int8", 0.52)]
)
def test_inspect_prints_bytes_per_parameter(converted, recipe, limit):
    reader, *_ = converted("hf", recipe)
    command = [sys.executable, str(ROOT / "tools" / "inspect_artifact.py"), str(reader.directory), "--tensors"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = next(line for line in reversed(printed.splitlines()) if line.startswith("linears"))
    assert float(line.split()[-1]) <= limit, printed
    parameters = sum(weight.numel() for weight in TrainedModel("none", torch.float32).masters.values())
    assert f"{parameters:,}" in next(line for line in printed.splitlines() if line.startswith("whole model"))


def test_inspect_refuses_another_directory(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "inspect_artifact.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no manifest.json" in done.stderr and "Traceback" not in done.stderr
