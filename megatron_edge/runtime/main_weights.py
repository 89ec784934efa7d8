"""Megatron's copy of updated fp32 main weights to the model's, which it does tensor by tensor, in one launch for all.

A part of compat.py, which installs it. Tests: tests/unit/test_update.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def copy_in_one_launch() -> None:
    """optimizer.py:76 has no kernel for bf16 and falls back to a loop; distrib_optimizer.py:2450 has a loop too, in
    which a fp32 parameter, whose part is its own main weight, is copied onto itself."""
    from megatron.core.optimizer import optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    def copy(self: Any) -> None:
        model, main = weights_and_mains(self)
        if model:
            torch._foreach_copy_(model, main)

    optimizer.Float16OptimizerWithFloat16Params._copy_main_params_to_model_params = copy
    DistributedOptimizer._copy_main_params_to_model_params = copy


def weights_and_mains(inner: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The bf16 weights of one of Megatron's optimizers, or this rank's parts of them, and the fp32 main weight of each,
    of the same shape. None where the model computes in fp32."""
    if inner.is_stub_optimizer or not hasattr(inner, "_get_model_and_main_params_data_float16"):
        return [], []
    return inner._get_model_and_main_params_data_float16()
