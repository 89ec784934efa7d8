"""From a command line to a RunConfig: Hydra composes conf/, each argument is checked before it does.

In: the arguments of a launcher (key=value, group=option, +scenario=name). Out: a frozen `RunConfig`, or Hydra's
multirun over them. Rank 0 alone calls this. Nobody past this module sees a DictConfig; `hydra` is imported only here
and by its plugins.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import yaml

from megatron_edge import templates
from megatron_edge.config import GROUPS, QuantConfig, RunConfig, check_same_run, from_yaml, with_derived
from megatron_edge.contracts import InputError
from megatron_edge.leaves import build_record, expected, refuse_unknown

log = logging.getLogger("megatron_edge")

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONF_DIR = Path(__file__).resolve().parents[1] / "conf"


def from_hydra(composed: DictConfig, named: Collection[str] = ()) -> RunConfig:
    """The record of what Hydra composed and of the recipe files that it names. `named` are the keys of the command
    line, which wins over those files.

    Raises:
        InputError: the first key that is unknown, missing, mistyped or out of range.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        data: Any = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(" ".join(str(error).split())) from None
    if isinstance(data.get("quant"), dict) and data["quant"].get("recipe"):
        data["quant"] = _with_recipes(data["quant"], named)
    return with_derived(build_record(RunConfig, data, ""))


def _with_recipes(quant: dict[str, Any], named: Collection[str]) -> dict[str, Any]:
    """The quant group under its recipe files, in their order: a file's keys replace earlier ones, its overrides follow
    them, and those of the command line come last.

    Raises:
        InputError: a file that is not there, or no recipe.
    """
    files = [quant["recipe"]] if isinstance(quant["recipe"], str) else quant["recipe"]
    own = quant["overrides"] if "quant.overrides" in named else []
    found = {**quant, "recipe": files, "overrides": [] if own else quant["overrides"]}
    for file in files:
        units = _recipe_file(file)
        overrides = found["overrides"] + (units.pop("overrides", None) or [])
        found |= {key: value for key, value in units.items() if f"quant.{key}" not in named}
        found["overrides"] = overrides
    return {**found, "overrides": found["overrides"] + own}


def _recipe_file(file: str) -> dict[str, Any]:
    allowed = [f.name for f in dataclasses.fields(QuantConfig) if f.name != "recipe"]
    words = f"a YAML file with keys of the quant group: {', '.join(allowed)}"
    try:
        units = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"quant.recipe={file}: {error}; allowed: {words}") from None
    except yaml.YAMLError as error:
        raise InputError(f"quant.recipe={file}: {' '.join(str(error).split())}; allowed: {words}") from None
    if not isinstance(units, dict) or not isinstance(units.get("overrides") or [], list):
        raise InputError(f"quant.recipe={file}: holds no recipe; allowed: {words}")
    for key in units:
        if key not in allowed:
            raise refuse_unknown(f"quant.recipe={file}: {key}", str(key), allowed)
    return {"name": Path(file).stem, **units}


def options(group: str) -> list[str]:
    """What may stand after `group=`: files whose name begins with "_" are parts of others. Raises InputError where
    conf/ is not beside the package."""
    names = sorted(path.stem for path in (CONF_DIR / group).glob("[!_]*.yaml"))
    if not names:
        raise InputError(f"{CONF_DIR / group}: no configuration here; run from a clone (pip install -e .)")
    return names


def leaves() -> dict[str, dataclasses.Field[Any]]:
    """The dataclass field of every leaf, by dotted name."""
    found = {}
    for name, kind in get_type_hints(RunConfig).items():
        prefix, members = (f"{name}.", kind) if name in GROUPS else ("", RunConfig)
        found.update({prefix + f.name: f for f in dataclasses.fields(members) if prefix or f.name == name})
    return found


def _check_key(key: str, values: list[Any]) -> None:
    """Raises InputError unless `key` is a leaf, or a group and each of `values` one of its options, or a template's
    field (`compose` refuses those, once it knows the device)."""
    if key not in leaves() and templates.field_of(key):
        return
    if key in (*GROUPS, "scenario"):
        for value in values:
            if value not in options(key):
                raise refuse_unknown(f"{key}={value}", str(value), options(key))
    elif key not in leaves():
        group = key.split(".")[0]
        allowed = [name for name in leaves() if name.startswith(f"{group}.") and "." in key]
        raise refuse_unknown(key, key, allowed or [*GROUPS, *(name for name in leaves() if "." not in name)])


