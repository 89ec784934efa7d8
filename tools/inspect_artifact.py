"""Print what an artifact holds and what it costs: python tools/inspect_artifact.py ARTIFACT [--tensors]

Reads manifest.json alone: no torch, seconds on any machine. ARTIFACT is a canonical artifact's directory.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_edge.contracts import InputError, LinearEntry, Manifest, TensorEntry

BYTES = {
    "uint8": 1, "int8": 1, "float8_e4m3fn": 1, "float16": 2, "bfloat16": 2, "int32": 4, "float32": 4, "int64": 8,
}  # fmt: skip
BF16_BYTES = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path, help="directory with manifest.json")
    parser.add_argument("--tensors", action="store_true", help="list every stored tensor")
    arguments = parser.parse_args()
    try:
        manifest = read_manifest(arguments.artifact)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print_facts(manifest)
    print()
    print_table(("", "parameters", "bytes", "bytes/parameter", "of BF16"), size_rows(manifest))
    if rows := mixed_rows(manifest):
        print()
        print_table(("linears", "format", "layers"), rows)
    if arguments.tensors:
        rows = [
            (name, "x".join(map(str, entry.shape)) or "scalar", entry.dtype, entry.format, entry.file)
            for name, entry in manifest.tensors.items()
        ]
        print()
        print_table(("tensor", "shape", "dtype", "format", "file"), rows)
    return 0


def read_manifest(artifact: Path) -> Manifest:
    """Raises InputError where the directory holds no manifest."""
    path = artifact / "manifest.json"
    if not path.is_file():
        raise InputError(f"artifact={artifact}: no manifest.json there; allowed: the directory of a canonical artifact")
    return Manifest.from_dict(json.loads(path.read_text()))


def size_rows(manifest: Manifest) -> list[tuple[str, ...]]:
    """Quantised linears by format and group, all of them, quantised tables, the rest, the whole model."""
    kinds: dict[str, list[LinearEntry]] = {}
    for linear in manifest.layer_linears.values():
        activation = "" if linear.activation == "none" else f", {linear.activation} activations"
        group = f", groups of {linear.group_size}" if linear.group_size else ""
        kinds.setdefault(f"linears {linear.format}{group}{activation}", []).append(linear)
    rows = [size_row(kind, manifest, linears) for kind, linears in sorted(kinds.items())]
    every = list(manifest.linears.values())
    owned = {name for linear in every for name in linear.tensors.values()}
    rest = [entry for name, entry in manifest.tensors.items() if name not in owned]
    rest_parameters = sum(math.prod(entry.shape) for entry in rest if entry.format != "scale")
    rest_bytes = sum(map(stored_bytes, rest))
    if len(kinds) > 1:
        rows.append(size_row("linears, all", manifest, list(manifest.layer_linears.values())))
    for name, table in manifest.tables.items():
        group = f", groups of {table.group_size}" if table.group_size else ""
        rows.append(size_row(f"{name} {table.format}{group}", manifest, [table]))
    rows.append(row("norms, other" if manifest.tables else "embeddings, norms, other", rest_parameters, rest_bytes))
    parameters = sum(math.prod(linear.shape) for linear in every) + rest_parameters
    rows.append(row("whole model", parameters, sum(map(stored_bytes, manifest.tensors.values()))))
    return rows


def size_row(label: str, manifest: Manifest, linears: list[LinearEntry]) -> tuple[str, ...]:
    parameters = sum(math.prod(linear.shape) for linear in linears)
    size_bytes = sum(stored_bytes(manifest.tensors[name]) for linear in linears for name in linear.tensors.values())
    return row(f"{label} ({len(linears)})", parameters, size_bytes)


def mixed_rows(manifest: Manifest) -> list[tuple[str, ...]]:
    """Which layers of each kind of linear have which format; empty where all of them have one."""
    found: dict[str, dict[str, list[int]]] = {}
    for name in [
        *manifest.linears,
        *(n.removesuffix(".weight") for n in manifest.tensors if n.endswith("_proj.weight")),
    ]:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer:
            linear = manifest.linears.get(name)
            kind = re.sub(r"(?<=\.)\d+(?=\.)", "N", name[layer.end() :])
            label = "unquantised" if linear is None else linear.format
            label += "" if linear is None or linear.activation == "none" else f", {linear.activation} activations"
            found.setdefault(kind, {}).setdefault(label, []).append(int(layer[1]))
    if len({label for kinds in found.values() for label in kinds}) < 2:
        return []
    return [
        (kind, label, ranges(sorted(set(of)))) for kind, kinds in found.items() for label, of in sorted(kinds.items())
    ]


def ranges(numbers: list[int]) -> str:
    """0-3 7 9-10"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def row(label: str, parameters: int, size_bytes: int) -> tuple[str, ...]:
    per_parameter = size_bytes / max(parameters, 1)
    return label, f"{parameters:,}", f"{size_bytes:,}", f"{per_parameter:.4f}", f"{per_parameter / BF16_BYTES:.4f}"


def stored_bytes(entry: TensorEntry) -> int:
    return math.prod(entry.shape) * BYTES[entry.dtype]


def print_facts(manifest: Manifest) -> None:
    facts = {"schema": manifest.schema, "family": manifest.family, "dtype": manifest.dtype}
    quant = {name: value for name, value in manifest.quant.items() if name != "rules"}  # the tables say what they did
    for name, value in {**facts, "source": manifest.source, "quant": quant, "kv": manifest.kv}.items():
        print(f"{name:8s} {value if isinstance(value, str) else json.dumps(value)}")


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    for line in [header, *rows]:
        print(line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)))


if __name__ == "__main__":
    raise SystemExit(main())
