"""Where the tests of our kernels run: on CUDA, or with TRITON_INTERPRET=1 in Triton's interpreter on a CPU."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
ABSENT = ""
if not INTERPRETED and not torch.cuda.is_available():
    ABSENT = "torch.cuda.is_available() is False: these tests compare CUDA kernels"
elif find_spec("triton") is None:
    ABSENT = "triton is not installed"
