"""AdamW as a plain loop in fp64, over the gradients that a Megatron optimizer has left."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_edge.runtime.optimizer_state import inner_optimizers

EPSILON = 1e-8


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    return [group for inner in inner_optimizers(optimizer) for group in inner.optimizer.param_groups]


def mains_of(optimizer: Any) -> list[Tensor]:
    """What Adam updates: fp32 weights, or the parts of them that this rank has."""
    return [main for group in _groups(optimizer) for main in group["params"]]


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, relative to |weight| + 0.01: fp32 has 6e-8 of a weight, Adam moves one by about 0.01."""
    pairs = zip(ours, theirs, strict=True)
    return max(float(((one - other).abs() / (other.abs() + 0.01)).max()) for one, other in pairs)


def divided_by(optimizer: Any, result: Any, train: Any) -> float:
    """What has still to be multiplied with the gradients that a step has left: 1, but where Adam divides and clips."""
    if optimizer.in_one_pass is None:
        return 1.0
    return min(train.clip_norm / (result.gradient_norm + 1e-6), 1.0) / result.tokens


class PlainAdam:
    """Loshchilov & Hutter 2019, algorithm 2, with the betas of `train` and the groups' rates and decays."""

    def __init__(self, optimizer: Any, train: Any) -> None:
        self._optimizer, self._betas, self._steps = optimizer, (train.adam_beta1, train.adam_beta2), 0
        self.values = [main.detach().double().clone() for main in mains_of(optimizer)]
        self._moments = [(value * 0, value * 0) for value in self.values]

    def step(self, divided: float = 1.0) -> None:
        """With the gradients as they lie there after an update of the other, times `divided`."""
        self._steps += 1
        rates = [(group["lr"], group["weight_decay"]) for group in _groups(self._optimizer) for _ in group["params"]]
        one, two = self._betas
        for at, (main, (rate, decay)) in enumerate(zip(mains_of(self._optimizer), rates, strict=True)):
            assert main.grad is not None
            gradient, (mean, square) = main.grad.double() * divided, self._moments[at]
            mean = one * mean + (1 - one) * gradient
            square = two * square + (1 - two) * gradient**2
            self._moments[at] = mean, square
            moved = (mean / (1 - one**self._steps)) / ((square / (1 - two**self._steps)).sqrt() + EPSILON)
            self.values[at] = self.values[at] - rate * decay * self.values[at] - rate * moved

    def apart(self) -> float:
        return apart([main.detach().double() for main in mains_of(self._optimizer)], self.values)
