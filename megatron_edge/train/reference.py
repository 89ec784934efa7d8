"""What the trained, fake-quantised model itself says, from its own shards: the yardstick that verify holds the
artifact against. Hashes of every weight as the model's forward uses it, its scales, and its losses and logits on
held-out windows. Nothing here goes through the checkpoint or the export code."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_edge.artifact import formats
from megatron_edge.artifact.store import save_tensors
from megatron_edge.contracts import QuantPlan
from megatron_edge.families import dims_of, find_rule, pieces, rules_of
from megatron_edge.model.build import named_shards, tensor_shard
from megatron_edge.quantize.apply import enabled_quantizers
from megatron_edge.quantize.policy import rule_for
from megatron_edge.runtime.session import Session
from megatron_edge.train.data import Batch
from megatron_edge.train.step import token_logits, token_losses

log = logging.getLogger("megatron_edge")

LOGIT_WINDOWS = 2


def sha256(tensor: Tensor) -> str:
    """Of the contiguous bytes of a tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


@torch.no_grad()
def round_unquantised(model: nn.Module) -> None:
    """Rounds what no weight quantizer covers (norms, often embeddings) to bf16, in place: the artifact stores it so,
    and the model that is measured shall be the one that is shipped. A model trained in bf16 does not change."""
    quantizers = enabled_quantizers(model)
    for name, param in named_shards(model).items():
        if name.removesuffix(".weight") + ".weight_quantizer" not in quantizers:
            param.data.copy_(param.data.to(torch.bfloat16))


def write_reference(
    directory: Path,
    model: nn.Module,
    hf_config: dict,
    plan: QuantPlan,
    session: Session,
    batches: list[Batch],
    losses: dict[str, float],
) -> float:
    """Writes `directory`/reference.json and reference.safetensors. All ranks call it; rank 0 writes.

    `batches` are held-out micro-batches of equal size; `losses` are the evaluations so far, in nats per token, to which
    this adds "trained".

    Returns:
        That loss, equal on all ranks.
    """
    round_unquantised(model)
    dtype = next(model.parameters()).dtype
    mine: dict[str, Any] = {"weights": [], "activations": {}, "kv": {}}
    mine["weights"] = _weight_slices(model, hf_config, plan, session)
    mine["activations"], mine["kv"] = _static_scales(model, hf_config)
    nll = token_losses(model, batches, session)
    logit_batches = Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True))).split(1)[:LOGIT_WINDOWS]
    logits = token_logits(model, logit_batches, session)
    speaks = session.is_last_stage and session.tp_rank == 0 and session.holds_first_copy
    mine["nll"], mine["logits"] = (nll, logits) if speaks else (None, None)
    losses["trained"] = _mean_loss(nll if speaks else None, batches, session)
    gathered: list[Any] = [None] * session.plan.world_size
    dist.gather_object(mine, gathered if session.rank == 0 else None, dst=0)
    if session.rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory, gathered, batches, dtype, plan, losses)
    return losses["trained"]


def _mean_loss(nll: Tensor | None, batches: list[Batch], session: Session) -> float:
    """Mean over counted tokens of the one rank that has `nll`, on every rank."""
    total = torch.zeros((), dtype=torch.float64)
    counted = torch.cat([batch.loss_mask for batch in batches])
    if nll is not None:
        total += nll.double()[counted].sum()
    total = total.to(session.device)
    dist.all_reduce(total)
    return float(total) / max(int(counted.sum()), 1)


def _write(
    directory: Path, gathered: list[Any], batches: list[Batch], dtype: torch.dtype, plan: QuantPlan, losses: dict
) -> None:
    report: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "weights": [entry for part in gathered for entry in part["weights"]],
        "activations": {k: v for part in gathered for k, v in part["activations"].items()},
        "kv": {"format": plan.kv, "layers": {k: v for part in gathered for k, v in part["kv"].items()}},
        "losses": losses,
    }
    spoken = next(part for part in gathered if part["nll"] is not None)
    windows = Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    save_tensors(
        directory / "reference.safetensors",
        {
            "tokens": windows.tokens,
            "documents": windows.documents,
            "positions": windows.positions,
            "loss_mask": windows.loss_mask,
            "nll": spoken["nll"],
            "logits": spoken["logits"],
        },
    )
    (directory / "reference.json").write_text(json.dumps(report, indent=1))


@torch.no_grad()
def _weight_slices(model: nn.Module, hf_config: dict, plan: QuantPlan, session: Session) -> list[dict[str, Any]]:
    """One entry for each part of a Hugging Face tensor that this shard holds; replicated ones once per model, a tied
    embedding once per stage that holds it."""
    rules, dims = rules_of(hf_config), dims_of(hf_config)
    quantizers = enabled_quantizers(model)
    entries = []
    for name, param in named_shards(model).items():
        rule = find_rule(name, rules)
        assert rule is not None
        speaks = session.edp_rank == 0 if rule.is_expert else session.holds_first_copy
        tp_rank, tp = tensor_shard(rule, session)
        if not speaks or (rule.split_axis is None and tp_rank > 0):
            continue
        quantizer = quantizers.get(name.removesuffix(".weight") + ".weight_quantizer")
        used = param.detach() if quantizer is None else quantizer(param.detach())
        chosen = rule_for(name.removesuffix(".weight"), plan)
        for piece in pieces(rule, dims, tp_rank=tp_rank, tp=tp):
            rows = slice(*piece.shard_rows)
            entry = {
                "tensor": piece.target,
                "rows": list(piece.rows),
                "cols": list(piece.cols) if piece.cols else None,
                "format": str(param.dtype).removeprefix("torch."),
                "dequantized_sha256": sha256(used[rows]),
            }
            if quantizer is not None and chosen is not None:
                amax = quantizer._amax
                if formats.scales_per_row(chosen.weight, param.shape[1], chosen.group_size):
                    amax = amax.reshape(param.shape[0], -1)[rows]
                entry |= _code_hashes(chosen, param.detach()[rows], amax)
            entries.append(entry)
    return entries


def _code_hashes(chosen: Any, weight: Tensor, amax: Tensor) -> dict[str, Any]:
    encoded = formats.encode(chosen.weight, weight, amax, chosen.group_size)
    codes = formats.unpacked_codes(encoded)
    return {
        "format": chosen.weight,
        "group_size": chosen.group_size,
        "codes_sha256": sha256(codes),
        "scale_sha256": sha256(encoded.scale),
        "global_scale": None if encoded.global_scale is None else float(encoded.global_scale),
    }


def _static_scales(model: nn.Module, hf_config: dict) -> tuple[dict[str, Any], dict[str, Any]]:
    """Input scales by Hugging Face linear, KV scales by layer, of this pipeline stage."""
    rules = rules_of(hf_config)
    activations: dict[str, Any] = {}
    kv: dict[str, dict[str, float]] = {}
    for name, quantizer in enabled_quantizers(model).items():
        if not hasattr(quantizer, "_amax"):
            continue
        module, role = name.rsplit(".", 1)
        kind = quantizer.backend_extra_args["format"]
        if role == "input_quantizer":
            rule = find_rule(module + ".weight", rules)
            assert rule is not None
            scale = float(formats.tensor_scale(kind, quantizer._amax))
            for target in rule.targets:
                activations[target.removesuffix(".weight")] = {"format": kind, "input_scale": scale}
        elif role in ("k_bmm_quantizer", "v_bmm_quantizer"):
            layer = module.split(".")[2]
            kv.setdefault(layer, {})[f"{role[0]}_scale"] = float(formats.tensor_scale(kind, quantizer._amax))
    return activations, kv
