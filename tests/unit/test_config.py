"""conf/ composes into typed records, strictly; identity and hash; checks across fields."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from megatron_edge import checks, compose, config, devices
from megatron_edge.artifact import formats
from megatron_edge.contracts import InputError, ParallelPlan

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def refusal(*arguments: str) -> str:
    with pytest.raises(InputError) as caught:
        checks.check_config(compose.compose(arguments))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("scenario", compose.options("scenario"))
def test_every_scenario_composes_and_passes_its_own_checks(scenario: str) -> None:
    composed = compose.compose([f"+scenario={scenario}"])
    checks.check_config(composed)
    assert composed.scenario == scenario
    assert re.fullmatch(rf"runs/{scenario}-[0-9a-f]{{10}}", composed.run_dir)
    overlay = yaml.safe_load((compose.CONF_DIR / "scenario" / f"{scenario}.yaml").read_text())
    assert any("override /device" in choice for choice in overlay["defaults"]), "a scenario names its device"


@pytest.mark.parametrize("group", [*config.GROUPS])
def test_every_option_composes(group: str) -> None:
    for option in compose.options(group):
        extra = ["model.source=/somewhere"] if (group, option) == ("model", "custom") else []
        assert getattr(compose.compose([f"{group}={option}", *extra]), group) is not None


def test_scenarios_are_those_promised() -> None:
    gateway, thor, vehicle, sm89 = (
        compose.compose([f"+scenario={name}"]) for name in ("gateway", "gateway_thor", "vehicle", "vehicle_sm89")
    )
    assert (gateway.quant.weight, gateway.quant.activation, gateway.kv.format) == ("nvfp4", "none", "int8")
    assert (gateway.device.runtime, gateway.device.memory_bytes) == ("llama.cpp", 2 * 1024**3)
    assert gateway.export.max_batch_size == 1
    assert (thor.quant.weight, thor.quant.activation, thor.kv.format) == ("nvfp4", "nvfp4", "fp8")
    for run, kv in ((vehicle, "int8"), (sm89, "fp8")):
        assert (run.quant.weight, run.quant.activation, run.quant.algorithm) == ("int4", "none", "awq")
        assert (run.quant.group_size, run.quant.calib_size, run.kv.format) == (128, 256, kv)
        assert (run.export.max_batch_size, run.export.max_seq_len) == (4, 512)
    assert (vehicle.device.power_w, vehicle.device.memory_bytes) == (10, 8 * 1024**3)


def test_every_preset_of_the_device_group_names_formats_that_exist() -> None:
    for name, device in devices.presets("device").items():
        assert set(device["weight_formats"]) <= {"none", *formats.WEIGHT_FORMATS}, name
        assert set(device["activation_formats"]) <= {"none", *formats.ACTIVATION_FORMATS}, name
        assert set(device["kv_formats"]) <= {"none", *formats.KV_FORMATS}, name
        assert device["name"] == name


def test_recipes_of_eight_bits_and_of_four_under_eight() -> None:
    w4a8, smooth = compose.compose(["quant=w4a8_awq", "kv=nvfp4"]), compose.compose(["quant=int8_sq"])
    assert (w4a8.quant.weight, w4a8.quant.activation, w4a8.quant.algorithm) == ("int4", "fp8", "awq")
    assert (w4a8.quant.group_size, w4a8.kv.format, w4a8.export.targets) == (128, "nvfp4", ["compressed_tensors"])
    assert (smooth.quant.weight, smooth.quant.activation, smooth.quant.algorithm) == ("int8", "int8", "smoothquant")
    assert smooth.export.targets == ["compressed_tensors"]
    q8_0 = ["quant=int8_sq", "quant.activation=none", "quant.algorithm=max", "device=board_2gb"]
    for arguments in (q8_0, ["quant=int4_awq", "quant.algorithm=awq_clip"], ["quant=w4a8_awq", "kv=nvfp4"]):
        checks.check_config(compose.compose(arguments))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quant=w4a8_awq", "device=rtx_2000_ada_embedded"], "quant=w4a8_awq .*does not run it.*nearest is quant=int4"),
        (["quant=w4a8_awq", "export.targets=[modelopt]"], "modelopt .*quant.weight=int4 with quant.activation=fp8"),
        (["quant=w4a8_awq", "export.targets=[onnx]"], "onnx .*weight=int4 with .*fp8; allowed: compressed_tensors, hf"),
        (["quant=int4", "kv=fp8", "export.targets=[gptq]"], "gptq cannot carry kv.format=fp8; allowed: modelopt, comp"),
        (["quant=int4", "quant.embedding=int8", "export.targets=[onnx]"], "onnx .*quant.embedding or quant.head=int8"),
        (
            ["quant=int4", "quant.exclude=['*fc2']", "export.targets=[onnx]"],
            "onnx .*left unquantised .*allowed: .*gptq",
        ),
        (["quant=nvfp4", "export.targets=[gptq]"], "gptq cannot carry quant.weight=nvfp4"),
        (["quant=int8_sq", "export.targets=[modelopt]"], "modelopt cannot carry quant.weight=int8"),
        (["quant=int8_sq", "quant.activation=fp8"], "quant.activation='fp8': allowed is none or int8 with"),
        (["quant=int8_sq", "quant.activation=none"], "quant.algorithm='smoothquant': allowed is max with"),
        (["quant=fp8", "quant.algorithm=smoothquant"], "quant.algorithm='smoothquant': allowed is max with"),
        (["quant=int4", "quant.calibration=percentile"], "quant.calibration='percentile': allowed is max or mse"),
        (["quant=none", "quant.calibration=mse"], "quant.calibration='mse': allowed is max with quant.weight=none"),
        (["quant=int4", "quant.algorithm=awq_clip", "quant.calibration=mse"], "quant.calibration='mse': .*awq_clip"),
        (["quant=fp8", "quant.percentile=120"], "quant.percentile=120.0: allowed is at least 50.0 and at most 100.0"),
        (["kv=nvfp4", "device=jetson_thor"], "kv.format=nvfp4: .*jetson_thor.* does not run it; .*nearest is kv=fp8"),
    ],
)
def test_recipes_that_cannot_be_are_refused_by_name(arguments: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        checks.check_config(compose.compose(arguments))


def test_the_command_line_wins_over_the_scenario() -> None:
    composed = compose.compose(["quant=int4", "+scenario=gateway", "export.max_seq_len=77"])
    assert (composed.quant.name, composed.export.max_seq_len, composed.kv.name) == ("int4", 77, "int8")
    assert compose.compose(["scenario=gateway"]) == compose.compose(["+scenario=gateway"])


def test_leaves_that_follow_from_others() -> None:
    composed = compose.compose(["train.steps=57", "train.learning_rate=1e-3"])
    assert (composed.train.warmup_steps, composed.train.min_learning_rate) == (5, 1e-4)
    assert composed.export.targets == ["modelopt", "compressed_tensors"]
    assert compose.compose(["quant=int4"]).export.targets == ["modelopt", "compressed_tensors", "gptq"]
    assert compose.compose(["quant=int4", "kv=fp8"]).export.targets == ["modelopt", "compressed_tensors"]
    assert compose.compose(["quant=none"]).export.targets == ["hf"]
    assert compose.compose(["model.source=/a/b"]).model.name == "custom"
    assert compose.compose(["train=ptq"]).train.steps == 0


def test_yaml_round_trip_is_exact() -> None:
    composed = compose.compose(["+scenario=vehicle", "train.learning_rate=1.234567e-05", "data.train='a b: {c}, #d'"])
    assert composed.data.train == "a b: {c}, #d"
    assert config.from_yaml(config.to_yaml(composed)) == composed
    for text in ("", "[1]", "model: {", "model: 3"):
        with pytest.raises(InputError):
            config.from_yaml(text)


def test_a_run_of_an_older_version_has_todays_defaults_for_what_it_does_not_say(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not what its command would say now: another value of a leaf that decides numbers is another run."""
    made = compose.compose(["train=qad", "train.steps=7", "quant=int4"])
    older = yaml.safe_load(config.to_yaml(made))
    del older["train"]["distill_layers_weight"], older["train"]["fp8_gemm"], older["bench"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(older))
    with caplog.at_level("INFO", "megatron_edge"):
        assert compose.of_run(tmp_path) == made
    assert "older version" in caplog.text and "train.distill_layers_weight" in caplog.text
    assert "bench.size" in caplog.text and "train.seed" not in caplog.text
    asked = compose.compose(["train=qad", "train.steps=7", "quant=int4", "train.distill_layers_weight=30"])
    with pytest.raises(InputError, match="distill_layers_weight"):
        config.check_same_run(compose.of_run(tmp_path), asked)
    older["train"]["stepz"] = 1
    for text, words in (
        (yaml.safe_dump(older), "stepz: unknown"),
        ("model: {", "config.yaml: "),
        ("model: 3", "model"),
    ):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(InputError, match=words):
            compose.of_run(tmp_path)


