"""Which layers go: by scores, by the loss without them, or as many as a perplexity allows."""

from short_gpt.scoring.order import at_random, best_block, deepest, lowest, reverse, sequential
from short_gpt.selection.methods import BY_LOSS, METHODS, check_method, choose
from short_gpt.selection.perplexity_budget import Budget, most_layers
from short_gpt.selection.search import Options, Search, by_loss, sleb_rounds

__all__ = ["BY_LOSS", "METHODS", "Budget", "Options", "Search", "at_random", "best_block"]
__all__ += ["by_loss", "check_method", "choose", "deepest", "lowest", "most_layers", "reverse"]
__all__ += ["sequential", "sleb_rounds"]
