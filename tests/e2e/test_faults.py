"""What is damaged is found and named: artifacts by verify, models and data before training, ranks by each other."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_edge.verify.report import Limits, verify_artifact
from tests.e2e.conftest import CHECKPOINT_EVERY_STEPS, Run
from tests.e2e.launches import REPOSITORY, Finished, checkpoints, flip_byte, hashes, metrics, refusal, run, run_all
from tests.e2e.tiny_model import CONTEXT_TOKENS, write_tiny_model

pytestmark = pytest.mark.timeout(300)

Damage = Callable[[Path], object]
SHARD = "model-00001-of-00001.safetensors"
REFUSAL_SECONDS = 60

# One tensor of each kind that an NVFP4 artifact holds.
KINDS = {
    "codes": "model.layers.1.mlp.down_proj.weight_codes",
    "block scales": "model.layers.2.self_attn.k_proj.weight_scale",
    "global scale": "model.layers.0.mlp.gate_proj.weight_global_scale",
    "norm": "model.layers.3.post_attention_layernorm.weight",
    "embedding": "model.embed_tokens.weight",
}


def tensor_bytes(shard: Path) -> dict[str, tuple[int, int]]:
    """Name -> first and last+1 byte of each tensor inside a safetensors file."""
    with shard.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))
    start = 8 + header_bytes
    places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: (start + begin, start + end) for name, (begin, end) in places.items()}


def flip_in(artifact: Path, tensor: str) -> None:
    begin, end = tensor_bytes(artifact / SHARD)[tensor]
    flip_byte(artifact / SHARD, (begin + end) // 2)


def drop(artifact: Path, tensor: str) -> None:
    tensors = load_file(artifact / SHARD)
    del tensors[tensor]
    save_file(tensors, artifact / SHARD, metadata={"format": "pt"})


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def consistent_change(artifact: Path) -> None:
    """Another code, and a manifest that agrees with it: whole, but not what was trained."""
    name = KINDS["codes"]
    flip_in(artifact, name)
    begin, end = tensor_bytes(artifact / SHARD)[name]
    manifest = json.loads((artifact / "manifest.json").read_text())
    data = (artifact / SHARD).read_bytes()[begin:end]
    manifest["tensors"][name]["sha256"] = hashlib.sha256(data).hexdigest()
    (artifact / "manifest.json").write_text(json.dumps(manifest))


# What is done to the artifact, and what verify must name. Every tensor's turn comes in the test after it.
DAMAGES: dict[str, tuple[Damage, str]] = {
    **{
        f"flipped byte in {kind}": (lambda path, name=name: flip_in(path, name), name)  # type: ignore[misc]
        for kind, name in KINDS.items()
        if kind in ("codes", "global scale")
    },
    "missing scale": (lambda path: drop(path, KINDS["block scales"]), KINDS["block scales"]),
    "missing tensor": (lambda path: drop(path, KINDS["norm"]), KINDS["norm"]),
    "truncated shard": (lambda path: truncate(path / SHARD), SHARD),
    "truncated config": (lambda path: truncate(path / "config.json"), "config.json"),
    "truncated manifest": (lambda path: truncate(path / "manifest.json"), "manifest.json"),
    "whole but not trained": (consistent_change, KINDS["codes"].removesuffix("_codes")),
}


def copy_of_run(source: Path, destination: Path) -> Path:
    """What verify reads of a run."""
    shutil.copytree(source / "artifact" / "canonical", destination / "artifact" / "canonical")
    shutil.copytree(source / "reference", destination / "reference")
    shutil.copy(source / "config.yaml", destination)
    return destination


@pytest.fixture(scope="module")
def verified(gateway_run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Finished]]:
    """launch/verify.py on a copy of the run for each damage."""
    scratch = tmp_path_factory.mktemp("damaged")
    copies = {}
    for number, (name, (damage, _)) in enumerate(DAMAGES.items()):
        copies[name] = copy_of_run(gateway_run.directory, scratch / str(number))
        damage(copies[name] / "artifact" / "canonical")
    done = run_all(
        {
            name: lambda copy=copy: run("verify", f"run_dir={copy}", directory=scratch)  # type: ignore[misc]
            for name, copy in copies.items()
        }
    )
    return {name: (copies[name], done[name]) for name in copies}


@pytest.mark.parametrize("name", DAMAGES)
def test_verify_names_the_damage(name: str, verified: dict[str, tuple[Path, Finished]]) -> None:
    copy, done = verified[name]
    named = DAMAGES[name][1]
    assert done.returncode == 3, done.stderr
    assert not done.noise, done.noise
    assert len(done.lines("failed: ")) == 1 and named in done.lines("failed: ")[0], done.stderr
    report = json.loads((copy / "verify.json").read_text())
    assert report["ok"] is False
    assert any(named in check["detail"] for check in report["checks"] if not check["ok"])


def test_one_flipped_byte_in_any_tensor_is_named(gateway_run: Run, tmp_path: Path) -> None:
    """The function that the launcher calls, on every tensor in turn: first, middle and last byte."""
    copy = copy_of_run(gateway_run.directory, tmp_path / "run")
    artifact = copy / "artifact" / "canonical"
    places = tensor_bytes(artifact / SHARD)
    assert len(places) == len(json.loads((artifact / "manifest.json").read_text())["tensors"]) > 80
    for name, (begin, end) in places.items():
        for offset in {begin, (begin + end) // 2, end - 1}:
            flip_byte(artifact / SHARD, offset)
            report = verify_artifact(artifact, copy / "reference", Limits())
            flip_byte(artifact / SHARD, offset)
            failed = [check.detail for check in report.checks if not check.ok]
            assert not report.ok and failed == [f"tensor {name}: sha256 differs from the manifest's"]


def test_verify_needs_neither_megatron_core_nor_modelopt(gateway_run: Run, tmp_path: Path) -> None:
    """launch/verify.py where importing either fails, on a whole artifact with its targets."""
    program = f"""
