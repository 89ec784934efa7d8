"""Linear layers with quantised operands: Megatron's without the host time of modelopt's way to them, those and
TransformerEngine's with products of FP8 numbers, and with inputs that come rounded.

modelopt replaces two functions of Megatron for the time of each forward, runs a long TensorQuantizer.forward for each
of three quantizers, two of them often disabled, and puts a node into the autograd graph for each operand: a quarter of
a millisecond for a layer, in which a small model's kernels are done. Here, while a layer's quantizers do nothing but
quantise with our numerics, they are asked at once and the straight-through gradient is the linear function's own. In
every other state (calibration, hooks, an adapter, a frozen weight) the layer goes modelopt's way; values and gradients
are the same bits, but those of FP8 products (fp8_gemm.py). Called by apply.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from megatron_edge.model.fp8_linear import linear_of_codes
from megatron_edge.model.layers import linear_classes, linear_of_values, transformer_engine_classes
from megatron_edge.quantize import fp8_gemm, kernels, written_inputs

# As Megatron's function takes them, after input and weight; its layers pass them by name, a row-parallel one not all.
_SETTINGS = (
    "bias", "gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel", "grad_output_buffer",
    "wgrad_deferral_limit", "tp_group",
)  # fmt: skip


def is_direct(quantizer: Any, backend: str) -> bool:
    """Whether modelopt's forward would do nothing (disabled), or nothing but call `backend`."""
    state = quantizer.__dict__
    if state["_forward_pre_hooks"] or state["_forward_hooks"]:
        return False
    if state["_disabled"]:
        return True
    return state["backend"] == backend and state["_if_quant"] and not state["_if_calib"]


def through(x: Tensor, quantizer: Any, backend: str, entry: Callable[[Tensor, Any], Tensor]) -> Tensor:
    """quantizer(x), where `entry` is what `backend` stands for."""
    if not is_direct(quantizer, backend):
        return quantizer(x)
    return x if quantizer.__dict__["_disabled"] or not x.numel() else entry(x, quantizer)


def knows_transformer_engine() -> bool:
    """Whether TransformerEngine is here, and modelopt has quantizers for Megatron's layers of it: without a word it
    leaves them out where it cannot import one of them."""
    from modelopt.torch.quantization.plugins import megatron

    return bool(megatron.HAS_TE and transformer_engine_classes())


def register(backend: str, quantised: Callable[[Tensor, Any], Tensor]) -> None:
    """Has modelopt make our classes of linear layers from now on. `quantised(x, quantizer)` is what an
    enabled quantizer of `backend` makes of x, without gradient."""
    from modelopt.torch.quantization.nn import QuantModuleRegistry

    def registered(layer: type) -> Any:  # the first class is made of it and `layer`
        return QuantModuleRegistry[layer].__mro__[1]

    of_te = transformer_engine_classes() if knows_transformer_engine() else ()
    if of_te:  # modelopt takes the first class with a layer's forward, which its base has too; of that we build none
        QuantModuleRegistry.unregister(of_te[0].__base__)
    made = {layer: _megatron_class(registered(layer), quantised) for layer in linear_classes()}
    made |= {layer: _transformer_engine_class(registered(layer)) for layer in of_te}
    for layer, ours in made.items():
        ours._backend = backend
        _classes[layer] = (ours, registered(layer))
        _put(layer, ours)


class _Direct:
    """What our classes of both libraries' layers share."""

    _backend: str

    def _is_direct(self: Any, weight: Tensor | None) -> bool:
        weight = self._parameters["weight"] if weight is None else weight
        modules, backend = self._modules, self._backend
        return (
            weight is not None
            and weight.requires_grad
            and modules["output_quantizer"].__dict__["_disabled"]
            and modules["weight_quantizer"].__dict__.get("_route") is None
            and is_direct(modules["output_quantizer"], backend)
            and is_direct(modules["weight_quantizer"], backend)
            and is_direct(modules["input_quantizer"], backend)
        )


