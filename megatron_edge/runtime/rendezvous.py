"""How the processes of one launch meet before any process group exists: one store, one start, one configuration.

In: the rendezvous store of torchrun (of rank 0 under srun). Out: rank 0's text on every rank, and a store whose keys
belong to this start alone. Called by the launcher.

`torchrun --max-restarts` starts every process again over the same store, where the keys of the last start still stand;
TORCHELASTIC_RESTART_COUNT is no name for a start, since each node counts its own. So rank 0 numbers the starts, and
answers every process that asks; a process that is no more does no harm by having asked.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_edge.contracts import InputError

if TYPE_CHECKING:
    from torch.distributed import Store

KEYS = "megatron_edge"
ARRIVAL_SECONDS = 1800.0  # as torch's own rendezvous
REFUSAL_SECONDS = 30.0
LEAVING_SECONDS = 3.0


class Meeting:
    """This process among those that were started together. `store` is this start's own, once that is known."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.store: Store | None = None
        self._shared: Store | None = None
        if world_size > 1:
            from torch.distributed import rendezvous

            self._shared = next(iter(rendezvous("env://")))[0]  # under torchrun its own store, which outlives a start

    def share(self, compose: Callable[[bool], str]) -> str:
        """Rank 0's `compose(begun)` on every rank; `begun` says that an earlier start of this torchrun came past it.

        Raises:
            InputError: on every rank, where rank 0 refuses the input.
            RuntimeError: the other processes did not come.
        """
        if self.rank:
            return self._ask()
        begun = self._has_begun()
        if self._shared is None:
            return compose(begun)
        prefix = f"{KEYS}/start_{self._shared.add(f'{KEYS}/starts', 1)}"
        self.store = _with_prefix(prefix, self._shared)
        try:
            text = compose(begun)
        except BaseException as error:
            refusal = str(error) if isinstance(error, InputError) else f"rank 0 failed: {error!r}"
            # Leave together, or the first to leave ends the others with a signal.
            self._answer(self._shared, self.store, {"prefix": prefix, "refused": refusal}, REFUSAL_SECONDS)
            raise
        self._shared.set(f"{KEYS}/begun", "1")
        absent = self._answer(self._shared, self.store, {"prefix": prefix, "text": text}, ARRIVAL_SECONDS)
        if absent:
            raise RuntimeError(f"{absent} of {self.world_size} processes did not come within {ARRIVAL_SECONDS:.0f} s")
        return text

    def _has_begun(self) -> bool:
        if self._shared is not None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return bool(self._shared.check([f"{KEYS}/begun"]))
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0

    def _ask(self) -> str:
        assert self._shared is not None
        token = uuid.uuid4().hex
        self._shared.set(f"{KEYS}/asks/{self.rank}", token)
        answer = json.loads(self._shared.get(f"{KEYS}/answer/{token}"))
        self.store = _with_prefix(answer["prefix"], self._shared)
        self.store.add("read", 1)
        if "refused" in answer:
            raise InputError(answer["refused"])
        return str(answer["text"])

    def _answer(self, shared: Store, own: Store, answer: dict[str, str], seconds: float) -> int:
        """Answers who asks until all have read it, at most for so long; gives how many have not."""
        answered: set[bytes] = set()
        deadline = time.monotonic() + seconds
        while (absent := self.world_size - 1 - own.add("read", 0)) and time.monotonic() < deadline:
            for rank in range(1, self.world_size):
                key = f"{KEYS}/asks/{rank}"
                if shared.check([key]) and (token := shared.get(key)) not in answered:
                    shared.set(f"{KEYS}/answer/{token.decode()}", json.dumps(answer))
                    answered.add(token)
            time.sleep(0.02)
        return absent

    def is_first(self, what: str) -> bool:
        """Whether this process is the first of this start to say `what`; a crash, after anything else was said, is a
        consequence of that. A crash is always said where that is unknown, anything else then by rank 0."""
        if self.store is None:  # one process, or a refusal that all ranks come to by themselves
            return what == "crash" or self.rank == 0
        try:
            if what == "crash" and self.store.check(["said"]):
                return False
            self.store.set("said", "1")
            return self.store.add(f"said/{what}", 1) == 1
        except RuntimeError:  # the process that held the store is gone
            return what == "crash" or self.rank == 0

    def leave_together(self) -> None:
        """Waits a moment for the others, so that none is ended by a signal while it still leaves with its own code."""
        if self.store is None:
            return
        try:
            self.store.add("leaving", 1)
            deadline = time.monotonic() + LEAVING_SECONDS
            while self.store.add("leaving", 0) < self.world_size and time.monotonic() < deadline:
                time.sleep(0.01)
            if self.rank:
                self.store.add("left", 1)
                return
            # Under srun the store lives in this process: it goes last.
            while self.store.add("left", 0) < self.world_size - 1 and time.monotonic() < deadline:
                time.sleep(0.01)
        except RuntimeError:  # the process that held the store is gone
            return


def _with_prefix(prefix: str, store: Store) -> Store:
    from torch.distributed import PrefixStore

    return PrefixStore(prefix, store)
