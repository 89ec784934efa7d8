"""The whole job through launch/qat.py: what it leaves on disk, what it says, and who can read the result."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.conftest import CHECKPOINT_EVERY_STEPS, SMALL, STEPS, Run
from tests.e2e.launches import checkpoints, hashes, metrics, run
from tests.unit.tiny_tokenizer import tiny_tokenizer
from tools.random_models import RANDOM_MODELS, make_random_model

EMBEDDING = "model.embed_tokens.weight"

pytestmark = pytest.mark.timeout(300)
TOPICS = sorted(topics)[:12]


def reference_facts(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "reference" / "reference.json").read_text())


def assert_complete(run_dir: Path, steps: int, targets: set[str]) -> None:
    """Everything that a run directory is to hold, and a verify.json in which nothing failed."""
    assert {"config.yaml", "plan.json", "metrics.jsonl", "checkpoints", "reference", "artifact", "verify.json"} <= {
        path.name for path in run_dir.iterdir()
    }
    assert [record["step"] for record in metrics(run_dir)] == list(range(1, steps + 1))
    assert {path.name for path in (run_dir / "artifact").iterdir()} == {"canonical", *targets}
    report = json.loads((run_dir / "verify.json").read_text())
    assert report["ok"] is True and report["checks"] and all(check["ok"] for check in report["checks"])
    assert {f"target {target}" for target in targets} <= {check["name"] for check in report["checks"]}
    index = json.loads((run_dir / "artifact" / "canonical" / "model.safetensors.index.json").read_text())
    manifest = json.loads((run_dir / "artifact" / "canonical" / "manifest.json").read_text())
    assert set(index["weight_map"]) == set(manifest["tensors"])
    for name in {"canonical", *targets} - {"gguf"}:  # which has it inside of the file: verify compares ids
        directory = run_dir / "artifact" / name
        tokenizer = AutoTokenizer.from_pretrained(directory)
        assert tokenizer.chat_template and tokenizer.decode(tokenizer("a byte").input_ids) == "a byte"


def trained_weights(run_dir: Path) -> dict[tuple[str, str], str]:
    """(tensor, rows and columns) -> sha256 of the values that the trained model computed with, in its data type."""
    return {
        (entry["tensor"], json.dumps([entry["rows"], entry["cols"]])): entry["dequantized_sha256"]
        for entry in reference_facts(run_dir)["weights"]
    }


def assert_weights_are_the_trained_ones(
    model: torch.nn.Module, run_dir: Path, but: frozenset[str] = frozenset()
) -> None:
    """Every slice that a training rank held, against the same slice of `model` in fp32, byte for byte."""
    expected = {key: sha256 for key, sha256 in trained_weights(run_dir).items() if key[0] not in but}
    weights = {name: weight for name, weight in model.named_parameters() if name.endswith(".weight")}
    assert {name for name, _ in expected} == set(weights) - but
    for (name, place), sha256 in expected.items():
        rows, cols = json.loads(place)
        part = weights[name].detach().float()[slice(*rows)]
        part = part if cols is None else part[:, slice(*cols)]
        assert hashlib.sha256(part.contiguous().numpy().tobytes()).hexdigest() == sha256, f"{name} {place}"


def documents_of(reference: dict[str, torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(token ids [n], the trained model's logits [n, vocabulary]) of each document of the windows with logits."""
    for window, logits in enumerate(reference["logits"]):
        for document in reference["documents"][window].unique():
            chosen = reference["documents"][window] == document
            yield reference["tokens"][window][chosen], logits[chosen]


@torch.no_grad()
def assert_logits_are_the_trained_ones(model: torch.nn.Module, run_dir: Path) -> None:
    """transformers on each document alone, without packing, mask or positions of ours, in fp32.

    The noise floor is transformers itself in fp32 against fp64; two sums in different order differ by at most 3 of it.
    """
    reference = load_file(run_dir / "reference" / "reference.safetensors")
    difference = floor = 0.0
    documents = list(documents_of(reference))
    single = [model.float()(tokens[None]).logits[0] for tokens, _ in documents]
    double = [model.double()(tokens[None]).logits[0] for tokens, _ in documents]
    for (_, trained), fp32, fp64 in zip(documents, single, double, strict=True):
        difference = max(difference, float((fp32 - trained).abs().max()))
        floor = max(floor, float((fp32 - fp64).abs().max()))
    print(f"largest logit difference {difference:.2e}, noise floor {floor:.2e} (transformers, fp32 against fp64)")
    assert 0 < floor < 1e-4 and difference <= 3 * floor


