"""Smaller ranges than the maximum: a percentile of what data quantizers see, or what has the least squared error.

In: enabled quantizers and their maxima, already equal on all ranks that share them; out: the maxima to use instead,
equal there as well. Data is seen by a second run of the calibration text with all quantizers off. Counts and errors are
summed over the ranks that share a maximum: data-parallel and tensor-parallel copies of the same numbers count alike on
every rank, which changes neither a percentile nor where an error is least. Called by apply.calibrate on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_edge.artifact import formats
from megatron_edge.log import track
from megatron_edge.quantize import maxima

BINS = 4096  # of the histogram under a percentile, from 0 to the maximum; it is interpolated inside of one
# Parts of the maximum that are tried, in this order: the first of equal ones is taken.
SHRINK = (1.0, 0.97, 0.94, 0.91, 0.88, 0.84, 0.8, 0.75, 0.7, 0.6, 0.5)


@torch.no_grad()
def percentile(
    quantizers: dict[str, Any], found: dict[str, Tensor], percent: float, run_data: Callable[[], None]
) -> dict[str, Tensor]:
    """The value that `percent` of |x| do not exceed, for each quantizer that takes its maximum from data."""
    counts: dict[str, Tensor] = {}

    def see(name: str, key: str, x: Tensor) -> None:
        amax = found[name].to(x.device)
        places = (x.abs().float() * (BINS / amax.clamp_min(1e-30))).long().clamp_(max=BINS - 1)
        counts[key] += torch.bincount(places.flatten(), minlength=BINS)

    with _watched(quantizers, see) as shared:
        for key, names in shared.items():
            counts[key] = torch.zeros(BINS, dtype=torch.int64, device=found[names[0]].device)
        run_data()
    _sum(counts, shared, quantizers)
    cut = {key: _cut(counts[key], percent) for key in counts}
    return {name: found[name] * cut[key] for key, names in shared.items() for name in names}


def _cut(counts: Tensor, percent: float) -> Tensor:
    """Where `percent` of the counts lie below, as a part of the histogram's width, fp32 []; 1 where nothing is."""
    up_to = counts.cumsum(0).double()
    wanted = up_to[-1] * (percent / 100)
    place = torch.searchsorted(up_to, wanted.reshape(1)).clamp(max=BINS - 1)[0]
    inside = counts[place].double().clamp_min(1)
    part = (place + 1 - (up_to[place] - wanted) / inside) / BINS
    return torch.where(up_to[-1] > 0, part.clamp(0, 1), torch.ones_like(part)).float()


@torch.no_grad()
def least_error_of_data(
    quantizers: dict[str, Any], found: dict[str, Tensor], run_data: Callable[[], None]
) -> dict[str, Tensor]:
    """Of SHRINK x the maximum, what quantises the data with the least squared error."""
    errors: dict[str, Tensor] = {}

    def see(name: str, key: str, x: Tensor) -> None:
        args = quantizers[name].backend_extra_args
        quantise = formats.fake_quantize_kv if args["role"] == "kv" else formats.fake_quantize_input
        for place, part in enumerate(SHRINK):
            amax = formats.snap_tensor_amax(args["format"], found[name] * part)
            errors[key][place] += _squared(quantise(args["format"], x, amax), x).sum()

    with _watched(quantizers, see) as shared:
        for key, names in shared.items():
            errors[key] = torch.zeros(len(SHRINK), dtype=torch.float64, device=found[names[0]].device)
        run_data()
    _sum(errors, shared, quantizers)
    parts = torch.tensor(SHRINK)
    return {
        name: found[name] * parts.to(found[name].device)[errors[key].argmin()]
        for key, names in shared.items()
        for name in names
    }


@torch.no_grad()
def least_error_of_weights(
    quantizers: dict[str, Any], found: dict[str, Tensor], weights: dict[str, Tensor], rank: int
) -> dict[str, Tensor]:
    """The same for weights, by their own error; int4 for each group, int8 for each row. `weights` by parameter name."""
    chosen: dict[str, Tensor] = {}
    names = [name for name, q in quantizers.items() if q.backend_extra_args["role"] == "weight"]
    for name in track(names, "scales of weights", len(names), rank):
        args = quantizers[name].backend_extra_args
        weight, amax, fmt = weights[name.removesuffix("_quantizer")].detach(), found[name], args["format"]
        per_row = formats.scales_per_row(fmt, weight.shape[1], args["group_size"])
        candidates = [formats.snap_amax(fmt, amax * part) for part in SHRINK]
        errors = []
        for candidate in candidates:
            squared = _squared(formats.fake_quantize(fmt, weight, candidate, args["group_size"]), weight)
            errors.append(squared.view(weight.shape[0] * per_row, -1).sum(1) if per_row else squared.sum().reshape(1))
        error = torch.stack(errors)  # [candidates, maxima]
        if not per_row:
            groups = maxima.groups_of(name, "weight")[1]
        else:
            groups = maxima.ranks_with_other_columns(name) if fmt == "int8" else []
        for group in groups:
            dist.all_reduce(error, group=group)
        best = error.argmin(0, keepdim=True)
        chosen[name] = torch.stack([c.reshape(-1) for c in candidates]).gather(0, best)[0].view(amax.shape)
    return chosen


def _squared(quantised: Tensor, x: Tensor) -> Tensor:
    return (quantised.double() - x.double()).square_()


@contextmanager
def _watched(quantizers: dict[str, Any], see: Callable[[str, str, Tensor], None]) -> Iterator[dict[str, list[str]]]:
    """Inside, `see(name, key, x)` is called with every input of a data quantizer. Gives key -> names: those with one
    key share a maximum."""
    data = {name: q for name, q in quantizers.items() if maxima.wants_data(q)}
    shared: dict[str, list[str]] = {}
    handles = []
    for name, quantizer in data.items():
        key = maxima.groups_of(name, quantizer.backend_extra_args["role"])[0]
        shared.setdefault(key, []).append(name)

        def hook(_: Any, inputs: tuple[Tensor, ...], name: str = name, key: str = key) -> None:
            if inputs[0].numel():
                see(name, key, inputs[0].detach())

        handles.append(quantizer.register_forward_pre_hook(hook))
    try:
        yield shared
    finally:
        for handle in handles:
            handle.remove()


def _sum(values: dict[str, Tensor], shared: dict[str, list[str]], quantizers: dict[str, Any]) -> None:
    for key, names in shared.items():
        for group in maxima.groups_of(names[0], quantizers[names[0]].backend_extra_args["role"])[1]:
            dist.all_reduce(values[key], group=group)
