"""Tokens per second, model FLOPs utilisation and peak memory of a training step, layout by layout; and that memory as
megatron_edge/memory.py plans it.

torchrun --nproc-per-node 2 tools/layout_speed.py [--model experts] [--layouts TP2SP PP2 DP2DO CP2] [--quant nvfp4]
python -m torch.distributed.run --nproc-per-node 1 tools/layout_speed.py --recompute full --train qad --quant int4

A model of the 1B class with random weights, bf16, on random tokens; each layout that the started processes suit runs
the same global batch (per data-parallel rank the same, where --weak). One table: the first losses, which every layout
must share but for roundings, and medians over the timed steps. --backend te takes TransformerEngine's layers.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from tools.layout_parity import REFERENCE, layout_plan

DENSE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32768,
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
EXPERTS: dict[str, Any] = DENSE | {
    "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2,
    "num_hidden_layers": 8, "intermediate_size": 4096,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("dense", "experts"), default="dense")
    parser.add_argument("--layouts", nargs="+", default=[REFERENCE], help=f"{REFERENCE}: one process does it all")
    parser.add_argument("--quant", default="none", help="a preset of conf/quant")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--train", choices=("qat", "qad"), default="qat", help="qad: with a teacher of the same sizes")
    parser.add_argument("--backend", choices=("local", "te"), default="local")
    parser.add_argument("--global-batch", type=int, default=8)
    parser.add_argument("--seq-length-tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8, help="the first three are not timed")
    parser.add_argument("--one-by-one", action="store_true", help="no CUDA graph, also where one can be recorded")
    parser.add_argument("--weak", action="store_true", help="--global-batch is that of each data-parallel rank")
    parser.add_argument("--layers", type=int, help="instead of the model's own")
    parser.add_argument("--hidden", type=int, help="a narrower model, to try this on a CPU")
    chosen = parser.parse_args()
    if chosen.steps < 4:
        parser.error(f"--steps {chosen.steps}: the first three are not timed; allowed: four or more")
    from torch.distributed import rendezvous

    store, rank, world = next(iter(rendezvous("env://")))
    rows = [measure(chosen, layout, store, rank) for layout in chosen.layouts]
    if rank == 0:
        print(f"{chosen.model} {chosen.quant} {chosen.backend}, {world} processes, {chosen.seq_length_tokens} tokens")
        print(f"{'layout':20}{'tokens/s':>10}{'per rank':>10}{'MFU':>8}{'GiB':>8}{'planned':>8}  losses")
        for row in rows:
            losses = " ".join(f"{loss:.5f}" for loss in row["losses"][:4])
            name = row["layout"] + (", graph" if row["recorded"] else "")
            print(f"{name:20}{row['speed']:10,.0f}{row['speed'] / row['ranks']:10,.0f}{row['mfu']:8.3f}"
                  f"{row['gib']:8.2f}{row['planned']:8.2f}  {losses}")  # fmt: skip


def measure(chosen: argparse.Namespace, layout: str, store: Any, rank: int) -> dict[str, Any]:
    from torch.distributed import PrefixStore

    from megatron_edge.contracts import ParallelPlan
    from megatron_edge.runtime.session import open_session

    alone = layout == REFERENCE
    plan = ParallelPlan() if alone else layout_plan(layout)
    outcome: dict[str, Any] = {"layout": "one process" if alone else layout, "ranks": plan.world_size}
    if rank < plan.world_size:
        with open_session(
            plan, rank=rank, local_rank=int(os.environ["LOCAL_RANK"]),
            store=PrefixStore(f"{layout}{chosen.backend}", store), timeout_seconds=300, seed=1,
        ) as session:  # fmt: skip
            outcome |= steps(chosen, layout, session)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    store.add(f"done {layout}", 1)
    while store.add(f"done {layout}", 0) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.05)
    return outcome


def steps(chosen: argparse.Namespace, layout: str, session: Any) -> dict[str, Any]:
    from megatron_edge.jobs import contenders
    from megatron_edge.jobs.preflight import records_steps
    from megatron_edge.memory import training_plan
    from megatron_edge.model.build import build_model, load_weights
    from megatron_edge.model.hf_config import checked_config
    from megatron_edge.quantize import apply, policy, written_inputs
    from megatron_edge.train import graph, step
    from megatron_edge.train.distill import Distillation

    raw = dict(DENSE if chosen.model == "dense" else EXPERTS)
    raw |= {"num_hidden_layers": chosen.layers} if chosen.layers else {}
    raw |= {"hidden_size": chosen.hidden, "intermediate_size": 2 * chosen.hidden, "num_attention_heads": 8,
            "vocab_size": 1024} if chosen.hidden else {}  # fmt: skip
    hf_config, length = checked_config(raw, "the benchmark's model"), chosen.seq_length_tokens
    device = session.device
    model = build_model(hf_config, session.plan, torch.bfloat16, device, chosen.recompute, backend=chosen.backend)
    load_weights(model, _random_weights(device), hf_config, session)
    batch = chosen.global_batch * (session.plan.dp if chosen.weak else 1)
    config = configured(chosen, layout, batch, session.plan)
    windows = _random_windows(hf_config["vocab_size"], batch, length)
    mine = windows.split(1)[session.dp_rank :: session.plan.dp]
    plan = policy.make_plan(config.quant, config.kv, hf_config)
    if plan.rules:
        matches = apply.insert_quantizers(model, plan)
        apply.calibrate(model, plan, matches, lambda _: step.run_forward(model, windows.split(1)[:2], session))
    recorded = records_steps(config, hf_config)
    stream = torch.cuda.Stream() if recorded else None
    wrapped, optimizer = step.make_trainable(
        model, config.train, torch.bfloat16, distributed_optimizer=layout.endswith("DO"), stream=stream
    )
    written_inputs.use(wrapped, config.train.fp8_gemm)
    gradients = graph.StepGraph(stream) if stream is not None else step.forward_backward
    step.learning_rate_schedule(optimizer, config.train).step(1)
    objective: step.Objective = step.LABELS
    if chosen.train == "qad":
        teacher = build_model(hf_config, session.plan, torch.bfloat16, device, chosen.recompute, backend=chosen.backend)
        load_weights(teacher, _random_weights(device), hf_config, session)
        objective = Distillation(teacher, config.train, session)
    losses, seconds = [], []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(chosen.steps):
        began = time.perf_counter()
        # ends with a reduction over all ranks
        losses.append(step.train_step(wrapped, optimizer, mine, session, objective, gradients).loss)
        seconds.append(time.perf_counter() - began)
    speed = batch * length / statistics.median(seconds[3:])
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    flop_rate = (contenders.chip() or (math.nan,))[0]
    taught = hf_config if chosen.train == "qad" else None
    planned = max(stage.total_bytes for stage in training_plan(config, hf_config, session.plan, taught))
    return {
        "planned": planned / 2**30,
        "recorded": recorded, "speed": speed, "losses": losses, "gib": max(session.gather(peak)) / 2**30,
        "mfu": speed * contenders.flops_per_token(hf_config, length) / (session.plan.world_size * flop_rate),
    }  # fmt: skip


def _random_windows(vocabulary: int, count: int, length: int) -> Any:
    from megatron_edge.train.data import Batch

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (count, length), generator=generator)
    places = torch.arange(length).expand_as(ids)
    counted = torch.ones_like(ids, dtype=torch.bool)
    return Batch(ids, torch.zeros_like(ids, dtype=torch.int32), places, counted, ids.roll(-1, 1))


def configured(chosen: argparse.Namespace, layout: str, batch: int, plan: Any) -> Any:
    from megatron_edge.compose import compose
    from megatron_edge.jobs.preflight import native

    graph = "false" if chosen.one_by_one else "null"
    config = compose(
        [f"train={chosen.train}", f"train.cuda_graph={graph}", f"quant={chosen.quant}", "train.learning_rate=1e-5",
         "train.warmup_steps=0", "train.min_learning_rate=1e-6", "train.precision=bf16",
         f"train.seq_length_tokens={chosen.seq_length_tokens}", f"train.global_batch={batch}",
         f"parallel.recompute={chosen.recompute}", f"model.backend={chosen.backend}",
         f"parallel.tensor={plan.tp}", f"parallel.pipeline={plan.pp}", f"parallel.context={plan.cp}",
         f"parallel.distributed_optimizer={str(layout.endswith('DO')).lower()}"]
    )  # fmt: skip
    return replace(config, train=native(config.train))


def _random_weights(device: torch.device) -> Any:
    """The same values in every layout: each slice is made from its tensor's name and the place of its rows."""

    def read(name: str, rows: slice | None, cols: slice | None) -> torch.Tensor:
        assert rows is not None
        if cols is None:
            return torch.ones(rows.stop - rows.start, device=device)
        row = torch.arange(rows.start, rows.stop, device=device, dtype=torch.float64)[:, None]
        column = torch.arange(cols.start, cols.stop, device=device, dtype=torch.float64)[None]
        seed = sum(name.encode()) % 997
        noise = torch.frac(torch.sin(row * 12.9898 + column * 78.233 + seed) * 43758.5453)
        return ((noise - 0.5) * 0.07).float()

    return read


if __name__ == "__main__":
    main()
