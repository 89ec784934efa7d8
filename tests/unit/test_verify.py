"""What verify accepts, and that everything that can be wrong with an artifact is found and named."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_artifact import RECIPES, TrainedModel, make_tiny, windows

from megatron_edge.artifact.store import INDEX_FILE, ArtifactReader, ArtifactWriter
from megatron_edge.contracts import DeviceProfile, InputError, MemoryPlan
from megatron_edge.export.targets import TARGETS, convert
from megatron_edge.verify.behaviour import FLOOR_FACTOR
from megatron_edge.verify.parity import uncovered
from megatron_edge.verify.quality import Windows, load_model, nats_per_token
from megatron_edge.verify.report import Limits, table, verify_artifact

ROOT = Path(__file__).resolve().parents[2]
DEVICE = DeviceProfile(
    name="board", runtime="some runtime", memory_bytes=2_000_000_000, reserved_bytes=0, overhead_bytes=0,
    bandwidth_bytes_per_second=1, decode_efficiency=1.0, power_w=1.0, power_modes=(), compute_capability=None,
    weight_formats=("int4", "int8", "fp8", "nvfp4"), activation_formats=("fp8", "int8", "nvfp4"),
    kv_formats=("fp8", "int8", "nvfp4"), embedding_formats=("bf16", "int4"), group_sizes=(64, 128),
    repacked_formats=(), sources={},
)  # fmt: skip
MEMORY = MemoryPlan(0, 1000, 1000, 1000, budget_bytes=3_000_000, max_batch=1, max_seq_len=64)
LIMITS = Limits(DEVICE, MEMORY, max_loss_rise=0.2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Gives the artifact and reference of a recipe, made once; tests that change them copy first."""
    known: dict = {}

    def get(recipe: str, dtype: str = "float32"):
        if (recipe, dtype) not in known:
            known[recipe, dtype] = make_tiny(tmp_path_factory.mktemp(recipe), recipe, dtype, count=8)
        return known[recipe, dtype]

    return get


@pytest.fixture
def copied(made, tmp_path):
    """The same, in a directory of the test's own."""

    def get(recipe: str, dtype: str = "float32"):
        tiny = made(recipe, dtype)
        shutil.copytree(tiny.artifact, tmp_path / "artifact" / "canonical")
        shutil.copytree(tiny.reference, tmp_path / "reference")
        return dataclasses.replace(tiny, artifact=tmp_path / "artifact" / "canonical", reference=tmp_path / "reference")

    return get


def failed(report) -> dict[str, str]:
    return {check.metric: check.detail for check in report.checks if not check.ok}


def change_tensors(artifact: Path, changes: dict[str, torch.Tensor], config: dict | None = None) -> None:
    """The artifact with other contents and a manifest that agrees: its bytes are whole, but not what was trained."""
    reader, manifest = ArtifactReader(artifact), ArtifactReader(artifact).manifest
    with ArtifactWriter(artifact, 10**9) as writer:
        for name, entry in manifest.tensors.items():
            writer.add(name, changes.get(name, reader.tensor(name)), entry.format)
        for file in manifest.files:
            if file != INDEX_FILE:
                shutil.copy(artifact / file, writer.side_files / file)
        if config:
            path = writer.side_files / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        kept = {f.name: getattr(manifest, f.name) for f in dataclasses.fields(manifest)}
        writer.finish(**{key: value for key, value in kept.items() if key not in ("schema", "tensors", "files")})


def change_reference(reference: Path, change) -> None:
    path = reference / "reference.json"
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_faithful_artifact_passes(copied, recipe, dtype):
    tiny = copied(recipe, dtype)
    for name in set(TARGETS) - {"onnx"}:  # seconds of another program: test_onnx_target.py
        try:
            convert(name, ArtifactReader(tiny.artifact), tiny.artifact.parent / name)
        except InputError:
            shutil.rmtree(tiny.artifact.parent / name, ignore_errors=True)
    output = tiny.artifact.parent / "verify.json"
    report = verify_artifact(tiny.artifact, tiny.reference, LIMITS, output=output)
    for check in report.checks:
        print(f"{check.name}: {check.metric}: {check.value} (limit {check.limit}) {check.detail}")
    assert report.ok, failed(report)
    names = {check.name for check in report.checks}
    assert {"integrity", "trained equals shipped", "loss", "logits", "perplexity", "memory", "device"} <= names
    targets = {path.name for path in tiny.artifact.parent.iterdir() if path.is_dir()} - {"canonical"}
    assert {f"target {name}" for name in targets} <= names
    assert ("target modelopt: logits" in report.not_run) == ("modelopt" in targets)
    written = json.loads(output.read_text())
    assert written["ok"] and len(written["checks"]) == len(report.checks) and written["not_run"] == report.not_run
    assert abs(report.losses["artifact"] - tiny.trained.loss(windows(8))) < 0.05
    assert len(table(report).rows) == len(report.checks) + len(report.not_run)


