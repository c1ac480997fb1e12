"""Whether this process is one of several, by its environment alone."""

from __future__ import annotations

import os


def several_ranks() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    named = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    return named and int(os.environ["WORLD_SIZE"]) > 1