def _values(override: Any) -> list[Any]:
    if not override.is_sweep_override():
        return [override.value()]
    # Of an interval there are no values before a search asks for them; no group has one.
    return [] if override.is_interval_sweep() else list(override.sweep_string_iterator())


def _parse(arguments: Sequence[str]) -> list[Any]:
    """Hydra's own parsed overrides, each with a key that exists and, for a group, an option that exists."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parsed = []
    for argument in arguments:
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException as error:
            raise InputError(f"{argument!r} is not of the form key=value: {' '.join(str(error).split())}") from None
        if override.is_delete() or override.package is not None:
            raise InputError(f"{argument!r}: allowed are key=value, group=option and +scenario=name")
        _check_key(override.key_or_group, _values(override))
        parsed.append(override)
    return parsed


@contextmanager
def _hydra() -> Iterator[Any]:
    """Hydra over conf/, of which there is one at a time: launchers compose inside of a multirun."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(CONF_DIR), job_name="megatron_edge", version_base="1.3"):
            yield GlobalHydra.instance().hydra
    finally:
        GlobalHydra.instance().hydra = outer


def compose(arguments: Sequence[str]) -> RunConfig:
    """The configuration of conf/run.yaml under `arguments` (key=value, group=option, +scenario=name).

    Only rank 0 calls this. Hydra writes nothing: no outputs/, no .hydra/.

    Raises:
        InputError: an unknown key, option, scenario or value, in one line.
    """
    from hydra import compose as hydra_compose
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    overrides, foreign = [], None
    for override in _parse(arguments):
        if override.key_or_group not in leaves() and templates.field_of(override.key_or_group):
            foreign = foreign or override
            continue
        if override.is_sweep_override():
            raise InputError(f"{override.input_line!r} are several runs: add -m, under plain python")
        key = override.key_or_group
        overrides.append(f"{'+' if key == 'scenario' else ''}{key}={override.get_value_element_as_str()}")
    chosen = [o.lstrip("+").split("=")[0] for o in overrides]
    if "model.source" in chosen and "model" not in chosen:
        overrides.append("model=custom")  # the preset's label and revision belong to the preset's source
    try:
        with _hydra():
            composed = from_hydra(hydra_compose("run", overrides=overrides), chosen)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(" ".join(str(error).split())) from None
    if foreign is not None:
        raise templates.refusal(foreign.key_or_group, foreign.input_line.partition("=")[2], composed)
    return composed


def of_run(directory: Path) -> RunConfig:
    """What a job wrote into its run directory. A leaf that this version has and the one that wrote it had not takes
    conf/'s value for that mode of training, which is how the older version behaved.

    Raises:
        InputError: config.yaml holds no configuration, or a leaf that there is no more.
    """
    text = (directory / "config.yaml").read_text()
    try:
        return from_yaml(text)
    except InputError:
        return from_yaml(text, newer=lambda saved: _todays_defaults(saved, directory))


def _todays_defaults(saved: dict[str, Any], directory: Path) -> RunConfig:
    mode = saved["train"].get("mode") if isinstance(saved.get("train"), dict) else None
    fresh = compose([f"train={mode}"] if mode in options("train") else [])
    lacking = []
    for name in leaves():
        group, _, member = name.rpartition(".")
        inside = saved.get(group, {}) if group else saved
        if isinstance(inside, dict) and member not in inside:
            lacking.append(name)
    log.info("%s: written by an older version; conf/'s values for %s", directory, ", ".join(lacking))
    return fresh


