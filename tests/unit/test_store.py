"""The artifact on disk: written as a stream, replaced whole, and every kind of damage named by its tensor or file."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_edge.artifact import formats, store
from megatron_edge.artifact.store import ArtifactReader, ArtifactWriter, ShardReader, ShardWriter
from megatron_edge.contracts import InputError, LinearEntry

LINEARS = {  # name -> (format, activation, group size)
    "model.layers.0.self_attn.k_proj": ("int4", "none", 32),
    "model.layers.0.self_attn.q_proj": ("fp8", "fp8", 0),
    "model.layers.0.mlp.down_proj": ("nvfp4", "nvfp4", 16),
    "model.layers.0.mlp.gate_proj": ("int8", "int8", 0),
}
SIDE_FILES = {"config.json": b'{"hidden_size": 64}', "tokenizer.json": b'{"version": "1.0"}'}


def weight_of(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(48, 64, generator=generator).to(torch.bfloat16)


def add_linear(writer: ArtifactWriter, name: str) -> LinearEntry:
    fmt, activation, group_size = LINEARS[name]
    weight = weight_of(name)
    amax = formats.snap_amax(fmt, formats.weight_amax(fmt, weight, group_size))
    encoded = formats.encode(fmt, weight, amax, group_size)
    parts = {"codes": encoded.codes, "scale": encoded.scale, "global_scale": encoded.global_scale}
    if activation != "none":
        parts["input_scale"] = formats.tensor_scale(activation, torch.tensor(2.0))
    tensors = {}
    for role, part in parts.items():
        if part is not None:
            tensors[role] = f"{name}.input_scale" if role == "input_scale" else f"{name}.weight_{role}"
            writer.add(tensors[role], part, fmt if role == "codes" else "scale")
    return LinearEntry(fmt, activation, group_size, (48, 64), tensors)


def write(directory: Path, shard_bytes: int = 3000) -> ArtifactWriter:
    """An artifact with a linear of each format, fp8 KV scales and an embedding, in several shards."""
    writer = ArtifactWriter(directory, shard_bytes)
    writer.add("model.embed_tokens.weight", torch.arange(640, dtype=torch.float32).view(10, 64), "fp32")
    linears = {name: add_linear(writer, name) for name in LINEARS}
    for which in "kv":
        writer.add(f"model.layers.0.self_attn.{which}_scale", torch.tensor(0.5), "scale")
    for file, content in SIDE_FILES.items():
        (writer.side_files / file).write_bytes(content)
    fields: dict = {key: {} for key in ("dims", "quant", "source", "versions")}
    writer.finish(family="llama", dtype="bfloat16", linears=linears, kv={"format": "fp8"}, tokenizer_sha="", **fields)
    return writer


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    write(tmp_path / "canonical")
    return tmp_path / "canonical"


def data_span(file: Path, name: str) -> tuple[int, int]:
    """Where a tensor's bytes lie in a safetensors file: 8 bytes of header length, JSON header, data."""
    content = file.read_bytes()
    (header_bytes,) = struct.unpack("<Q", content[:8])
    begin, end = json.loads(content[8 : 8 + header_bytes])[name]["data_offsets"]
    return 8 + header_bytes + begin, 8 + header_bytes + end


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 0x10
    file.write_bytes(content)


