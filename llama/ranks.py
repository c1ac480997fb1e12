"""Whether this process is one of several, by its environment; and changes of that."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def is_distributed() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    named = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    return named and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def environment(name: str, value: str | None) -> Iterator[None]:
    """An environment variable with another value inside the block; None: without it."""
    before = os.environ.pop(name, None)
    try:
        os.environ.update({} if value is None else {name: value})
        yield
    finally:
        os.environ.pop(name, None)
        os.environ.update({} if before is None else {name: before})
