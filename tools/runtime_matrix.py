"""Every runtime that runs here on every format that it takes: trained, exported, verified; one table.

python tools/runtime_matrix.py --out DIR [--formats int4 nvfp4_w4a16 fp8 nvfp4] [--tokens 32500] [-- OVERRIDES]

Each format is a job of launch/qat.py, then launch/export.py and launch/verify.py on `--tokens` held-out tokens, then,
where its environment is there (make runtimes), TensorRT Edge-LLM's own export on the target modelopt. OVERRIDES go to
the training (data.train=..., data.heldout=..., train.steps=...). What is done is not done again. Exit code 1 where a
check does not hold or a runtime did not run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.edge_llm import PROGRAM

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = 2  # of a launcher or tool: what was asked for is outside of what is documented


@dataclass(frozen=True)
class Format:
    """A recipe, the targets that carry it and the runtimes that run them here."""

    recipe: tuple[str, ...]
    targets: tuple[str, ...]
    runtimes: tuple[str, ...]


FORMATS = {
    "int4": Format(
        ("quant=int4",),
        ("compressed_tensors", "gguf", "gptq", "onnx", "modelopt"),
        ("llama.cpp", "onnxruntime-genai", "transformers"),
    ),
    "nvfp4_w4a16": Format(
        ("quant=nvfp4_w4a16", "kv=int8"), ("compressed_tensors", "gguf", "modelopt"), ("llama.cpp", "transformers")
    ),
    "fp8": Format(("quant=fp8", "kv=fp8"), ("compressed_tensors", "modelopt"), ("transformers",)),
    "nvfp4": Format(("quant=nvfp4", "kv=fp8"), ("compressed_tensors", "modelopt"), ("transformers",)),
}


def run(command: list[str], log: Path, words: str) -> int:
    """A launcher or tool in a process of its own, its output in `log`; its exit code."""
    print(f"{words}: {shlex.join(command[1:])}", flush=True)
    with log.open("w") as file:
        return subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False).returncode


def prove(name: str, directory: Path, tokens: int, overrides: list[str]) -> dict[str, Any]:
    """verify.json of one format, with the exit codes of what was run: `codes`."""
    chosen, run_dir, codes = FORMATS[name], f"run_dir={directory}", {}
    directory.mkdir(parents=True, exist_ok=True)
    python = [sys.executable]
    done = directory / "trained.json"
    if not done.is_file():
        train = ["launch/qat.py", *chosen.recipe, "device=x86_laptop", "export.targets=[]", run_dir, *overrides]
        codes["train"] = run(python + train, directory.with_suffix(".train.log"), f"{name}: train")
        if codes["train"]:
            return {"codes": codes}
        done.write_text(json.dumps(train))
    targets, runtimes = (",".join(part) for part in (chosen.targets, chosen.runtimes))
    export = ["launch/export.py", run_dir, f"export.targets=[{targets}]"]
    codes["export"] = run(python + export, directory.with_suffix(".export.log"), f"{name}: export")
    if codes["export"]:
        return {"codes": codes}
    verify = ["launch/verify.py", run_dir, f"runtimes=[{runtimes}]", f"data.eval_tokens={tokens}"]
    found = _verified(directory)
    if found.get("command") != verify:
        codes["verify"] = run(python + verify, directory.with_suffix(".verify.log"), f"{name}: verify")
        found = {**json.loads((directory / "verify.json").read_text()), "command": verify}
        if codes["verify"] in (0, 3):
            (directory / "matrix.json").write_text(json.dumps(found))
    if PROGRAM.is_file():
        parse = ["tools/edge_llm.py", f"{directory}/artifact/canonical"]
        codes["edge_llm"] = run(python + parse, directory.with_suffix(".edge_llm.log"), f"{name}: TensorRT Edge-LLM")
    return {**found, "codes": codes}


def _verified(directory: Path) -> dict[str, Any]:
    """What an earlier call found, unless the artifact has changed since."""
    kept, manifest = directory / "matrix.json", directory / "artifact" / "canonical" / "manifest.json"
    if not kept.is_file() or kept.stat().st_mtime < manifest.stat().st_mtime:
        return {}
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def rows(name: str, found: dict[str, Any]) -> list[list[str]]:
    """One for each runtime; a second for llama.cpp with the weights of its file decoded to F32."""
    shown = []
    for runtime, row in found.get("runtimes", {}).items():
        for prefix, words in (("", ""), ("decoded_", ", weights decoded to F32")):
            if f"{prefix}compared_tokens" not in row:
                continue
            ratio, error = row[f"{prefix}perplexity_ratio"], row[f"{prefix}paired_error_nats"]
            speed, peak = row.get("tokens_per_second"), row.get("peak_rss_bytes")
            shown.append(
                [
                    f"{name} -> {row['target']} -> {runtime}{words}",
                    f"{row[f'{prefix}compared_tokens']:,}",
                    f"{ratio - 1:+.4%}",
                    f"{error:.1e}",
                    f"{row[f'{prefix}likeliest_agree']:.3%}",
                    f"{speed:.1f}" if speed and not prefix else "",
                    f"{peak / 2**20:.0f}" if peak and not prefix else "",
                ]
            )
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--tokens", type=int, default=32500, help="held-out tokens that runtimes are asked about")
    parser.add_argument("overrides", nargs="*", help="after --: overrides of the training")
    arguments = parser.parse_args()
    table = [["cell", "tokens", "perplexity", "paired s.e., nats", "likeliest", "tokens/s", "MiB"]]
    failed = []
    for name in arguments.formats:
        found = prove(name, arguments.out.resolve() / name, arguments.tokens, arguments.overrides)
        table += rows(name, found)
        failed += [
            f"{name}: {check['name']}: {check['metric']}" for check in found.get("checks", []) if not check["ok"]
        ]
        words = {0: "parsed, its checks hold", OUTSIDE: "refused: outside of its documented limits"}
        if (code := found["codes"].pop("edge_llm", None)) is not None:
            table.append([f"{name} -> modelopt -> TensorRT Edge-LLM: {words.get(code, f'FAILED ({code})')}", *6 * [""]])
            failed += [f"{name}: TensorRT Edge-LLM ended with {code}"] if code not in words else []
        failed += [f"{name}: {step} ended with {code}" for step, code in found["codes"].items() if code]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for line in failed:
        print(f"FAILED {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
