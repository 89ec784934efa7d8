"""Losses of QAT steps with our quantizers and with modelopt's own: same model, data, order, optimizer and maxima;
several seeds.

python tools/step_curves.py --out DIR --model-source DIR_OR_GGUF [--formats int4 fp8] [--seeds 1 2 3] [--steps 200]
    [--scales snapped] [--parallel 6] [-- OVERRIDES OF launch/qat.py ...]

A seed sets the order of the windows (and those that calibrate inputs): of int4 every seed starts from the same weights,
and what is apart at the start is so in all seeds. With modelopt's `own` maxima it is: one in 300 of SmolLM2's weights
lies exactly between two levels, and the last bits of its scale decide which one it takes. `snapped` gives modelopt's
quantizers our maxima: then what is apart comes from training.

Each run is a process (--parallel 0: all in this one), so that a GPU that one of them leaves waiting for the next kernel
serves the others. Out: DIR/step_curves.json with every loss, step_curves.png, how far apart the held-out losses are
before the first step, and the verdict: the means over seeds of the final loss (training, last tenth of the steps;
held-out, at the end) are apart by no more than twice the standard deviation of modelopt's own. Exit 0 where that holds
for every format.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

KINDS = ("ours", "modelopt")
SCALES = ("snapped", "own")  # modelopt's: moved as artifact/formats.snap_amax moves ours, or as it calibrates them
FORMATS = ("int4", "fp8", "nvfp4")  # those that modelopt calibrates by maxima alone, as we do here
BATCH, TOKENS = 16, 128
FORWARD_WINDOWS = 4  # of a micro-batch without gradient


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    if args.run is not None:
        fmt, kind, seed = args.run.split(",")
        (args.out / f"{fmt}_{kind}_{seed}.json").write_text(json.dumps(train(args, fmt, kind, int(seed))))
        return 0
    if args.redraw:
        found = json.loads((args.out / "step_curves.json").read_text())["runs"]
        return tell(verdicts_of(found), found, args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    runs = [(fmt, kind, seed) for fmt in args.formats for seed in args.seeds for kind in reversed(KINDS)]
    began = time.perf_counter()
    prepare_data(args)
    if args.parallel == 0:
        found = [train(args, *run) for run in runs]
    else:
        with ThreadPoolExecutor(args.parallel) as pool:
            found = list(pool.map(lambda run: in_a_process(args, arguments, *run), runs))
    verdicts = verdicts_of(found)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    report = {"arguments": arguments, "device": device, "verdicts": verdicts, "runs": found}
    (args.out / "step_curves.json").write_text(json.dumps(report, indent=1))
    print(f"{len(found)} runs of {args.steps} steps in {time.perf_counter() - began:.0f} s on {device}: {args.out}")
    return tell(verdicts, found, args.out)


def tell(verdicts: list[dict[str, Any]], runs: list[dict[str, Any]], out: Path) -> int:
    for one in verdicts:
        print(sentence(one), flush=True)
    if find_spec("matplotlib") is None:
        print(f"no picture: matplotlib is missing here; elsewhere: python tools/step_curves.py --out {out} --redraw")
    else:
        draw(runs, [one["format"] for one in verdicts], out / "step_curves.png")
    return 0 if all(one["holds"] for one in verdicts) else 1


def parse(arguments: list[str]) -> argparse.Namespace:
    own, overrides = arguments, []
    if "--" in arguments:
        at = arguments.index("--")
        own, overrides = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model-source", help="as model.source of launch/qat.py")
    parser.add_argument("--redraw", action="store_true", help="the picture and verdict of the losses that DIR holds")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["int4"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--scales", choices=SCALES, default=SCALES[0], help="those of modelopt's quantizers")
    parser.add_argument("--parallel", type=int, default=6, help="processes at a time; 0: one run after another, here")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # format,kind,seed: what a process of its own does
    args = parser.parse_args(own)
    if args.model_source is None and not args.redraw:
        parser.error("--model-source is missing; allowed: a directory, a hub name or a *.gguf file")
    if len(args.seeds) < 2:
        parser.error(f"--seeds {args.seeds}: their spread is asked for; allowed: two or more")
    args.overrides = overrides
    return args


def in_a_process(args: argparse.Namespace, arguments: list[str], fmt: str, kind: str, seed: int) -> dict[str, Any]:
    result, log = (args.out / f"{fmt}_{kind}_{seed}.{end}" for end in ("json", "log"))
    result.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--run", f"{fmt},{kind},{seed}", *arguments]
    with log.open("w") as stream:
        threads = str(max(1, (os.cpu_count() or 1) // args.parallel))
        code = subprocess.run(
            command, stdout=stream, stderr=subprocess.STDOUT, env={"OMP_NUM_THREADS": threads, **os.environ}
        ).returncode
    if code != 0:
        raise SystemExit(f"{fmt} {kind} seed {seed} ended with {code}: {log}\n{log.read_text()[-2000:]}")
    found: dict[str, Any] = json.loads(result.read_text())
    print(f"{fmt} {kind} seed {seed}: held-out {found['heldout']:.4f}, {found['seconds']:.0f} s", flush=True)
    return found


def configured(args: argparse.Namespace, seed: int) -> Any:
    from megatron_edge.compose import compose
    from megatron_edge.jobs.preflight import native

    config = compose(
        [f"model.source={args.model_source}", "train=qat", f"train.steps={args.steps}", f"train.seed={seed}",
         f"train.micro_batch={BATCH}", f"train.global_batch={BATCH}", f"train.seq_length_tokens={TOKENS}",
         "data.eval_tokens=32768", f"run_dir={args.out}", *args.overrides]
    )  # fmt: skip
    return replace(config, train=native(config.train))


def prepare_data(args: argparse.Namespace) -> None:
    """Reads and tokenises the text once for all."""
    from megatron_edge.model.source import open_model

    config = configured(args, args.seeds[0])
    load(args, config, open_model(config.model))


def load(args: argparse.Namespace, config: Any, source: Any) -> Any:
    from megatron_edge.train.data import load_data

    length, seed = config.train.seq_length_tokens, config.train.seed
    return load_data(config.data, source.tokenizer(), length, seed, args.out / "data")


def train(args: argparse.Namespace, fmt: str, kind: str, seed: int) -> dict[str, Any]:
    """One run, on one process: the model as it comes, quantised in bf16's place, trained, evaluated."""
    from megatron_edge.contracts import ParallelPlan
    from megatron_edge.jobs.training import DTYPES
    from megatron_edge.model.build import build_model, load_weights
    from megatron_edge.model.source import open_model
    from megatron_edge.runtime.session import open_session
    from megatron_edge.train import graph, step
    from megatron_edge.train.data import BatchPlan
    from megatron_edge.train.loop import fit

    began, config = time.perf_counter(), configured(args, seed)
    source, dtype, losses = open_model(config.model), DTYPES[config.train.precision], []
    data = load(args, config, source)
    with open_session(ParallelPlan(), rank=0, local_rank=0, store=None, timeout_seconds=300, seed=seed) as session:
        model = build_model(source.hf_config, session.plan, dtype, session.device)
        load_weights(model, source.read, source.hf_config, session)
        calibration = data.train.calibration(min(config.quant.calib_size, len(data.train)))
        batches = calibration.split(FORWARD_WINDOWS)
        quantise(
            config, fmt, kind, model, source.hf_config, lambda _: step.run_forward(model, batches, session), args.scales
        )
        # modelopt's kernels are launched one by one, as its users do; ours are recorded, as our jobs do.
        stream = torch.cuda.Stream() if kind == "ours" and torch.cuda.is_available() else None
        wrapped, optimizer = step.make_trainable(model, config.train, dtype, stream=stream)
        heldout = data.heldout.evaluation(config.data.eval_tokens).split(FORWARD_WINDOWS)
        heldout = [batch for batch in heldout if len(batch.tokens) == len(heldout[0].tokens)]
        before = step.evaluate(wrapped, heldout, session)
        fit(
            wrapped, optimizer, BatchPlan(data.train, config.train.global_batch, config.train.micro_batch),
            config.train, session, start_step=0, save=lambda at: None,
            report=lambda metrics: losses.append(metrics["loss_nats_per_token"]),
            gradients=step.forward_backward if stream is None else graph.StepGraph(stream),
        )  # fmt: skip
        after = step.evaluate(wrapped, heldout, session)
    return {
        "format": fmt, "kind": kind, "seed": seed, "losses": losses, "heldout_before": before, "heldout": after,
        "scales": args.scales, "precision": config.train.precision, "seconds": time.perf_counter() - began,
    }  # fmt: skip


