"""modelopt as it comes: its own configuration, numerics and layers, for launch/bench.py to compare with.

Nothing of it is trained, saved or exported by this project.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from megatron_edge.model.build import chunks_of
from megatron_edge.quantize import direct
from megatron_edge.runtime import compat

# Presets of quant= that modelopt has too, and its name for them.
CONFIGURATIONS = {
    "fp8": "FP8_DEFAULT_CFG", "int4": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "int4_awq": "INT4_AWQ_CFG",
    "int8_sq": "INT8_SMOOTHQUANT_CFG", "nvfp4": "NVFP4_DEFAULT_CFG", "nvfp4_w4a16": "W4A16_NVFP4_CFG",
    "w4a8_awq": "W4A8_AWQ_BETA_CFG",
}  # fmt: skip
NEEDS_CUDA = ("nvfp4", "nvfp4_w4a16")  # tensor_quant.py:172


def quantize(model: nn.Module, preset: str, forward_loop: Callable[[nn.Module], None]) -> None:
    """Inserts modelopt's quantizers into the linear layers of the decoder and calibrates them. In place; all ranks
    call it."""
    compat.install()
    import modelopt.torch.quantization as mtq

    recipe: dict[str, Any] = copy.deepcopy(getattr(mtq, CONFIGURATIONS[preset]))
    # Our registered embedding would be quantised along with the layers; modelopt knows none.
    recipe["quant_cfg"] += [{"quantizer_name": f"*{part}*", "enable": False} for part in ("embedding", "output_layer")]
    with direct.modelopts_own(), contextlib.redirect_stdout(None):
        for chunk in chunks_of(model):
            mtq.quantize(chunk, recipe, forward_loop)