def test_from_hydra_refuses_unknown_keys_at_any_depth() -> None:
    plain = yaml.safe_load(config.to_yaml(compose.compose([])))
    for path in (("extra",), ("train", "extra"), ("device", "extra")):
        data = yaml.safe_load(config.to_yaml(compose.compose([])))
        inner = data
        for key in path[:-1]:
            inner = inner[key]
        inner["extra"] = 1
        with pytest.raises(InputError, match=re.escape(".".join(path)) + ": unknown"):
            compose.from_hydra(OmegaConf.create(data))
    del plain["train"]["seed"]
    with pytest.raises(InputError, match=r"train\.seed: no value"):
        compose.from_hydra(OmegaConf.create(plain))


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("+scenario=gatway", ("scenario=gatway", "did you mean 'gateway'", "vehicle_sm89")),
        ("train.stepz=3", ("train.stepz: unknown", "did you mean 'train.steps'")),
        ("+train.stepz=3", ("train.stepz: unknown", "did you mean 'train.steps'")),
        ("trian.steps=3", ("trian.steps: unknown", "did you mean 'train'")),
        ("quant=nvfp5", ("quant=nvfp5", "did you mean 'nvfp4'", "int4_awq")),
        ("quant=[fp8]", ("quant=", "allowed")),
        ("train.precision=bf61", ("train.precision='bf61'", "bf16, fp32", "did you mean 'bf16'")),
        ("train.steps=three", ("train.steps='three'", "whole number")),
        ("train.steps=2.5", ("train.steps=2.5", "whole number")),
        ("train.steps=true", ("train.steps=True", "whole number")),
        ("train.steps=-1", ("train.steps=-1", "at least 0")),
        ("train.learning_rate=nan", ("train.learning_rate=nan", "finite number")),
        ("train.seq_length_tokens=1", ("train.seq_length_tokens=1", "at least 2")),
        ("parallel.sequence=1", ("parallel.sequence=1", "true or false")),
        ("data.heldout_fraction=1.5", ("data.heldout_fraction=1.5", "at most 0.9")),
        ("model.source=''", ("model.source=''", "not empty")),
        ("model=custom", ("model.source: no value",)),
        ("export.targets=modelopt", ("export.targets='modelopt'", "a list")),
        ("export.targets=[tensorrt]", ("export.targets[0]='tensorrt'", "compressed_tensors")),
        ("train.seed=1,2", ("train.seed=1,2", "-m")),
        ("train.steps", ("'train.steps' is not of the form key=value",)),
        ("~train.steps", ("~train.steps", "key=value")),
        ("resume=perhaps", ("resume='perhaps'", "auto, never, must")),
        ("parallel.context=3", ("train.seq_length_tokens=128", "a multiple of 6 (2 x context)")),
        ("parallel.sequence=true", ("parallel.sequence=true", "parallel.tensor")),
        ("quant.group_size=32", ("quant.group_size=32", "16 with quant.weight=nvfp4")),
        ("quant.algorithm=awq_clip", ("quant.algorithm='awq_clip'", "max or awq with quant.weight=nvfp4")),
        ("quant.activation=fp8", ("quant.activation='fp8'", "none or nvfp4")),
        ("train.min_learning_rate=1", ("train.min_learning_rate=1.0", "at most")),
    ],
)
def test_one_wrong_argument_is_one_line_that_names_what_is_allowed(argument: str, words: tuple[str, ...]) -> None:
    message = refusal(argument)
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("+scenario=gateway", "quant=fp8"), ("device=board_2gb", "does not run it", "the nearest is quant=int4_awq")),
        (("+scenario=gateway", "quant=nvfp4"), ("activation=nvfp4", "the nearest is quant=nvfp4_w4a16")),
        (("+scenario=vehicle", "quant=nvfp4_w4a16"), ("device=orin_nano_8gb", "the nearest is quant=int4_awq")),
        (("+scenario=vehicle", "kv=fp8"), ("kv.format=fp8", "the nearest is kv=int8")),
        (("device=jetson_thor", "kv=int8"), ("kv.format=int8", "the nearest is kv=fp8")),
        (("device=orin_nano_8gb_edgellm", "quant=int4", "quant.group_size=64"), ("group_size=64", "quant=int4")),
        (("quant=int8_sq", "export.targets=[modelopt]"), ("modelopt cannot carry", "compressed_tensors")),
        (("train=ptq", "train.steps=5"), ("train.steps=5", "train.mode=ptq")),
    ],
)
def test_impossible_combinations_name_the_nearest_that_works(
    arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    message = refusal(*arguments)
    for word in words:
        assert word in message, message


def test_the_nearest_preset_really_runs() -> None:
    for scenario in compose.options("scenario"):
        for quant in compose.options("quant"):
            try:
                checks.check_config(compose.compose([f"+scenario={scenario}", f"quant={quant}"]))
            except InputError as error:
                nearest = str(error).rsplit("quant=", 1)[1]
                checks.check_config(compose.compose([f"+scenario={scenario}", f"quant={nearest}"]))


def test_batches_must_be_whole() -> None:
    composed = compose.compose(["train.global_batch=6", "train.micro_batch=2"])
    checks.check_batches(composed, ParallelPlan(dp=3, world_size=3))
    with pytest.raises(InputError, match=r"train\.global_batch=6: .* 2 x 2 = 4"):
        checks.check_batches(composed, ParallelPlan(dp=2, world_size=2))


def test_hash_and_identity_follow_what_decides_the_result() -> None:
    base = compose.compose(["+scenario=gateway"])
    assert config.config_hash(base) == config.config_hash(compose.compose(["+scenario=gateway"]))
    for same in (
        "parallel.pipeline=2",
        "threads=1",
        "resume=never",
        "run_dir=x",
        "train.log_every_steps=5",
        "device=x86_laptop",
    ):
        other = compose.compose(["+scenario=gateway", same])
        assert config.config_hash(other) == config.config_hash(base), same
        config.check_same_run(base, other)
    for different in (
        "train.seed=2",
        "train.steps=21",
        "quant=int4",
        "kv=none",
        "model.source=/m",
        "data.eval_tokens=64",
    ):
        other = compose.compose(["+scenario=gateway", different])
        assert config.config_hash(other) != config.config_hash(base), different
        with pytest.raises(InputError, match=re.escape(different.split("=")[0])):
            config.check_same_run(base, other)


def test_jobs_that_read_a_run_start_from_its_own_configuration(tmp_path: Path) -> None:
    saved = compose.compose(["+scenario=vehicle", "train.seed=5", "parallel.pipeline=2", f"run_dir={tmp_path}"])
    (tmp_path / "config.yaml").write_text(config.to_yaml(saved))
    for name in ("run_dir", "reference"):
        read = compose.compose_over_run([f"{name}={tmp_path}", "export.targets=[hf]", "device=x86_laptop"])
        assert (read.train, read.quant, read.run_dir) == (saved.train, saved.quant, str(tmp_path))
        assert (read.export.targets, read.device.name, read.parallel.pipeline) == (["hf"], "x86_laptop", 1)
        assert dataclasses.replace(read.export, targets=[]) == dataclasses.replace(saved.export, targets=[])
    assert compose.compose_over_run(["artifact=/a"]) == compose.compose(["artifact=/a"])
    for argument in ("train.seed=6", "quant=fp8", "+scenario=gateway"):
        with pytest.raises(InputError, match=r"seed|quant|scenario"):
            compose.compose_over_run([f"run_dir={tmp_path}", argument])
    with pytest.raises(InputError, match=r"run_dir='/nowhere'"):
        compose.compose_over_run(["run_dir=/nowhere"])


@pytest.mark.parametrize(
    ("arguments", "sizes", "words"),
    [
        (("parallel.tensor=2",), {}, ("parallel.tensor=2", "num_attention_heads=9", "allowed for this model: 1, 3")),
        (("parallel.expert=2",), {}, ("parallel.expert=2", "no experts", "allowed is 1")),
        (("train.seq_length_tokens=9000",), {}, ("train.seq_length_tokens=9000", "max_position_embeddings=8192")),
        (("quant=int4",), {"hidden_size": 600}, ("quant.group_size=128", "in_features=600")),
        (("quant=nvfp4",), {"intermediate_size": 1540}, ("quant.group_size=16", "down_proj")),
        (
            ("quant=nvfp4_w4a16", "device=board_2gb"),
            {"intermediate_size": 1552},
            ("llama.cpp", "64 weights", "down_proj"),
        ),
        (
            ("quant=int4", "parallel.tensor=2"),
            {"num_attention_heads": 12, "num_key_value_heads": 6, "intermediate_size": 1664},
            ("parallel.tensor=2", "down_proj", "1664/2 = 832", "group of 128"),
        ),
        (("quant=int4", "device=orin_nano_8gb_edgellm"), {}, ("quant.group_size=128", "groups of 64", "[128]")),
        (("kv=int8",), {"head_dim": 48}, ("kv.format=int8", "head_dim=48")),
    ],
)
def test_model_sizes_are_checked_before_anything_is_built(
    arguments: tuple[str, ...], sizes: dict[str, int], words: tuple[str, ...]
) -> None:
    checks.check_model_dims(compose.compose([]), SMOLLM2)
    with pytest.raises(InputError) as caught:
        checks.check_model_dims(compose.compose(arguments), {**SMOLLM2, **sizes})
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_layouts_that_the_model_allows_pass() -> None:
    for layout in (("parallel.tensor=3",), ("parallel.pipeline=2",), ("parallel.tensor=3", "parallel.pipeline=5")):
        for quant in compose.options("quant"):
            checks.check_model_dims(compose.compose([*layout, f"quant={quant}"]), SMOLLM2)


def test_a_cuda_graph_is_refused_where_a_step_cannot_be_recorded() -> None:
    from tiny_megatron import hf_config_of, random_llama

    from megatron_edge.jobs.preflight import records_steps

    model = hf_config_of(random_llama())
    alone = ("parallel.tensor=2", "parallel.context=2", "parallel.recompute=full")
    for settings in (["parallel.pipeline=2"], *(["model.backend=te", setting] for setting in alone)):
        with pytest.raises(InputError, match=rf"train.cuda_graph=true: .*{settings[-1]}.*; allowed here: null, false"):
            records_steps(compose.compose(["train.cuda_graph=true", *settings]), model)
        assert not records_steps(compose.compose(settings), model)
    assert not records_steps(compose.compose(["train.cuda_graph=false"]), model)
    for setting in alone:  # with our layers nothing but the device stands in the way
        told = ["train.cuda_graph=true", setting]
        if torch.cuda.is_available():
            assert records_steps(compose.compose(told), model) and records_steps(compose.compose([setting]), model)
        else:
            with pytest.raises(InputError, match=r"cuda_graph=true: there is no CUDA device; allowed"):
                records_steps(compose.compose(told), model)


def test_fp8_products_are_refused_where_layers_have_none() -> None:
    from megatron_edge.jobs.preflight import check_backend

    told = ["train.fp8_gemm=true", "model.backend=te", "parallel.tensor=2"]
    with pytest.raises(InputError, match=r"train.fp8_gemm=true: TransformerEngine's .* parallel.tensor=2 \(1 is"):
        check_backend(compose.compose(told))
