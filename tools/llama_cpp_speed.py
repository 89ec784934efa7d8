"""Our INT4 file in llama.cpp beside the Q4_0 file of its own rules and its own quantiser, of the same weights.

Run: python tools/llama_cpp_speed.py --out DIR [--size 345m] [--threads 2] [--repeats 5]

Random weights of the size, with SmolLM2's tokenizer, are exported twice, quantised (INT4, embedding in INT8) and plain
(BF16). The plain file becomes what llama-quantize makes of it as Q4_0: layers in Q4_0, the tied embedding in Q6_K, by
the library's own functions. The two files then answer the same prompt in turns, each time in a process of its own.
Prints tokens per second, milliseconds per token and resident memory; the ratio is that of the medians. Exit code 1
where ours has less than 0.95 of the other's speed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

LEAST_RATIO = 0.95
PROMPT = "In one sentence: what is an embedded computer?"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new directory, or one of this program")
    parser.add_argument("--size", default="345m", help="of tools/random_checkpoint.py")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    asked = parser.parse_args()
    plain = exported(asked.out, asked.size, "bf16", ["quant=none"])
    files = {
        "ours": exported(asked.out, asked.size, "int4", ["quant=int4", "quant.embedding=int8"]),
        "llama.cpp's own": asked.out / "q4_0.gguf",
    }
    if not files["llama.cpp's own"].is_file():
        quantise(plain, files["llama.cpp's own"])
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in files}
    for repeat in range(asked.repeats):
        for name in files if repeat % 2 else reversed(files):
            found[name].append(answer(files[name], asked.threads, asked.tokens))
    speeds = {name: statistics.median(one["tokens_per_second"] for one in rows) for name, rows in found.items()}
    for name, rows in found.items():
        spread = ", ".join(f"{one['tokens_per_second']:.1f}" for one in rows)
        peak = statistics.median(one["peak_rss_bytes"] for one in rows)
        print(
            f"{name}: {speeds[name]:.1f} tokens/s ({spread}), {1000 / speeds[name]:.1f} ms/token, "
            f"{peak / 1e6:.0f} MB resident at most, file {files[name].stat().st_size / 1e6:.1f} MB"
        )
    ratio = speeds["ours"] / speeds["llama.cpp's own"]
    print(f"ratio {ratio:.3f} (at least {LEAST_RATIO}), {asked.size}, {asked.threads} thread(s)")
    return 0 if ratio >= LEAST_RATIO else 1


def exported(out: Path, size: str, name: str, arguments: list[str]) -> Path:
    """The GGUF file of random weights in a format, by the export job."""
    import torch

    from megatron_edge.compose import compose
    from megatron_edge.contracts import ParallelPlan
    from megatron_edge.model.source import open_model
    from tools.random_checkpoint import SIZES, make_run, write_source

    run_dir, source = out / name, out / "source"
    if not source.exists():
        write_source(source, SIZES[size])
        open_model(compose([]).model).tokenizer().save_pretrained(source)  # SmolLM2's, which has as many words
    file = run_dir / "artifact" / "gguf" / "model.gguf"
    if not file.is_file():
        targets = ["export.targets=[gguf]", "device=x86_laptop"]
        make_run(run_dir, source, ParallelPlan(), [*arguments, *targets], torch.bfloat16)
        command = [sys.executable, str(REPOSITORY / "launch" / "export.py"), f"run_dir={run_dir}"]
        subprocess.run(command, check=True)
    return file


def quantise(plain: Path, file: Path) -> None:
    """What llama-quantize writes for Q4_0 of a model with a tied embedding."""
    import gguf
    import numpy as np
    import xllamacpp.xllamacpp as module
    from gguf import GGMLQuantizationType as Kind

    library = ctypes.CDLL(module.__file__)
    functions = {Kind.Q4_0: library.quantize_q4_0, Kind.Q6_K: library.quantize_q6_K}
    pointer = ctypes.c_void_p
    for function in functions.values():
        function.argtypes, function.restype = (
            [pointer, pointer, ctypes.c_int64, ctypes.c_int64, pointer],
            ctypes.c_size_t,
        )
    read = gguf.GGUFReader(plain)
    writer = gguf.GGUFWriter(file, "llama")
    for field in read.fields.values():
        if field.name == gguf.Keys.General.ARCHITECTURE or field.name.startswith("GGUF."):
            continue
        kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    for tensor in read.tensors:
        values = np.ascontiguousarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
            continue
        kind = Kind.Q6_K if tensor.name == "token_embd.weight" else Kind.Q4_0
        rows, columns = values.shape
        packed = np.empty((rows, gguf.quant_shape_to_byte_shape((columns,), kind)[0]), np.uint8)
        functions[kind](values.ctypes.data, packed.ctypes.data, rows, columns, None)
        writer.add_tensor(tensor.name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def answer(file: Path, threads: int, tokens: int) -> dict[str, Any]:
    """One answer in a process of its own: speed and memory."""
    from megatron_edge.verify.llama_cpp import run_llama_cpp

    request = {
        "task": "chat", "gguf": str(file), "kv": "int8", "threads": threads, "context_tokens": 512,
        "max_tokens": tokens, "messages": [], "prompt": PROMPT,
    }  # fmt: skip
    found, _ = run_llama_cpp(request, None)
    if found["answer_tokens"] < tokens // 2:
        raise RuntimeError(f"the answer ended after {found['answer_tokens']} tokens: {json.dumps(found)[:300]}")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