def test_it_runs_without_megatron_core_and_modelopt(made, tmp_path):
    tiny = made("nvfp4")
    program = f"""
import sys
from pathlib import Path
from megatron_edge.verify.report import Limits, verify_artifact
report = verify_artifact(Path({str(tiny.artifact)!r}), Path({str(tiny.reference)!r}), Limits())
assert report.ok, report
strangers = [name for name in sys.modules if name.split(".")[0] in ("megatron", "modelopt")]
assert not strangers, strangers
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize("recipe", ["int4", "fp8", "nvfp4"])
def test_one_flipped_byte_in_any_tensor_is_named(copied, recipe):
    tiny = copied(recipe)
    reader = ArtifactReader(tiny.artifact)
    assert {role for linear in reader.manifest.linears.values() for role in linear.tensors} >= {"codes", "scale"}
    for name, entry in reader.manifest.tensors.items():
        path = tiny.artifact / entry.file
        whole = path.read_bytes()
        stored = reader.tensor(name).contiguous().reshape(-1).view(torch.uint8)
        header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
        begin, end = header[name]["data_offsets"]
        assert end - begin == stored.numel()
        place = 8 + int.from_bytes(whole[:8], "little") + (begin + end) // 2
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        report = verify_artifact(tiny.artifact, tiny.reference, LIMITS)
        path.write_bytes(whole)
        assert not report.ok and failed(report) == {
            "tensors and files at fault": f"tensor {name}: sha256 differs from the manifest's"
        }
    assert verify_artifact(tiny.artifact, None, Limits()).ok, "the copy is whole again"


def drop(artifact: Path, name: str) -> str:
    path = artifact / ArtifactReader(artifact).manifest.tensors[name].file
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    return name


def damage_scale_gone_from_manifest_too(artifact: Path) -> str:
    name = drop(artifact, "model.layers.0.self_attn.k_proj.weight_scale")
    for file, part in (("manifest.json", "tensors"), (INDEX_FILE, "weight_map")):
        content = json.loads((artifact / file).read_text())
        del content[part][name]
        (artifact / file).write_text(json.dumps(content))
    return name


def damage_truncated_file(artifact: Path) -> str:
    path = sorted(artifact.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    return path.name


def damage_missing_file(artifact: Path) -> str:
    path = sorted(artifact.glob("*.safetensors"))[0]
    path.unlink()
    return path.name


def damage_stranger(artifact: Path) -> str:
    save_file({"model.layers.9.stranger": torch.ones(3)}, artifact / "model-stranger.safetensors")
    return "model.layers.9.stranger"


def damage_config(artifact: Path) -> str:
    (artifact / "config.json").write_text((artifact / "config.json").read_text().replace("192", "193"))
    return "config.json"


def damage_tokenizer(artifact: Path) -> str:
    (artifact / "tokenizer.json").unlink()
    return "tokenizer.json"


DAMAGES = {name.removeprefix("damage_"): value for name, value in globals().items() if name.startswith("damage_")}
DAMAGES |= {
    "missing_tensor": lambda artifact: drop(artifact, "model.layers.1.mlp.up_proj.weight_codes"),
    "missing_scale": lambda artifact: drop(artifact, "model.layers.0.self_attn.k_proj.weight_scale"),
    "missing_kv_scale": lambda artifact: drop(artifact, "model.layers.0.self_attn.v_scale"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(copied, damage):
    tiny = copied("nvfp4")
    name = DAMAGES[damage](tiny.artifact)
    report = verify_artifact(tiny.artifact, tiny.reference, LIMITS)
    assert not report.ok and name in failed(report)["tensors and files at fault"]
    assert list(report.not_run) == ["everything else"]


def test_a_directory_without_manifest_is_the_users_input(tmp_path):
    with pytest.raises(InputError, match=r"manifest\.json is missing"):
        verify_artifact(tmp_path, None, Limits())


def test_codes_other_than_the_trained_ones_are_named(copied):
    tiny, name = copied("int4"), "model.layers.1.self_attn.o_proj"
    codes = ArtifactReader(tiny.artifact).tensor(f"{name}.weight_codes")
    codes[-1, -1] ^= 16  # the last column: the second tensor-parallel rank's half
    change_tensors(tiny.artifact, {f"{name}.weight_codes": codes})
    found = failed(verify_artifact(tiny.artifact, tiny.reference, LIMITS))
    half = "[96:192, 0:192]"  # 96 columns are no multiple of the group of 64, so that rows were split
    assert found["codes that differ"] == found["dequantised values that differ"] == f"{name}.weight{half}"
    assert "scales that differ" not in found


def test_scales_other_than_the_trained_ones_are_named(copied):
    tiny, name, other = copied("nvfp4"), "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"
    reader = ArtifactReader(tiny.artifact)
    scale = reader.tensor(f"{name}.weight_scale").view(torch.uint8)
    scale[0, 0] += 1
    change_tensors(
        tiny.artifact,
        {
            f"{name}.weight_scale": scale.view(torch.float8_e4m3fn),
            f"{other}.weight_global_scale": reader.tensor(f"{other}.weight_global_scale") * 2,
            f"{other}.input_scale": torch.tensor(0.5),
            "model.layers.1.self_attn.k_scale": torch.tensor(0.25),
        },
    )
    found = failed(verify_artifact(tiny.artifact, tiny.reference, LIMITS))
    assert f"{name}.weight[0:192, 0:128]" in found["scales that differ"]
    assert "mlp.up_proj.weight[0:128, 0:192]: global scale" in found["scales that differ"]
    assert "model.layers.1.mlp.up_proj: nvfp4 0.5, trained nvfp4" in found["input scales that differ"]
    assert found["KV scales that differ"].startswith("model.layers.1.self_attn.k_scale: 0.25, trained with 0.")


def test_unquantised_tensors_are_compared_too(copied):
    tiny = copied("int4")
    norm = ArtifactReader(tiny.artifact).tensor("model.norm.weight")
    norm[3] += 1e-3
    change_tensors(tiny.artifact, {"model.norm.weight": norm})
    found = failed(verify_artifact(tiny.artifact, tiny.reference, LIMITS))
    assert found["dequantised values that differ"] == "model.norm.weight[0:192, 0:1]"


def test_a_shard_that_the_reference_lacks_is_a_gap(copied):
    tiny, name = copied("int4"), "model.layers.0.mlp.down_proj.weight"

    def forget(facts: dict) -> None:
        kept = [entry for entry in facts["weights"] if entry["tensor"] != name or entry["cols"][0] > 0]
        facts["weights"] = [entry for entry in kept if entry["tensor"] != "model.norm.weight"]
        facts["weights"].append({**kept[0], "tensor": "model.layers.7.mlp.up_proj.weight"})

    change_reference(tiny.reference, forget)
    found = failed(verify_artifact(tiny.artifact, tiny.reference, LIMITS))
    text = found["parts that no trained shard covers, or none shipped"]
    assert f"{name}: no trained shard covers [0:192, 0:128]" in text
    assert "model.norm.weight: in the artifact, but in no trained shard" in text
    assert "model.layers.7.mlp.up_proj.weight: trained, but not in the artifact" in text


def test_uncovered_parts_of_a_matrix():
    left, right = ((0, 4), (0, 3)), ((0, 4), (3, 6))
    assert uncovered((4, 6), [left, right]) == []
    assert uncovered((4, 6), [left, left]) == ["no trained shard covers [0:4, 3:6]"]
    assert uncovered((4, 6), [left, ((0, 2), (3, 6))]) == ["no trained shard covers [2:4, 3:6]"]
    assert "reaches out of 4 x 6" in uncovered((4, 6), [left, right, ((2, 5), (0, 6))])[0]
    assert uncovered((5,), [((0, 5), (0, 1))]) == [] and uncovered((5,), [((0, 4), (0, 1))]) != []


WRONG = {
    "another rope base": ("int4", {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}),
    "another norm": ("nvfp4_w4a16", {"rms_norm_eps": 1e-2}),
    "another activation function": ("fp8", {"hidden_act": "gelu"}),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_model_that_computes_otherwise_is_caught(copied, mistake):
    """The weights are the trained ones, the configuration is not."""
    recipe, config = WRONG[mistake]
    tiny = copied(recipe)
    change_tensors(tiny.artifact, {}, config)
    report = verify_artifact(tiny.artifact, tiny.reference, LIMITS)
    assert all(check.ok for check in report.checks if check.name == "trained equals shipped")
    assert not all(check.ok for check in report.checks if check.name == "logits"), mistake


@pytest.mark.parametrize(
    "recipe, without", [("int4", "kv"), ("fp8", "activation"), ("nvfp4", "activation"), ("w4a8", "kv")]
)
def test_a_reference_that_left_a_quantiser_out_is_caught(copied, recipe, without):
    """What the model says without its KV or activation quantisers is not what the artifact says with them."""
    tiny, text = copied(recipe), windows(8)
    other = TrainedModel(recipe, torch.float32)
    if without == "kv":
        other.kv, other.kv_amax = "none", {}
    else:
        other.input_amax = {}
    said = {"nll": other.nll(text), "logits": other.logits({k: v[:2] for k, v in text.items()})}
    save_file({**text, **said}, tiny.reference / "reference.safetensors")
    report = verify_artifact(tiny.artifact, tiny.reference, LIMITS)
    assert [check.name for check in report.checks if not check.ok and check.name == "logits"], table(report)


def test_attention_that_crosses_documents_is_caught(copied):
    tiny = copied("none")
    tensors = load_file(tiny.reference / "reference.safetensors")
    tensors["documents"].zero_()
    save_file(tensors, tiny.reference / "reference.safetensors")
    found = failed(verify_artifact(tiny.artifact, tiny.reference, LIMITS))
    assert "difference, largest" in found and "difference, nats/token" in found


def test_promises_are_held_against_it(made):
    tiny = made("nvfp4")
    device = dataclasses.replace(DEVICE, weight_formats=("int4",), kv_formats=("int8",))
    limits = Limits(device, dataclasses.replace(MEMORY, budget_bytes=300_000), max_loss_rise=-1.0)
    found = failed(verify_artifact(tiny.artifact, tiny.reference, limits))
    assert set(found) == {"bytes on the device", "weight formats", "KV formats", "rise over bf16, nats/token"}
    assert found["weight formats"] == "some runtime on board does not run nvfp4"
    assert ArtifactReader(tiny.artifact).size_bytes() + 3000 > 300_000


def test_groups_that_the_runtime_does_not_run_are_refused(made):
    limits = Limits(dataclasses.replace(DEVICE, group_sizes=(128,)))
    assert "64" in failed(verify_artifact(made("int4").artifact, made("int4").reference, limits))["int4 groups"]


def test_what_cannot_be_checked_is_said_and_never_passed(made):
    report = verify_artifact(made("int4").artifact, None, Limits())
    assert [check.name for check in report.checks] == ["integrity"]
    assert set(report.not_run) >= {"trained equals shipped", "logits", "loss", "perplexity", "memory", "device"}


COMPRESSED = [("compressed_tensors", recipe) for recipe in ("int4", "w4a8", "int8")]


@pytest.mark.parametrize("target, recipe", [("modelopt", "nvfp4"), ("modelopt", "fp8"), ("hf", "int4"), *COMPRESSED])
def test_a_target_that_decodes_otherwise_is_caught(copied, target, recipe):
    tiny, name = copied(recipe, "bfloat16"), "model.layers.1.mlp.gate_proj"
    directory = tiny.artifact.parent / target
    convert(target, ArtifactReader(tiny.artifact), directory)
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    packed = tensors.get(f"{name}.weight_packed", tensors.get(f"{name}.weight"))
    packed.view(torch.uint8)[5, 5] ^= 0x11
    save_file(tensors, file, metadata={"format": "pt"})
    report = verify_artifact(tiny.artifact, tiny.reference, LIMITS)
    (found,) = [c for c in report.checks if not c.ok and ("otherwise" in c.metric)]
    assert found.name == f"target {target}" and name in found.detail


def test_a_target_that_does_not_load_is_a_failure(copied):
    tiny = copied("int4")
    directory = tiny.artifact.parent / "compressed_tensors"
    convert("compressed_tensors", ArtifactReader(tiny.artifact), directory)
    (file,) = directory.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    (found,) = [c for c in verify_artifact(tiny.artifact, tiny.reference, LIMITS).checks if not c.ok]
    assert (found.name, found.metric) == ("target compressed_tensors", "loads")


def test_loss_of_an_artifact_on_text_is_the_trained_models(made):
    tiny, text = made("none"), windows(3, seed=5)
    model = load_model(ArtifactReader(tiny.artifact), torch.float32)
    exact = TrainedModel("none", torch.float64).loss(text)
    noise = abs(tiny.trained.loss(text) - exact)  # the same loss in float32 and float64
    value = abs(nats_per_token(model, Windows(**text)) - tiny.trained.loss(text))
    print(f"difference {value:.3g}, noise floor {noise:.3g}")
    assert value <= FLOOR_FACTOR * max(noise, torch.finfo(torch.float32).eps)


def test_text_without_a_counted_token_is_refused(made):
    text = windows(1)
    text["loss_mask"].zero_()
    with pytest.raises(InputError, match="loss_mask"):
        nats_per_token(load_model(ArtifactReader(made("none").artifact), torch.float32), Windows(**text))
