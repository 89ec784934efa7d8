"""Quantised embeddings and output layers: what they compute and learn, which there are, and what they cost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_config import SMOLLM2
from tiny_artifact import make_tiny
from tiny_megatron import hf_config_of, megatron_twin, random_batches, random_llama
from torch import Tensor, nn

from megatron_edge import memory
from megatron_edge.artifact import formats
from megatron_edge.artifact.store import INDEX_FILE, ArtifactReader, ArtifactWriter, ShardReader
from megatron_edge.artifact.tables import tables_of
from megatron_edge.checks import check_config, check_model_dims
from megatron_edge.compose import compose
from megatron_edge.contracts import InputError, LinearEntry, QuantPlan
from megatron_edge.export import targets
from megatron_edge.model.build import named_shards
from megatron_edge.quantize import apply
from megatron_edge.quantize.policy import make_plan
from megatron_edge.train import step
from megatron_edge.verify import parity, runtimes
from megatron_edge.verify.quality import Windows, load_model
from megatron_edge.verify.references import References

EMBEDDING = "model.embed_tokens"
FORMATS = ("int8", "fp8", "int4")
TRAIN = compose(["train.learning_rate=0.01", "train.steps=2"]).train


def quantised(llama: Any, session: Any, *arguments: str) -> tuple[nn.ModuleList, QuantPlan]:
    """The twin of `llama` with calibrated tables and nothing else quantised."""
    config = compose(["quant=none", "kv=none", *arguments])
    plan = make_plan(config.quant, config.kv, hf_config_of(llama))
    model = megatron_twin(llama, session)
    apply.calibrate(model, plan, apply.insert_quantizers(model, plan), lambda _: None)
    return model, plan  # type: ignore[return-value]


def stored_values(plan: QuantPlan, module: str, weight: Tensor) -> Tensor:
    """What the artifact would give back: encoded and decoded, with maxima taken here."""
    rule = next(rule for rule in plan.rules if rule.pattern == module)
    amax = formats.snap_amax(rule.weight, formats.weight_amax(rule.weight, weight, rule.group_size))
    return formats.decode(formats.encode(rule.weight, weight, amax, rule.group_size), weight.dtype)


def losses_and_gradients(model: nn.ModuleList, session: Any) -> tuple[Tensor | None, dict[str, Tensor]]:
    nll = step.token_losses(model, random_batches(), session)
    wrapped, optimizer = step.make_trainable(model, TRAIN, torch.float32)
    step.learning_rate_schedule(optimizer, TRAIN).step(1)
    step.train_step(wrapped, optimizer, random_batches(), session)
    return nll, {name: param.main_grad.clone() for name, param in named_shards(wrapped).items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_table_computes_with_its_stored_values_and_learns_straight_through(
    session: Any, fmt: str, tied: bool
) -> None:
    """Losses and gradients bit for bit those of a plain model that holds the decoded values."""
    llama = random_llama(tie_word_embeddings=tied)
    model, plan = quantised(llama, session, f"quant.embedding={fmt}")
    expected = ["embedding.word_embeddings"] + ([] if tied else ["output_layer"])
    assert [rule.pattern for rule in plan.rules] == expected
    assert sorted(apply.enabled_quantizers(model)) == sorted(f"{name}.weight_quantizer" for name in expected)
    plain = megatron_twin(llama, session)
    for name in expected:
        weight = named_shards(plain)[f"{name}.weight"].data
        values = stored_values(plan, name, weight)
        assert not torch.equal(values, weight)
        weight.copy_(values)
    nll, gradients = losses_and_gradients(model, session)
    plain_nll, plain_gradients = losses_and_gradients(plain, session)  # type: ignore[arg-type]
    assert nll is not None and plain_nll is not None and torch.equal(nll, plain_nll)
    assert all(torch.equal(gradients[name], plain_gradients[name]) for name in plain_gradients)


def test_embedding_and_output_layer_have_formats_of_their_own(session: Any) -> None:
    model, plan = quantised(random_llama(tie_word_embeddings=False), session, "quant.head=fp8")
    assert list(apply.enabled_quantizers(model)) == ["output_layer.weight_quantizer"]
    assert (plan.embedding, plan.head) == ("bf16", "fp8")


def test_a_tied_table_is_quantised_once_a_step(session: Any) -> None:
    """Lookup and output layer share one quantizer, and inside of a step its one result."""
    model, _ = quantised(random_llama(), session, "quant.embedding=int4")
    chunk: Any = model[0]
    quantizer = chunk.embedding.word_embeddings.weight_quantizer
    assert chunk.output_layer.weight_quantizer is quantizer
    with apply.constant_weights(model):
        step.run_forward(model, random_batches(1), session)
        kept = quantizer._kept
        step.run_forward(model, random_batches(1), session)
        assert quantizer._kept is kept is not None


def test_a_table_keeps_its_maxima(session: Any) -> None:
    """Whatever finds the scales of linear layers."""
    llama = random_llama(tie_word_embeddings=False)
    model, _ = quantised(
        llama, session, "quant=int4", "quant.embedding=int4", "quant.group_size=32", "quant.calibration=mse"
    )
    weights = named_shards(model)
    kept = {}
    for name, quantizer in apply.enabled_quantizers(model).items():
        amax = formats.weight_amax("int4", weights[name.removesuffix("_quantizer")].detach(), 32)
        kept[name] = torch.equal(quantizer._amax.view_as(amax), formats.snap_amax("int4", amax))
    assert {name for name, same in kept.items() if same} == {
        "embedding.word_embeddings.weight_quantizer",
        "output_layer.weight_quantizer",
    }


def test_the_tables_of_a_model() -> None:
    """576 values a row: groups of 128 become 64, as those of a linear layer."""
    quant = compose(["quant=nvfp4_w4a16", "quant.embedding=int4", "quant.embedding_group_size=128"]).quant
    (table,) = tables_of(quant, SMOLLM2)
    assert (table.name, table.shape, table.format) == ("model.embed_tokens", (49152, 576), "int4")
    assert table.group_size == formats.effective_group_size(576, 128) == 64
    untied = {**SMOLLM2, "tie_word_embeddings": False}
    assert [(t.name, t.format, t.group_size) for t in tables_of(quant, untied)] == [
        ("model.embed_tokens", "int4", 64),
        ("lm_head", "int4", 64),
    ]
    left = compose(["quant.embedding=fp8", "quant.exclude=[output_*]"]).quant
    assert [table.format for table in tables_of(left, untied)] == ["fp8", "bf16"]


def test_an_impossible_table_is_refused() -> None:
    with pytest.raises(InputError, match=r"quant.head=int4: .* is its embedding; allowed: bf16"):
        tables_of(compose(["quant.head=int4"]).quant, SMOLLM2)
    odd = {**SMOLLM2, "hidden_size": 72}
    with pytest.raises(InputError, match=r"quant.embedding=int4: .*embedding_group_size=32 .*hidden_size=72"):
        tables_of(compose(["quant.embedding=int4"]).quant, odd)
    wide = compose(["device=x86_laptop", "quant.embedding=int4", "quant.embedding_group_size=192"])
    with pytest.raises(
        InputError, match=r"quant.embedding_group_size=192: .* groups of 192, .* allowed: \[32, 64, 128\]"
    ):
        check_model_dims(wide, SMOLLM2)
    on_board = compose(["+scenario=gateway", "quant=none", "quant.embedding=int8", "kv=none"])
    with pytest.raises(InputError, match=r"quant.embedding=int8.*llama.cpp packs 32 values"):
        check_model_dims(on_board, odd)
    with pytest.raises(InputError, match=r"quant.embedding='int8': allowed is bf16: device=jetson_thor .* no other"):
        check_config(compose(["+scenario=gateway_thor", "quant.embedding=int8"]))


@pytest.mark.parametrize(("fmt", "per_row"), [("bf16", 1152), ("int8", 576 + 2), ("fp8", 576), ("int4", 288 + 36)])
def test_bytes_of_a_table(fmt: str, per_row: int) -> None:
    """SmolLM2's: codes, and a fp16 scale per row (int8) or per 32 of them (int4)."""
    run = compose(["quant=int4", f"quant.embedding={fmt}", "train.precision=bf16"])
    plain = compose(["quant=int4", "train.precision=bf16"])
    saved = memory.weights_bytes(plain, SMOLLM2) - memory.weights_bytes(run, SMOLLM2)
    assert saved == 49152 * (1152 - per_row) - (4 if fmt == "fp8" else 0)


