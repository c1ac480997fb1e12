"""The commands: plain functions, given to fire. Only this package prints.

Every command is its arguments, one call of the library and one table on stdout; progress goes to
stderr, and files are written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable

from short_gpt.cli.calibrate import calibrate
from short_gpt.cli.compare import compare
from short_gpt.cli.convert import convert
from short_gpt.cli.demo import demo
from short_gpt.cli.evaluate import evaluate
from short_gpt.cli.generate import generate
from short_gpt.cli.heal import heal
from short_gpt.cli.perplexity import perplexity
from short_gpt.cli.plot import plot
from short_gpt.cli.prune import prune
from short_gpt.cli.rank import rank
from short_gpt.cli.reproduce import reproduce

REMOVED = {"draft": "compare the pruned model by perplexity, or by evaluate on tasks"}
ALONE = ("prune", "heal", "convert", "plot")  # of several ranks, only the first runs these
COMMANDS: dict[str, Callable[..., None]] = {  # in the order of use
    "demo": demo,
    "rank": rank,
    "prune": prune,
    "heal": heal,
    "calibrate": calibrate,
    "compare": compare,
    "generate": generate,
    "perplexity": perplexity,
    "evaluate": evaluate,
    "plot": plot,
    "reproduce": reproduce,
    "convert": convert,
}
