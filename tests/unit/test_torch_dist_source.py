"""Checkpoints of Megatron-LM read as Hugging Face models: every tensor that transformers wrote comes back."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_checkpoint import model_of, save_as_megatron_lm
from safetensors.torch import load_file

from megatron_edge.compose import compose
from megatron_edge.contracts import InputError
from megatron_edge.jobs.teacher import teacher_source
from megatron_edge.model.source import open_source
from tools.random_models import RANDOM_MODELS, make_random_model


def small(name: str) -> dict[str, Any]:
    return RANDOM_MODELS[name] | {"num_hidden_layers": 2}


@pytest.fixture(scope="module")
def saved(session: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny/hf and tiny/megatron, of a tied Llama."""
    root = tmp_path_factory.mktemp("tiny")
    save_as_megatron_lm(model_of(make_random_model(small("tiny"), root / "hf"), session), root / "megatron")
    return root


def assert_same(found: Any, tensors: dict[str, torch.Tensor]) -> None:
    assert set(found.names()) == {name for name in tensors if name in found.names()} and len(found.names()) > 10
    assert not set(tensors) - set(found.names()) - {"lm_head.weight"}
    for name in found.names():
        assert torch.equal(found.read(name), tensors[name]), name


@pytest.mark.parametrize("name", ["untied", "llama3", "qwen2", "qwen3", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("metadata", [{}, {"non_homogeneous_layers": True}, {"singleton_local_shards": True}])
def test_every_tensor_comes_back(session: Any, tmp_path: Path, name: str, metadata: dict[str, Any]) -> None:
    """Layers stacked and apart; gate and up rows together and apart."""
    hf = make_random_model(small(name), tmp_path / "hf")
    directory = save_as_megatron_lm(model_of(hf, session), tmp_path / "megatron", **metadata)
    assert_same(open_source(directory, hf), load_file(hf / "model.safetensors"))


def test_slices(saved: Path) -> None:
    found, tensors = open_source(saved / "megatron", saved / "hf"), load_file(saved / "hf" / "model.safetensors")
    for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        name = f"model.layers.1.{name}.weight"
        part = found.read(name, slice(40, 120), slice(3, 150))
        assert torch.equal(part, tensors[name][40:120, 3:150]), name
    assert torch.equal(found.read("model.norm.weight", slice(5, 9)), tensors["model.norm.weight"][5:9])


def test_padded_vocabulary_and_bf16(session: Any, tmp_path: Path) -> None:
    """Megatron-LM pads embeddings to a multiple of 128 x tensor parallelism; config.json has the tokens there are."""
    hf = make_random_model(small("untied") | {"vocab_size": 640}, tmp_path / "hf")
    directory = save_as_megatron_lm(model_of(hf, session, torch.bfloat16), tmp_path / "megatron")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"vocab_size": 600}))
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(hf / "model.safetensors").items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:600]
    found = open_source(directory, hf)
    assert found.dtype("lm_head.weight") is torch.bfloat16 and found.shape("lm_head.weight")[0] == 600
    assert_same(found, tensors)