def with_table(plain: ArtifactReader, directory: Path, fmt: str) -> ArtifactReader:
    """The same artifact with its embedding in `fmt`."""
    manifest, table = plain.manifest, plain.tensor(f"{EMBEDDING}.weight")
    group = 64 if fmt == "int4" else 0
    amax = formats.snap_amax(fmt, formats.weight_amax(fmt, table, group))
    encoded = formats.encode(fmt, table, amax, group)
    names = {"codes": f"{EMBEDDING}.weight_codes", "scale": f"{EMBEDDING}.weight_scale"}
    with ArtifactWriter(directory, 10**9) as writer:
        for name in set(plain.names()) - {f"{EMBEDDING}.weight"}:
            writer.add(name, plain.tensor(name), manifest.tensors[name].format)
        writer.add(names["codes"], encoded.codes, fmt)
        writer.add(names["scale"], encoded.scale, "scale")
        for file in set(manifest.files) - {INDEX_FILE}:
            shutil.copyfile(plain.directory / file, writer.side_files / file)
        entry = LinearEntry(fmt, "none", group, encoded.shape, names)
        fields = {key: value for key, value in vars(manifest).items() if key not in ("schema", "tensors", "files")}
        writer.finish(**{**fields, "linears": {**manifest.linears, EMBEDDING: entry}})
    return ArtifactReader(directory)


