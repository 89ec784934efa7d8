"""Where the time of a step goes: torch.profiler's kernels in groups. Called by jobs/bench.py.

Kernels are told apart by their names, those of the optimizer by their time (all after forward and backward), those of
the loss also by the shapes of their operation, which only a step launched kernel by kernel knows: in a CUDA graph what
is not in kernels of the loss alone is among the elementwise ones. On a CPU the same of torch's operations.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_edge.jobs.contenders import UNCACHED, Gradients, Way
from megatron_edge.model.build import chunks_of
from megatron_edge.quantize import apply
from megatron_edge.runtime.session import Session
from megatron_edge.train import step
from megatron_edge.train.data import Batch

# In this order: the first that a name matches.
GROUPS = (
    ("attention", r"flash|fmha|sdpa|attention|cudnn::fusion"),
    ("loss", r"_loss_(rows|gradient)_kernel"),
    ("GEMM", r"gemm|cutlass|nvjet|cublas|xmma|matmul|splitk|aten::(mm|_scaled_mm|addmm|bmm|linear)$"),
    ("norm, SwiGLU, rope", r"_(rms_norm|swiglu|rotate)_"),
    ("fake quantisation", r"_(static|grouped|nvfp4|q8_0|\w+_operand|fp8_values)_kernel|fake_|e4m3|fp4|quant|amax_conv"),
    ("copies and casts", r"memcpy|memset|copy|fill|::zero|catarray|aten::cat"),
    ("sums and norms", r"reduce|aten::(sum|mean|norm)|l2norm"),
)
OTHER, LOSS, OPTIMIZER, GAPS = "elementwise", "loss", "optimizer", "gaps"
TOP = 12
# torch's operation that scaled_dot_product_attention becomes -> what a report calls it; none of them: unfused.
ATTENTION = {
    "aten::_scaled_dot_product_flash_attention": "flash",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "flash",
    "aten::_scaled_dot_product_cudnn_attention": "cudnn",
    "aten::_scaled_dot_product_efficient_attention": "memory-efficient",
}


class _Attentions(TorchDispatchMode):
    """Inside, `found` collects which of ATTENTION run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split(".")[0] in ATTENTION:
            self.found.add(ATTENTION[func.name().split(".")[0]])
        return func(*args, **(kwargs or {}))


def group_of(name: str) -> str:
    return next((group for group, pattern in GROUPS if re.search(pattern, name.lower())), OTHER)


def attention_kernel(chunks: nn.ModuleList, gradients: Gradients, batches: list[Batch], session: Session) -> str:
    """Which of torch's attentions a model's forward and backward run, launched by `gradients`. All ranks call it."""
    with _Attentions() as attentions:
        gradients(chunks, batches, session, step.LABELS)
    return ", ".join(sorted(attentions.found)) or "unfused"


def profile(way: Way, batches: list[Batch], session: Session) -> dict[str, Any]:
    """Milliseconds of one whole step by group, and its longest kernels. All ranks call it."""
    apply.set_weight_cache(way.contender.chunks, way.name != UNCACHED)
    on_cuda = session.device.type == "cuda"

    def gradients(*arguments: Any) -> Any:
        with torch.profiler.record_function("bench: gradients"):
            found = way.gradients(*arguments)
            if on_cuda:
                torch.cuda.synchronize()
        return found

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    if on_cuda:
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities, record_shapes=way.launched != "graph") as profiler:
        began = time.perf_counter()
        step.train_step(way.contender.chunks, way.contender.optimizer, batches, session, gradients=gradients)
        if on_cuda:
            torch.cuda.synchronize()
        wall_ms = (time.perf_counter() - began) * 1e3
    vocabulary = chunks_of(way.contender.chunks)[0].vocab_size
    found = _grouped(list(profiler.events()), vocabulary, on_cuda)
    return {"contender": way.name, "launched": way.launched, "wall_ms": wall_ms, **found}


def _grouped(events: Sequence[Any], vocabulary: int, on_cuda: bool) -> dict[str, Any]:
    ranges = [e.time_range for e in events if e.name == "bench: gradients" and e.device_type == DeviceType.CPU]
    ended = max(one.end for one in ranges)
    wanted = DeviceType.CUDA if on_cuda else DeviceType.CPU
    kernels = [e for e in events if e.device_type == wanted and not _is_a_range(e)]
    milliseconds: dict[str, float] = {}
    longest: dict[str, list[float]] = {}
    for event in kernels:
        duration = (event.time_range.elapsed_us() if on_cuda else event.self_cpu_time_total) / 1e3
        group = group_of(event.name) if event.time_range.start < ended else OPTIMIZER
        milliseconds[group] = milliseconds.get(group, 0.0) + duration
        entry = longest.setdefault(event.name[:120], [0.0, 0])
        entry[0], entry[1] = entry[0] + duration, entry[1] + 1
    for group, duration in _of_loss(events, vocabulary, ended, on_cuda).items():
        milliseconds[group] -= duration
        milliseconds[LOSS] = milliseconds.get(LOSS, 0.0) + duration
    if on_cuda:
        spans = sorted((e.time_range.start, e.time_range.end) for e in kernels)
        milliseconds[GAPS] = _idle(spans) / 1e3
    top = sorted(longest.items(), key=lambda item: -item[1][0])[:TOP]
    return {
        "groups_ms": dict(sorted(milliseconds.items(), key=lambda item: -item[1])),
        "kernels": len(kernels),
        "longest": [{"name": name, "ms": duration, "count": int(count)} for name, (duration, count) in top],
    }


def _is_a_range(event: Any) -> bool:
    """Whether it is no work but a name for a stretch of time, such as the optimizer's step."""
    return event.is_user_annotation or event.name.startswith(("bench: ", "ProfilerStep", "Optimizer."))


def _of_loss(events: Sequence[Any], vocabulary: int, ended: float, on_cuda: bool) -> dict[str, float]:
    """By group, milliseconds of what works on logits, products of matrices apart."""
    found: dict[str, float] = {}
    for event in events:
        if event.device_type != DeviceType.CPU or event.time_range.start >= ended or _is_a_range(event):
            continue
        if not any(shape and shape[-1] == vocabulary for shape in event.input_shapes or ()):
            continue
        parts = [(k.name, k.duration / 1e3) for k in event.kernels]
        for name, duration in parts if on_cuda else [(event.name, event.self_cpu_time_total / 1e3)]:
            group = group_of(name)
            if group != "GEMM":
                found[group] = found.get(group, 0.0) + duration
    return found


def _idle(spans: list[tuple[float, float]]) -> float:
    """Between the first kernel and the last, where none runs."""
    idle, until = 0.0, spans[0][0] if spans else 0.0
    for start, end in spans:
        idle += max(0.0, start - until)
        until = max(until, end)
    return idle


def table(one: dict[str, Any]) -> Any:
    from rich.table import Table

    what = f"{one['format']} {one['shape']} x{one['accumulate']}, {one['contender']}, {one['launched']}"
    shown = Table(title=f"{what}: {one['wall_ms']:.1f} ms under the profiler, {one['kernels']} kernels")
    shown.add_column("group")
    shown.add_column("ms", justify="right")
    for group, duration in one["groups_ms"].items():
        shown.add_row(group, f"{duration:.2f}")
    shown.add_section()
    for kernel in one["longest"]:
        shown.add_row(f"{kernel['name'][:70]} x{kernel['count']}", f"{kernel['ms']:.2f}")
    return shown
