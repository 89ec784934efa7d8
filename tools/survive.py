"""Kills a job again and again, and checks that nothing is lost: losses and artifact of a run that nobody disturbed.

python tools/survive.py [--kills 20] [--seed 1] [--processes 2] [--out DIR] [-- parallel.pipeline=2 ...]

A random tiny model. After each kill (SIGKILL or SIGTERM, a random rank, a random moment; every third at the earliest
moment inside of a save) the same command is started again, until the job is done; then another job begins, until there
were that many kills. Exit code 1 where a job ends with other losses or another artifact.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.random_models import RANDOM_MODELS, make_random_model

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS, EVERY_STEPS = 48, 6
PATIENCE_SECONDS = 240.0


@dataclass
class Job:
    """One run directory, started as often as it takes."""

    command: list[str]
    run_dir: Path
    starts: int = 0
    told: list[str] = field(default_factory=list)

    def start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(part for part in (str(REPOSITORY), os.environ.get("PYTHONPATH")) if part)
        environment = {**os.environ, "PYTHONPATH": path}
        with (self.run_dir / f"start{self.starts}.log").open("wb") as log:
            command = [*self.command, f"run_dir={self.run_dir}"]
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=self.run_dir)

    def last_step(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        steps = [json.loads(line)["step"] for line in lines if line.endswith("\n")]
        return max(steps, default=0)

    def result(self) -> dict[str, str]:
        """Losses of all steps, and the hash of each file of the artifact."""
        lines = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]
        found = {f"step {line['step']}": repr(line["loss_nats_per_token"]) for line in lines}
        for path in sorted((self.run_dir / "artifact" / "canonical").iterdir()):
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def is_saving(self) -> bool:
        return any((self.run_dir / "checkpoints").glob(".saving-*"))


def rank_process(launcher: subprocess.Popen[bytes], rank: int) -> psutil.Process | None:
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(launcher.pid).children():
            if child.environ().get("RANK") == str(rank):
                return child
    return None


def wait_for_moment(job: Job, launcher: subprocess.Popen[bytes], inside_save: bool, choice: random.Random) -> bool:
    """Until a random step from where the job stands now, or a save; False where the job ends before."""
    target = job.last_step() + choice.randint(1, 2 * EVERY_STEPS)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while launcher.poll() is None and time.monotonic() < deadline:
        if job.is_saving() if inside_save else job.last_step() >= target:
            time.sleep(choice.uniform(0.0, 0.02 if inside_save else 0.2))
            return launcher.poll() is None
        time.sleep(0.002)
    return False


def disturb(job: Job, kills: int, first: int, processes: int, choice: random.Random) -> int:
    """Starts the job until it is done, killing it until there were `kills`; gives how many there were."""
    count = first
    while True:
        launcher = job.start()
        inside_save = count % 3 == 0
        if count < kills and wait_for_moment(job, launcher, inside_save, choice):
            rank, number = choice.randrange(processes), choice.choice((signal.SIGKILL, signal.SIGTERM))
            process = rank_process(launcher, rank)
            if process is not None and process.is_running():
                saving, step = job.is_saving(), job.last_step()
                process.send_signal(number)
                count += 1
                job.told.append(f"{number.name} rank {rank} after step {step}{' inside a save' if saving else ''}")
                print(f"kill {count:2}: {job.told[-1]}", flush=True)
        code = launcher.wait(timeout=PATIENCE_SECONDS)
        if code == 0:
            return count
        if job.starts > 3 * kills:
            raise RuntimeError(f"{job.run_dir}: not done after {job.starts} starts; see its start*.log")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where everything is kept; else a temporary directory")
    parser.add_argument("arguments", nargs="*", default=["parallel.pipeline=2"], help="more, for launch/qat.py")
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}")
    with tempfile.TemporaryDirectory() as scratch:
        out = (chosen.out or Path(scratch)).absolute()
        model = make_random_model(RANDOM_MODELS["qwen3"], out / "model")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command += [str(chosen.processes), str(REPOSITORY / "launch" / "qat.py"), f"model.source={model}"]
        command += ["quant=nvfp4_w4a16", f"train.steps={STEPS}", f"train.checkpoint_every_steps={EVERY_STEPS}"]
        command += ["train.global_batch=4", "train.seq_length_tokens=64", "data.eval_tokens=256", "threads=1"]
        command += ["train.learning_rate=1e-4", "export.max_loss_rise=5", *chosen.arguments]
        undisturbed = Job(command, out / "undisturbed")
        disturb(undisturbed, 0, 0, chosen.processes, random.Random(0))
        expected, choice = undisturbed.result(), random.Random(chosen.seed)
        count, wrong, jobs = 0, 0, []
        while count < chosen.kills:
            job = Job(command, out / f"job{len(jobs) + 1}")
            count = disturb(job, chosen.kills, count, chosen.processes, choice)
            found = job.result()
            differing = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
            wrong += bool(differing)
            jobs.append(job)
            print(f"{job.run_dir.name}: {len(job.told)} kills, {job.starts} starts: "
                  + (f"DIFFERS in {differing[:3]}" if differing else f"{STEPS} losses and the artifact are equal"),
                  flush=True)  # fmt: skip
        inside = sum("inside a save" in kill for job in jobs for kill in job.told)
        print(f"{count} kills ({inside} inside a save), {len(jobs)} jobs, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