def quantise(config: Any, fmt: str, kind: str, model: Any, hf_config: Any, run_data: Any, scales: str) -> None:
    """The decoder's linear layers, both kinds with the same groups: of int4, the largest up to 128 that fits all."""
    from megatron_edge import memory
    from megatron_edge.jobs.contenders import quant_of
    from megatron_edge.quantize import apply, plain_modelopt, policy, written_inputs

    quant, group_size = quant_of(config, fmt), None
    if fmt == "int4":
        columns = [one.shape[1] for one in memory.linears(hf_config)]
        group_size = next(size for size in (128, 64, 32) if not any(count % size for count in columns))
        quant = replace(quant, group_size=group_size)
    if kind == "modelopt":
        plain_modelopt.load_kernels(fmt)
        plain_modelopt.quantize(model, fmt, run_data, group_size)
        if scales == "snapped":
            snap(model, quant)
        return
    plan = policy.make_plan(quant, config.kv, hf_config)
    apply.calibrate(model, plan, apply.insert_quantizers(model, plan), run_data)
    written_inputs.use(model, config.train.fp8_gemm)


def snap(model: Any, quant: Any) -> None:
    """Moves the maxima of modelopt's quantizers, which are of the weights' dtype, to ours in fp32. In place."""
    from megatron_edge.artifact import formats
    from megatron_edge.quantize import apply

    for name, quantizer in apply.enabled_quantizers(model).items():
        amax = quantizer._amax.detach().float()
        if name.endswith(".weight_quantizer"):
            amax = formats.snap_amax(quant.weight, amax)
        else:
            amax = formats.snap_tensor_amax(quant.activation, amax)
        delattr(quantizer, "_amax")  # set in place it would be rounded to that dtype
        quantizer.register_buffer("_amax", amax)


