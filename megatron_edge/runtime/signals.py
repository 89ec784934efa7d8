"""SIGTERM and SIGINT as a wish that a loop reads between its rounds, instead of an end at any place."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """Set by SIGTERM or SIGINT."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, number: int, frame: Any) -> None:
        self.requested = True


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    stop = Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
