"""Bytes of training on each rank, and of the artifact on its device, for a model that need not exist.

python tools/report_theoretical_memory.py --num-layers 24 --hidden-size 1024 --ffn-hidden-size 4096 \\
    --vocab-size 50304 --num-attention-heads 16 --seq-length 1024 --micro-batch-size 4 \\
    --tensor-model-parallel-size 2 --quant-mode int4
python tools/report_theoretical_memory.py --model-source DIR --quant-mode nvfp4_w4a16 --kv-cache int8 --device board_2gb

Arguments are Megatron-LM's where it has them. Runs nothing, reads at most a config.json: seconds on any machine.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_edge import checks, compose, deployment, memory
from megatron_edge.config import RunConfig
from megatron_edge.contracts import InputError, ParallelPlan
from megatron_edge.runtime.topology import describe, plan_of


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model: --model-source, or its sizes")
    model.add_argument("--model-source", help="as model.source=: directory, hub name, GGUF file, Megatron checkpoint")
    model.add_argument("--hf-config", help="as model.hf_config=, beside a Megatron checkpoint")
    for name, default in (
        ("num-layers", None), ("hidden-size", None), ("ffn-hidden-size", None), ("num-attention-heads", None),
        ("num-query-groups", None), ("kv-channels", None), ("vocab-size", None), ("max-position-embeddings", 8192),
        ("num-experts", 0), ("moe-ffn-hidden-size", None), ("moe-router-topk", 2),
    ):  # fmt: skip
        model.add_argument(f"--{name}", type=int, default=default)
    model.add_argument("--untie-embeddings-and-output-weights", action="store_true")
    training = parser.add_argument_group("training")
    for name, default in (
        ("seq-length", 1024), ("micro-batch-size", 1), ("global-batch-size", None), ("world-size", None),
        ("tensor-model-parallel-size", 1), ("pipeline-model-parallel-size", 1),
        ("virtual-pipeline-model-parallel-size", 1), ("expert-model-parallel-size", 1),
        ("expert-tensor-parallel-size", 1), ("context-parallel-size", 1),
    ):  # fmt: skip
        training.add_argument(f"--{name}", type=int, default=default)
    training.add_argument("--sequence-parallel", action="store_true")
    training.add_argument("--use-distributed-optimizer", action="store_true")
    training.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    training.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    training.add_argument("--train", default="qat", help="a preset of train=; qad has a teacher of the same sizes")
    device = parser.add_argument_group("what is stored and served")
    device.add_argument("--quant-mode", default="none", help="a preset of quant=")
    device.add_argument("--embedding", default="bf16", help="format of the embedding and the output layer")
    device.add_argument("--kv-cache", default="none", help="a preset of kv=")
    device.add_argument("--device", default="x86_laptop", help="a preset of device=")
    device.add_argument("--max-batch-size", type=int, default=1)
    device.add_argument("--max-seq-len", type=int, default=2048)
    device.add_argument("--medusa-num-heads", type=int, default=0, help="heads of a draft, in bf16")
    return parser


def main() -> int:
    chosen = arguments().parse_args()
    try:
        config, hf_config = configured(chosen), model_sizes(chosen)
        ranks = chosen.world_size or smallest_world(config)
        layout = plan_of(config.parallel, ranks)
        batch = chosen.global_batch_size or chosen.micro_batch_size * layout.dp * layout.pp
        config = replace(config, train=replace(config.train, global_batch=batch))
        checks.check_config(config)
        checks.check_batches(config, layout)
        checks.check_model_dims(config, hf_config)
        print_training(config, hf_config, layout)
        print_device(config, hf_config, chosen.medusa_num_heads)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def configured(chosen: argparse.Namespace) -> RunConfig:
    return compose.compose(
        [
            f"train={chosen.train}", f"quant={chosen.quant_mode}", f"kv={chosen.kv_cache}", f"device={chosen.device}",
            f"quant.embedding={chosen.embedding}", f"train.precision={chosen.precision}",
            f"train.seq_length_tokens={chosen.seq_length}", f"train.micro_batch={chosen.micro_batch_size}",
            f"parallel.tensor={chosen.tensor_model_parallel_size}",
            f"parallel.pipeline={chosen.pipeline_model_parallel_size}",
            f"parallel.virtual_pipeline={chosen.virtual_pipeline_model_parallel_size}",
            f"parallel.expert={chosen.expert_model_parallel_size}",
            f"parallel.expert_tensor={chosen.expert_tensor_parallel_size}",
            f"parallel.context={chosen.context_parallel_size}",
            f"parallel.sequence={str(chosen.sequence_parallel).lower()}",
            f"parallel.distributed_optimizer={str(chosen.use_distributed_optimizer).lower()}",
            f"parallel.recompute={chosen.recompute}",
            f"export.max_batch_size={chosen.max_batch_size}", f"export.max_seq_len={chosen.max_seq_len}",
        ]
    )  # fmt: skip


def smallest_world(config: RunConfig) -> int:
    parallel = config.parallel
    of_stage = max(parallel.tensor * parallel.context, parallel.expert * parallel.expert_tensor)
    return parallel.pipeline * of_stage


def model_sizes(chosen: argparse.Namespace) -> dict[str, Any]:
    """The checked config.json of --model-source, or of the sizes.

    Raises:
        InputError: a size is missing, or the model cannot be read.
    """
    from megatron_edge.model.hf_config import checked_config
    from megatron_edge.model.source import open_model

    if chosen.model_source:
        arguments = [f"model.source={chosen.model_source}"]
        arguments += [f"model.hf_config={chosen.hf_config}"] if chosen.hf_config else []
        return open_model(compose.compose(arguments).model).hf_config
    for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size"):
        if getattr(chosen, name) is None and not (name == "ffn_hidden_size" and chosen.moe_ffn_hidden_size):
            raise InputError(f"--{name.replace('_', '-')}: is not given; allowed: a number, or --model-source")
    raw: dict[str, Any] = {
        "architectures": ["MixtralForCausalLM" if chosen.num_experts else "LlamaForCausalLM"],
        "num_hidden_layers": chosen.num_layers, "hidden_size": chosen.hidden_size,
        "intermediate_size": chosen.ffn_hidden_size, "num_attention_heads": chosen.num_attention_heads,
        "num_key_value_heads": chosen.num_query_groups or chosen.num_attention_heads,
        "head_dim": chosen.kv_channels or chosen.hidden_size // chosen.num_attention_heads,
        "vocab_size": chosen.vocab_size, "max_position_embeddings": chosen.max_position_embeddings,
        "tie_word_embeddings": not chosen.untie_embeddings_and_output_weights,
    }  # fmt: skip
    if chosen.num_experts:
        raw["intermediate_size"] = chosen.moe_ffn_hidden_size or chosen.ffn_hidden_size
        raw |= {"num_local_experts": chosen.num_experts, "num_experts_per_tok": chosen.moe_router_topk}
    return checked_config(raw, "the sizes given")


def print_training(config: RunConfig, hf_config: dict[str, Any], layout: ParallelPlan) -> None:
    count = memory.count_parameters(hf_config)
    print(f"{count.total:,} parameters ({count.experts:,} in experts); {describe(layout)}")
    teacher = hf_config if config.train.mode == "qad" else None
    names = ("weights", "gradients", "optimizer", "activations", "quantizers", "teacher", "total")
    rows = [
        (f"each rank of stage {stage.stage}", *(mib(getattr(stage, f"{name}_bytes")) for name in names))
        for stage in memory.training_plan(config, hf_config, layout, teacher)
    ]
    print_table((f"training, MiB ({config.train.precision}, recompute {config.parallel.recompute})", *names), rows)


def print_device(config: RunConfig, hf_config: dict[str, Any], medusa_num_heads: int) -> None:
    found = deployment.predict(config, hf_config)
    draft = deployment.medusa_bytes(hf_config, medusa_num_heads)
    needed = replace(found.memory, draft_bytes=draft)
    weights = deployment.runtime_weights(config, hf_config)
    device = config.device
    print()
    print_table(
        (
            f"{device.name} ({device.runtime}), MiB",
            "linears",
            "experts",
            "embedding",
            "head",
            "others",
            "in the artifact",
        ),
        [
            (
                f"weights, {config.quant.name}",
                *map(mib, (weights.linears, weights.experts, weights.embedding + weights.repacked_table)),
                *map(mib, (weights.head, weights.others, weights.artifact)),
            )
        ],
    )
    print()
    parts = deployment.parts_of_plan(needed)
    header = (f"{needed.max_batch} x {needed.max_seq_len} tokens, kv {config.kv.name}, MiB", *parts, "total", "budget")
    totals = (needed.total_bytes, needed.budget_bytes)
    print_table(header, [("needs", *map(mib, parts.values()), *map(mib, totals))])
    print(
        f"\nresident {mib(needed.resident_bytes)} MiB; predicted without a draft: {found.ms_per_token:.2f} ms and "
        f"{found.joules_per_token:.4f} J per token at {found.mode.power_w:g} W; largest batch {found.largest_batch:,}, "
        f"largest context {found.largest_seq_len:,}"
    )
    if needed.total_bytes > needed.budget_bytes:
        print(f"does not fit: {mib(needed.total_bytes - needed.budget_bytes)} MiB too many")


def mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        print(
            "  ".join([row[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(row[1:], widths[1:], strict=True))])
        )


if __name__ == "__main__":
    sys.exit(main())
