"""Every change that we make to megatron-core and modelopt, each with its reason and its test.

`install()` runs once per process, before a model is built. On a machine with CUDA only the modelopt part does
anything; on a CPU the Megatron part gives each upstream module that names CUDA its own view of `torch`, in which
those names mean the CPU. Nothing of the real `torch` is changed. Tests: tests/unit/test_compat.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import types
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megatron_edge.contracts import disk_error
from megatron_edge.runtime import main_weights, random_states, weight_gradients

MEGATRON_VERSIONS = ("0.16.1",)
MODELOPT_VERSIONS = ("0.47.0",)

# Modules of megatron.core 0.16.1 that name a CUDA device, stream or random state on our path.
_MODULES_NAMING_CUDA = (
    "tensor_parallel.layers",
    "tensor_parallel.mappings",
    "pipeline_parallel.schedules",
    "pipeline_parallel.p2p_communication",
    "distributed.param_and_grad_buffer",
    "optimizer.optimizer",
    "transformer.moe.router",
    "transformer.moe.token_dispatcher",
    "utils",
    "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.state_dict_saver",
)
_FACTORIES = (
    "zeros",
    "ones",
    "empty",
    "full",
    "tensor",
    "arange",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
)


class _NoStream:
    """A CUDA stream or event on a machine without one: work is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def record_event(self, event: Any = None) -> _NoStream:
        return self

    def wait(self, stream: Any = None) -> None: ...


