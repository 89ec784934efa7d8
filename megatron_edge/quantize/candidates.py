"""A model whose layers change formats one at a time, without calibrating again and without running what stays the same.

`Candidates` holds every unit's calibrated quantizers in every recipe and puts them into the model; `PartialRuns` runs
the model from one decoder layer on. Called by search.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

from torch import Tensor, nn

from megatron_edge.config import QuantConfig
from megatron_edge.model.build import chunks_of, named_modules

QUANTIZERS = ("input_quantizer", "weight_quantizer", "output_quantizer")
Quantizers = dict[str, Any]  # of one linear layer, by attribute


class Candidates:
    """The quantizers of `patterns`' modules (fnmatch, one pattern for each unit) in each recipe, by the recipe's name;
    None is a unit without. Every unit's are in the model, of one recipe at a time, inside of `placed` alone."""

    def __init__(
        self,
        model: nn.Module,
        patterns: Sequence[str],
        recipes: Mapping[str, QuantConfig],
        quantize: Callable[[QuantConfig], None],
    ) -> None:
        """`quantize(recipe)` puts calibrated quantizers into the model. All ranks call it."""
        self.model, self._patterns = model, list(patterns)
        self._sets: dict[str | None, list[list[Quantizers]]] = {}
        for name, recipe in recipes.items():
            if recipe.weight != "none":
                quantize(recipe)
                self._find_layers()
                self._sets[name] = [[_copies(layer) for layer in layers] for layers in self._layers]
        self._sets[None] = [[_off(_copies(layer)) for layer in layers] for layers in self._layers]
        self._none = {name for name, recipe in recipes.items() if recipe.weight == "none"}

    def _find_layers(self) -> None:
        """This rank's linear layers of each unit, and the quantizers of everything else. A layer that gets its first
        quantizers changes its class, not its identity."""
        linears = [(name, module) for name, module in named_modules(self.model) if hasattr(module, "weight_quantizer")]
        self._layers = [[m for name, m in linears if fnmatch(name, pattern)] for pattern in self._patterns]
        mine = {id(module) for layers in self._layers for module in layers}
        self._others = [
            quantizer for _, module in linears if id(module) not in mine for quantizer in _of(module).values()
        ]

    @contextlib.contextmanager
    def placed(self, picks: Sequence[str | None]) -> Iterator[None]:
        """Inside, each unit has the recipe that `picks` names; quantizers outside of the units (of tables) act where
        any unit has one. The model's own are back at the end."""
        own = [[_of(layer) for layer in layers] for layers in self._layers]
        off = [q for q in self._others if q.is_enabled] if all(self._key(pick) is None for pick in picks) else []
        try:
            for quantizer in off:
                quantizer.disable()
            for index, name in enumerate(picks):
                self._put(index, self._sets[self._key(name)][index])
            yield
        finally:
            for quantizer in off:
                quantizer.enable()
            for index, quantizers in enumerate(own):
                self._put(index, quantizers)

    @contextlib.contextmanager
    def swapped(self, index: int, name: str | None) -> Iterator[None]:
        """Inside, unit `index` alone has another recipe than `placed` gave it."""
        before = [_of(layer) for layer in self._layers[index]]
        self._put(index, self._sets[self._key(name)][index])
        try:
            yield
        finally:
            self._put(index, before)

    def is_same(self, name: str | None, other: str | None) -> bool:
        """Whether a unit has the same quantizers in both."""
        return self._key(name) == self._key(other)

    def _key(self, name: str | None) -> str | None:
        return None if name in self._none else name

    def _put(self, index: int, quantizers: Sequence[Quantizers]) -> None:
        for layer, ones in zip(self._layers[index], quantizers, strict=True):
            for attribute, quantizer in ones.items():
                setattr(layer, attribute, quantizer)


def _of(layer: nn.Module) -> Quantizers:
    return {attribute: getattr(layer, attribute) for attribute in QUANTIZERS if hasattr(layer, attribute)}


def _copies(layer: nn.Module) -> Quantizers:
    return {attribute: copy.deepcopy(quantizer) for attribute, quantizer in _of(layer).items()}


def _off(quantizers: Quantizers) -> Quantizers:
    for quantizer in quantizers.values():
        quantizer.disable()
    return quantizers


class PartialRuns:
    """Runs over the same micro-batches that begin at one decoder layer, with the inputs that it had when everything
    before it was as it still is. Layers before it hand on what they get, in any layout: each rank keeps the inputs of
    its own layers, and every stage runs as often as in a whole run."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = {layer.layer_number - 1: layer for chunk in chunks_of(model) for layer in chunk.decoder.layers}
        self._at, self._inputs = 0, [Tensor()] * 0

    def move_to(self, layer: int, run: Callable[[], object]) -> None:
        """Begins at `layer` (its index in the whole model, not before the present one) from now on. `run` runs all
        micro-batches once; what comes of it means nothing. All ranks call it."""
        assert layer >= self._at, "layers are visited in the order of the forward pass"
        if layer == self._at:
            return
        kept: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.append(kwargs["hidden_states"].detach())

        others = [index for index in self._layers if not self._at <= index < layer]
        with contextlib.ExitStack() as stack:
            if layer in self._layers:
                stack.enter_context(_hooked(self._layers[layer], keep))
            self._enter(stack, others)
            run()
        self._at, self._inputs = layer, kept

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """Inside, one run over all micro-batches begins at the layer."""
        with contextlib.ExitStack() as stack:
            self._enter(stack, [index for index in self._layers if index < self._at])
            yield

    def _enter(self, stack: contextlib.ExitStack, passing: Sequence[int]) -> None:
        """`passing` layers do nothing, and the present one takes the kept inputs, micro-batch by micro-batch."""
        for index in passing:
            stack.enter_context(_passing_on(self._layers[index]))
        if self._at > 0 and self._at in self._layers:
            inputs = iter(self._inputs)

            def give(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
                return args, {**kwargs, "hidden_states": next(inputs)}

            stack.enter_context(_hooked(self._layers[self._at], give))


@contextlib.contextmanager
def _hooked(layer: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _passing_on(layer: nn.Module) -> Iterator[None]:
    # A copy: a stage whose output is its input would send what its schedule may give back.
    layer.forward = lambda hidden_states, **_: (hidden_states.clone(), None)
    try:
        yield
    finally:
        del layer.forward