import importlib.abc, runpy, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron", "modelopt"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
sys.argv = ["launch/verify.py", "run_dir={gateway_run.directory}"]
try:
    runpy.run_path({str(REPOSITORY / "launch" / "verify.py")!r}, run_name="__main__")
except SystemExit as ended:
    assert ended.code == 0, ended.code
present = [name for name in sys.modules if name.split(".")[0] in ("megatron", "modelopt")]
assert not present, present
assert "transformers" in sys.modules and "compressed_tensors" in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((gateway_run.directory / "verify.json").read_text())["ok"] is True


def test_the_disk_of_one_rank_ends_all_in_agreement(gateway_run: Run, tmp_path: Path) -> None:
    """Rank 1 alone may write no file larger than 1 MiB: the first checkpoint with optimizer state fails there.

    Then the same command without that limit: what was saved before is intact, and the run ends as if nothing had been.
    """
    run_dir = tmp_path / "run"
    command = (*gateway_run.arguments, f"run_dir={run_dir}")
    limited = ("bash", "-c", 'if [ "$RANK" = 1 ]; then ulimit -f 1024; fi; exec "$0" "$@"')
    done = run("qat", *command, directory=tmp_path, processes=2, wrapper=limited)
    assert done.returncode == 1 and done.seconds < 120
    (said,) = done.lines("disk: ")
    saved = run_dir / "checkpoints" / f"step_{CHECKPOINT_EVERY_STEPS:08d}"
    reason = "rank 1: [Errno 27] File too large; the checkpoints before it are untouched"
    assert said.startswith(f"disk: {saved} cannot be written: {reason}")
    assert done.rank_codes == [6, 6], "rank 0 has written its part, and agrees"
    assert not [line for line in done.stderr.splitlines() if line.startswith("[rank ")]
    assert checkpoints(run_dir) == [0] and not list((run_dir / "checkpoints").glob(".saving-*")), (
        "what was there before"
    )
    assert [record["step"] for record in metrics(run_dir)] == list(range(1, CHECKPOINT_EVERY_STEPS + 1))

    done = run("qat", *command, directory=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert f"resuming from {run_dir}/checkpoints/step_00000000" in done.stderr
    assert hashes(run_dir / "artifact") == hashes(gateway_run.directory / "artifact")


def changed_config(directory: Path, **fields: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **fields}))


