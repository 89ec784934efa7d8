"""Each warning that compat silences is still given by upstream; one that nothing gives any more is to be deleted."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

from megatron_edge.runtime import compat

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for machines without CUDA")

# The message of each silenced warning and the upstream file that gives it.
WARNING_SOURCES = (
    ("Apex is not installed", "megatron/core/models/gpt/gpt_layer_specs.py"),
    ("Transformer Engine and Apex are not installed", "megatron/core/optimizer/optimizer.py"),
    ("is not tested with current version of modelopt", "modelopt/torch/__init__.py"),
    (
        "GPTModel.sharded_state_dict is not the version ModelOpt patches",
        "modelopt/torch/quantization/plugins/megatron.py",
    ),
    ("initialized but no parallel_state is set", "modelopt/torch/quantization/nn/modules/quant_module.py"),
    ("`load_state_dict` is deprecated and will be removed", "torch/distributed/checkpoint/state_dict_loader.py"),
    ("`torch.jit.script` is deprecated", "torch/jit/_script.py"),
    ("`torch.distributed.all_gather_into_tensor` is deprecated", "torch/distributed/distributed_c10d.py"),
    ("`torch.distributed.reduce_scatter_tensor` is deprecated", "torch/distributed/distributed_c10d.py"),
    ("`sequence_parallel` is set to `True`, but tensor model parallel size", "megatron/core/tensor_parallel/layers.py"),
)
ON_CUDA_ONLY = "Attempting to run cuBLAS"  # in CUDABlas.cpp, which a CPU build of torch lacks


def test_each_silenced_warning_is_still_given() -> None:
    packages = Path(torch.__file__).parents[1]
    silenced = [re.compile(message) for message, _ in compat._HARMLESS_WARNINGS]
    sources = {text: (packages / file).read_text() for text, file in WARNING_SOURCES}
    joined = {text: re.sub(r'"\s*\n\s*f?"|\'\s*\n\s*f?\'', "", source) for text, source in sources.items()}
    assert [text for text, source in joined.items() if text not in source] == []
    covered = {i for i, pattern in enumerate(silenced) if pattern.pattern.startswith(ON_CUDA_ONLY)}
    covered |= {i for i, pattern in enumerate(silenced) for text, _ in WARNING_SOURCES if _covers(pattern, text)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.set_warn_always(True)  # else it may have been given already, once per process
        _ = torch.ones(2, requires_grad=True)[:1].grad
        torch.set_warn_always(False)
    covered |= {i for i, pattern in enumerate(silenced) for one in caught if pattern.match(str(one.message))}
    assert covered == set(range(len(silenced))), "a silenced warning that nothing gives any more"


def _covers(pattern: re.Pattern[str], text: str) -> bool:
    """Whether the warning that holds `text`, with what upstream puts around it, is silenced."""
    in_full = f"Distributed training is {text} for <class QuantMLP>", f"{text} in future versions"
    starts = [text, f"transformers version 5 {text}", *in_full]
    return any(pattern.match(start) for start in starts)