def test_where_config_and_tokenizer_are_found(saved: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(saved / "megatron", tmp_path / "megatron"))
    with pytest.raises(InputError, match=r"model\.hf_config=None: .* says neither architecture nor tokenizer"):
        open_source(copy)
    with pytest.raises(InputError, match=r"model\.hf_config=.*: .* has its own config\.json"):
        open_source(saved / "hf", saved / "hf")
    shutil.copytree(saved / "hf", copy / "iter_0000007" / "hf")  # as Megatron-Bridge does on request
    found = open_source(copy)
    assert found.kind == "torch_dist" and found.path == copy / "iter_0000007"
    assert found.tokenizer().encode("a b") == open_source(saved / "hf").tokenizer().encode("a b")
    (tmp_path / "out").mkdir()
    found.save_tokenizer(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert found.fingerprint() == open_source(copy / "iter_0000007", saved / "hf").fingerprint()


def test_a_checkpoint_as_teacher(saved: Path) -> None:
    """It is described by a leaf of its own, which the messages name: model.hf_config is the student's."""
    student, checkpoint = saved / "hf", saved / "megatron"
    qad = ["train=qad", f"model.source={student}", f"train.teacher={checkpoint}"]
    found = teacher_source(compose([*qad, f"train.teacher_hf_config={student}"]), open_source(student))
    assert found is not None and found.kind == "torch_dist"
    assert_same(found, load_file(student / "model.safetensors"))
    with pytest.raises(InputError, match=r"train\.teacher=.*: train\.teacher_hf_config=None: .* says neither"):
        teacher_source(compose(qad), open_source(student))
    plain = ["train=qad", f"model.source={student}", f"train.teacher={student}", f"train.teacher_hf_config={student}"]
    with pytest.raises(InputError, match=r"train\.teacher_hf_config=.*: .* has its own config\.json"):
        teacher_source(compose(plain), open_source(student))


class Evil:
    def __reduce__(self) -> Any:
        return print, ("run",)


def test_a_pickle_that_names_anything_else_is_refused(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(saved / "megatron", tmp_path / "megatron"))
    (copy / "iter_0000007" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match=r"it names builtins\.print, which is no record"):
        open_source(copy, saved / "hf")
    assert "run" not in capsys.readouterr().out


def remove_a_file(directory: Path, hf: Path) -> None:
    next((directory / "iter_0000007").glob("*.distcp")).unlink()


def cut_a_file(directory: Path, hf: Path) -> None:
    for file in (directory / "iter_0000007").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:200])


def other_backend(directory: Path, hf: Path) -> None:
    (directory / "iter_0000007" / "metadata.json").write_text(json.dumps({"sharded_backend": "fsdp_dtensor"}))


def other_iteration(directory: Path, hf: Path) -> None:
    (directory / "latest_checkpointed_iteration.txt").write_text("9")


def pickled(directory: Path, hf: Path) -> None:
    (directory / "iter_0000007" / "mp_rank_00").mkdir()


def change_config(**changes: Any) -> Any:
    def change(directory: Path, hf: Path) -> None:
        config = json.loads((hf / "config.json").read_text())
        (hf / "config.json").write_text(json.dumps(config | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove_a_file, r"__0_\d\.distcp \(one of 1\) is missing"),
        (other_backend, "sharded_backend is 'fsdp_dtensor'; allowed: torch_dist"),
        (other_iteration, r"iter_0000009: no \.metadata"),
        (pickled, "mp_rank_.*: pickled weights"),
        (change_config(num_hidden_layers=1), "has more layers or experts"),
        (change_config(num_hidden_layers=3), r"needs \[192\] of it at \[2\]"),
        (change_config(intermediate_size=256), "linear_fc1.weight is .* needs"),
        (change_config(vocab_size=700), r"embedding.word_embeddings.weight is \[600, 192\]"),
        (change_config(tie_word_embeddings=False), "no output_layer.weight"),
        (change_config(architectures=["Qwen3ForCausalLM"], model_type="qwen3"), "no .*q_layernorm"),
    ],
)
def test_what_is_not_that_model_is_refused(saved: Path, tmp_path: Path, damage: Any, words: str) -> None:
    copy, hf = (Path(shutil.copytree(saved / name, tmp_path / name)) for name in ("megatron", "hf"))
    damage(copy, hf)
    with pytest.raises(InputError, match=words):
        open_source(copy, hf)


def test_a_truncated_file_is_named(saved: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(saved / "megatron", tmp_path / "megatron"))
    cut_a_file(copy, saved)
    with pytest.raises(InputError, match=r"embedding\.word_embeddings\.weight cannot be read"):
        open_source(copy, saved / "hf").read("model.embed_tokens.weight")


def test_tensors_that_would_be_another_model_are_refused(session: Any, tmp_path: Path) -> None:
    """Biases of Qwen2 under a Llama's config; the adapters or unfolded scales of others likewise."""
    hf = make_random_model(small("qwen2"), tmp_path / "hf")
    directory = save_as_megatron_lm(model_of(hf, session), tmp_path / "megatron")
    text = (hf / "config.json").read_text()
    (hf / "config.json").write_text(re.sub("Qwen2ForCausalLM", "LlamaForCausalLM", text).replace('"qwen2"', '"llama"'))
    with pytest.raises(InputError, match=r"linear_qkv\.bias \(of 1\) is unknown to its family"):
        open_source(directory, hf)
