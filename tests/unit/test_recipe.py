"""Overrides of a recipe: which format each layer has, where they may come from, and what is refused."""

from __future__ import annotations

import dataclasses
import random
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_config import SMOLLM2

from megatron_edge import checks, compose, config, devices, memory
from megatron_edge.artifact.formats import effective_group_size, storage_bytes
from megatron_edge.contracts import InputError
from megatron_edge.quantize import policy
from megatron_edge.recipe import linear_modules

MIXTRAL = {
    **SMOLLM2, "architectures": ["MixtralForCausalLM"], "num_hidden_layers": 3, "num_local_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip


def configured(*arguments: str) -> config.RunConfig:
    return compose.compose([argument.strip("'") for argument in arguments])


def formats_of(run: config.RunConfig, sizes: dict[str, Any] = SMOLLM2) -> dict[str, tuple[str, str, int]]:
    plan = policy.make_plan(run.quant, run.kv, sizes)
    chosen = {name: policy.rule_for(name, plan) for name in linear_modules(sizes)}
    return {name: (r.weight, r.activation, r.group_size) if r else ("none", "none", 0) for name, r in chosen.items()}


def test_later_entries_win_over_earlier_ones_and_over_the_base() -> None:
    overrides = [
        {"pattern": "*.layers.2.*", "weight": "fp8", "activation": "fp8"},
        {"pattern": "*.linear_fc2", "weight": "int4"},
        {"pattern": "decoder.layers.2.mlp.*", "weight": "none"},
    ]
    run = configured("quant=nvfp4_w4a16", f"quant.overrides={overrides}".replace("'", ""))
    found = formats_of(run)
    assert len(found) == 120
    assert found["decoder.layers.2.self_attention.linear_qkv"] == ("fp8", "fp8", 0)
    assert found["decoder.layers.2.mlp.linear_fc2"] == found["decoder.layers.2.mlp.linear_fc1"] == ("none", "none", 0)
    assert found["decoder.layers.3.mlp.linear_fc2"] == ("int4", "none", 128)
    assert found["decoder.layers.12.self_attention.linear_qkv"] == ("nvfp4", "none", 16), "2 is not 12"


def test_an_override_over_several_sizes_has_each_ones_group() -> None:
    found = formats_of(configured("quant=fp8", "quant.overrides=[{pattern:'*.layers.4.*',weight:int4}]"))
    groups = {name.rsplit(".", 1)[1]: found[name] for name in found if ".layers.4." in name}
    expected = {"linear_qkv": 576, "linear_proj": 576, "linear_fc1": 576, "linear_fc2": 1536}
    assert groups == {name: ("int4", "none", effective_group_size(size, 128)) for name, size in expected.items()}


@pytest.mark.parametrize("sizes", [SMOLLM2, MIXTRAL], ids=["dense", "experts"])
def test_rules_are_what_a_plain_loop_over_the_recipe_says(sizes: dict[str, Any]) -> None:
    """Random recipes; the bytes of memory.py are the sum over the layers' own formats."""
    names, draw = linear_modules(sizes), random.Random(4)
    parts = ["*", "*.layers.1.*", "*.mlp.*", "*.linear_qkv", "decoder.layers.[01].*", "*.linear_fc2", names[0]]
    for _ in range(12):
        entries = [(draw.choice(parts), draw.choice(["none", "fp8", "int4", "nvfp4"])) for _ in range(3)]
        text = ",".join(f'{{pattern:"{pattern}",weight:{weight}}}' for pattern, weight in entries)
        run = configured("quant=nvfp4", f"quant.overrides=[{text}]", "quant.exclude=['*.layers.2.*']")
        found = formats_of(run, sizes)
        for name in names:
            expected = ("nvfp4", "nvfp4")
            for pattern, weight in entries:
                if fnmatch(name, pattern):
                    expected = (weight, "none")
            if ".layers.2." in name:
                expected = ("none", "none")
            assert found[name][:2] == expected, (entries, name)
        total = 0
        for linear in memory.linears(sizes):
            for layer in range(sizes["num_hidden_layers"]):
                weight, activation, group = found[f"decoder.layers.{layer}.{linear.module}"]
                total += storage_bytes("bf16" if weight == "none" else weight, linear.shape, group)
                total += 4 if activation != "none" else 0
        plain = configured("quant=none", "train.precision=bf16")
        of_linears = sum(storage_bytes("bf16", linear.shape) for linear in memory.linears(sizes))
        rest = memory.weights_bytes(plain, sizes) - sizes["num_hidden_layers"] * of_linears
        bf16 = config.replace(run, train=plain.train)
        assert memory.weights_bytes(bf16, sizes) == rest + total


def test_the_resolved_configuration_holds_the_overrides_themselves(tmp_path: Path) -> None:
    """A run directory needs no other file, and knows another recipe for another run."""
    file = tmp_path / "mine.yaml"
    file.write_text("weight: int4\ngroup_size: 64\noverrides:\n- {pattern: '*.layers.0.*', weight: int4}\n")
    run = configured("quant=fp8", "quant.activation=none", f"quant.recipe={file}")
    assert (run.quant.name, run.quant.weight, run.quant.activation) == ("mine", "int4", "none")
    assert [one.group_size for one in run.quant.overrides] == [64], "the base recipe's"
    file.unlink()
    assert config.from_yaml(config.to_yaml(run)) == run
    same = configured("quant=int4", "quant.group_size=64", "quant.overrides=[{pattern:'*.layers.0.*',weight:int4}]")
    assert config.config_hash(same) == config.config_hash(run)
    config.check_same_run(run, same)
    with pytest.raises(InputError, match=r"quant\.overrides"):
        config.check_same_run(run, configured("quant=int4", "quant.group_size=64"))


def test_recipe_files_compose_and_the_command_line_wins(tmp_path: Path) -> None:
    units = {
        "a": {
            "weight": "fp8",
            "activation": "fp8",
            "group_size": 0,
            "overrides": [{"pattern": "*fc1", "weight": "none"}],
        },
        "b": {"calib_size": 7, "overrides": [{"pattern": "*.3.*", "weight": "int4", "group_size": 32}]},
    }
    for name, unit in units.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(unit))
    files = f"quant.recipe=[{tmp_path / 'a.yaml'},{tmp_path / 'b.yaml'}]"
    run = configured("+scenario=vehicle", "quant.algorithm=max", files)
    assert (run.quant.name, run.quant.weight, run.quant.calib_size) == ("b", "fp8", 7), "over the scenario"
    assert [(one.pattern, one.group_size) for one in run.quant.overrides] == [("*fc1", 0), ("*.3.*", 32)]
    run = configured("+scenario=vehicle", files, "quant.calib_size=9", "quant.overrides=[{pattern:'*fc2',weight:none}]")
    assert run.quant.calib_size == 9
    assert [one.pattern for one in run.quant.overrides] == ["*fc1", "*.3.*", "*fc2"], "the command line's are last"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("wieght: fp8", ("wieght", "did you mean 'weight'")),
        ("[1, 2]", ("holds no recipe",)),
        ("weight: {", ("quant.recipe=",)),
        ("overrides: [{pattern: '*', weight: fp9}]", ("quant.overrides[0].weight='fp9'", "fp8")),
        ("overrides: [{weight: fp8}]", ("quant.overrides[0].pattern", "no value")),
        ("overrides: [{pattern: '*', weight: fp8, groups: 3}]", ("quant.overrides[0].groups", "group_size")),
        ("overrides: 3", ("holds no recipe",)),
        (None, ("quant.recipe=", "No such file")),
    ],
)
def test_a_recipe_file_at_fault_is_named(tmp_path: Path, text: str | None, words: tuple[str, ...]) -> None:
    file = tmp_path / "bad.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError) as caught:
        compose.compose([f"quant.recipe={file}"])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("quant.overrides=[{pattern:'*.layers.30.*',weight:fp8}]",),
            ("overrides[0].pattern='*.layers.30.*'", "names"),
        ),
        (("quant.overrides=[{pattern:'*',weight:int4},{pattern:'*.core_attention',weight:fp8}]",), ("overrides[1]",)),
        (("quant.overrides=[{pattern:'*',weight:fp8,activation:nvfp4}]",), ("activation='nvfp4'", "weight=fp8")),
        (("quant.overrides=[{pattern:'*',weight:int4,group_size:16}]",), ("group_size=16", "32 or 64 or 128")),
        (("quant=fp8", "quant.algorithm=awq"), ("quant.algorithm='awq'",)),
        (("+scenario=gateway", "quant.overrides=[{pattern:'*',weight:fp8}]"), ("overrides[0]", "board_2gb", "fp8")),
        (
            ("quant=int4", "quant.overrides=[{pattern:'*fc1',weight:fp8}]", "export.targets=[modelopt]"),
            ("modelopt cannot carry quant.weight=fp8 with quant.activation=none", "allowed: compressed_tensors, hf"),
        ),
        (
            ("device=orin_nano_8gb_edgellm", "quant=none", "quant.overrides=[{pattern:'*proj',weight:int4}]"),
            ("'*proj'", "groups of 64", "[128]"),
        ),
    ],
)
def test_overrides_that_cannot_be_are_refused(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        run = compose.compose(arguments)
        checks.check_config(run)
        checks.check_model_dims(run, SMOLLM2)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    "argument",
    [
        "quant.overrides=[{pattern:'*.local_experts.2.*',weight:fp8}]",
        "quant.exclude=['*.1.mlp.*.local_experts.[01].*']",
    ],
)
def test_experts_of_a_layer_have_one_format(argument: str) -> None:
    """They share the scale of what they read, and the ranks that hold them must agree on what there is."""
    with pytest.raises(InputError, match=r"all or none of decoder\.layers\.[01]\.mlp\.experts\.local_experts\.\*"):
        checks.check_model_dims(configured("quant=nvfp4", argument), MIXTRAL)
    checks.check_model_dims(
        configured("quant=nvfp4", "quant.overrides=[{pattern:'*.1.*experts*',weight:fp8}]"), MIXTRAL
    )


