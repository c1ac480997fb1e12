"""As many layers as the quality on held-out text allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from short_gpt.evaluation.paired import Difference, difference
from short_gpt.evaluation.perplexity import Perplexity, exp
from short_gpt.runtime.errors import ShortGPTError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Budget:
    """What `most_layers` chose, and the evidence.

    Attributes:
        layers: to remove; empty if not even one may go.
        tried: by number of layers removed, from 0, the perplexity.
        ratio: the largest factor by which the perplexity was allowed to rise.
        confidence: that it rises by no more.
        changes: by number of layers removed, from 1, the loss minus the original model's.
    """

    layers: list[int]
    tried: dict[int, Perplexity]
    ratio: float
    confidence: float = CONFIDENCE
    changes: dict[int, Difference] = field(default_factory=dict)

    def bounds(self, n: int) -> tuple[float, float]:
        """Lower and upper bound of the factor by which the perplexity rises with n layers removed.

        Each on its own holds with ``confidence``; both are NaN where there are too few texts.
        """
        change = self.changes[n]
        margin = change.error.margin(self.confidence, sides=1)
        return exp(change.nats - margin), exp(change.nats + margin)

    def holds(self, n: int) -> bool:
        """Whether the ratio holds with n layers removed, with ``confidence``."""
        return self.bounds(n)[1] <= self.ratio  # False for NaN, which holds no ratio

    def verdict(self, n: int) -> str:
        """What is known of the ratio with n layers removed, in words."""
        low, high = self.bounds(n)
        error = self.changes[n].error
        sure = f"{self.confidence:.0%} sure over {error.over}"
        if error.no_interval:
            unknown = f"unknown whether within {self.ratio:g}"
            return f"{unknown}: {error.no_interval}; evaluate on more text"
        if high <= self.ratio:
            return f"at most {high:.4f}, {sure}"
        if low > self.ratio:
            return f"at least {low:.4f}, above {self.ratio:g}, {sure}"
        return f"up to {high:.4f}, unknown whether within {self.ratio:g}, {sure}"

    def to_dict(self) -> dict[str, object]:
        """The evidence, ready for JSON."""
        dense = self.tried[0].value
        rows: list[dict[str, object]] = []
        for n, p in self.tried.items():
            row: dict[str, object] = {"layers": n, "perplexity": p.value, "ratio": p.value / dense}
            row["tokens"] = p.tokens
            if n:
                most, change = self.bounds(n)[1], self.changes[n]
                row["at_most"] = None if math.isnan(most) else most
                row |= {"windows": change.windows, "texts": change.texts}
            rows.append(row)
        limit = {"max_perplexity_ratio": self.ratio, "confidence": self.confidence}
        return {**limit, "tried": rows}


def check_limit(ratio: float, confidence: float) -> None:
    """Raises ShortGPTError for numbers out of range; the arguments are those of `most_layers`."""
    if not ratio >= 1:
        raise ShortGPTError(f"max_perplexity_ratio = {ratio}: expected a factor of at least 1")
    if not 0.5 <= confidence < 1:
        raise ShortGPTError(f"confidence = {confidence}: expected at least 0.5 and below 1")


def most_layers(
    perplexity_without: Callable[[list[int]], Perplexity],
    choose: Callable[[int], list[int]],
    *,
    ratio: float,
    most: int,
    confidence: float = CONFIDENCE,
) -> Budget:
    """Removes one more layer, on trial, until the perplexity may have risen too far.

    The rise is exp of the mean change of a token's loss, whose one-sided bound is Student's t with
    the error of `evaluation.difference`: windows are paired, and texts are the samples if there
    are several. A number of layers is only judged if the one before held: then the confidence
    is that of the whole answer (tests in a fixed sequence: Maurer, Hothorn and Lehmacher 1995).

    Args:
        perplexity_without: from the layers to remove, none at first, to the perplexity on text
            that neither chose the layers nor trained the model; always on the same windows.
        choose: from a number of layers to the layers to remove.
        ratio: the largest factor by which the perplexity may rise, at least 1.
        most: layers to try at most.
        confidence: of the ratio, at least 0.5 and below 1.

    Returns:
        The largest removal up to which every smaller one holds the ratio as well.

    Example:
        >>> from short_gpt.evaluation.sampling import Sample
        >>> def perplexity_without(layers):
        ...     nats = math.log(10 + len(layers))
        ...     return Perplexity.of([Sample(text, nats, 1) for text in range(3)])
        >>> most_layers(perplexity_without, lambda n: [3, 1, 2][:n], ratio=1.25, most=3).layers
        [3, 1]
    """
    check_limit(ratio, confidence)
    dense = perplexity_without([])
    budget = Budget([], {0: dense}, ratio, confidence)
    kept: list[int] = []
    for n in range(1, most + 1):
        layers = choose(n)
        budget.tried[n] = perplexity_without(layers)
        budget.changes[n] = difference([dense], [budget.tried[n]])
        if not budget.holds(n):
            break
        kept = layers
    return Budget(kept, budget.tried, ratio, confidence, budget.changes)
