"""The command line. Only this package prints."""

from __future__ import annotations

from short_gpt.cli.commands import (
    ALONE,
    COMMANDS,
    REMOVED,
    calibrate,
    compare,
    convert,
    demo,
    evaluate,
    generate,
    heal,
    perplexity,
    plot,
    prune,
    rank,
    reproduce,
)

__all__ = [
    "ALONE",
    "COMMANDS",
    "REMOVED",
    "calibrate",
    "compare",
    "convert",
    "demo",
    "evaluate",
    "generate",
    "heal",
    "perplexity",
    "plot",
    "prune",
    "rank",
    "reproduce",
]
