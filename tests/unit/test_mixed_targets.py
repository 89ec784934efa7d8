"""Layers of several formats in one artifact: each target says so by name, as its reader wants it, or refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_artifact import TrainedModel, finish, windows

from megatron_edge.artifact import formats
from megatron_edge.artifact.store import ArtifactReader, ArtifactWriter
from megatron_edge.contracts import InputError, LinearEntry
from megatron_edge.export.targets import convert
from megatron_edge.verify.quality import Windows
from megatron_edge.verify.references import References
from megatron_edge.verify.runtimes import check_target

ROOT = Path(__file__).resolve().parents[2]
# (weight, activation) by pattern; the first that matches. The last names leave layers alone.
MIXES = {
    "int4+fp8": {r"layers\.0\.mlp": ("fp8", "fp8"), r"o_proj": ("none", "none"), "": ("int4", "none")},
    "nvfp4+fp8": {r"down_proj": ("fp8", "fp8"), r"1\.self_attn": ("nvfp4", "nvfp4"), "": ("nvfp4", "none")},
    "all": {r"0\.mlp": ("fp8", "fp8"), r"1\.mlp": ("int4", "none"), "": ("nvfp4", "none")},
}


def write_mixed(directory: Path, mix: str) -> tuple[ArtifactReader, dict[str, tuple[str, str]]]:
    """An artifact in fp32 whose maxima are its weights' own, and each linear's (weight, activation)."""
    masters = TrainedModel("none", torch.float32).masters
    writer, linears, chosen = ArtifactWriter(directory / "canonical", 200_000), {}, {}
    for name, weight in masters.items():
        linear = name.removesuffix(".weight")
        kind = next(f for pattern, f in MIXES[mix].items() if re.search(pattern, linear)) if "_proj" in name else None
        if kind is None or kind[0] == "none":
            writer.add(name, weight, "fp32")
            continue
        chosen[linear] = kind
        group = formats.effective_group_size(weight.shape[1], 128) if kind[0] == "int4" else 0
        amax = formats.snap_amax(kind[0], formats.weight_amax(kind[0], weight, group))
        encoded = formats.encode(kind[0], weight, amax, group)
        parts = {"codes": encoded.codes, "scale": encoded.scale, "global_scale": encoded.global_scale}
        parts["input_scale"] = formats.tensor_scale(kind[1], torch.tensor(3.0)) if kind[1] != "none" else None
        tensors = {role: f"{linear}.{role}" for role, part in parts.items() if part is not None}
        for role, tensor in tensors.items():
            writer.add(tensor, parts[role], kind[0] if role == "codes" else "scale")
        linears[linear] = LinearEntry(*kind, encoded.group_size, encoded.shape, tensors)
    finish(writer, linears, SimpleNamespace(weight="mixed", activation="mixed", kv="none"), "float32")
    return ArtifactReader(directory / "canonical"), chosen


@pytest.mark.parametrize("mix", MIXES)
def test_compressed_tensors_has_a_group_for_each_format_and_reads_it(mix: str, tmp_path: Path) -> None:
    """Where one data type is exact for all, transformers runs it; else compressed-tensors decodes each linear."""
    reader, chosen = write_mixed(tmp_path, mix)
    convert("compressed_tensors", reader, tmp_path / "target")
    section = json.loads((tmp_path / "target" / "config.json").read_text())["quantization_config"]
    assert section["format"] == "mixed-precision"
    for linear, (weight, activation) in chosen.items():
        meant = [
            group
            for group in section["config_groups"].values()
            if any(re.match(t[3:], linear) if t.startswith("re:") else t == linear for t in group["targets"])
        ]
        assert len(meant) == 1, linear
        assert (meant[0]["weights"]["num_bits"] == 8) == (weight == "fp8")
        assert (meant[0]["input_activations"] is None) == (activation == "none")
    assert not set(section["ignore"]) & set(chosen)
    assert set(section["ignore"]) - {"lm_head"} == {
        name.removesuffix(".weight") for name in reader.names() if name.endswith("_proj.weight")
    }
    found = check_target(References(reader, Windows(**windows(2))), "compressed_tensors", tmp_path / "target")
    assert found.checks and all(check.ok for check in found.checks), found.checks
    assert bool(found.not_run) == ("nvfp4" in mix or mix == "all"), "what did not run is said"


@pytest.mark.parametrize("mix", MIXES)
def test_modelopt_lists_each_layer_as_its_own_converter_does(mix: str, tmp_path: Path) -> None:
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    reader, chosen = write_mixed(tmp_path, mix)
    convert("modelopt", reader, tmp_path / "target")
    sidecar = json.loads((tmp_path / "target" / "hf_quant_config.json").read_text())
    assert sidecar["quantization"]["quant_algo"] == "MIXED_PRECISION"
    names = {("fp8", "fp8"): "FP8", ("nvfp4", "nvfp4"): "NVFP4", ("nvfp4", "none"): "W4A16_NVFP4"}
    names |= {("int4", "none"): "W4A16_AWQ"}
    listed = sidecar["quantization"]["quantized_layers"]
    assert {name: layer["quant_algo"] for name, layer in listed.items()} == {
        n: names[kind] for n, kind in chosen.items()
    }
    section = json.loads((tmp_path / "target" / "config.json").read_text())["quantization_config"]
    assert section == convert_hf_quant_config_format(sidecar)
    found = check_target(References(reader, Windows(**windows(2))), "modelopt", tmp_path / "target")
    assert all(check.ok for check in found.checks), found.checks


def test_a_target_refuses_layers_by_name(tmp_path: Path) -> None:
    reader, chosen = write_mixed(tmp_path, "int4+fp8")
    with pytest.raises(InputError, match="weight=fp8") as caught:
        convert("gptq", reader, tmp_path / "target")
    for linear, (weight, _) in chosen.items():
        assert (linear in str(caught.value)) == (weight == "fp8")
    report = convert("hf", reader, tmp_path / "hf")
    assert any("fp8/int4" in line for line in report.dropped)


def test_inspect_says_which_layers_have_which_format(tmp_path: Path) -> None:
    write_mixed(tmp_path, "int4+fp8")
    command = [sys.executable, str(ROOT / "tools" / "inspect_artifact.py"), str(tmp_path / "canonical")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    table = [line.split() for line in printed.split("linears ")[-1].splitlines()]
    assert ["mlp.up_proj", "fp8,", "fp8", "activations", "0"] in table and ["mlp.up_proj", "int4", "1"] in table
    assert ["self_attn.o_proj", "unquantised", "0-1"] in table
