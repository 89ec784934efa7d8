"""What a device's runtime runs, at which power, and what comes nearest to what it does not run. Pure.

In: a `RunConfig`, the presets of conf/. Out: nothing, or an `InputError` that names the device, the reason and the
nearest preset and devices. Called by checks.check_config, before the model is known.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import yaml

from megatron_edge.compose import CONF_DIR, options
from megatron_edge.config import RunConfig, parts_of
from megatron_edge.contracts import DeviceProfile, InputError, PowerMode
from megatron_edge.leaves import build_record, expected

# int4 weights under fp8 inputs are no matter of each alone: vLLM's take inputs scaled per token, on Hopper only, and
# neither llama.cpp nor Edge-LLM has them.
W4A8_RUNTIMES = ("megatron_edge",)

# Compute capability (times ten) from which CUDA hardware has what an engine of a runtime needs of it. vLLM multiplies
# fp8 and nvfp4 weights without such inputs on older chips too, and llama.cpp decodes all of its formats in software.
_INPUTS_AND_CACHE = {
    ("activation", "fp8"): (89, "FP8 tensor cores"),
    ("activation", "nvfp4"): (100, "FP4 tensor cores"),
    ("kv", "fp8"): (89, "FP8 conversion in hardware"),
    ("kv", "nvfp4"): (100, "FP4 conversion in hardware"),
}
NEEDS: dict[str, dict[tuple[str, str], tuple[int, str]]] = {
    "vllm": _INPUTS_AND_CACHE,
    "tensorrt-edge-llm": _INPUTS_AND_CACHE
    | {("weight", "fp8"): (89, "FP8 tensor cores"), ("weight", "nvfp4"): (100, "FP4 tensor cores")},
}


def check_device(config: RunConfig) -> None:
    """Raises InputError where the runtime on config.device does not run the recipe, or the device has no power mode
    within its budget."""
    device, quant = config.device, config.quant
    check_profile(device)
    on = f"device={device.name} (runtime {device.runtime})"
    for where, part in parts_of(quant):
        if not _runs(part.weight, part.activation, part.group_size, device):
            able = presets_that_run(device)
            near = min(able, key=lambda name: _distance(able[name], part, quant.algorithm), default=None)
            where = f"quant={quant.name}" if part is quant else where
            others = _others(device, functools.partial(_runs, part.weight, part.activation, part.group_size))
            raise InputError(
                f"{where} (weight={part.weight}, activation={part.activation}, group_size={part.group_size})"
                f": {on} does not run it{_reason(device, ('weight', part.weight), ('activation', part.activation))}; "
                f"it runs on device={others}; allowed: {', '.join(able)}; the nearest is quant={near}"
            )
    for leaf in ("embedding", "head"):
        if getattr(quant, leaf) not in device.embedding_formats:
            words = f"{' or '.join(device.embedding_formats)}: {on} runs no other"
            raise expected(f"quant.{leaf}", getattr(quant, leaf), words)
    if config.kv.format not in device.kv_formats:
        kv_able = [name for name, preset in presets("kv").items() if preset["format"] in device.kv_formats]
        near = min(kv_able, key=lambda name: (name == "none", name), default=None)
        others = _others(device, lambda one: config.kv.format in one.kv_formats)
        raise InputError(
            f"kv.format={config.kv.format}: {on} does not run it{_reason(device, ('kv', config.kv.format))}; "
            f"it runs on device={others}; allowed: {', '.join(kv_able)}; the nearest is kv={near}"
        )
    power_mode(config)


def check_profile(device: DeviceProfile) -> None:
    """Raises InputError where a profile claims what its hardware cannot do."""
    claimed = {"weight": device.weight_formats, "activation": device.activation_formats, "kv": device.kv_formats}
    for kind, found in claimed.items():
        for fmt in found:
            if reason := _reason(device, (kind, fmt)):
                able = [one for one in found if not _reason(device, (kind, one))]
                raise expected(f"device.{kind}_formats", fmt, f"{', '.join(able)} on device={device.name}{reason}")
    if not device.power_modes:
        raise expected("device.power_modes", (), "at least one mode, such as [{power_w: 10}]")
    if device.reserved_bytes >= device.memory_bytes:
        raise expected("device.reserved_bytes", device.reserved_bytes, f"less than memory_bytes={device.memory_bytes}")


def power_mode(config: RunConfig) -> PowerMode:
    """The largest mode of the device within budget.power_w (device.power_w where that is null).

    Raises:
        InputError: the smallest one draws more.
    """
    device, budget = config.device, config.budget.power_w
    limit = device.power_w if budget is None else budget
    able = [mode for mode in device.power_modes if mode.power_w <= limit]
    if not able:
        least = min(mode.power_w for mode in device.power_modes)
        cooler = _others(device, lambda one: min(mode.power_w for mode in one.power_modes) <= limit)
        field = "device.power_w" if budget is None else "budget.power_w"
        raise expected(
            field, limit, f"at least {least:g} on device={device.name}, its smallest mode; within it: device={cooler}"
        )
    return max(able, key=lambda mode: mode.power_w)


def _runs(weight: str, activation: str, group_size: int, device: DeviceProfile) -> bool:
    known = weight in device.weight_formats and activation in device.activation_formats
    if weight == "int4" and activation == "fp8" and device.runtime not in W4A8_RUNTIMES:
        return False
    return known and (weight != "int4" or group_size in device.group_sizes)


def _reason(device: DeviceProfile, *wanted: tuple[str, str]) -> str:
    """In words why hardware refuses one of (kind, format), or nothing where it is the runtime alone."""
    if device.compute_capability is None:
        return ""
    for need in wanted:
        capability, what = NEEDS.get(device.runtime, {}).get(need, (0, ""))
        if device.compute_capability < capability:
            return f" ({need[1]} needs sm{capability} for {what}, this is sm{device.compute_capability})"
    return ""


def _others(device: DeviceProfile, suits: Any) -> str:
    """Names of the profiles that suit, those of the same runtime first."""
    found = [one for one in profiles().values() if one.name != device.name and suits(one)]
    found.sort(key=lambda one: one.runtime != device.runtime)
    return "|".join(one.name for one in found) or "(none)"


def presets_that_run(device: DeviceProfile) -> dict[str, dict[str, Any]]:
    return {
        name: preset
        for name, preset in presets("quant").items()
        if _runs(preset["weight"], preset["activation"], preset["group_size"], device)
    }


def _distance(preset: dict[str, Any], quant: Any, algorithm: str) -> tuple[int, bool, bool, bool]:
    """How far a preset is from what was asked: bits of a weight first, then its format, then the rest."""
    bits = {"none": 16, "fp8": 8, "int8": 8, "int4": 4, "nvfp4": 4}
    return (
        abs(bits[preset["weight"]] - bits[quant.weight]),
        preset["weight"] != quant.weight,
        preset["activation"] != quant.activation,
        preset["algorithm"] == "max" if preset["weight"] != quant.weight else preset["algorithm"] != algorithm,
    )


@functools.cache
def profiles() -> Mapping[str, DeviceProfile]:
    """Every device of conf/device, by name."""
    return {name: build_record(DeviceProfile, preset, "device") for name, preset in presets("device").items()}


@functools.cache
def presets(group: str) -> dict[str, dict[str, Any]]:
    """The options of a group by name, as their files say."""
    return {name: _option(group, name) for name in options(group)}


def _option(group: str, name: str) -> dict[str, Any]:
    """What one file says over the files of its group that it names under `defaults`; mappings are merged, as Hydra
    does."""
    own = yaml.safe_load((CONF_DIR / group / f"{name}.yaml").read_text())
    found: dict[str, Any] = {}
    for unit in own.pop("defaults", ["_self_"]):
        for key, value in (own if unit == "_self_" else _option(group, unit)).items():
            found[key] = {**found.get(key, {}), **value} if isinstance(value, dict) else value
    return found
