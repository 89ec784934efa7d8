"""How much memory and time export takes, against a plain copy of the same bytes on the same disk.

python tools/export_memory.py --out DIR [--size 7b] [--layout TP4PP2] [--dtype bf16] [--targets compressed_tensors hf]
                              [--keep] [-- quant=int4 quant.embedding=int8 ...]

Makes a checkpoint of random weights as ranks of the layout store it (tools/random_checkpoint.py), copies its files,
exports it in one process, kills another export halfway, lets it go on, and compares what both wrote, byte for byte.
Memory is anonymous memory (RssAnon) above what the process has after its imports, read every two milliseconds. The
file cache is emptied of the files that are read before each measurement. Exit code 1 where memory exceeds two layers
and 1 GiB, or the bytes differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
SAMPLE_SECONDS = 0.002
MIB = 1 << 20


@dataclass(frozen=True)
class Measured:
    """One export: bytes above the baseline, seconds from the end of its imports, core seconds of the whole process."""

    baseline_bytes: int
    peak_bytes: int
    seconds: float
    core_seconds: float
    returncode: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="an empty or new directory on the disk to be measured")
    parser.add_argument("--size", default="1b", help="of tools/random_checkpoint.py: tiny, tiny_experts, 345m, 1b, 7b")
    parser.add_argument("--layout", default="TP4PP2")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="of the checkpoint's weights")
    parser.add_argument("--targets", nargs="*", default=["compressed_tensors", "hf"])
    parser.add_argument("--threads", type=int, default=0, help="of the export; 0: the cores of this host")
    parser.add_argument("--keep", action="store_true", help="leave everything in --out")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help="leaves of the configuration, such as quant=int4")
    chosen = parser.parse_args()
    threads = chosen.threads or len(os.sched_getaffinity(0))
    if chosen.worker:
        return export(chosen.out, chosen.targets, threads)
    out = chosen.out.absolute()
    if out.exists() and any(out.iterdir()):
        print(f"--out {out}: is not empty; allowed: a new directory", file=sys.stderr)
        return 2
    try:
        return measure(out, chosen, threads)
    finally:
        if not chosen.keep:
            shutil.rmtree(out, ignore_errors=True)


def measure(out: Path, chosen: argparse.Namespace, threads: int) -> int:
    run_dir = out / "run"
    layer_bytes, checkpoint_bytes = make(run_dir, chosen)
    limit = 2 * layer_bytes + (1 << 30)
    checkpoint = next((run_dir / "checkpoints").glob("step_*"))
    num_files = len(list(checkpoint.glob("*.distcp")))
    print(f"{chosen.size} {chosen.layout} {chosen.dtype}: checkpoint {checkpoint_bytes / 1e9:.2f} GB in "
          f"{num_files} files, layer {layer_bytes / MIB:.0f} MiB, {threads} threads")  # fmt: skip
    copied = copy_seconds(checkpoint, out / "copy")
    print(f"plain copy: {copied:.1f} s, {checkpoint_bytes / copied / 1e6:.0f} MB/s")
    ok = True

    def row(name: str, found: Measured, read_bytes: int) -> None:
        nonlocal ok
        ok = ok and found.returncode == 0 and found.peak_bytes <= limit
        rate = read_bytes / found.seconds / 1e6
        speed = f"{found.seconds:.1f} s, {rate:.0f} MB/s of it ({copied / found.seconds:.2f} x copy)"
        memory = f"{found.peak_bytes / MIB:.0f} MiB above {found.baseline_bytes / MIB:.0f}, limit {limit / MIB:.0f}"
        print(f"{name}: {speed}, {found.core_seconds:.1f} core seconds, peak {memory}, exit code {found.returncode}",
              flush=True)  # fmt: skip

    artifact = run_dir / "artifact" / "canonical"
    drop_from_cache(checkpoint)
    exported = start(run_dir, [], threads)
    row("export", exported, checkpoint_bytes)
    if exported.returncode != 0:
        return 1
    whole = hashes(artifact)
    print(f"artifact: {sum(file.stat().st_size for file in artifact.iterdir()) / 1e9:.2f} GB")
    if chosen.targets:
        drop_from_cache(artifact)
        row("export again (hashes checked) and targets " + " ".join(chosen.targets),
            start(run_dir, chosen.targets, threads), checkpoint_bytes)  # fmt: skip
    num_tensors = len(json.loads((artifact / "manifest.json").read_text())["tensors"])
    shutil.rmtree(run_dir / "artifact")
    drop_from_cache(checkpoint)
    killed = start(run_dir, [], threads, kill_after=num_tensors // 2)
    print(f"killed after half of the tensors: {killed.seconds:.1f} s, exit code {killed.returncode}")
    drop_from_cache(checkpoint)
    row("resumed", start(run_dir, [], threads), checkpoint_bytes)
    same = hashes(artifact) == whole
    print(f"the resumed artifact and the other: {'equal' if same else 'DIFFERENT'}, byte for byte")
    return 0 if ok and same else 1


def make(run_dir: Path, chosen: argparse.Namespace) -> tuple[int, int]:
    """(bytes of a layer's weights, bytes of the checkpoint)."""
    import torch

    from megatron_edge.families import dims_of, expected_tensors, rules_of
    from tools.layout_parity import layout_plan
    from tools.random_checkpoint import SIZES, make_run, write_source

    model, dtype = SIZES[chosen.size], getattr(torch, DTYPES[chosen.dtype])
    source = write_source(run_dir.with_name("model"), model)
    _, checkpoint_bytes = make_run(run_dir, source, layout_plan(chosen.layout), chosen.arguments, dtype)
    shapes = expected_tensors(rules_of(model), dims_of(model))
    layer = sum(torch.Size(shape).numel() for name, shape in shapes.items() if ".layers.0." in name)
    return layer * dtype.itemsize, checkpoint_bytes


def copy_seconds(checkpoint: Path, place: Path) -> float:
    """A plain copy of the checkpoint's files, on the disk at its end."""
    drop_from_cache(checkpoint)
    place.mkdir()
    began = time.monotonic()
    for file in sorted(checkpoint.iterdir()):
        shutil.copyfile(file, place / file.name)
        with (place / file.name).open("rb") as copied:
            os.fsync(copied.fileno())
    seconds = time.monotonic() - began
    shutil.rmtree(place)
    return seconds


def drop_from_cache(directory: Path) -> None:
    for file in directory.iterdir():
        with file.open("rb") as content:
            os.fsync(content.fileno())
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def hashes(directory: Path) -> dict[str, str]:
    found = {}
    for path in sorted(directory.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def start(run_dir: Path, targets: list[str], threads: int, kill_after: int = 0) -> Measured:
    """Exports in a process of its own, which is killed when its journal has `kill_after` tensors."""
    told, journal = run_dir / "told.json", run_dir / "artifact" / ".canonical.building" / ".journal.jsonl"
    told.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--worker", "--out", str(run_dir), "--threads", str(threads)]
    process = subprocess.Popen([*command, "--targets", *targets])
    baseline = peak = 0
    began, used = time.monotonic(), core_seconds()
    while process.poll() is None:
        if not baseline and told.is_file():
            baseline, began = anonymous_bytes(process.pid), time.monotonic()
        peak = max(peak, anonymous_bytes(process.pid))
        if kill_after and journal.is_file() and len(journal.read_bytes().splitlines()) > kill_after:
            process.send_signal(signal.SIGKILL)
            process.wait()
        time.sleep(SAMPLE_SECONDS)
    return Measured(baseline, peak - baseline, time.monotonic() - began, core_seconds() - used, process.returncode)


def core_seconds() -> float:
    """Of all cores, by processes that were started here and are over."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (OSError, ValueError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def export(run_dir: Path, targets: list[str], threads: int) -> int:
    """The measured process: what launch/export.py does, with a mark where its imports are done."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from dataclasses import replace

    import torch.distributed.checkpoint  # noqa: F401  what the job imports when it comes to it
    import transformers  # noqa: F401

    from megatron_edge import log
    from megatron_edge.config import from_yaml
    from megatron_edge.contracts import ParallelPlan
    from megatron_edge.jobs import delivery
    from megatron_edge.runtime.launcher import Launch

    log.setup(0, 1)
    config = from_yaml((run_dir / "config.yaml").read_text())
    config = replace(config, export=replace(config.export, targets=targets))
    (run_dir / "told.json").write_text("{}")
    time.sleep(0.05)  # for the other process to read the baseline
    delivery.export(config, Launch(0, 1, 0, 1, threads, ParallelPlan(), None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