def final_loss(losses: list[float]) -> float:
    return statistics.fmean(losses[-max(1, len(losses) // 10) :])


def verdicts_of(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    formats = dict.fromkeys(run["format"] for run in runs)
    return [verdict([run for run in runs if run["format"] == fmt]) for fmt in formats]


def verdict(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one format's runs. `apart` is ours minus modelopt's mean over seeds, `sigma` modelopt's over seeds, `paired`
    the standard deviation of the difference within a seed; `start` the held-out loss before the first step."""
    start = {kind: statistics.fmean(run["heldout_before"] for run in runs if run["kind"] == kind) for kind in KINDS}
    start["apart"] = start["ours"] - start["modelopt"]
    found: dict[str, Any] = {"format": runs[0]["format"], "holds": True, "start": start}
    measures = {"training": lambda run: final_loss(run["losses"]), "heldout": lambda run: run["heldout"]}
    for what, measure in measures.items():
        ours, theirs = ({run["seed"]: measure(run) for run in runs if run["kind"] == kind} for kind in KINDS)
        sigma = statistics.stdev(theirs.values())
        apart = statistics.fmean(ours.values()) - statistics.fmean(theirs.values())
        found[what] = {
            "ours": statistics.fmean(ours.values()), "modelopt": statistics.fmean(theirs.values()),
            "apart": apart, "sigma": sigma, "paired": statistics.stdev(ours[seed] - theirs[seed] for seed in theirs),
        }  # fmt: skip
        found["holds"] = found["holds"] and abs(apart) <= 2 * sigma
    return found


def sentence(one: dict[str, Any]) -> str:
    parts = [
        f"{what} {one[what]['ours']:.5f} and modelopt's {one[what]['modelopt']:.5f}, apart {one[what]['apart']:+.5f} "
        f"(sigma {one[what]['sigma']:.5f}, of differences within a seed {one[what]['paired']:.5f})"
        for what in ("training", "heldout")
    ]
    within = "within" if one["holds"] else "NOT within"
    start = f"held-out before the first step apart {one['start']['apart']:+.6f}"
    return f"{one['format']}: {'; '.join(parts)}: {within} 2 sigma; {start}"


def draw(runs: list[dict[str, Any]], formats: list[str], path: Path) -> None:
    """Each format's curves, means of ten steps, and below them ours minus modelopt's with the same windows."""
    from matplotlib.figure import Figure

    from megatron_edge.report.pictures import PRINT

    figure = Figure(figsize=(5.5 * len(formats), 6), layout="constrained", dpi=150)
    axes = figure.subplots(2, len(formats), squeeze=False, sharex=True, height_ratios=(2, 1))
    colours = {"ours": PRINT.series, "modelopt": PRINT.second}
    for column, fmt in enumerate(formats):
        curves = {(run["kind"], run["seed"]): smooth(run["losses"]) for run in runs if run["format"] == fmt}
        for kind, seed in sorted(curves, reverse=True):
            first = seed == min(other for _, other in curves)
            axes[0][column].plot(
                curves[kind, seed], color=colours[kind], linewidth=1, linestyle="-" if kind == "ours" else "--",
                label=kind if first else None,
            )  # fmt: skip
        seeds = sorted({seed for _, seed in curves})
        for seed in seeds:
            apart = [a - b for a, b in zip(curves["ours", seed], curves["modelopt", seed], strict=True)]
            axes[1][column].plot(apart, linewidth=1, label=f"seed {seed}")
        axes[0][column].set_title(fmt)
        axes[0][column].set_ylabel("loss, nats per token (mean of 10 steps)")
        axes[1][column].set_ylabel("ours - modelopt")
        axes[1][column].set_xlabel("step")
        axes[1][column].axhline(0, color=PRINT.line, linewidth=1)
        axes[0][column].legend(frameon=False)
        axes[1][column].legend(frameon=False, ncols=-(-len(seeds) // 3), fontsize="small")
    figure.savefig(path)


def smooth(losses: list[float], width: int = 10) -> list[float]:
    return [statistics.fmean(losses[max(0, at - width + 1) : at + 1]) for at in range(len(losses))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
