"""Where the tests of our kernels run: on CUDA, or with TRITON_INTERPRET=1 in Triton's interpreter on a CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
ABSENT = ""
if INTERPRETED and find_spec("triton") is not None:
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fused(_: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        """fp32 x * y + z rounded once, as hardware does: the interpreter (3.6) rounds the product too."""
        total = x.data.astype("float64") * y.data + z.data
        return TensorHandle(total.astype(z.data.dtype), z.dtype.scalar)

    InterpreterBuilder.create_fma = fused
if not INTERPRETED and not torch.cuda.is_available():
    ABSENT = "torch.cuda.is_available() is False: these tests compare CUDA kernels"
elif find_spec("triton") is None:
    ABSENT = "triton is not installed"


def timed(call: Callable[[], Any], together: int = 20, repeats: int = 10) -> float:
    """Microseconds of a call on the device, of `together` in a CUDA graph: the host takes as long as a norm."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(together):
            call()
    graph.replay()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        graph.replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / (repeats * together) * 1e6
