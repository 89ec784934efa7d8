"""TensorRT Edge-LLM: what it does not run is refused by name, and its own export reads the target modelopt."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_artifact import make_tiny

from megatron_edge import checks, compose
from megatron_edge.artifact.store import ArtifactReader
from megatron_edge.contracts import InputError
from megatron_edge.export.targets import convert
from megatron_edge.verify import edge_llm

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / ".venv-edgellm" / "bin" / "tensorrt-edgellm-export"
TEMPLATE = "{{ messages[0]['content'] }}"


@pytest.mark.parametrize(
    "recipe, words",
    [
        ("int4", "model.layers.0.self_attn.q_proj: int4 in groups of 64, not 128"),
        ("fp8_kv4", "its nvfp4 scales would be taken for those of an FP8 cache"),
        ("nvfp4_w4a16", "nvfp4 weights alone; it would quantise the inputs too"),
    ],
)
def test_what_it_does_not_run_is_refused_by_name(recipe: str, words: str, tmp_path: Path) -> None:
    reader = ArtifactReader(make_tiny(tmp_path, recipe).artifact)
    with pytest.raises(InputError, match=words):
        edge_llm.parse(reader, tmp_path / "modelopt", PROGRAM, tmp_path / "onnx")


def test_sides_that_its_kernel_does_not_take(tmp_path: Path) -> None:
    manifest = ArtifactReader(make_tiny(tmp_path, "int4").artifact).manifest
    down = manifest.linears["model.layers.0.mlp.down_proj"]
    assert (down.group_size, down.shape) == (128, (192, 256))
    only = dataclasses.replace(manifest, linears={"model.layers.0.mlp.down_proj": down})
    assert edge_llm.limits_broken(only) == ["model.layers.0.mlp.down_proj: 192 x 256, no multiples of 128"]
    wide = dataclasses.replace(down, shape=(256, 256))
    assert not edge_llm.limits_broken(dataclasses.replace(manifest, linears={"model.layers.0.mlp.down_proj": wide}))


def test_preflight_holds_its_limit_on_outputs() -> None:
    from test_config import SMOLLM2

    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "head_dim": 64}
    run = compose.compose(["quant=int4", "device=orin_nano_8gb_edgellm"])
    with pytest.raises(InputError, match=r"512 and 64 outputs of .*k_proj.* multiples of 128, .*orin_nano_8gb_edgellm"):
        checks.check_model_dims(run, {**SMOLLM2, **sizes, "num_key_value_heads": 1})
    checks.check_model_dims(run, {**SMOLLM2, **sizes, "num_key_value_heads": 2})


def test_it_wants_a_chat_template_and_its_environment(tmp_path: Path) -> None:
    reader = ArtifactReader(make_tiny(tmp_path, "fp8").artifact)
    convert("modelopt", reader, tmp_path / "modelopt")
    with pytest.raises(InputError, match="wants a chat template"):
        edge_llm.parse(reader, tmp_path / "modelopt", PROGRAM, tmp_path / "onnx")
    (tmp_path / "modelopt" / "chat_template.jinja").write_text(TEMPLATE)
    with pytest.raises(InputError, match="`make runtimes`"):
        edge_llm.parse(reader, tmp_path / "modelopt", tmp_path / "nowhere", tmp_path / "onnx")


def parsed(tmp_path: Path, recipe: str, change: Any = None, *options: str) -> subprocess.CompletedProcess[str]:
    tiny = make_tiny(tmp_path, recipe, "bfloat16")
    directory = tiny.artifact.parent / "modelopt"
    convert("modelopt", ArtifactReader(tiny.artifact), directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    if change:
        (file,) = directory.glob("*.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    command = [sys.executable, str(ROOT / "tools" / "edge_llm.py"), str(tiny.artifact), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.long
@pytest.mark.skipif(not PROGRAM.is_file(), reason="no environment of TensorRT Edge-LLM: make runtimes")
@pytest.mark.parametrize("recipe", ["fp8", "nvfp4", "int4_kv8"])
def test_its_export_understands_the_layout_and_the_kv_scales(recipe: str, tmp_path: Path) -> None:
    done = parsed(tmp_path, recipe, None, *(["--beyond-limits"] if recipe == "int4_kv8" else []))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parsed (never ran)" in done.stdout and done.stdout.count("ok ") == 3


@pytest.mark.long
@pytest.mark.skipif(not PROGRAM.is_file(), reason="no environment of TensorRT Edge-LLM: make runtimes")
def test_another_scale_and_another_code_are_named(tmp_path: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.self_attn.v_proj.v_scale"] *= 1.01
        tensors["model.layers.0.mlp.up_proj.weight"][3, 5] ^= 0x10

    done = parsed(tmp_path, "nvfp4", change)
    assert done.returncode == 3
    assert "layer 1: scales" in done.stdout and "model.layers.0.mlp.up_proj: weight" in done.stdout
    assert done.stdout.count("FAILED") == 2
