"""Scenarios and devices as the documentation has them; template fields are kept or answered; tools that print them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_edge import compose, devices, templates
from megatron_edge.contracts import DeviceProfile, InputError
from tools import scenario_table

REPOSITORY = Path(__file__).resolve().parents[2]


def test_readme_has_the_table_of_the_scenarios() -> None:
    assert scenario_table.table() in (REPOSITORY / "README.md").read_text()


@pytest.mark.parametrize("scenario", compose.options("scenario"))
def test_every_scenario_has_all_budgets(scenario: str) -> None:
    budget = compose.compose([f"+scenario={scenario}"]).budget
    assert all(value is not None for value in dataclasses.astuple(budget))


def test_the_drone_is_a_module_of_four_gigabytes_at_ten_watts() -> None:
    drone = compose.compose(["+scenario=drone"])
    assert (drone.device.memory_bytes, drone.device.runtime, drone.budget.power_w) == (4 * 2**30, "llama.cpp", 10)
    assert (drone.quant.weight, drone.quant.algorithm, drone.quant.embedding) == ("int4", "awq", "int8")
    assert devices.power_mode(drone).power_w == 10


def test_every_line_of_every_device_has_its_source() -> None:
    lines = {field.name for field in dataclasses.fields(DeviceProfile)} - {"name", "sources"}
    for name, device in devices.profiles().items():
        assert set(device.sources) == lines, name
        assert all(len(text) > 3 for text in device.sources.values()), name
        devices.check_profile(device)
        assert device.power_w >= min(mode.power_w for mode in device.power_modes), name
        assert compose.compose([f"device={name}", "quant=none"]).device == device, "Hydra merges as devices.py does"


FIELDS = (
    "quant_cfg", "calib_size", "weight_only", "kv_cache_quant", "max_batch_size", "max_seq_len", "enable_medusa",
    "medusa_num_heads", "max_draft_tokens", "paged_kv_cache", "remove_input_padding",
)  # fmt: skip


def test_template_fields_are_refused_with_what_stands_for_them() -> None:
    runs = [compose.compose([f"+scenario={name}"]) for name in ("gateway", "gateway_thor", "vehicle_sm89")]
    for field in FIELDS:
        assert templates.field_of(field) == templates.field_of(f"export.{field}") == field
        for run in runs:
            words = str(templates.refusal(field, "INT4_AWQ", run))
            assert words.startswith(f"{field}=INT4_AWQ: ")
            assert ("this project calls it" in words) is (field in templates.KEPT)
            if field in templates.ANSWERED:
                assert f"device={run.device.name}: " in words and "allowed: leave it out" in words
                assert "no choice with the runtime" not in words


@pytest.mark.parametrize("argument", ["enable_medusa=true", "+medusa_num_heads=2", "export.paged_kv_cache=true"])
def test_a_template_field_on_the_command_line_is_refused_for_its_device(argument: str) -> None:
    with pytest.raises(InputError) as caught:
        compose.compose([argument, "+scenario=gateway_thor"])
    assert str(caught.value).startswith(f"{argument.lstrip('+')}: device=jetson_thor: TensorRT Edge-LLM ")


def test_names_that_are_our_own_are_still_ours() -> None:
    assert compose.compose(["export.max_seq_len=77", "quant.calib_size=3"]).export.max_seq_len == 77
    with pytest.raises(InputError, match=r"quant_cfg=INT4_AWQ: this project calls it quant=int4_awq$"):
        compose.compose(["quant_cfg=INT4_AWQ"])


SIZES = (
    "--num-layers 4 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 4 --num-query-groups 2 "
    "--vocab-size 1024"
)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (
            f"{SIZES} --quant-mode int4 --kv-cache int8 --device board_2gb --medusa-num-heads 2",
            0,
            "each rank of stage 0",
        ),
        (f"{SIZES} --num-experts 4 --expert-model-parallel-size 2 --pipeline-model-parallel-size 2", 0, "stage 1"),
        (f"{SIZES} --quant-mode nvfp4 --device orin_nano_8gb_edgellm", 2, "needs sm100"),
        ("--num-layers 4", 2, "--hidden-size: is not given"),
    ],
)
def test_report_of_theoretical_memory(arguments: str, code: int, words: str) -> None:
    command = [sys.executable, str(REPOSITORY / "tools" / "report_theoretical_memory.py"), *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert words in done.stdout + done.stderr and "Traceback" not in done.stderr
