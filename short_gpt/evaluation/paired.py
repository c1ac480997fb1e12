"""Two states of a model on the same windows: what a change costs or brings, with its error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from short_gpt.evaluation.perplexity import Perplexity, perplexity
from short_gpt.models.decoder import Decoder
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import bar


@dataclass(frozen=True)
class Difference:
    """How much the mean loss of a token changed.

    Attributes:
        nats: second less first; below 0 is better. exp(nats) is the ratio of the perplexities.
        standard_error: of ``nats``, windows being the samples; NaN for fewer than two.
        windows: compared.
    """

    nats: float
    standard_error: float
    windows: int

    def __str__(self) -> str:
        return (
            f"{self.nats:+.4f} nats a token (standard error {self.standard_error:.4f}, paired over "
            f"{self.windows} windows): perplexity x {math.exp(self.nats):.4f}"
        )


def losses(
    decoder: Decoder, windows: Sequence[Sequence[int]], *, progress: bool = True
) -> list[Perplexity]:
    """The loss of every window on its own; errors as in `perplexity.perplexity`."""
    found = []
    with bar("perplexity", total=len(windows), unit="window", show=progress) as shown:
        for window in windows:
            found.append(perplexity(decoder, [[window]]))
            shown.update()
    return found


def together(parts: Sequence[Perplexity]) -> Perplexity:
    """The perplexity of all windows."""
    return Perplexity(
        sum(p.nats for p in parts), sum(p.tokens for p in parts), sum(p.windows for p in parts)
    )


def difference(first: Sequence[Perplexity], second: Sequence[Perplexity]) -> Difference:
    """The change from one state of a model to another on the same windows.

    The error is that of a ratio of sums: with d the change of a window's nats, t its tokens and m
    = sum d / sum t, sqrt(n / (n - 1) sum (d - m t)^2) / sum t.

    Args:
        first, second: from `losses` on the same windows in the same order.

    Raises:
        ShortGPTError: the windows differ.
    """
    tokens = [p.tokens for p in first]
    if tokens != [p.tokens for p in second] or not tokens:
        raise ShortGPTError(
            f"expected losses of the same windows, got {len(first)} windows and {len(second)}"
        )
    changes = [b.nats - a.nats for a, b in zip(first, second, strict=True)]
    n, total = len(tokens), sum(tokens)
    mean = sum(changes) / total
    # windows weigh by their tokens, as in the mean: their deviations are of d - m t, not d / t
    squares = sum((d - mean * t) ** 2 for d, t in zip(changes, tokens, strict=True))
    error = math.sqrt(n / (n - 1) * squares) / total if n > 1 else math.nan
    return Difference(mean, error, n)
