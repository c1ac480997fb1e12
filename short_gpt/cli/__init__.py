"""The commands: plain functions, given to fire. Only this package prints.

Every command checks its input before it works, prints one table on stdout, shows progress on
stderr, and writes files whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable

from short_gpt.cli.comparison import compare
from short_gpt.cli.healing import heal
from short_gpt.cli.quality import evaluate, generate, perplexity
from short_gpt.cli.scoring import plot, rank, reproduce
from short_gpt.cli.surgery import convert, prune
from short_gpt.cli.whole import demo

ALONE = ("prune", "heal", "convert", "plot")  # of several ranks, only the first runs these
COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "rank": rank,
    "prune": prune,
    "heal": heal,
    "compare": compare,
    "generate": generate,
    "perplexity": perplexity,
    "evaluate": evaluate,
    "plot": plot,
    "reproduce": reproduce,
    "convert": convert,
}
