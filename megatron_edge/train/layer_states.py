"""The residual stream after every decoder layer: kept of a teacher, compared with a student's, which is drawn to it.

In: model chunks in a forward pass. Out: their layers' outputs h [s, b, h], where s is a rank's part under sequence and
context parallelism, and the student's distance, whose gradient joins the one that comes from the layers above. A stage
needs nothing of another: a teacher lies in the student's layout. Called by train/distill.py.

The distance of a token is |u_student - u_teacher|^2 with u = h / |h|, which is 2 (1 - cosine) and at most 4: whatever
reads the stream normalises it first. Lengths are out of it because they would decide everything. The stream of a few
tokens, most often a text's first, is far longer than the others': up to 178 times the median in SmolLM2-135M. Plain
squared distances are those tokens' alone; divided by |h_teacher|^2 they still are, wherever a student has such a token
and its teacher has not (seen after 35 steps with INT4 weights: a mean of 8 where it was 0.05, a gradient 200 times as
long). Large channels need no care: four hold up to 67% of the stream's squared length, but at most 11% of what INT4
weights change in it (groups of 32, 256 tokens, layers 1 to 28).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_edge.model.build import unwrap


@contextlib.contextmanager
def watched(chunk: Any) -> Iterator[list[Tensor]]:
    """The outputs of the chunk's layers in their order, filled by each forward pass inside.

    They are taken where the next module reads them, and at the end of the chunk: a layer that is recomputed runs in a
    graph of its own, and again in backward, when nothing says which micro-batch it belongs to."""
    seen: list[Tensor] = []

    def see(state: Tensor) -> None:
        # The pipeline empties a tensor that it has sent: without a gradient to hook, another is kept of its memory.
        seen.append(state if state.requires_grad else state.detach())

    def reading(_: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        see(named["hidden_states"] if "hidden_states" in named else inputs[0])

    model = unwrap(chunk)
    norm = model.decoder.final_layernorm
    readers = [*model.decoder.layers[1:], *([] if norm is None else [norm])]
    handles = [reader.register_forward_pre_hook(reading, with_kwargs=True) for reader in readers]
    if norm is None:
        handles.append(model.register_forward_hook(lambda _, inputs, output: see(output)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def draw(
    students: list[Tensor], teachers: list[Tensor], counted: Tensor, weight: float, scale: Callable[[Tensor], Tensor]
) -> Tensor:
    """Sum of the distances of `students` over layers and counted tokens (bool [s, b]), without a gradient; `weight`
    times its gradient is added to each student's when backward gets there.

    `scale` is what Megatron does to the main loss before backward (config.grad_scale_func). Sums over tokens are not
    divided here: the update divides all gradients of a step by its tokens."""
    total = torch.zeros((), dtype=torch.float32, device=counted.device)
    with torch.no_grad():
        for student, teacher in zip(students, teachers, strict=True):
            # Not `student` itself: the hook would keep its own graph alive, and the pipeline empties what it has sent.
            state = student.detach()
            per_length, wanted = (1 / _length(x) for x in (state, teacher))
            distance = _length(torch.addcmul(teacher * -wanted, state, per_length)).square()
            mask = counted[..., None]
            total += torch.where(mask, distance, 0.0).sum()
            slope = scale(torch.where(mask, 2 * weight * per_length, 0.0))
            of_state = slope * per_length * (1 - distance / 2)  # 1 - distance / 2: the cosine
            student.register_hook(partial(_pulled, state, teacher, of_state, slope * -wanted))
    return total


def _pulled(state: Tensor, teacher: Tensor, of_state: Tensor, of_teacher: Tensor, gradient: Tensor) -> Tensor:
    """`gradient` [s, b, h] + slope (cosine u_student - u_teacher), in fp32 and rounded once."""
    return torch.addcmul(torch.addcmul(gradient, state, of_state), teacher, of_teacher).to(gradient.dtype)


def _length(x: Tensor) -> Tensor:
    """[..., h] -> fp32 [..., 1]"""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
