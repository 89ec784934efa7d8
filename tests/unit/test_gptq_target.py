"""The target gptq, read by an independent reader: GPTQ's documented layout written down in plain loops."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_mixed_targets import MIXES, write_mixed
from tiny_artifact import Tiny, make_tiny, windows

from megatron_edge.artifact.store import ArtifactReader
from megatron_edge.contracts import InputError, LinearEntry
from megatron_edge.export.targets import convert
from megatron_edge.export.targets.gptq import refuse_what_is_not_int4
from megatron_edge.verify.quality import Windows
from megatron_edge.verify.references import References
from megatron_edge.verify.runtimes import check_target


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("gptq"), "int4")


@pytest.fixture(scope="module")
def target(tiny: Tiny) -> Path:
    directory = tiny.artifact.parent / "gptq"
    convert("gptq", ArtifactReader(tiny.artifact), directory)
    return directory


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in directory.glob("*.safetensors") for name, x in load_file(file).items()}


def plain_reader(words: list, zeros: list, scales: list, group_of: list) -> list[list[float]]:
    """AutoGPTQ's layout for 4 bits, old spelling: the stored zero point is one less than the real one."""
    values = []
    for i in range(len(group_of)):
        row, group = [], group_of[i]
        for o in range(len(words[0])):
            code = ((words[i // 8][o] & 0xFFFFFFFF) >> (4 * (i % 8))) & 0xF
            zero = (((zeros[group][o // 8] & 0xFFFFFFFF) >> (4 * (o % 8))) & 0xF) + 1
            row.append((code - zero) * scales[group][o])
        values.append(row)
    return values


def test_a_plain_reader_gets_the_trained_weights(tiny: Tiny, target: Path) -> None:
    tensors = stored(target)
    for linear in tiny.trained.linears:
        parts = [tensors[f"{linear}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")]
        assert [part.dtype for part in parts] == [torch.int32, torch.int32, torch.float16, torch.int32]
        values = torch.tensor(plain_reader(*(part.tolist() for part in parts)), dtype=torch.float32).T
        assert torch.equal(values, tiny.trained.values[f"{linear}.weight"]), linear
        assert f"{linear}.weight" not in tensors


def group_for(section: dict, name: str) -> int | None:
    """As GPTQModel, vLLM and onnxruntime-genai's builder look a layer's group size up; None: it is not quantised."""
    for pattern, values in section["dynamic"].items():
        if re.match(pattern.removeprefix("+:").removeprefix("-:"), name):
            return None if pattern.startswith("-:") else values.get("group_size", section["group_size"])
    return section["group_size"]


def test_each_reader_finds_each_layers_group_size(tiny: Tiny, target: Path) -> None:
    config = json.loads((target / "config.json").read_text())
    section = config["quantization_config"]
    assert section == json.loads((target / "quantize_config.json").read_text())
    facts = ("quant_method", "bits", "sym", "desc_act", "checkpoint_format")
    assert [section[key] for key in facts] == ["gptq", 4, True, False, "gptq"]
    assert config["dtype"] == "float16", "its readers would round the scales to bfloat16 otherwise"
    assert set(tiny.trained.groups.values()) == {64, 128}
    for linear, group in tiny.trained.groups.items():
        assert group_for(section, linear) == group_for(section, f"{linear}.qweight") == group
        fused = re.sub("[qkv]_proj", "qkv_proj", re.sub("(gate|up)_proj", "gate_up_proj", linear))
        assert group_for(section, fused) == group


def test_layers_left_alone_are_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIXES, "int4+plain", {r"o_proj|1\.mlp": ("none", "none"), "": ("int4", "none")})
    reader, chosen = write_mixed(tmp_path, "int4+plain")
    convert("gptq", reader, tmp_path / "gptq")
    section = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    for layer in range(2):
        for leaf in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{leaf}"
            assert (group_for(section, name) is None) == (name not in chosen), name
    assert group_for(section, "model.layers.1.mlp.gate_up_proj") is None
    with pytest.raises(InputError, match=r"no unquantised linear layers.*layers\.0\.self_attn\.o_proj"):
        convert("onnx", reader, tmp_path / "onnx")


@pytest.mark.parametrize("layout, part", [("gptq", "qweight"), ("gptq", "qzeros"), ("modelopt", "weight")])
def test_one_other_code_is_named(tiny: Tiny, tmp_path: Path, layout: str, part: str) -> None:
    reader, name = ArtifactReader(tiny.artifact), "model.layers.1.mlp.gate_proj"
    convert(layout, reader, tmp_path / layout)
    assert all(
        check.ok for check in check_target(References(reader, Windows(**windows(1))), layout, tmp_path / layout).checks
    )
    (file,) = (tmp_path / layout).glob("*.safetensors")
    tensors = load_file(file)
    tensors[f"{name}.{part}"].view(torch.uint8)[1, 5] ^= 0x10
    save_file(tensors, file, metadata={"format": "pt"})
    (check,) = check_target(References(reader, Windows(**windows(1))), layout, tmp_path / layout).checks
    assert not check.ok and name in check.detail


def test_packed_tables_are_refused_by_name(tiny: Tiny) -> None:
    manifest = ArtifactReader(tiny.artifact).manifest
    table = LinearEntry("int8", "none", 0, (256, 192), {})
    with pytest.raises(InputError, match=r"gptq cannot carry the int8 codes of model\.embed_tokens; allowed: quant"):
        refuse_what_is_not_int4(replace(manifest, linears={**manifest.linears, "model.embed_tokens": table}), "gptq")
