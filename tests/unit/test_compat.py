"""Every patch of upstream is needed (without it upstream fails as its comment says) and gives plain torch's results.

A test that fails with "did not raise" says that upstream has mended the fault: delete the patch.
"""

from __future__ import annotations

import errno
import importlib
import inspect
import json
import multiprocessing.process
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_megatron import megatron_twin, random_batches, random_experts, random_llama

from megatron_edge import checkpoint
from megatron_edge.compose import compose
from megatron_edge.contracts import QuantPlan, disk_error
from megatron_edge.runtime import compat
from megatron_edge.train import step

REPOSITORY = Path(__file__).resolve().parents[2]
NO_CUDA = "Torch not compiled with CUDA enabled|Found no NVIDIA driver|requires CUDA support"
TRAIN = compose(["train.clip_norm=0.01", "train.learning_rate=0.01", "train.weight_decay=0.1"]).train
NO_QUANTIZERS = QuantPlan("none", "none", "none", 0, "max")

# Modules of megatron.core that are given another view of torch: seen to fail in one process, and in two.
IN_ONE_PROCESS = (
    "pipeline_parallel.schedules",
    "distributed.param_and_grad_buffer",
    "optimizer.optimizer",
    "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.state_dict_saver",
)
WITH_EXPERTS = ("transformer.moe.router", "transformer.moe.token_dispatcher")
IN_TWO_PROCESSES = (
    "utils",
    "tensor_parallel.layers",
    "tensor_parallel.mappings",
    "pipeline_parallel.p2p_communication",
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for machines without CUDA")


@pytest.fixture
def monkeypatch_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Takes the patch of one module away, for one test."""
    return lambda name: monkeypatch.setattr(importlib.import_module(name), "torch", torch)


def whole_job(session: Any, directory: Path, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Evaluate, train a step, save and load: (loss, gradient norm) of the step."""
    model = megatron_twin(random_llama(), session, dtype)
    step.evaluate(model, random_batches(), session)
    wrapped, optimizer = step.make_trainable(model, TRAIN, dtype)
    result = step.train_step(wrapped, optimizer, random_batches(), session)
    checkpoint.save_checkpoint(directory, 1, wrapped, optimizer, NO_QUANTIZERS, session, extra={}, keep=1)
    found = checkpoint.find_newest(directory, session)
    assert found is not None
    checkpoint.load_checkpoint(found, wrapped, optimizer, NO_QUANTIZERS, session)
    return result.loss, result.gradient_norm


# ---------------------------------------------------------------- each is needed


def test_every_patched_module_has_a_test() -> None:
    assert sorted(compat._MODULES_NAMING_CUDA) == sorted((*IN_ONE_PROCESS, *WITH_EXPERTS, *IN_TWO_PROCESSES))


@pytest.mark.parametrize("name", IN_ONE_PROCESS)
def test_one_process_fails_without(name: str, session: Any, tmp_path: Path, monkeypatch_torch) -> None:
    whole_job(session, tmp_path / "with")
    monkeypatch_torch("megatron.core." + name)
    with pytest.raises((AssertionError, RuntimeError), match=NO_CUDA):
        whole_job(session, tmp_path / "without")


def experts_job(session: Any, *, distributed_optimizer: bool = False) -> float:
    """Gradient norm of a step of a model with experts."""
    wrapped, optimizer = step.make_trainable(
        random_experts(session), TRAIN, torch.float32, distributed_optimizer=distributed_optimizer
    )
    return step.train_step(wrapped, optimizer, random_batches(), session).gradient_norm


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_experts_fail_without(name: str, session: Any, monkeypatch_torch) -> None:
    assert experts_job(session) > 0
    monkeypatch_torch("megatron.core." + name)
    if name.endswith("token_dispatcher"):  # made once per process
        from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

        MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = None
    with pytest.raises((AssertionError, RuntimeError), match=NO_CUDA):
        experts_job(session)


def test_experts_miss_transformer_engines_product_without(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.transformer.moe import moe_utils

    monkeypatch.delattr(moe_utils, "te_general_gemm")
    with pytest.raises(NameError, match="te_general_gemm"):
        experts_job(session)


def test_experts_split_sizes_stay_tensors_without(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    sizes = torch.tensor([3, 4])
    assert token_dispatcher.maybe_move_tensor_to_cpu(sizes, as_numpy=True).tolist() == [3, 4]
    assert isinstance(moe_utils.maybe_move_tensor_to_cpu(sizes, as_numpy=True), torch.Tensor), "upstream converts now"


def test_modelopt_would_share_experts_maxima_itself_without() -> None:
    from megatron.core.transformer.moe.experts import SequentialMLP
    from modelopt.torch.quantization.nn import QuantModuleRegistry
    from modelopt.torch.quantization.plugins.megatron import _MegatronSequentialMLP

    compat.install()
    assert QuantModuleRegistry.get(SequentialMLP) is None
    assert "TP+EP is not supported" in inspect.getsource(_MegatronSequentialMLP._setup)


def test_the_distributed_optimizer_asks_for_cuda_tensors_without(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    assert experts_job(session, distributed_optimizer=True) == experts_job(session)
    monkeypatch.setattr(DistributedOptimizer, "__init__", DistributedOptimizer.__init__.__wrapped__)
    with pytest.raises(TypeError, match=r"torch\.cuda\."):
        experts_job(session, distributed_optimizer=True)


@pytest.mark.parametrize(
    ("module", "reason"), [("*linear_fc1", NO_CUDA), ("embedding.word_embeddings", "Boolean value of Tensor")]
)
def test_a_quantised_model_cannot_be_saved_without(
    session: Any, monkeypatch: pytest.MonkeyPatch, module: str, reason: str
) -> None:
    """modelopt's opt/plugins/megatron.py:86 asks for a GPU, and past it megatron's gpt_model.py:825 asserts."""
    from modelopt.torch.opt.plugins import megatron as states
    from modelopt.torch.quantization.plugins import megatron as upstream

    from megatron_edge.contracts import QuantRule
    from megatron_edge.quantize import apply

    def state() -> Any:
        model = megatron_twin(random_llama(), session)
        apply.insert_quantizers(
            model, QuantPlan("fp8", "none", "none", 0, "max", (QuantRule(module, "fp8", "none", 0),))
        )
        return model[0].sharded_state_dict()

    assert state()
    theirs = upstream.quant_module_get_extra_state.__wrapped__
    monkeypatch.setattr(upstream, "quant_module_get_extra_state", theirs)
    if reason != NO_CUDA:
        monkeypatch.setattr(states.torch.cuda, "synchronize", lambda: None)
    with pytest.raises((AssertionError, RuntimeError), match=reason):
        state()


def test_a_full_disk_is_kept_for_all_ranks_to_compare(session: Any, tmp_path: Path) -> None:
    """/dev/full refuses every byte. torch.save to a path does not say why it failed."""
    from megatron.core.dist_checkpointing.strategies import common

    (tmp_path / common.COMMON_STATE_FNAME).symlink_to("/dev/full")
    with pytest.raises(RuntimeError) as upstream:
        torch.save({"a": 1}, tmp_path / common.COMMON_STATE_FNAME)
    assert disk_error(upstream.value) is None
    assert compat.take_refused_writes() == []
    common.TorchCommonSaveStrategy("torch", 1).save_common({"a": 1}, tmp_path)
    (kept,) = compat.take_refused_writes()
    reason = disk_error(kept)
    assert reason is not None and reason.errno == errno.ENOSPC


def test_random_states_need_cuda_without() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    with pytest.raises((AssertionError, RuntimeError), match=NO_CUDA):
        CudaRNGStatesTracker().add("any", 1)


def test_the_bf16_optimizer_asks_for_cuda_tensors_without(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    model = megatron_twin(random_llama(), session, torch.bfloat16)
    monkeypatch.setattr(
        Float16OptimizerWithFloat16Params, "__init__", Float16OptimizerWithFloat16Params.__init__.__wrapped__
    )
    with pytest.raises(TypeError, match=r"torch\.cuda\."):
        step.make_trainable(model, TRAIN, torch.bfloat16)


def test_a_failed_quantised_forward_poisons_the_process_without() -> None:
    from modelopt.torch.quantization.plugins import custom
    from modelopt.torch.quantization.utils import replace_function as upstream

    compat.install()
    assert custom.replace_function is not upstream
    for replace, is_restored in ((upstream, False), (custom.replace_function, True)):
        package = types.SimpleNamespace(function=len)
        with pytest.raises(ValueError, match="in the forward"), replace(package, "function", max):
            raise ValueError("in the forward")
        assert (package.function is len) == is_restored
        assert hasattr(package, "_function") != is_restored


def test_saving_starts_processes_without(session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the start method of every process; upstream's own functions come from a second copy of its module."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    started = []
    start = multiprocessing.process.BaseProcess.start
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", lambda self: (started.append(self), start(self)))
    patched = whole_job(session, tmp_path / "with")
    assert not started
    spec = importlib.util.find_spec(filesystem_async.__name__)
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    writer, name = filesystem_async.FileSystemWriterAsync, "write_preloaded_data_multiproc"
    monkeypatch.setattr(writer, name, staticmethod(getattr(fresh.FileSystemWriterAsync, name)))
    monkeypatch.setattr(filesystem_async, "_get_write_results_queue", fresh._get_write_results_queue)
    assert whole_job(session, tmp_path / "without") == patched
    assert started


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    written = tmp_path_factory.mktemp("probes") / "probes.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests" / "unit")])
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("compat_probes.py")), str(written)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(written.read_text())


@pytest.mark.parametrize("name", [*IN_TWO_PROCESSES, "setup_embeddings_and_output_layer"])
def test_two_processes_fail_without_and_equal_torch_with(two_processes: dict[str, tuple[str, str]], name: str) -> None:
    without, with_patch = two_processes[name]
    assert re.search(NO_CUDA, without), without
    assert with_patch == "equals plain torch"


# ---------------------------------------------------------------- and gives what plain torch gives


def test_the_optimizer_steps_as_torch_does(session: Any) -> None:
    """fp32: clipping and AdamW by hand on the same gradients, bit for bit."""
    model = megatron_twin(random_llama(), session)
    wrapped, optimizer = step.make_trainable(model, TRAIN, torch.float32)
    step.learning_rate_schedule(optimizer, TRAIN).step(5)  # also sets the decay of each group
    learning_rate = optimizer.param_groups[0]["lr"]
    seen: dict[str, torch.Tensor] = {}
    prepare = optimizer.prepare_grads

    def spy() -> Any:
        seen.update({name: param.main_grad.clone() for name, param in model.named_parameters()})
        return prepare()

    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer.prepare_grads = spy
    result = step.train_step(wrapped, optimizer, random_batches(), session)
    total = torch.nn.utils.get_total_norm(seen.values())
    assert result.gradient_norm == pytest.approx(float(total), rel=3 * _norm_floor(list(seen.values())))
    shrink = TRAIN.clip_norm / (result.gradient_norm + 1e-6)
    assert shrink < 1, "nothing would be clipped"
    for name, param in model.named_parameters():
        plain = torch.nn.Parameter(before[name])
        plain.grad = seen[name] * shrink
        decay = 0.0 if plain.dim() == 1 else TRAIN.weight_decay  # Megatron's rule: norms and biases do not decay
        betas = (TRAIN.adam_beta1, TRAIN.adam_beta2)
        torch.optim.AdamW([plain], lr=learning_rate, betas=betas, eps=1e-8, weight_decay=decay).step()
        assert torch.equal(param, plain), name


def _norm_floor(gradients: list[torch.Tensor]) -> float:
    """Relative difference of the norm in fp32 and in float64."""
    exact = torch.nn.utils.get_total_norm([gradient.double() for gradient in gradients])
    return float((torch.nn.utils.get_total_norm(gradients) - exact).abs() / exact)


def test_the_bf16_optimizer_keeps_fp32_weights(session: Any) -> None:
    model = megatron_twin(random_llama(), session, torch.bfloat16)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    wrapped, optimizer = step.make_trainable(model, TRAIN, torch.bfloat16)
    step.train_step(wrapped, optimizer, random_batches(), session)
    (inner,) = getattr(optimizer, "chained_optimizers", [optimizer])
    low = [param for group in inner.float16_groups for param in group]
    high = [param for group in inner.fp32_from_float16_groups for param in group]
    assert len(low) == len(before) and all(param.dtype is torch.float32 for param in high)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(low, high, strict=True))
    assert any(not torch.equal(param, before[name]) for name, param in model.named_parameters())


def test_random_states_are_generators_of_torch(session: Any) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    tracker.add("a test's own", 11)
    plain = torch.Generator().manual_seed(11)
    torch.manual_seed(7)
    with tracker.fork("a test's own"):
        inside = torch.rand(5)
    outside = torch.rand(5)
    with tracker.fork("a test's own"):
        again = torch.rand(5)
    assert torch.equal(torch.cat((inside, again)), torch.cat([torch.rand(5, generator=plain) for _ in range(2)]))
    torch.manual_seed(7)
    assert torch.equal(outside, torch.rand(5)), "the stream outside went on undisturbed"


def test_the_view_of_torch_makes_cpu_tensors(session: Any) -> None:
    from megatron.core.optimizer import optimizer

    view = optimizer.torch
    x = torch.arange(6.0)
    for name, args in {
        "zeros": ((2, 3),), "ones": ((2, 3),), "full": ((2, 3), 7.0), "tensor": ([1.0, 2.0],), "arange": (5,),
        "zeros_like": (x,), "ones_like": (x,), "full_like": (x, 3.0),
    }.items():  # fmt: skip
        made = getattr(view, name)(*args, dtype=torch.float64, device="cuda")
        expected = getattr(torch, name)(*args, dtype=torch.float64)
        assert torch.equal(made, expected) and made.device == expected.device and made.dtype == expected.dtype, name
    assert (
        view.empty(3, device="cuda", pin_memory=True).device.type
        == view.empty_like(x, device="cuda").device.type
        == "cpu"
    )
    assert view.cuda.current_device() == torch.device("cpu")
    assert view.matmul is torch.matmul and view.nn is torch.nn and view.cuda.is_available is torch.cuda.is_available


def test_torch_itself_is_unchanged(session: Any) -> None:
    for call in (lambda: torch.zeros(1, device="cuda"), torch.cuda.current_device, torch.cuda.synchronize):
        with pytest.raises((AssertionError, RuntimeError), match=NO_CUDA):
            call()
    assert torch.ones(1).type() == "torch.FloatTensor"


# ---------------------------------------------------------------- versions and warnings


def test_other_versions_are_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match=r"megatron-core 0\.15\.0; found " + re.escape(version("megatron-core"))):
        compat._require("megatron-core", ("0.15.0",))
    compat._require("megatron-core", compat.MEGATRON_VERSIONS)
    compat._require("nvidia-modelopt", compat.MODELOPT_VERSIONS)