class _CudaOnCpu(types.ModuleType):
    """`torch.cuda` as those modules see it on a CPU; anything not listed is torch's own."""

    Stream = Event = _NoStream

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def synchronize(device: Any = None) -> None: ...

    @staticmethod
    def current_stream(device: Any = None) -> _NoStream:
        return _NoStream()

    default_stream = current_stream

    @staticmethod
    def stream(stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class _TorchOnCpu(types.ModuleType):
    """`torch` as those modules see it on a CPU: `device="cuda"` makes CPU tensors."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CudaOnCpu("torch.cuda")
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


class _CpuTensorsAsCuda(torch.overrides.TorchFunctionMode):
    """Tensor.type() answers 'torch.cuda.FloatTensor' for CPU tensors, with which upstream compares
    (optimizer.py:671), and Tensor.cuda() gives the tensor itself (language_module.py:244)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _with_cpu_as_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _CpuTensorsAsCuda():
            return function(*args, **kwargs)

    return call


def _require(package: str, allowed: tuple[str, ...]) -> None:
    found = version(package)
    if found not in allowed:
        raise RuntimeError(
            f"megatron_edge/runtime/compat.py was written for {package} {', '.join(allowed)}; found {found}. "
            "Read that release's changes, run tests/unit/test_compat.py, then add it to the list."
        )


# What upstream says that a user cannot act on: (start of the message, why it does not matter here).
_HARMLESS_WARNINGS = (
    (r"Apex is not installed", "the log has one line on accelerators"),
    (r"Transformer ?Engine and Apex are not installed", "the same"),
    (r"transformers .* is not tested with current version of modelopt", "modelopt's Hugging Face path is not used"),
    (r"GPTModel\.sharded_state_dict is not the version ModelOpt patches", "we save quantizers ourselves"),
    (
        r"Distributed training is initialized but no parallel_state is set .*QuantMLP",
        "an MLP holds no quantizer itself",
    ),
    (r"`torch.distributed.reduce_scatter_tensor` is deprecated", "Megatron's call of torch"),
    (r"The \.grad attribute of a Tensor that is not a leaf", "the distributed optimizer's parts of a weight"),
    (
        r"`sequence_parallel` is set to `True`, but tensor model parallel size",
        "experts, which have a size of their own",
    ),
    (r"`load_state_dict` is deprecated and will be removed in future versions", "Megatron's call of torch"),
    (r"Attempting to run cuBLAS, but there was no current CUDA context", "torch then makes the context itself"),
    (r".*all_gather_into_tensor.* is deprecated", "Megatron's call of torch"),
    (r"`torch\.jit\.script` is (deprecated|not supported)", "upstream's kernels, unused here"),
)


def _silence_harmless_warnings() -> None:
    for message, _ in _HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


@functools.cache
def install() -> None:
    """Applies every patch; calling it again does nothing.

    Raises:
        RuntimeError: a version of megatron-core or modelopt that the patches were not written for.
    """
    _require("megatron-core", MEGATRON_VERSIONS)
    _require("nvidia-modelopt", MODELOPT_VERSIONS)
    _silence_harmless_warnings()
    if torch.cuda.is_available():
        random_states.leave_out_of_graphs()
    else:
        _megatron_on_cpu()
    _write_checkpoints_in_process()
    _full_disks_are_told_to_all_ranks()
    main_weights.copy_in_one_launch()
    weight_gradients.add_in_product()
    _experts_without_transformer_engine()
    _experts_keep_no_graph()
    _modelopt_exception_safe()
    _modelopt_leaves_experts_alone()
    _modelopt_has_no_extra_state()


def _megatron_on_cpu() -> None:
    proxy = _TorchOnCpu()
    for name in _MODULES_NAMING_CUDA:
        importlib.import_module("megatron.core." + name).torch = proxy  # type: ignore[attr-defined]
    random_states.keep_on_cpu()
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.optimizer import optimizer

    LanguageModule.setup_embeddings_and_output_layer = _with_cpu_as_cuda(
        LanguageModule.setup_embeddings_and_output_layer
    )
    mixed = optimizer.Float16OptimizerWithFloat16Params
    mixed.__init__ = _with_cpu_as_cuda(mixed.__init__)
    _distributed_optimizer_on_cpu()
    _experts_on_gloo()


def _distributed_optimizer_on_cpu() -> None:
    """distrib_optimizer.py:361/420/582 compare Tensor.type() with torch.cuda's."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    DistributedOptimizer.__init__ = _with_cpu_as_cuda(DistributedOptimizer.__init__)


def _experts_on_gloo() -> None:
    """moe_utils.py:1093 turns split sizes into numbers only where they are on CUDA, and mappings.py:149 gathers
    uneven parts, which gloo refuses: they are padded, gathered, and cut again."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher

    def on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = on_host
    even = mappings._gather_along_first_dim

    def gather(x: torch.Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return even(x, group, None, use_global_buffer)
        counts = [int(size) for size in sizes]
        padded = x.new_zeros((max(counts), *x.shape[1:]))
        padded[: x.shape[0]] = x
        parts = even(padded, group, None, False).chunk(len(counts)) if max(counts) else [x] * len(counts)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    mappings._gather_along_first_dim = gather


def _experts_keep_no_graph() -> None:
    """A dispatcher of tokens keeps the router's probabilities (token_dispatcher.py:610), and with them the autograd
    graph of the last micro-batch, whose nodes hold the model's hooks where Python's garbage collector does not look: a
    trained model with experts would never be freed."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    upstream = MoELayer.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = upstream(self, *args, **kwargs)
        kept = self.token_dispatcher.__dict__
        for name in [name for name, value in kept.items() if torch.is_tensor(value) and value.grad_fn is not None]:
            kept[name] = None
        return found

    MoELayer.forward = forward


def _experts_without_transformer_engine() -> None:
    """moe_utils.py:1192 asks for a name that is bound only where TransformerEngine is installed."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _modelopt_exception_safe() -> None:
    """utils/core_utils.py:383 replaces functions of megatron without try/finally: one failed quantised forward
    would leave every later model of the process quantised by a dead module."""
    from modelopt.torch.quantization.plugins import custom

    @contextlib.contextmanager
    def replace_function(package: Any, name: str, new: Any, og_func_cache_name: str | None = None) -> Iterator[None]:
        kept_as = og_func_cache_name or "_" + name
        old = getattr(package, name)
        setattr(package, kept_as, old)
        setattr(package, name, new)
        try:
            yield
        finally:
            setattr(package, name, old)
            if hasattr(package, kept_as):
                delattr(package, kept_as)

    custom.replace_function = replace_function


def _modelopt_leaves_experts_alone() -> None:
    """plugins/megatron.py:741 refuses experts under expert and tensor parallelism together; what it does there, sharing
    maxima, quantize/apply.py does for every layout. The experts' linear layers get their quantizers all the same."""
    import modelopt.torch.quantization  # its plugins register when it is imported
    from megatron.core.transformer.moe.experts import SequentialMLP
    from modelopt.torch.quantization.nn import QuantModuleRegistry

    assert modelopt.torch.quantization is not None
    QuantModuleRegistry.unregister(SequentialMLP)


def _modelopt_has_no_extra_state() -> None:
    """Checkpoints hold quantizers in our own form (quantize/state.py). opt/plugins/megatron.py:86 synchronises a GPU
    for modelopt's, and gpt_model.py:825 asserts that a quantised output layer has none."""
    from modelopt.torch.quantization.plugins import megatron as upstream

    upstream.quant_module_get_extra_state = functools.wraps(upstream.quant_module_get_extra_state)(lambda module: {})


def _write_checkpoints_in_process() -> None:
    """filesystem_async.py starts a manager process (which imports the launch script again) and forks a process with
    live communication threads for every save. Ours are synchronous: the same writer is called in this process."""
    import queue

    from megatron.core.dist_checkpointing.strategies import filesystem_async as upstream

    writer = upstream.FileSystemWriterAsync

    def write(transforms: Any, use_msc: bool, rank: int, buckets: list[Any], results: Any) -> None:
        written: dict[int, Any] = {}
        for index, bucket in enumerate(buckets):
            answer: queue.Queue[Any] = queue.Queue()
            turn: queue.Queue[Any] = queue.Queue()
            turn.put(index)
            writer.write_preloaded_data(
                transforms,
                local_proc_idx=index,
                write_bucket=bucket,
                results_queue=answer,
                count_queue=turn,
                use_fsync=True,
            )
            _, outcome = answer.get_nowait()
            if isinstance(outcome, Exception):
                _refused_writes.append(outcome)
                results.put(outcome)  # upstream tells all ranks, once they have all come to an end
                return
            written[index] = outcome
        results.put(written)

    writer.write_preloaded_data_multiproc = staticmethod(write)
    upstream._get_write_results_queue = queue.Queue


_refused_writes: list[Exception] = []


def take_refused_writes() -> list[Exception]:
    """What this rank could not write in dist_checkpointing.save since the last call."""
    taken = list(_refused_writes)
    _refused_writes.clear()
    return taken


def _full_disks_are_told_to_all_ranks() -> None:
    """Three files are rank 0's alone, and where the disk refuses one of them the other ranks wait for ever in the
    collective after it. Here rank 0 keeps the error for `take_refused_writes` and goes on. common.pt is written through
    Python's own file, since torch's (common.py:58) does not say why it failed."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import common, filesystem_async

    def save_common(self: Any, state: Any, checkpoint_dir: Any) -> None:
        if torch.distributed.get_rank() == 0:
            with (Path(checkpoint_dir) / common.COMMON_STATE_FNAME).open("wb") as stream:
                torch.save(state, stream)

    def remembered(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except Exception as error:
                if disk_error(error) is None:
                    raise
                _refused_writes.append(error)

        return call

    common.TorchCommonSaveStrategy.save_common = remembered(save_common)
    writer = filesystem_async.FileSystemWriterAsync
    writer.finish = remembered(writer.finish)
    serialization.save_config = remembered(serialization.save_config)
