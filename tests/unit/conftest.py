"""Megatron's groups of a world of one, and a random Llama, for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tiny_megatron import one_process, random_llama


@pytest.fixture(scope="module")
def session() -> Iterator[Any]:
    with one_process() as opened:
        yield opened


@pytest.fixture(scope="module")
def llama() -> Any:
    return random_llama()
