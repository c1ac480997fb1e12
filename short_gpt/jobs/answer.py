"""What a ranking is to answer."""

from __future__ import annotations

from dataclasses import dataclass

from short_gpt.runtime.errors import ShortGPTError
from short_gpt.scoring.stopping import Stop
from short_gpt.selection.methods import BY_LOSS, check_method


@dataclass(frozen=True)
class Answer:
    """What a ranking is to answer.

    Args:
        n: also say which so many layers the methods would remove.
        method: bi, angular, angular_all, deepest, relative_magnitude, norm, sequential, reverse,
            random, perplexity or sleb.
        candidates: sleb only tries the so many layers of lowest Block Influence; all if not
            given.
        confidence: of all runs, at most 1 - confidence end early with another answer than that of
            all windows, unless windows decide that make up less than rare of all; of those that
            end early, more may be wrong. none reads all windows.
        rare: share of all windows that a kind of windows must make up to be guarded against by
            that; the smaller, the more is read.
        sublayers: also score the attention and the MLP of every layer.

    Raises:
        ShortGPTError: there is no such method, or it needs a number of layers.
    """

    n: int | None = None
    method: str = "bi"
    candidates: int | None = None
    confidence: float | None = 0.99
    rare: float = 0.02
    sublayers: bool = False

    def __post_init__(self) -> None:
        check_method(self.method)
        if self.by_loss and self.n is None:
            raise ShortGPTError(f"`method` {self.method} needs `n`")

    @property
    def by_loss(self) -> bool:
        """Whether the method runs the model without layers."""
        return self.method in BY_LOSS

    def rule(self, seed: int | None) -> Stop | None:
        """The rule that ends a run early, where the answer can be settled.

        That takes a method that chooses its n layers by means over windows, in one pass, and
        windows in random order.
        """
        if self.confidence is None:
            return None
        rule = Stop(self.n or 1, self.method == "angular", self.confidence, rare=self.rare)
        can = self.n is not None and seed is not None and self.method in ("bi", "angular")
        return rule if can else None
