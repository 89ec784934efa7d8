"""Records of typed leaves out of nested dicts, for config.py: every key a field, every value of its kind and range.

What is wrong is an `InputError` naming field, value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable
from dataclasses import MISSING
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_edge.contracts import InputError


def leaf(
    doc: str, low: float | None = None, high: float | None = None, derived: bool = False, default: Any = MISSING
) -> Any:
    """A field without default (conf/ holds the defaults), with its meaning and its inclusive range.

    `derived`: null in conf/ is filled in from other leaves; the record itself never holds None there. `default` is for
    the records of a list, which conf/ does not hold.
    """
    return dataclasses.field(default=default, metadata={"doc": doc, "low": low, "high": high, "derived": derived})


def refuse_unknown(field: str, key: str, allowed: Iterable[str]) -> InputError:
    known = sorted(allowed)
    if not any("." in name for name in known):
        key = key.split(".")[0]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return InputError(f"{field}: unknown{hint} (allowed: {', '.join(known)})")


def expected(field: str, value: Any, allowed: str) -> InputError:
    return InputError(f"{field}={value!r}: allowed is {allowed}")


def _leaf_value(field: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`, without guessing: a number is not read out of text, nor text out of a number."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value not in args or isinstance(value, bool):
            near = difflib.get_close_matches(str(value), args, n=1, cutoff=0.5)
            raise expected(field, value, "one of " + ", ".join(args) + (f"; did you mean {near[0]!r}?" if near else ""))
        return value
    if origin in (Union, types.UnionType):
        return None if value is None else _leaf_value(field, value, next(a for a in args if a is not type(None)))
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise expected(field, value, "a list, such as [a,b]")
        if dataclasses.is_dataclass(args[0]):
            return origin(build_record(args[0], v, f"{field}[{i}]") for i, v in enumerate(value))  # type: ignore[arg-type]
        return origin(_leaf_value(f"{field}[{i}]", v, args[0]) for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise expected(field, value, "a mapping, such as {a: b}")
        return {_leaf_value(field, key, str): _leaf_value(f"{field}.{key}", v, args[1]) for key, v in value.items()}
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is not float and type(value) is kind:
        return value
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text (quote it if need be)"}
    raise expected(field, value, words[kind])


def build_record(cls: type, data: Any, path: str) -> Any:
    """Build dataclass `cls` out of nested dicts; every key must be a field and every field a key."""
    prefix = f"{path}." if path else ""
    if not isinstance(data, dict):
        raise expected(path, data, f"a group with the keys {', '.join(f.name for f in dataclasses.fields(cls))}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise refuse_unknown(f"{prefix}{key}", str(key), fields)
    values: dict[str, Any] = {}
    for name, kind in get_type_hints(cls).items():
        field = f"{prefix}{name}"
        if name not in data and fields[name].default is not MISSING:
            values[name] = fields[name].default
            continue
        if name not in data or data[name] == "???":
            raise InputError(f"{field}: no value is given, and it has no default")
        if data[name] is None and fields[name].metadata.get("derived"):
            values[name] = None
            continue
        if dataclasses.is_dataclass(kind):
            values[name] = build_record(kind, data[name], field)  # type: ignore[arg-type]
            continue
        value = values[name] = _leaf_value(field, data[name], kind)
        if value == "" and name != "scenario":
            raise expected(field, value, "text that is not empty")
        low, high = (fields[name].metadata.get(k) for k in ("low", "high"))
        if value is not None and ((low is not None and value < low) or (high is not None and value > high)):
            raise expected(field, value, f"at least {low}" + (f" and at most {high}" if high is not None else ""))
    return cls(**values)
