"""Target gguf: read back by the gguf package, run by llama.cpp, and refused where it would not be the model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from megatron_edge import checks, compose
from megatron_edge.artifact import formats
from megatron_edge.artifact.store import ArtifactReader
from megatron_edge.contracts import InputError
from megatron_edge.export.targets import convert, gguf_tokenizer
from megatron_edge.verify import gguf_tensors, llama_cpp
from megatron_edge.verify.quality import Windows, load_model, score
from megatron_edge.verify.references import References
from tests.unit.any_artifact import any_artifact
from tests.unit.tiny_tokenizer import tiny_tokenizer

# Every family, weight and table format, group sizes larger than a block, both ways to scale RoPE, tied and not.
CASES = {
    "llama": ("tiny", "int4", "bf16", "int8"),
    "llama3": ("llama3", "nvfp4", "int8", "none"),
    "qwen2": ("qwen2", "int4", "int4", "int8"),
    "qwen3": ("qwen3", "int8", "bf16", "none"),
    "mixtral": ("mixtral", "nvfp4", "bf16", "int8"),
    "qwen3_moe": ("qwen3_moe", "int4", "int8", "none"),
    "plain": ("untied", "none", "bf16", "none"),
}
LENGTH = 96


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """(artifact reader, directory of its target gguf) of a case, made once."""
    found: dict[str, tuple[ArtifactReader, Path]] = {}

    def get(case: str) -> tuple[ArtifactReader, Path]:
        if case not in found:
            directory = tmp_path_factory.mktemp(case)
            model, weight, table, kv = CASES[case]
            reader = ArtifactReader(any_artifact(directory, model, weight, table, group=64, kv=kv))
            convert("gguf", reader, directory / "gguf")
            found[case] = reader, directory / "gguf"
        return found[case]

    return get


def windows() -> Windows:
    """Four windows of two documents each."""
    place = torch.arange(LENGTH)
    documents = (place >= 40).int().expand(4, -1).contiguous()
    mask = torch.ones(4, LENGTH, dtype=torch.bool)
    mask[:, [39, LENGTH - 1]] = False
    tokens = torch.randint(0, 600, (4, LENGTH), generator=torch.Generator().manual_seed(3))
    return Windows(tokens, documents, torch.where(place >= 40, place - 40, place).expand(4, -1).contiguous(), mask)


def test_codes_and_scales_are_those_of_the_artifact(made) -> None:
    """By hand, apart from verify's own reading: a q_proj with its rows turned back, an o_proj, an embedding."""
    reader, directory = made("llama")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(directory / "model.gguf").tensors}
    for theirs, ours, turned in (
        ("blk.1.attn_q", "model.layers.1.self_attn.q_proj", True),
        ("blk.3.attn_output", "model.layers.3.self_attn.o_proj", False),
    ):
        encoded = reader.encoded(ours)
        rows, columns = encoded.shape
        raw = stored[f"{theirs}.weight"].data.reshape(rows, columns // 32, 18)
        scale = raw[..., :2].copy().view(np.float16)[..., 0]
        codes = np.concatenate((raw[..., 2:] & 15, raw[..., 2:] >> 4), axis=-1).reshape(rows, columns)
        if turned:  # head_dim 32: row 2 j + half of a head is row half * 16 + j of Hugging Face's
            order = [32 * head + 2 * j + half for head in range(12) for half in range(2) for j in range(16)]
            codes, scale = codes[order], scale[order]
        assert np.array_equal(codes, formats.unpacked_codes(encoded).numpy())
        assert encoded.group_size == 64
        assert np.array_equal(scale, np.repeat(encoded.scale.numpy(), 2, axis=1)), "a scale per 32, each twice"
    embedding = reader.tensor("model.embed_tokens.weight").float().numpy()
    assert stored["token_embd.weight"].tensor_type.name == "BF16" and "output.weight" not in stored
    assert np.array_equal(gguf.dequantize(stored["token_embd.weight"].data, 30), embedding)


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_reads_and_runs_every_family(made, case: str) -> None:
    """Every tensor, the tokens of a text, losses and likeliest tokens: what verify checks, and that it ran."""
    reader, directory = made(case)
    model, text = load_model(reader, torch.float32, cache=False), windows()
    found = llama_cpp.check_gguf(References(reader, text), "target gguf", directory, score(model, text, 0).nll)
    for check in found.checks:
        print(f"{check.metric}: {check.value} (limit {check.limit}) {check.detail}")
    assert [check.metric for check in found.checks if not check.ok] == [] and len(found.checks) == 8
    ran = found.runtimes["llama.cpp"]
    assert not found.not_run and ran["answer_tokens"] > 0 and ran["peak_rss_bytes"] > ran["rss_before_bytes"] > 0
    assert f"KV {'q8_0' if CASES[case][3] == 'int8' else 'f16'}" in ran["recipe"], ran["recipe"]


def test_inputs_of_nvfp4_weights_stay_unquantised_on_a_gpu(made) -> None:
    """As llama.cpp's converter says it of ModelOpt's W4A16_NVFP4: for each such tensor, no products in FP4."""
    read = gguf.GGUFReader(made("llama3")[1] / "model.gguf")
    named = read.fields["general.tensor_extra.name"].contents()
    assert named == sorted(tensor.name for tensor in read.tensors if tensor.tensor_type.name == "NVFP4")
    assert read.fields["general.tensor_extra.prec_a4"].contents() == [False] * 28


@pytest.mark.parametrize("damage", ["scale", "row", "weight"])
def test_a_file_that_is_another_model_fails(made, tmp_path: Path, damage: str) -> None:
    """One byte of a block scale, two rows of k_proj in Hugging Face's order, or a tensor scale: named."""
    reader, directory = made("llama3")
    read = gguf.GGUFReader(directory / "model.gguf")
    name = {"scale": "blk.2.ffn_up.scale", "row": "blk.0.attn_k.weight", "weight": "blk.3.ffn_down.weight"}[damage]
    tensor = next(tensor for tensor in read.tensors if tensor.name == name)
    data = bytearray((directory / "model.gguf").read_bytes())
    begin, size = int(tensor.data_offset), int(tensor.n_bytes)
    if damage == "row":
        width = size // tensor.data.shape[0]
        first, second = data[begin : begin + width], data[begin + width : begin + 2 * width]
        data[begin : begin + 2 * width] = second + first
    else:
        data[begin + (1 if damage == "weight" else 0)] ^= 0x08
    (tmp_path / "model.gguf").write_bytes(data)
    (check,) = gguf_tensors.check_file(reader, "target gguf", tmp_path / "model.gguf")
    linear = {"scale": "2.mlp.up_proj", "row": "0.self_attn.k_proj", "weight": "3.mlp.down_proj"}[damage]
    assert (check.ok, check.value) == (False, 1.0) and f"layers.{linear}" in check.detail


@pytest.mark.parametrize("case", ["llama", "mixtral"])
def test_a_product_that_is_not_the_files_is_named(made, case: str) -> None:
    """Of llama.cpp's own products one is moved by a millionth, of which sums have no such noise; one is left out."""
    reader, directory = made(case)
    file, name = directory / "model.gguf", {"llama": "blk.2.ffn_up", "mixtral": "blk.1.ffn_up_exps"}[case] + ".weight"
    request = {"task": "products", "gguf": str(file), "kv": "int8", "threads": 1, "tokens": 30}
    _, arrays = llama_cpp.run_llama_cpp(request, windows().first(1))
    for change, words in (
        ({f"result {name}": arrays[f"result {name}"] * np.float32(1 + 4e-6)}, f"largest {name}"),
        ({f"result {name}": None}, f"never multiplied: {name}"),
    ):
        changed = {key: array for key, array in {**arrays, **change}.items() if array is not None}
        _, check = gguf_tensors.check_file(reader, "target gguf", file, gguf_tensors.Products(changed))
        assert not check.ok and words in check.detail, check


@pytest.mark.parametrize("case", ["llama3", "qwen2", "qwen3", "mixtral"])
def test_llama_cpp_decodes_what_the_gguf_package_decodes(made, tmp_path: Path, case: str) -> None:
    """Its own functions on every tensor, all metadata kept: what verify lets it run without roundings."""
    source, to = made(case)[1] / "model.gguf", tmp_path / "decoded.gguf"
    llama_cpp.run_llama_cpp({"task": "rewrite", "gguf": str(source), "to": str(to)}, None)
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(to)
    stored = {tensor.name: tensor for tensor in after.tensors}
    assert [tensor.name for tensor in before.tensors] == list(stored)
    for tensor in before.tensors:
        assert stored[tensor.name].tensor_type.name == "F32"
        assert np.array_equal(stored[tensor.name].data, gguf.dequantize(tensor.data, tensor.tensor_type)), tensor.name
    told = [{name: field.contents() for name, field in read.fields.items()} for read in (before, after)]
    assert told[0] == told[1]


def test_windows_shared_between_processes_are_answered_as_by_one(made) -> None:
    text, directory = windows(), made("llama")[1]
    eight = Windows(*(torch.cat((part, part.flip(0))) for part in vars(text).values()))
    request = {"gguf": str(directory / "model.gguf"), "kv": "int8", "threads": 1, "texts": []}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        _, shared = llama_cpp.score(request, eight)
    finally:
        torch.set_num_threads(before)
    _, alone = llama_cpp.run_llama_cpp({**request, "task": "score"}, eight)
    assert all(np.array_equal(shared[name], alone[name]) for name in ("nll", "top"))


def test_a_file_that_llama_cpp_cannot_read_is_an_error_of_its_process(made, tmp_path: Path) -> None:
    _, directory = made("llama")
    (tmp_path / "model.gguf").write_bytes((directory / "model.gguf").read_bytes()[:-5000])
    request = {"task": "score", "gguf": str(tmp_path / "model.gguf"), "kv": "none", "threads": 1, "texts": []}
    with pytest.raises(RuntimeError, match=r"llama\.cpp does not load the file"):
        llama_cpp.run_llama_cpp(request, windows())


def test_the_process_of_llama_cpp_imports_no_torch() -> None:
    """Its resident memory is reported as llama.cpp's."""
    program = (
        "import sys, megatron_edge.verify.llama_process; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("model", "weight", "table", "kv", "words"),
    [
        ("qwen2", "nvfp4", "bf16", "none", "nvfp4 weights of Qwen2ForCausalLM"),
        ("tiny", "fp8", "bf16", "none", "cannot carry weight=fp8"),
        ("tiny", "int4", "fp8", "none", "model.embed_tokens in fp8"),
        ("tiny", "int4", "bf16", "nvfp4", "the scales of the nvfp4 KV cache"),
    ],
)
def test_what_llama_cpp_would_not_run_is_refused_by_name(tmp_path: Path, model, weight, table, kv, words) -> None:
    reader = ArtifactReader(any_artifact(tmp_path, model, weight, table, kv=kv))
    with pytest.raises(InputError, match=words):
        convert("gguf", reader, tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quant=nvfp4"], r"gguf cannot carry quant\.activation=nvfp4"),
        (["quant=fp8"], r"gguf cannot carry quant\.weight=fp8"),
        (["quant=w4a8_awq"], r"gguf cannot carry quant\.activation=fp8"),
        (["quant=int4", "kv=fp8"], r"gguf cannot carry kv\.format=fp8"),
        (["quant=int4", "quant.embedding=fp8"], r"gguf cannot carry quant\.embedding or quant\.head=fp8"),
        (["quant=int4", "quant.overrides=[{pattern:'*fc2',weight:fp8,activation:fp8}]"], "gguf cannot carry .*fp8"),
    ],
)
def test_preflight_refuses_what_the_file_cannot_carry(arguments: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        checks.check_config(compose.compose([*arguments, "export.targets=[gguf]"]))


def test_devices_with_llama_cpp_get_the_file() -> None:
    found = {
        name: compose.compose([f"+scenario={name}"]).export.targets for name in ("gateway", "vehicle", "vehicle_sm89")
    }
    assert found == {
        "gateway": ["modelopt", "compressed_tensors", "gguf"],
        "vehicle": ["modelopt", "compressed_tensors", "gptq", "gguf"],
        "vehicle_sm89": ["modelopt", "compressed_tensors"],
    }
    assert compose.compose(["quant=none", "device=board_2gb"]).export.targets == ["gguf", "hf"]


# ---------------------------------------------------------------- tokenizers


def byte_level(steps, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """The vocabulary of tests/unit/tiny_tokenizer.py under other rules."""
    content = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in content["merges"]]
    backend = Tokenizer(models.BPE(vocab=content["vocab"], merges=merges, ignore_merges=ignore_merges))
    backend.pre_tokenizer = steps
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def split(pattern: str):
    from tokenizers import Regex

    rule = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([rule, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


LLAMA3 = gguf_tokenizer.PRE_TOKENIZERS["llama-bpe"][0][0][1]
TOKENIZERS = {
    "smollm": lambda: byte_level(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ),
    "llama-bpe": lambda: byte_level(split(LLAMA3), ignore_merges=True),
    "qwen2": lambda: byte_level(split(LLAMA3.replace("{1,3}", ""))),
}


@pytest.mark.parametrize("pre", TOKENIZERS)
def test_llama_cpp_splits_text_as_the_tokenizer_does(made, tmp_path: Path, pre: str) -> None:
    """Each set of rules, on numbers, contractions, runs of white space, other scripts and special tokens."""
    reader, _ = made("llama")
    copy = tmp_path / "canonical"
    copy.mkdir()
    for file in reader.directory.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tokenizer = TOKENIZERS[pre]()
    tokenizer.backend_tokenizer.save(str(copy / "tokenizer.json"))
    convert("gguf", ArtifactReader(copy), tmp_path / "gguf")
    texts = [
        llama_cpp.TRICKY,
        "We'll see 2024-11-26 at 07:05; 1000000 times!?\n\n\n  def f(x):\n\treturn x_1 + 'é' # ок",
    ]
    request = {"task": "score", "gguf": str(tmp_path / "gguf/model.gguf"), "kv": "none", "threads": 1, "texts": texts}
    answer, _ = llama_cpp.run_llama_cpp(request, windows().first(1))
    assert answer["token_ids"] == [tokenizer(text).input_ids for text in texts]
    fields = gguf.GGUFReader(tmp_path / "gguf/model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == pre
    assert fields["tokenizer.chat_template"].contents() == tiny_tokenizer().chat_template


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, "would split text otherwise"),
        ({"normalizer": normalizers.Lowercase()}, "cannot carry the normalizer"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(tmp_path: Path, change, words: str) -> None:
    tokenizer = tiny_tokenizer()
    for name, value in change.items():
        setattr(tokenizer.backend_tokenizer, name, value)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=words):
        gguf_tokenizer.read(tmp_path, 600)


def test_rows_without_a_word_are_padding_and_a_missing_row_is_refused(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    words = gguf_tokenizer.read(tmp_path, 640)
    assert len(words.tokens) == 640 and words.tokens[-1] == "[PAD639]" and words.types[-1] == gguf_tokenizer.UNUSED
    assert [words.types[words.special[name]] for name in ("bos", "eos")] == [gguf_tokenizer.CONTROL] * 2
    with pytest.raises(InputError, match=re.escape("600 tokens, the embedding 599 rows")):
        gguf_tokenizer.read(tmp_path, 599)


def test_its_own_reader_takes_the_file_as_a_source(made) -> None:
    """model.source reads GGUF of the llama architecture: the same values come back."""
    from megatron_edge.model.source import open_source

    reader, directory = made("llama")
    source = open_source(directory / "model.gguf")
    name = "model.layers.2.self_attn.k_proj"
    assert torch.equal(source.read(f"{name}.weight"), reader.dequantized(name, torch.float32))


def test_transformers_reads_the_file(made) -> None:
    """transformers' own GGUF reader on the unquantised one, an implementation that is neither ours nor llama.cpp's."""
    reader, directory = made("plain")
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file="model.gguf", dtype=torch.float32)
    weights = model.state_dict()
    for name in reader.manifest.tensors:
        assert torch.equal(weights[name], reader.tensor(name).float()), name
