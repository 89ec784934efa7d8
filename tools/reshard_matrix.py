"""Does a checkpoint of any layout load under any other? Weights, quantizers, optimizer, and the artifact that follows.

python tools/reshard_matrix.py [--source random:tiny] [--quant int4_awq] [--layouts TP2PP2 DP4DO ...] [--out DIR]

Each layout starts from one state, trains two steps and saves. Each layout then loads what each of them saved and saves
it again: every tensor must be the same, bit for bit, and the artifacts exported from both the same bytes. One torchrun
for all; the layouts' world sizes must be equal. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from tools.layout_parity import CALIBRATION_WINDOWS, EVALUATION_BATCH, compose, find_source, layout_plan

DENSE = ("DP4DO", "TP2PP2", "PP2VPP2DP2", "TP2CP2SP", "PP4")
EXPERTS = ("EP4", "TP2EP2DP2SP", "PP2TP2ETP2SPDO")
STEPS = 2


@dataclass(frozen=True)
class Job:
    directory: str
    source: str
    format: str
    arguments: list[str]
    layouts: list[str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="random:tiny", help="directory, *.gguf, or random:NAME")
    parser.add_argument("--quant", default="int4_awq+fp8:embedding=int8", help="as of layout_parity.py")
    parser.add_argument("--layouts", nargs="+", help="default: five for a dense model, three for one with experts")
    parser.add_argument("--out", type=Path, help="where everything is kept; else a temporary directory")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = (chosen.out or Path(scratch)).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        source = find_source(chosen.source, directory)
        layouts = chosen.layouts or list(EXPERTS if "moe" in chosen.source or "mixtral" in chosen.source else DENSE)
        worlds = {layout: layout_plan(layout).world_size for layout in layouts}
        if len(set(worlds.values())) > 1:
            print(f"--layouts: {worlds} differ in their number of processes; allowed: layouts of one", file=sys.stderr)
            return 2
        arguments = [f"model.source={source}", f"run_dir={directory}", f"train.steps={STEPS}", "quant.group_size=32"]
        file = directory / "job.json"
        file.write_text(json.dumps(asdict(Job(str(directory), str(source), chosen.quant, arguments, layouts))))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [*command, str(worlds[layouts[0]]), __file__, "--worker", str(file)], env=environment, check=True
        )
        found = json.loads((directory / "matrix.json").read_text())
    return report(found, layouts)


def report(found: dict[str, dict[str, Any]], layouts: list[str]) -> int:
    """Prints the matrix; 1 where a cell is not all equal."""
    print(f"{'saved under':18}" + "".join(f"{'loaded under ' + layout:>28}" for layout in layouts))
    wrong = 0
    for saved in layouts:
        cells = []
        for loaded in layouts:
            cell = found[saved][loaded]
            bad = cell["differing"] + cell["files"]
            wrong += bad > 0
            cells.append(f"{cell['tensors']} equal, same artifact" if not bad else f"{bad} DIFFER {cell['first']}")
        print(f"{saved:18}" + "".join(f"{cell:>28}" for cell in cells))
    print(f"{len(layouts) ** 2} pairs, {wrong} wrong")
    return 1 if wrong else 0


class Worker:
    """One rank: opens one layout after the other."""

    def __init__(self, job: Job) -> None:
        from torch.distributed import rendezvous

        self.job, self.directory = job, Path(job.directory)
        self.store, self.rank, _ = next(iter(rendezvous("env://")))
        self.config = compose(job.arguments, job.format)
        self.opened = 0

    def run(self) -> None:
        from megatron_edge.model.source import open_source
        from megatron_edge.quantize import policy

        self.source = open_source(Path(self.config.model.source))
        self.plan = policy.make_plan(self.config.quant, self.config.kv, self.source.hf_config)
        for layout in self.job.layouts:
            self.train(layout)
        for layout in self.job.layouts:
            for saved in self.job.layouts:
                self.load_and_save(saved, layout)
        if self.rank == 0:
            matrix = {a: {b: self.compare(a, b) for b in self.job.layouts} for a in self.job.layouts}
            (self.directory / "matrix.json").write_text(json.dumps(matrix))

    def session(self, layout: str) -> Any:
        from torch.distributed import PrefixStore

        from megatron_edge.runtime.session import open_session

        self.opened += 1
        return open_session(
            layout_plan(layout), rank=self.rank, local_rank=int(os.environ["LOCAL_RANK"]),
            store=PrefixStore(str(self.opened), self.store), timeout_seconds=300, seed=1,
        )  # fmt: skip

    def model(self, session: Any) -> Any:
        from megatron_edge.model.build import build_model

        return build_model(self.source.hf_config, session.plan, torch.float32, session.device)

    def trainable(self, model: Any, layout: str) -> tuple[Any, Any]:
        from megatron_edge.train import step

        splits = layout.endswith("DO")
        return step.make_trainable(model, self.config.train, torch.float32, distributed_optimizer=splits)

    def checkpoints(self, saved: str, loaded: str = "") -> Path:
        return self.directory / saved / (loaded or "trained") / "checkpoints"

    def train(self, layout: str) -> None:
        """Import, calibrate, two steps, save."""
        from megatron_edge import checkpoint
        from megatron_edge.model.build import load_weights
        from megatron_edge.quantize import apply, awq
        from megatron_edge.train import step
        from megatron_edge.train.data import BatchPlan, load_data

        settings = self.config.train
        with self.session(layout) as session:
            tokens, cache = settings.seq_length_tokens, self.directory / "data"
            data = load_data(self.config.data, self.source.tokenizer(), tokens, 1, cache, session.on_rank_0)
            model = self.model(session)
            load_weights(model, self.source.read, self.source.hf_config, session)
            batches = data.train.calibration(CALIBRATION_WINDOWS).split(EVALUATION_BATCH)

            def forward_loop(_: Any) -> None:
                step.run_forward(model, batches, session)

            if self.plan.algorithm == "awq":
                counts = {"calib_tokens": CALIBRATION_WINDOWS * tokens, "awq_tokens": 256}
                awq.search_and_fold(model, self.plan, forward_loop, **counts)
            apply.calibrate(model, self.plan, apply.insert_quantizers(model, self.plan), forward_loop)
            wrapped, optimizer = self.trainable(model, layout)
            step.learning_rate_schedule(optimizer, settings).step(1)
            order = BatchPlan(data.train, settings.global_batch, settings.micro_batch)
            for at in range(STEPS):
                step.train_step(wrapped, optimizer, order.micro_batches(at, session.dp_rank, session.plan.dp), session)
            checkpoint.save_checkpoint(
                self.checkpoints(layout), STEPS, wrapped, optimizer, self.plan, session, extra={}, keep=1
            )

    def load_and_save(self, saved: str, layout: str) -> None:
        from megatron_edge import checkpoint
        from megatron_edge.quantize import apply

        with self.session(layout) as session:
            found = checkpoint.find_newest(self.checkpoints(saved), session)
            assert found is not None
            model = self.model(session)
            apply.insert_quantizers(model, self.plan)
            wrapped, optimizer = self.trainable(model, layout)
            checkpoint.load_checkpoint(found, wrapped, optimizer, self.plan, session)
            where = self.checkpoints(saved, layout)
            checkpoint.save_checkpoint(where, STEPS, wrapped, optimizer, self.plan, session, extra={}, keep=1)

    def compare(self, saved: str, loaded: str) -> dict[str, Any]:
        """Every tensor of both checkpoints, and every file of both artifacts."""
        from tools.layout_state import num_differing, read_checkpoint

        step = f"step_{STEPS:08d}"
        before, after = (read_checkpoint(self.checkpoints(saved, which) / step) for which in ("", loaded))
        differing = sorted(before.keys() ^ after.keys())
        differing += [name for name in before.keys() & after.keys() if num_differing(before[name], after[name])]
        one, other = (self.artifact(saved, which) for which in ("", loaded))
        files = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
        first = (differing + files)[0] if differing or files else ""
        return {"tensors": len(before), "differing": len(differing), "files": len(files), "first": first}

    def artifact(self, saved: str, which: str) -> dict[str, str]:
        """Hash of each file of the artifact that follows from a checkpoint."""
        from megatron_edge.contracts import ParallelPlan
        from megatron_edge.jobs import delivery
        from megatron_edge.runtime.launcher import Launch

        run_dir = self.checkpoints(saved, which).parent
        if not (run_dir / "artifact").exists():
            config = replace(self.config, run_dir=str(run_dir), export=replace(self.config.export, targets=[]))
            delivery.export(config, Launch(0, 1, 0, 1, 1, ParallelPlan(), None))
        folder = run_dir / "artifact" / "canonical"
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        Worker(Job(**json.loads(Path(sys.argv[2]).read_text()))).run()
    else:
        sys.exit(main())
