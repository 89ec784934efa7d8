"""The house rules: imports point down only, who may touch which library, and how long files and functions are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "megatron_edge"

# From the top; a unit imports units of lower rows, and itself. Units of one row do not import each other, but for the
# two lowest rows, where an order remains all the same (test_imports_have_no_cycle).
ROWS = (
    ("launch", "hydra_plugins"),
    ("jobs",),
    ("report",),
    ("verify",),
    ("train", "export", "serve"),
    ("checkpoint",),
    ("quantize",),
    ("model",),
    ("runtime",),
    ("memory", "deployment", "checks", "target_checks", "devices", "recipe", "artifact", "families", "tracking"),
    ("compose", "templates", "config", "leaves", "contracts", "log", "target_limits"),
)
RANK = {unit: row for row, units in enumerate(ROWS) for unit in units}
FREE_ROWS = (RANK["memory"], RANK["config"])

# Library -> the only places (unit, or unit/file) that may import it.
MAY_IMPORT = {
    "megatron": ("runtime", "model", "checkpoint", "train"),
    "modelopt": ("runtime/compat", "model/draft", "quantize", "checkpoint", "train/distill"),
    "hydra": ("launch", "compose", "hydra_plugins"),
    "omegaconf": ("launch", "compose", "hydra_plugins"),
    "safetensors": ("artifact/shards", "model"),
}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_LAUNCHER_LINES = 399, 59, 60


def source_files() -> list[Path]:
    beside = [file for folder in ("launch", "hydra_plugins") for file in (REPOSITORY / folder).rglob("*.py")]
    files = [*PACKAGE.rglob("*.py"), *beside]
    return sorted(file for file in files if file != PACKAGE / "__init__.py")


def place_of(file: Path) -> str:
    """runtime/compat for megatron_edge/runtime/compat.py, config for megatron_edge/config.py, launch/qat."""
    root = PACKAGE if file.is_relative_to(PACKAGE) else REPOSITORY
    return file.relative_to(root).with_suffix("").as_posix().removesuffix("/__init__")


def imported_modules(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import statement, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative imports hide the direction"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def unit_edges() -> Iterator[tuple[str, str, str]]:
    """(importing unit, imported unit, where) within the package."""
    for file in source_files():
        unit = place_of(file).split("/")[0]
        for line, module in imported_modules(file):
            parts = module.split(".")
            if parts[0] == "megatron_edge" and len(parts) > 1 and not parts[1].startswith("__"):
                yield unit, parts[1], f"{file.relative_to(REPOSITORY)}:{line}"


def test_every_unit_has_a_row() -> None:
    assert {place_of(file).split("/")[0] for file in source_files()} <= set(RANK)


def test_imports_point_down_only() -> None:
    wrong = []
    for unit, imported, where in unit_edges():
        down = RANK[imported] > RANK[unit]
        beside = RANK[imported] == RANK[unit] and RANK[unit] in FREE_ROWS
        if not (down or beside or imported == unit):
            wrong.append(f"{where}: {unit} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_imports_have_no_cycle() -> None:
    edges: dict[str, set[str]] = {}
    for unit, imported, _ in unit_edges():
        if imported != unit:
            edges.setdefault(unit, set()).add(imported)
    done: set[str] = set()
    while remaining := set(edges) - done:
        free = {unit for unit in remaining if not (edges[unit] & remaining)}
        assert free, f"these import each other in a circle: {sorted(remaining)}"
        done |= free


def test_serve_runs_without_megatron() -> None:
    allowed = {"serve", "artifact", *ROWS[-1]}
    assert {imported for unit, imported, _ in unit_edges() if unit == "serve"} <= allowed


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_libraries_are_imported_only_in_their_places(library: str) -> None:
    wrong = []
    for file in source_files():
        place = place_of(file)
        if any(place == allowed or place.startswith(f"{allowed}/") for allowed in MAY_IMPORT[library]):
            continue
        for line, module in imported_modules(file):
            if module.split(".")[0] == library:
                wrong.append(f"{file.relative_to(REPOSITORY)}:{line}: {module}")
    assert not wrong, f"{library} belongs in {MAY_IMPORT[library]}:\n" + "\n".join(wrong)


def test_contracts_need_the_standard_library_only() -> None:
    import sys

    for _, module in imported_modules(PACKAGE / "contracts.py"):
        assert module.split(".")[0] in sys.stdlib_module_names


def test_launchers_import_nothing_heavy_before_main() -> None:
    light = (
        "megatron_edge.config",
        "megatron_edge.contracts",
        "megatron_edge.leaves",
        "megatron_edge.runtime.launcher",
        "__future__",
    )
    for file in (REPOSITORY / "launch").glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                assert node.module in light, f"{file.name}:{node.lineno}: {node.module}"
            assert not isinstance(node, ast.Import), f"{file.name}:{node.lineno}"


def functions(file: Path) -> Iterator[tuple[int, str]]:
    """(lines from def to end, name): decorators are not counted, docstrings are."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.end_lineno - node.lineno + 1, f"{file.relative_to(REPOSITORY)}:{node.lineno} {node.name}"


def test_files_and_functions_are_short(capsys: pytest.CaptureFixture[str]) -> None:
    everywhere = [
        file
        for folder in ("megatron_edge", "hydra_plugins", "launch", "tools", "tests")
        for file in (REPOSITORY / folder).rglob("*.py")
    ]
    files = sorted(
        ((len(f.read_text().splitlines()), str(f.relative_to(REPOSITORY))) for f in everywhere), reverse=True
    )
    longest = sorted((entry for file in everywhere for entry in functions(file)), reverse=True)
    launchers = sorted(((lines, name) for lines, name in files if name.startswith("launch/")), reverse=True)
    with capsys.disabled():
        print(f"\n  longest file {files[0][0]} lines ({files[0][1]}), allowed {MAX_FILE_LINES}")
        print(f"  longest function {longest[0][0]} lines ({longest[0][1]}), allowed {MAX_FUNCTION_LINES}")
        print(f"  longest launcher {launchers[0][0]} lines ({launchers[0][1]}), allowed {MAX_LAUNCHER_LINES}")
    too_long = [f"{name}: {lines} lines" for lines, name in files if lines > MAX_FILE_LINES]
    too_long += [f"{name}: {lines} lines" for lines, name in longest if lines > MAX_FUNCTION_LINES]
    too_long += [f"{name}: {lines} lines" for lines, name in launchers if lines > MAX_LAUNCHER_LINES]
    assert not too_long, "\n".join(too_long)
