"""modelopt as it comes: its own configuration, numerics, layers and kernels, for launch/bench.py and
tools/step_curves.py to compare with.

Nothing of it is saved or exported by this project.
"""

from __future__ import annotations

import contextlib
import copy
import io
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
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
_EXTENSIONS = {
    "fp8": ("get_cuda_ext_fp8",), "int4": ("get_cuda_ext",), "int4_awq": ("get_cuda_ext",),
    "int8_sq": ("get_cuda_ext",), "w4a8_awq": ("get_cuda_ext", "get_cuda_ext_fp8"),
}  # fmt: skip


@dataclass(frozen=True)
class Kernels:
    """What modelopt quantises with on this device. `seconds` is what it took to compile or to find compiled;
    `obstacle` why it is not there: modelopt then computes with plain torch, several operations for one."""

    name: str
    seconds: float
    obstacle: str | None


def load_kernels(preset: str) -> list[Kernels]:
    """Has modelopt compile what `preset` needs, as its first quantised forward on CUDA would (into
    TORCH_EXTENSIONS_DIR); what it could not compile it does not try again in this process. [] without CUDA."""
    if not torch.cuda.is_available():
        return []
    from modelopt.torch.kernels.quantization import gemm
    from modelopt.torch.quantization import extensions

    names: tuple[str, ...] = _EXTENSIONS.get(preset, ())
    found = []
    if preset in NEEDS_CUDA:  # tensor_quant.py:175
        if gemm.IS_AVAILABLE and hasattr(gemm, "fp4_fake_quant_block"):
            found.append(Kernels("Triton", 0.0, None))
        else:
            names = ("get_cuda_ext_mx",)
    for name in names:
        began = time.perf_counter()
        with warnings.catch_warnings(record=True) as said, contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("always")
            loaded = getattr(extensions, name)()
        why = " ".join(str(warning.message) for warning in said if "xtension" in str(warning.message)).split()
        obstacle = None if loaded is not None else " ".join(why[:60]) or "not said"
        found.append(Kernels(name.removeprefix("get_"), time.perf_counter() - began, obstacle))
    return found


def quantize(
    model: nn.Module, preset: str, forward_loop: Callable[[nn.Module], None], group_size: int | None = None
) -> None:
    """Inserts modelopt's quantizers into the linear layers of the decoder and calibrates them. In place; all ranks
    call it. `group_size` is that of int4 weights, None modelopt's own."""
    compat.install()
    import modelopt.torch.quantization as mtq

    recipe: dict[str, Any] = copy.deepcopy(getattr(mtq, CONFIGURATIONS[preset]))
    if group_size is not None:
        _set_group_size(recipe, group_size)
    # Our registered embedding would be quantised along with the layers; modelopt knows none.
    recipe["quant_cfg"] += [{"quantizer_name": f"*{part}*", "enable": False} for part in ("embedding", "output_layer")]
    with direct.modelopts_own(), contextlib.redirect_stdout(io.StringIO()):
        for chunk in chunks_of(model):
            mtq.quantize(chunk, recipe, forward_loop)


def _set_group_size(recipe: dict[str, Any], group_size: int) -> None:
    for entry in recipe["quant_cfg"]:
        settings = entry.get("cfg") or {}
        for one in settings if isinstance(settings, list) else [settings]:
            if one.get("num_bits") == 4 and one.get("block_sizes"):
                one["block_sizes"] = {**one["block_sizes"], -1: group_size}