def rewrite(file: Path, change) -> None:
    """Write the shard again with `change` applied to its dictionary: a whole file with other content."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def file_of(artifact: Path, name: str) -> Path:
    return artifact / ArtifactReader(artifact).manifest.tensors[name].file


NAMES = [
    "model.embed_tokens.weight",
    *(f"{name}.weight_{role}" for name in LINEARS for role in ("codes", "scale")),
    "model.layers.0.mlp.down_proj.weight_global_scale",
    *(f"{name}.input_scale" for name, (_, activation, _) in LINEARS.items() if activation != "none"),
    "model.layers.0.self_attn.k_scale",
    "model.layers.0.self_attn.v_scale",
]


# ---------------------------------------------------------------- whole artifacts


def test_everything_comes_back(artifact):
    reader = ArtifactReader(artifact)
    assert reader.check() == []
    assert sorted(reader.names()) == sorted(NAMES)
    assert torch.equal(reader.tensor("model.embed_tokens.weight"), torch.arange(640.0).view(10, 64))
    for name, (fmt, _, group_size) in LINEARS.items():
        weight = weight_of(name)
        amax = formats.snap_amax(fmt, formats.weight_amax(fmt, weight, group_size))
        assert torch.equal(
            reader.dequantized(name, torch.bfloat16), formats.fake_quantize(fmt, weight, amax, group_size)
        )
        assert reader.encoded(name).format == fmt and reader.encoded(name).group_size == group_size
    assert reader.size_bytes() == sum(reader.tensor(name).nbytes for name in NAMES)


def test_layout_is_that_of_hugging_face(artifact):
    shards = sorted(path.name for path in artifact.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    index = json.loads((artifact / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(NAMES)
    for name, file in index["weight_map"].items():
        assert name in load_file(artifact / file)
    assert index["metadata"]["total_size"] == ArtifactReader(artifact).size_bytes()
    assert not [path for path in artifact.parent.iterdir() if path != artifact]
    assert not list(artifact.glob(".*"))


def test_manifest_hashes_are_of_the_stored_bytes(artifact):
    manifest = ArtifactReader(artifact).manifest
    assert manifest.schema == "megatron-edge/1"
    for name, entry in manifest.tensors.items():
        begin, end = data_span(artifact / entry.file, name)
        assert entry.sha256 == hashlib.sha256((artifact / entry.file).read_bytes()[begin:end]).hexdigest()
    assert {file: manifest.files[file] for file in SIDE_FILES} == {
        file: hashlib.sha256(content).hexdigest() for file, content in SIDE_FILES.items()
    }


def test_no_more_than_a_shard_is_spooled_and_none_is_larger(tmp_path):
    writer = ShardWriter(tmp_path, 1000)
    base = torch.zeros(100, 100)
    for i in range(10):
        writer.add(f"a{i}", base[i, :75])  # 300 bytes, a view
        (spool,) = tmp_path.glob(".shard-*.spool")
        assert spool.stat().st_size <= 1000 + 3 * 64, "with gaps that align the tensors"
    writer.add("large", torch.zeros(1000))
    files = writer.finish({})
    assert files["a0"] == files["a2"] == "model-00001-of-00005.safetensors" != files["a3"]
    assert [name for name, file in files.items() if file == files["large"]] == ["large"]
    assert sorted(ShardReader(tmp_path).names()) == sorted(files)


def test_what_the_caller_does_after_add_changes_nothing(tmp_path):
    writer, tensor = ShardWriter(tmp_path, 1 << 20), torch.ones(4, 4)
    writer.add("ones", tensor)
    writer.add("tied", tensor)
    writer.add("transposed", torch.arange(6).view(2, 3).t())
    tensor.zero_()
    writer.finish({})
    reader = ShardReader(tmp_path)
    assert reader.tensor("ones").eq(1).all() and reader.tensor("tied").eq(1).all()
    assert reader.tensor("transposed").tolist() == [[0, 3], [1, 4], [2, 5]]
    with pytest.raises(InputError, match="other is missing"):
        reader.tensor("other")


def test_a_new_artifact_replaces_the_old_one_whole(artifact):
    (artifact / "stale.txt").write_text("of the old artifact")
    write(artifact, shard_bytes=1 << 20)
    assert not (artifact / "stale.txt").exists() and len(list(artifact.glob("*.safetensors"))) == 1
    assert ArtifactReader(artifact).check() == []


def test_an_error_while_writing_leaves_the_old_artifact(artifact):
    before = {path.name: path.read_bytes() for path in artifact.iterdir()}
    with pytest.raises(ZeroDivisionError), ArtifactWriter(artifact, 100) as writer:
        writer.add("x", torch.ones(100), "fp32")
        writer.add("y", torch.ones(100), "fp32")
        raise ZeroDivisionError
    assert {path.name: path.read_bytes() for path in artifact.iterdir()} == before
    assert [path.name for path in artifact.parent.iterdir()] == [artifact.name]


def test_what_a_killed_writer_left_is_cleared(artifact):
    ArtifactWriter(artifact, 100).add("x", torch.ones(100), "fp32")
    write(artifact)
    assert ArtifactReader(artifact).check() == []
    assert [path.name for path in artifact.parent.iterdir()] == [artifact.name]


def test_writer_refuses(tmp_path):
    with pytest.raises(InputError, match="shard_bytes=0"):
        ArtifactWriter(tmp_path / "a", 0)
    writer = ArtifactWriter(tmp_path / "a", 100)
    writer.add("x", torch.ones(2), "fp32")
    with pytest.raises(InputError, match="x was added twice"):
        writer.add("x", torch.ones(2), "fp32")
    linear = LinearEntry("fp8", "none", 0, (2, 2), {"codes": "x", "scale": "forgotten"})
    with pytest.raises(InputError, match=r"linear l: .*forgotten"):
        writer.finish(linears={"l": linear})


def test_one_file_of_tensors(tmp_path):
    tensors = {"tokens": torch.arange(6).view(2, 3), "mask": torch.tensor([True, False])}
    store.save_tensors(tmp_path / "reference.safetensors", tensors)
    back = store.read_tensors(tmp_path / "reference.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)
    (tmp_path / "reference.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match=r"reference\.safetensors"):
        store.read_tensors(tmp_path / "reference.safetensors")


# ---------------------------------------------------------------- damage, each named


def naming(problems: list[str], name: str) -> list[str]:
    return [line for line in problems if name in line]


@pytest.mark.parametrize("name", NAMES)
def test_one_flipped_byte_names_the_tensor(artifact, name):
    file = file_of(artifact, name)
    begin, end = data_span(file, name)
    flip(file, (begin + end) // 2)
    assert ArtifactReader(artifact).check() == [f"tensor {name}: sha256 differs from the manifest's"]


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor_is_named(artifact, name):
    file = file_of(artifact, name)
    if len(load_file(file)) == 1:
        file.unlink()
    else:
        rewrite(file, lambda tensors: tensors.pop(name))
    problems = ArtifactReader(artifact).check()
    assert len(problems) == 1 and name in problems[0] and "missing" in problems[0]


def test_an_extra_tensor_is_named(artifact):
    rewrite(file_of(artifact, NAMES[1]), lambda tensors: tensors.update(stranger=torch.ones(2)))
    save_file({"guest": torch.ones(2)}, artifact / "more.safetensors")
    problems = ArtifactReader(artifact).check()
    assert len(problems) == 2 and naming(problems, "tensor stranger:") and naming(problems, "tensor guest:")


@pytest.mark.parametrize("change", [lambda t: t.to(torch.float16), lambda t: t.view(64, 10)], ids=["dtype", "shape"])
def test_a_wrong_dtype_or_shape_is_named(artifact, change):
    name = "model.embed_tokens.weight"
    rewrite(file_of(artifact, name), lambda tensors: tensors.update({name: change(tensors[name])}))
    problems = ArtifactReader(artifact).check()
    assert len(problems) == 1 and f"tensor {name}: is" in problems[0]


@pytest.mark.parametrize("bytes_left", [0, 5, 40, -1])
def test_a_truncated_file_is_named_with_all_its_tensors(artifact, bytes_left):
    name = "model.layers.0.mlp.down_proj.weight_codes"
    file = file_of(artifact, name)
    inside = list(load_file(file))
    file.write_bytes(file.read_bytes()[:bytes_left])
    problems = ArtifactReader(artifact).check()
    assert naming(problems, f"file {file.name}:")
    assert len(problems) == 1 + len(inside) and all(naming(problems, f"tensor {tensor}:") for tensor in inside)
    with pytest.raises(InputError, match=file.name):
        ArtifactReader(artifact).dequantized("model.layers.0.mlp.down_proj", torch.float32)


@pytest.mark.parametrize("place", [0, 9, 60])
def test_a_flipped_byte_in_a_header_is_found(artifact, place):
    file = file_of(artifact, NAMES[1])
    flip(file, place)
    problems = ArtifactReader(artifact).check()
    assert problems and all("tensor" in line or file.name in line for line in problems)


@pytest.mark.parametrize("file", [*SIDE_FILES, "model.safetensors.index.json"])
def test_a_flipped_or_missing_side_file_is_named(artifact, file):
    flip(artifact / file, 3)
    assert naming(ArtifactReader(artifact).check(), f"file {file}: sha256")
    (artifact / file).unlink()
    assert naming(ArtifactReader(artifact).check(), f"file {file}: missing")


def edit_manifest(artifact: Path, change) -> None:
    data = json.loads((artifact / "manifest.json").read_text())
    change(data)
    (artifact / "manifest.json").write_text(json.dumps(data))


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(("scale", "codes"))])
def test_a_part_missing_from_file_and_manifest_is_named(artifact, name):
    """A consistent artifact that never had the scale: only the linear, or the KV format, tells that it should."""
    file = file_of(artifact, name)
    if len(load_file(file)) == 1:
        file.unlink()
    else:
        rewrite(file, lambda tensors: tensors.pop(name))
    edit_manifest(artifact, lambda data: data["tensors"].pop(name))
    problems = [line for line in ArtifactReader(artifact).check() if "index.json" not in line]
    assert len(problems) == 1 and name in problems[0] and "missing from the manifest" in problems[0]


def test_a_role_that_the_manifest_forgot_is_named(artifact):
    linear = "model.layers.0.mlp.down_proj"
    edit_manifest(artifact, lambda data: data["linears"][linear]["tensors"].pop("input_scale"))
    problems = ArtifactReader(artifact).check()
    assert naming(problems, f"linear {linear}: its input_scale")
    assert naming(problems, f"tensor {linear}.input_scale: belongs to no linear")
    edit_manifest(artifact, lambda data: data["linears"][linear]["tensors"].pop("scale"))
    with pytest.raises(InputError, match="has no scale"):
        ArtifactReader(artifact).encoded(linear)


def test_parts_of_the_wrong_size_are_named(artifact):
    linear = "model.layers.0.self_attn.k_proj"
    edit_manifest(artifact, lambda data: data["linears"][linear].update(group_size=64))
    problems = ArtifactReader(artifact).check()
    assert len(problems) == 1 and f"tensor {linear}.weight_scale: is" in problems[0]
    with pytest.raises(InputError, match=f"{linear}.weight_scale is"):
        ArtifactReader(artifact).encoded(linear)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.unlink(), "manifest.json is missing"),
        (lambda path: path.write_text(path.read_text()[:-20]), "manifest.json is no JSON"),
        (
            lambda path: path.write_text('{"schema": "megatron-edge/0"}'),
            "'megatron-edge/0'; allowed: 'megatron",
        ),
        (lambda path: path.write_text("[]"), "schema None"),
        (lambda path: path.write_text('{"schema": "megatron-edge/1"}'), r"keys \['dims'.* are missing"),
        (lambda path: path.write_text(path.read_text().replace('"sha256"', '"sha265"')), "manifest.json is damaged"),
    ],
)
def test_an_unreadable_manifest_is_refused(artifact, damage, message):
    damage(artifact / "manifest.json")
    with pytest.raises(InputError, match=message):
        ArtifactReader(artifact)


def test_reading_what_is_not_there(artifact, tmp_path):
    reader = ArtifactReader(artifact)
    with pytest.raises(InputError, match="tensor nothing is missing"):
        reader.tensor("nothing")
    with pytest.raises(InputError, match=r"model\.norm is no quantised linear"):
        reader.encoded("model.norm")
    with pytest.raises(InputError, match=r"no \*\.safetensors file"):
        ShardReader(tmp_path)
