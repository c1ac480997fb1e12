"""Which layers go: by scores, or by the loss without them."""

from typing import TYPE_CHECKING

from llama import lazy

if TYPE_CHECKING:
    from short_gpt.scoring.order import at_random, best_block, deepest, lowest, reverse, sequential
    from short_gpt.selection.methods import BY_LOSS, METHODS, check_method, choose
    from short_gpt.selection.search import Search, SearchOptions, by_loss, sleb_rounds
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = ["BY_LOSS", "METHODS", "Search", "SearchOptions", "at_random", "best_block", "by_loss"]
__all__ += ["check_method", "choose", "deepest", "lowest", "reverse", "sequential", "sleb_rounds"]