def compose_over_run(arguments: Sequence[str]) -> RunConfig:
    """For jobs that read a run: its own config.yaml (in run_dir, else in reference) with `arguments` over it.

    The layout is not part of a run's identity: it starts from conf/'s default again, unless `arguments` say otherwise.

    Raises:
        InputError: as `compose`; a named directory that does not exist; a leaf that would make it another run.
    """
    fresh = compose(arguments)
    named = {override.key_or_group for override in _parse(arguments)}
    directory = fresh.run_dir if "run_dir" in named else fresh.reference
    if directory is None:
        return fresh
    if not Path(directory).is_dir():
        raise expected("run_dir" if "run_dir" in named else "reference", directory, "the directory of an earlier run")
    if not (Path(directory) / "config.yaml").is_file():
        return fresh
    saved = of_run(Path(directory))
    if "scenario" in named and fresh.scenario != saved.scenario:
        raise expected("scenario", fresh.scenario, f"{saved.scenario!r}, which made {directory}")
    changed = replace(saved, parallel=fresh.parallel, run_dir=directory)
    for key in named - {"scenario"}:
        group, _, name = key.partition(".") if key != "quant.recipe" else ("quant", "", "")  # its content counts
        value = getattr(fresh, group)
        if name:
            value = replace(getattr(changed, group), **{name: getattr(value, name)})
        changed = replace(changed, **{group: value})
    check_same_run(saved, replace(changed, data=saved.data))  # evaluate reads a run on any text
    return changed


def swept_keys(arguments: Sequence[str]) -> list[str]:
    """The keys that have several values in Hydra's sweep syntax (`train.seed=1,2`, range(...), interval(...))."""
    return [override.key_or_group for override in _parse(arguments) if override.is_sweep_override()]


# What of Hydra's own configuration a sweep may set, and for the groups from what.
_HYDRA_GROUPS = {"hydra/launcher": (), "hydra/sweeper": ("basic",)}
_HYDRA_KEYS = ("hydra.launcher.", "hydra.sweeper.", "hydra.sweep.dir")


def _check_hydra(argument: str) -> None:
    key, _, value = argument.partition("=")
    if key in _HYDRA_GROUPS:
        allowed = [*options(key), *_HYDRA_GROUPS[key]]
        if value not in allowed:
            raise refuse_unknown(argument, value, allowed)
    elif not key.startswith(_HYDRA_KEYS):
        raise refuse_unknown(key, key, [*_HYDRA_GROUPS, *(name.rstrip(".") for name in _HYDRA_KEYS)])


def multirun(script: str, arguments: Sequence[str], reads_run: bool) -> tuple[Path, list[list[Any]]]:
    """Hydra's multirun: its sweeper makes the combinations, its launcher (hydra/launcher=torchrun or slurm) runs
    `script` with each. Gives the sweep's directory and what the launcher returned, batch by batch.

    The directory is run_dir, else runs/sweep-<hash of the arguments>, so that the same command finds it again; a
    launcher that reads a run (`reads_run`) keeps its run_dir.

    Raises:
        InputError: an unknown key, option or value, in one line, before any job.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    own = [argument for argument in arguments if not argument.startswith("hydra")]
    hydra = [argument for argument in arguments if argument.startswith("hydra")]
    for argument in hydra:
        _check_hydra(argument)
    parsed = _parse(own)
    named = {override.key_or_group: override for override in parsed}
    directory = f"runs/sweep-{hashlib.sha256(chr(0).join([script, *sorted(own)]).encode()).hexdigest()[:10]}"
    if "run_dir" in named and not reads_run and not named["run_dir"].is_sweep_override():
        directory = str(named["run_dir"].value())
        parsed = [override for override in parsed if override.key_or_group != "run_dir"]
    directory = next((a.partition("=")[2].strip("'\"") for a in hydra if a.startswith("hydra.sweep.dir=")), directory)
    for override in parsed:
        if override.is_sweep_override() and override.is_interval_sweep() and "hydra/sweeper=optuna" not in hydra:
            raise InputError(
                f"{override.input_line}: an interval is for hydra/sweeper=optuna; allowed: a,b  range(...)"
            )
    lines = [f"{'+' if o.key_or_group == 'scenario' else ''}{o.input_line.lstrip('+')}" for o in parsed]
    hydra += [f"hydra.sweep.dir='{directory}'", f"hydra.launcher.own_run_dir={str(not reads_run).lower()}"]
    try:
        with _hydra() as running:
            returned = running.multirun("run", _elsewhere, lines + hydra, with_log_configuration=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(" ".join(str(error).split())) from None
    return Path(directory), [[one.return_value for one in batch] for batch in returned]


def _elsewhere(composed: DictConfig) -> None:
    """Hydra's task function. Raises RuntimeError: a launcher of ours runs the jobs in processes of their own."""
    raise RuntimeError("a job of a sweep needs processes of its own: hydra/launcher=torchrun or slurm")