def pickle_weights(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


# What is done to a model directory, more arguments, and what the refusal must say.
BAD_MODELS: dict[str, tuple[Damage, list[str], list[str]]] = {
    "no weights": (lambda path: (path / "model.safetensors").unlink(), [], ["no weights", "model.safetensors"]),
    "truncated": (lambda path: truncate(path / "model.safetensors"), [], ["model.safetensors", "truncated"]),
    "architecture": (
        lambda path: changed_config(path, architectures=["MambaForCausalLM"], model_type="mamba"),
        [],
        ["architectures is ['MambaForCausalLM']", "LlamaForCausalLM"],
    ),
    "pickled": (pickle_weights, [], ["pytorch_model.bin", "pickled", "safetensors"]),
    "too long": (
        lambda path: None,
        [f"train.seq_length_tokens={CONTEXT_TOKENS + 1}"],
        [f"train.seq_length_tokens={CONTEXT_TOKENS + 1}", f"max_position_embeddings={CONTEXT_TOKENS}"],
    ),
    "pipeline": (
        lambda path: changed_config(path, num_hidden_layers=3),
        [],
        ["model.layers.3", "allowed"],
    ),
}


@pytest.fixture(scope="module")
def bad_models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    scratch = tmp_path_factory.mktemp("bad_models")
    launches = {}
    for number, (name, (damage, arguments, _)) in enumerate(BAD_MODELS.items()):
        model = scratch / str(number)
        shutil.copytree(tiny_model, model)
        damage(model)
        command = (f"model.source={model}", f"run_dir={scratch / 'run'}", *arguments)
        launches[name] = lambda command=command: run("qat", *command, directory=scratch)  # type: ignore[misc]
    done = run_all(launches)
    assert not (scratch / "run").exists(), "a refused model leaves nothing behind"
    return done


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_bad_model_is_refused(name: str, bad_models: dict[str, Finished]) -> None:
    done, words = bad_models[name], BAD_MODELS[name][2]
    line = refusal(done)
    assert done.returncode == 2
    assert all(word in line for word in words), line
    assert not done.noise, done.noise
    assert done.seconds < REFUSAL_SECONDS


BAD_DATA: dict[str, tuple[bytes, list[str]]] = {
    "empty.txt": (b"", ["is empty", "0 bytes"]),
    "binary.txt": (bytes(range(256)) * 64, ["binary.txt", "allowed: UTF-8 text"]),
    "torn.jsonl": (b'{"text": "a"}\n{"text": ', ["torn.jsonl, line 2", "not JSON"]),
    "short.txt": (b"One.\n\n\nTwo.\n", ["less than one window", "allowed"]),
}


@pytest.fixture(scope="module")
def bad_data(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    scratch = tmp_path_factory.mktemp("bad_data")
    launches = {}
    for name, (content, _) in BAD_DATA.items():
        (scratch / name).write_bytes(content)
        command = (f"model.source={tiny_model}", f"data.train={scratch / name}", f"run_dir={scratch / 'runs' / name}")
        launches[name] = lambda command=command: run("qat", *command, directory=scratch)  # type: ignore[misc]
    done = run_all(launches)
    assert not list(scratch.glob("runs/*/config.yaml")), "the directory may be used again with other data"
    return done


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_are_refused(name: str, bad_data: dict[str, Finished]) -> None:
    done, words = bad_data[name], BAD_DATA[name][1]
    line = refusal(done)
    assert done.returncode == 2
    assert all(word in line for word in words), line
    assert "gloo" not in done.stderr, "before any process group"
    assert done.seconds < REFUSAL_SECONDS


@pytest.mark.parametrize(
    ("sizes", "arguments", "words"),
    [
        (
            {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 96},
            ["quant=none"],
            ["parallel.tensor=2", "num_attention_heads=3", "allowed for this model: 1"],
        ),
        (
            {"num_hidden_layers": 1},
            ["quant=int4"],
            ["parallel.tensor=2", "o_proj", "128/2 = 64", "group of 128"],
        ),
    ],
)
def test_a_layout_that_the_model_does_not_allow(
    sizes: dict[str, int], arguments: list[str], words: list[str], tmp_path: Path
) -> None:
    """Two ranks agree on the refusal; torchrun itself exits with 1."""
    model = write_tiny_model(tmp_path / "model", **sizes)
    command = ("parallel.tensor=2", *arguments, f"model.source={model}", "run_dir=run")
    done = run("qat", *command, directory=tmp_path, processes=2)
    line = refusal(done)
    assert done.returncode == 1 and done.rank_codes == [2, 2]
    assert all(word in line for word in words), line
    assert "gloo" not in done.stderr, "before any process group"
    assert done.seconds < REFUSAL_SECONDS
    assert not (tmp_path / "run").exists()