def _megatron_class(upstream: Any, quantised: Callable[[Tensor, Any], Tensor]) -> Any:
    from modelopt.torch.quantization.plugins.custom import _QuantFunctionalMixin

    def value(x: Tensor, quantizer: Any) -> Tensor:
        return x if quantizer.__dict__["_disabled"] or not x.numel() else quantised(x, quantizer)

    class DirectLinear(_Direct, upstream):
        def forward(self, input_: Tensor, weight: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            given = () if weight is None else (weight,)
            # Here, as Megatron may hand on a view.
            written = self.__dict__["_written"] = written_inputs.taken(input_, self._modules["input_quantizer"])
            if not self._is_direct(weight):
                assert written != (), "rounded again it could be another value"  # with codes, of fp8, it cannot
                return super().forward(input_, *given, *args, **kwargs)
            return super(_QuantFunctionalMixin, self).forward(input_, *given, *args, **kwargs)

        def _forward_impl(self, input: Tensor, weight: Tensor, **settings: Any) -> Tensor:
            written = self.__dict__.pop("_written", None)
            if not self._is_direct(weight):
                return super()._forward_impl(input, weight, **settings)
            given = [settings.get(name) for name in _SETTINGS]
            if fp8_gemm.takes(self, input):
                return _fp8_product(self, input, weight, written, given)
            modules = self._modules
            x_value = value(input, modules["input_quantizer"]) if written is None else input
            return linear_of_values()(input, weight, x_value, value(weight, modules["weight_quantizer"]), *given)

    return DirectLinear


def _transformer_engine_class(upstream: Any) -> Any:
    class DirectTELinear(_Direct, upstream):
        """Its own product; or ours of FP8 numbers, where tensor parallelism does not split the layer."""

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            written = written_inputs.taken(x, self._modules["input_quantizer"])
            if not (self._is_direct(None) and fp8_gemm.takes(self, x)):
                return super().forward(x) if written != () else self._of_value(x)
            bias = self.bias if self.use_bias else None
            settings = None if self.te_return_bias else bias, False, False, False, None, None, self.tp_group
            out = _fp8_product(self, x, self._parameters["weight"], written, settings)
            return out, bias if self.te_return_bias else None

        def _of_value(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            """x comes as its quantizer rounds it."""
            assert self._is_direct(None), "rounded again it could be another value"
            of_input = self._modules["input_quantizer"].__dict__
            of_input["_disabled"] = True
            try:
                return super().forward(x)
            finally:
                of_input["_disabled"] = False

    return DirectTELinear


def _fp8_product(layer: Any, x: Tensor, weight: Tensor, written: Any, settings: Sequence[Any]) -> Tensor:
    """Where fp8_gemm.takes it; `written`: (codes, scale), where what made x rounded it, or None."""
    modules = layer._modules
    of_x = fp8_gemm.input_operand(x, modules["input_quantizer"]) if written is None else written
    operands = *of_x, *fp8_gemm.weight_operand(weight, modules["weight_quantizer"])
    return linear_of_codes()(x, weight, *operands, kernels.fp8_values if written is None else None, *settings)


_classes: dict[type, tuple[Any, Any]] = {}  # a layer -> our class of it, modelopt's


def _put(layer: type, made: Any) -> None:
    from modelopt.torch.quantization.nn import QuantModuleRegistry

    QuantModuleRegistry.unregister(layer)
    QuantModuleRegistry.register({layer: f"megatron_{layer.__name__}"})(made)  # the name is shown, and no more


@contextlib.contextmanager
def modelopts_own() -> Iterator[None]:
    """Inside, modelopt makes its own classes of linear layers; models that there are stay as they are."""
    for layer, (_, base) in _classes.items():
        _put(layer, base)
    try:
        yield
    finally:
        for layer, (ours, _) in _classes.items():
            _put(layer, ours)
