"""As many layers as the quality on held-out text allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.runtime.errors import ShortGPTError


@dataclass(frozen=True)
class Budget:
    """What `most_layers` chose, and on what evidence.

    Attributes:
        layers: to remove; empty if not even one may go.
        tried: for every number of layers tried, from 0, the perplexity without them.
        ratio: the most that the perplexity was allowed to rise by.
    """

    layers: list[int]
    tried: dict[int, Perplexity]
    ratio: float

    def to_dict(self) -> dict[str, object]:
        """The evidence, ready for JSON."""
        dense = self.tried[0].value
        rows = [
            {"layers": n, "perplexity": p.value, "ratio": p.value / dense, "tokens": p.tokens}
            for n, p in self.tried.items()
        ]
        return {"max_perplexity_ratio": self.ratio, "tried": rows}


def most_layers(
    perplexity_without: Callable[[list[int]], Perplexity],
    choose: Callable[[int], list[int]],
    *,
    ratio: float,
    most: int,
) -> Budget:
    """Removes one layer more, on trial, until the perplexity has risen too far.

    Args:
        perplexity_without: from the layers to remove, none at first, to the perplexity on text
            that neither chose the layers nor trained the model.
        choose: from a number of layers to the layers to remove.
        ratio: most that the perplexity may rise by, as a factor of at least 1.
        most: layers to try at most.

    Returns:
        The largest removal up to which every smaller one holds the ratio as well.

    Raises:
        ShortGPTError: the ratio is below 1.

    Example:
        >>> import math
        >>> def perplexity_without(layers):
        ...     return Perplexity(nats=math.log(10 + len(layers)), tokens=1, windows=1)
        >>> most_layers(perplexity_without, lambda n: [3, 1, 2][:n], ratio=1.25, most=3).layers
        [3, 1]
    """
    if not ratio >= 1:
        raise ShortGPTError(f"max_perplexity_ratio = {ratio}: expected a factor of at least 1")
    tried = {0: perplexity_without([])}
    kept: list[int] = []
    for n in range(1, most + 1):
        layers = choose(n)
        tried[n] = perplexity_without(layers)
        # "not <=", because a perplexity that is no number holds no ratio
        if not tried[n].value <= ratio * tried[0].value:
            break
        kept = layers
    return Budget(kept, tried, ratio)
