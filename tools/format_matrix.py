"""Each weight format x KV format through the whole job: calibrate, train ten steps, compress, verify. One process.

python tools/format_matrix.py [--quant int8_sq w4a8_awq ...] [--kv nvfp4 ...] [--source DIR] [--out DIR] [-- OVERRIDES]

Prints what each saves on the linear layers against bf16, scales included, beside the least that is asked of it, and
verify's verdict; exit code 1 where one of them falls short. --source is a directory, or random:NAME for a model made
on the spot (tools/random_models.py).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_edge.compose import options
from megatron_edge.contracts import InputError, ParallelPlan, VerificationFailed
from tools.inspect_artifact import read_manifest, stored_bytes
from tools.layout_parity import find_source

# Least share of the linear layers' bf16 bytes that a weight format saves.
LEAST_SAVED = {"none": 0.0, "fp8": 0.49, "int8": 0.49, "int4": 0.73, "nvfp4": 0.71}
SMALL = (
    "train.precision=fp32", "train.steps=10", "train.seq_length_tokens=64", "train.learning_rate=1e-3",
    "train.checkpoint_every_steps=0", "data.eval_tokens=512", "quant.calib_size=8", "export.max_loss_rise=1",
    "threads=1",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """What one combination came to. `saved` is a share of the linears' bf16 bytes."""

    quant: str
    kv: str
    saved: float
    least: float
    losses: dict[str, float]
    checks: int
    failed: list[str]
    targets: list[str]
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.failed and self.checks > 0 and self.saved >= self.least


def run_cell(quant: str, kv: str, directory: Path, overrides: list[str]) -> Cell:
    """The job of launch/qat.py, in this process."""
    from megatron_edge.compose import compose
    from megatron_edge.jobs import preflight, training
    from megatron_edge.runtime.launcher import Launch

    began, layout = time.monotonic(), ParallelPlan()
    config = compose([f"quant={quant}", f"kv={kv}", f"run_dir={directory}", "resume=never", *SMALL, *overrides])
    config = preflight.prepare(config, layout)
    try:
        training.qat(config, Launch(0, 1, 0, 1, 1, layout, None))
    except VerificationFailed as error:
        print(f"{quant}+{kv}: {error}", file=sys.stderr)
    report = json.loads((directory / "verify.json").read_text())
    checks = report["checks"]
    failed = [f"{check['name']}: {check['metric']}" for check in checks if not check["ok"]]
    saved = saved_on_linears(directory / "artifact" / "canonical")
    losses = report["losses_nats_per_token"]
    seconds = time.monotonic() - began
    least = LEAST_SAVED[config.quant.weight]
    return Cell(quant, kv, saved, least, losses, len(checks), failed, list(config.export.targets), seconds)


def saved_on_linears(artifact: Path) -> float:
    """1 - bytes of the quantised linears, all their scales included, over their bytes in bf16."""
    manifest = read_manifest(artifact)
    stored = sum(
        stored_bytes(manifest.tensors[name]) for x in manifest.layer_linears.values() for name in x.tensors.values()
    )
    plain = sum(2 * math.prod(linear.shape) for linear in manifest.layer_linears.values())
    return 1 - stored / plain if plain else 0.0


def run_all(quants: list[str], kvs: list[str], out: Path, overrides: list[str]) -> Iterator[Cell]:
    for quant in quants:
        for kv in kvs:
            cell = run_cell(quant, kv, out / f"{quant}+{kv}", overrides)
            print(line_of(cell), flush=True)
            yield cell


HEADER = f"{'weights':13}{'KV':7}{'saved':>8}{'least':>8}{'PTQ':>9}{'trained':>9}{'artifact':>9}  verify"


def line_of(cell: Cell) -> str:
    numbers = "".join(f"{cell.losses.get(name, math.nan):9.4f}" for name in ("ptq", "trained", "artifact"))
    verdict = f"{cell.checks} checks, {len(cell.failed)} failed" + (
        f": {'; '.join(cell.failed)}" if cell.failed else ""
    )
    carried = ", ".join(cell.targets)
    return (
        f"{cell.quant:13}{cell.kv:7}{cell.saved:8.1%}{cell.least:8.1%}{numbers}  {verdict}; {carried}"
        f"{'' if cell.ok else '  SHORT'} ({cell.seconds:.0f} s)"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quant", nargs="+", default=[name for name in options("quant") if name != "none"])
    parser.add_argument("--kv", nargs="+", default=list(options("kv")))
    parser.add_argument("--source", default="random:tiny", help="a model's directory, or random:NAME")
    parser.add_argument("--out", type=Path, help="where everything is kept; else a temporary directory")
    parser.add_argument("overrides", nargs="*", help="after --: overrides for every cell")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = (arguments.out or Path(scratch)).absolute()
        out.mkdir(parents=True, exist_ok=True)
        try:
            source = find_source(arguments.source, out)
            print(HEADER, flush=True)
            overrides = [f"model.source={source}", *arguments.overrides]
            cells = list(run_all(arguments.quant, arguments.kv, out, overrides))
        except (InputError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
        record: list[dict[str, Any]] = [asdict(cell) | {"ok": cell.ok} for cell in cells]
        (out / "matrix.json").write_text(json.dumps(record, indent=1))
    short = [cell for cell in cells if not cell.ok]
    print(f"{len(cells)} cells, {len(short)} short" + (f"; all of it: {out}" if arguments.out else ""))
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
