"""Which layers go: by scores, or by the loss without them."""

from typing import TYPE_CHECKING

from llama import lazy

if TYPE_CHECKING:
    from short_gpt.scoring.metrics import best_block, lowest
    from short_gpt.selection.methods import BY_LOSS, METHODS, check_method, choose
    from short_gpt.selection.search import Search, SearchOptions, by_loss
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = ["BY_LOSS", "METHODS", "Search", "SearchOptions", "best_block", "by_loss"]
__all__ += ["check_method", "choose", "lowest"]