def test_the_recipe_in_docs_is_no_larger_than_the_uniform_format() -> None:
    file = Path(__file__).resolve().parents[2] / "docs" / "mixed_4.50.yaml"
    mixed, uniform = (configured(one, "device=x86_laptop") for one in (f"quant.recipe=['{file}']", "quant=nvfp4_w4a16"))
    checks.check_model_dims(mixed, SMOLLM2)
    assert {format for format, _, _ in formats_of(mixed).values()} == {"int4", "nvfp4", "fp8"}
    sizes = [memory.weights_bytes(one, SMOLLM2) for one in (mixed, uniform)]
    assert sizes[1] - sizes[0] == 59_720_520 - 59_720_244, sizes


def test_presets_are_what_hydra_composes_of_their_units() -> None:
    for name, preset in devices.presets("quant").items():
        composed = dataclasses.asdict(configured(f"quant={name}").quant)
        assert set(preset) == set(composed), name
        said = {key: value for key, value in preset.items() if value is not None}  # null follows from others
        assert said == {key: composed[key] for key in said}, name


def test_another_recipe_over_a_run_is_refused(tmp_path: Path) -> None:
    run = configured("quant=fp8", "quant.overrides=[{pattern:'*fc1',weight:none}]", f"run_dir={tmp_path}")
    (tmp_path / "config.yaml").write_text(config.to_yaml(run))
    assert compose.compose_over_run([f"run_dir={tmp_path}"]).quant == run.quant
    (tmp_path / "other.yaml").write_text("overrides: [{pattern: '*fc2', weight: none}]")
    with pytest.raises(InputError, match=r"quant\.overrides"):
        compose.compose_over_run([f"run_dir={tmp_path}", "quant=fp8", f"quant.recipe={tmp_path / 'other.yaml'}"])


def test_a_mixed_recipe_takes_what_its_formats_allow() -> None:
    run = configured("quant=fp8", "quant.algorithm=awq", "quant.overrides=[{pattern:'*fc2',weight:int4}]")
    checks.check_config(run)
    checks.check_model_dims(run, SMOLLM2)
    assert run.export.targets == ["modelopt", "compressed_tensors"], "gptq has int4 alone"
    assert configured("quant=fp8", "quant.overrides=[{pattern:'*fc2',weight:nvfp4}]").export.targets == [
        "modelopt",
        "compressed_tensors",
    ]
    assert configured("quant=none", "quant.overrides=[{pattern:'*fc2',weight:int4}]").export.targets == [
        "modelopt",
        "compressed_tensors",
        "gptq",
    ]