def test_gateway_on_two_pipeline_stages(gateway_run: Run) -> None:
    """The first command of the README, on a tiny model and the default corpus."""
    run_dir, done = gateway_run.directory, gateway_run.done
    assert not done.noise, done.noise
    assert not done.stdout
    assert_complete(run_dir, STEPS, {"modelopt", "compressed_tensors", "gguf"})
    assert checkpoints(run_dir) == [STEPS - CHECKPOINT_EVERY_STEPS, STEPS], "keeps the last two"
    facts = reference_facts(run_dir)
    assert facts["kv"]["format"] == "int8" and set(facts["losses"]) == {"fp32", "ptq", "trained"}
    assert facts["losses"]["trained"] < facts["losses"]["ptq"], "it learns"
    for shown in ("as it came", "calibrated (PTQ)", "trained", "artifact", "next: python launch/evaluate.py"):
        assert shown in done.stderr
    assert "perplexity" in done.stderr and "step 12/12" in done.stderr


def test_gateway_target_is_read_by_transformers(gateway_run: Run) -> None:
    directory = gateway_run.directory / "artifact" / "compressed_tensors"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model.hf_quantizer.compressor.decompress_model(model)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert config["format"] == "nvfp4-pack-quantized"
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_export_and_evaluate_alone_on_a_run(gateway_run: Run, tmp_path: Path) -> None:
    """One process exports what the job on two stages did, byte for byte.
    Evaluate gives the losses that the job found, and the same answers for the
    artifact and, on two stages, the checkpoint; against the model as it came, and against the artifact."""
    artifact = gateway_run.directory / "artifact"
    (tmp_path / "run").mkdir()
    shutil.copy(gateway_run.directory / "config.yaml", tmp_path / "run")
    shutil.copytree(gateway_run.directory / "checkpoints", tmp_path / "run" / "checkpoints")
    done = run("export", f"run_dir={tmp_path / 'run'}", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not done.noise, done.noise
    assert hashes(tmp_path / "run" / "artifact") == hashes(artifact)
    shutil.copytree(artifact / "canonical", tmp_path / "canonical")  # evaluation.json is written beside it
    rows = [{"question": f"The {name} is", "choices": [topics[name][:30], name, "no"], "answer": 1} for name in TOPICS]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = (f"run_dir={gateway_run.directory}", f"eval.tasks=[{tmp_path / 'own.jsonl'}]", "eval.limit=8")
    done = run("evaluate", f"artifact={tmp_path / 'canonical'}", *shared, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not done.noise, done.noise
    verified = json.loads((gateway_run.directory / "verify.json").read_text())
    losses = verified["losses_nats_per_token"]
    limit = next(check["limit"] for check in verified["checks"] if check["name"] == "loss")  # 3 times its noise floor
    assert f"{losses['artifact']:.4f} nats/token" in done.stderr
    of_artifact = json.loads((tmp_path / "evaluation.json").read_text())
    assert of_artifact["text"]["baseline_nats_per_token"] == pytest.approx(losses["fp32"], abs=limit)
    assert of_artifact["text"]["verdict"].startswith("better: -"), "trained against as it came"
    assert {task["by"] for task in of_artifact["tasks"]} == {"whole", "per character"}
    assert all(task["questions"] == 8 and task["of"] == 12 and task["verdict"] for task in of_artifact["tasks"])
    arguments = ("parallel.pipeline=2", f"eval.baseline={tmp_path / 'canonical'}")
    done = run("evaluate", *shared, *arguments, directory=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert f"{losses['trained']:.4f} nats/token" in done.stderr
    of_checkpoint = json.loads((gateway_run.directory / "evaluation.json").read_text())
    assert of_checkpoint["text"]["nats_per_token"] == pytest.approx(of_artifact["text"]["nats_per_token"], abs=limit)
    assert [t["accuracy"] for t in of_checkpoint["tasks"]] == [t["accuracy"] for t in of_artifact["tasks"]]
    assert [t["baseline"] for t in of_checkpoint["tasks"]] == [t["accuracy"] for t in of_artifact["tasks"]]


@pytest.mark.long
def test_the_next_command_that_is_printed(gateway_run: Run, tmp_path: Path) -> None:
    """The last line of a job, with a text of one's own."""
    command = next(line for line in gateway_run.done.stderr.splitlines() if "next: python launch/" in line)
    job, *arguments = command.split("launch/")[1].split()
    (tmp_path / "own.txt").write_text(topics["assignment"])
    arguments = [argument.replace("YOUR_TEXT", str(tmp_path / "own.txt")) for argument in arguments]
    done = run(job.removesuffix(".py"), *arguments, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nats/token, perplexity" in done.stderr


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    with path.open("w") as lines:
        for name in sorted(topics)[:60]:
            question = {"role": "user", "content": f"What does the documentation say about {name}?"}
            answer = {"role": "assistant", "content": topics[name][:600]}
            lines.write(json.dumps({"messages": [question, answer]}) + "\n")
    return path


@pytest.fixture(scope="module")
def vehicle_run(tiny_model: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("vehicle")
    arguments = (
        "+scenario=vehicle",
        f"model.source={tiny_model}",
        f"data.train={conversations}",
        "train.steps=4",
        "quant.calib_size=16",
        "quant.embedding=int4",
        *SMALL,
    )
    done = run("qat", *arguments, f"run_dir={directory / 'run'}", directory=directory, processes=2)
    assert done.returncode == 0, done.stderr
    return Run(directory / "run", done, arguments)


def test_vehicle_on_two_replicas_and_conversations(vehicle_run: Run, conversations: Path) -> None:
    run_dir, done = vehicle_run.directory, vehicle_run.done
    assert not done.noise, done.noise
    assert_complete(run_dir, 4, {"modelopt", "compressed_tensors", "gguf"})
    assert "DP2" in done.stderr
    reference = load_file(run_dir / "reference" / "reference.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "artifact" / "canonical")
    predicted = reference["tokens"].roll(-1, dims=1)[reference["loss_mask"]]
    counted = tokenizer.decode(predicted)
    assert "What does the documentation say" not in counted, "the loss is on what the assistant says"
    assert any(topics[name][20:50] in counted for name in sorted(topics)[:60])


def test_vehicle_target_is_read_by_transformers(vehicle_run: Run) -> None:
    """transformers + compressed-tensors decode the int4 target to exactly what the trained model computed with."""
    directory = vehicle_run.directory / "artifact" / "compressed_tensors"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.hf_quantizer.compressor.decompress_model(model)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized" and config["config_groups"]["group_0"]["weights"]["group_size"] == 128
    assert_weights_are_the_trained_ones(model, vehicle_run.directory, but=frozenset({EMBEDDING}))


def test_vehicle_embedding_is_stored_in_int4(vehicle_run: Run) -> None:
    """Codes and scales decoded by hand are what both replicas computed with; the target has those values in bf16."""
    tensors: dict[str, torch.Tensor] = {}
    for file in (vehicle_run.directory / "artifact" / "canonical").glob("*.safetensors"):
        tensors |= load_file(file)
    codes, scale = tensors["model.embed_tokens.weight_codes"], tensors["model.embed_tokens.weight_scale"]
    assert EMBEDDING not in tensors and (codes.dtype, scale.dtype) == (torch.uint8, torch.float16)
    levels = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1).float() - 8
    values = levels * scale.float().repeat_interleave(32, dim=1)
    trained = [sha256 for (name, _), sha256 in trained_weights(vehicle_run.directory).items() if name == EMBEDDING]
    assert trained == [hashlib.sha256(values.numpy().tobytes()).hexdigest()]
    stored: dict[str, torch.Tensor] = {}
    for file in (vehicle_run.directory / "artifact" / "compressed_tensors").glob("*.safetensors"):
        stored |= load_file(file)
    assert torch.equal(stored[EMBEDDING], values.bfloat16())
    assert "does not carry: the packed int4 codes of model.embed_tokens" in vehicle_run.done.stderr


def test_plain_fine_tuning_on_parquet(tiny_model: Path, tmp_path: Path) -> None:
    """quant=none in one process: a BF16 model that transformers loads, with the trained model's logits."""
    texts = {"body": [topics[name] for name in sorted(topics)[:40]]}
    pyarrow.parquet.write_table(pyarrow.table(texts), tmp_path / "topics.parquet")
    arguments = ("quant=none", f"model.source={tiny_model}", "train.steps=4", "run_dir=run", *SMALL)
    done = run("qat", *arguments, "data.train=topics.parquet", "data.text_key=body", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not done.noise, done.noise
    assert_complete(tmp_path / "run", 4, {"hf"})
    directory = tmp_path / "run" / "artifact" / "hf"
    config = json.loads((directory / "config.json").read_text())
    assert "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert_weights_are_the_trained_ones(model, tmp_path / "run")
    assert_logits_are_the_trained_ones(model, tmp_path / "run")


def test_experts_spread_by_themselves(tmp_path: Path) -> None:
    """A mixture of experts, parallel=auto: experts on both ranks, the log says why, and the artifact is the model."""
    source = make_random_model(RANDOM_MODELS["qwen3_moe"], tmp_path / "model")
    tiny_tokenizer().save_pretrained(source)
    arguments = ("parallel=auto", "quant=nvfp4", "kv=fp8", f"model.source={source}", f"run_dir={tmp_path / 'run'}")
    arguments += ("quant.embedding=int8", "quant.head=int4")
    small = ("train.steps=2", "train.seq_length_tokens=64", "data.eval_tokens=256", "quant.calib_size=8")
    done = run("qat", *arguments, *small, "export.max_loss_rise=1", directory=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert not done.noise, done.noise
    assert "parallel=auto: TP1 PP1 EP2 DP2 on 2 processes: " in done.stderr
    assert_complete(tmp_path / "run", 2, {"modelopt", "compressed_tensors"})
    manifest = json.loads((tmp_path / "run" / "artifact" / "canonical" / "manifest.json").read_text())
    assert sum(".experts." in name for name in manifest["linears"]) == 4 * 8 * 3, "layers x experts x gate, up, down"
    tables = {name: manifest["linears"][name]["format"] for name in ("model.embed_tokens", "lm_head")}
    assert tables == {"model.embed_tokens": "int8", "lm_head": "int4"}, "not tied: one table each"
    report = json.loads((tmp_path / "run" / "quant_report.json").read_text())
    assert isinstance(report["experts_without_tokens"], list)
