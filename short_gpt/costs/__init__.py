"""What a model costs: its sizes, its speeds, and what the same model in fewer bits is worth."""

from short_gpt.costs.rivals import Rival, largest_within, requantized

__all__ = ["Rival", "largest_within", "requantized"]