@pytest.mark.parametrize(
    ("recipe", "fmt", "target"),
    [("int4", "int8", "compressed_tensors"), ("nvfp4", "int4", "modelopt"), ("none", "fp8", "hf")],
)
def test_targets_have_the_values_of_a_table_and_say_so(tmp_path: Path, recipe: str, fmt: str, target: str) -> None:
    """Of an fp32 model: the artifact has them exactly, a target rounded to bf16; its reader is compared with those."""
    tiny = make_tiny(tmp_path, recipe, "float32")
    plain = ArtifactReader(tiny.artifact)
    reader = with_table(plain, tmp_path / "tables" / "canonical", fmt)
    assert reader.check() == [] and list(reader.manifest.tables) == [EMBEDDING]
    assert set(reader.manifest.layer_linears) == set(plain.manifest.linears)
    values = reader.dequantized(EMBEDDING, torch.float32)
    assert torch.equal(load_model(reader, torch.float32).get_input_embeddings().weight, values)
    report = targets.convert(target, reader, tmp_path / "tables" / target)
    assert any(f"the packed {fmt} codes of {EMBEDDING}" in line and "bfloat16" in line for line in report.dropped)
    stored = ShardReader(Path(report.directory)).tensor(f"{EMBEDDING}.weight")
    assert stored.dtype is torch.bfloat16 and torch.equal(stored, values.bfloat16())
    assert not torch.equal(stored.float(), values), "eight significant bits do not hold them"
    text = parity.read_reference(tiny.reference).windows
    found = runtimes.check_target(References(reader, Windows(*vars(text).values())), target, Path(report.directory))
    assert found.checks and all(check.ok for check in found.checks), found.checks
    spoiled = {name: tensor.clone() for name, tensor in _tensors(Path(report.directory)).items()}
    spoiled[f"{EMBEDDING}.weight"][3, 5] *= 1.5
    _replace(Path(report.directory), spoiled)
    found = runtimes.check_target(References(reader, Windows(*vars(text).values())), target, Path(report.directory))
    assert not all(check.ok for check in found.checks)


def _tensors(directory: Path) -> dict[str, Tensor]:
    (file,) = directory.glob("*.safetensors")
    return load_file(file)


def _replace(directory: Path, tensors: dict[str, Tensor]) -> None:
    (file,) = directory.glob("*.safetensors")
    save_file(tensors, file, metadata={"format": "pt"})
