"""How far a mean over tokens is off because only some windows, of some texts, were read.

Windows of one text are alike: where there are several texts, the text is what was sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from short_gpt.scoring.metrics import student_t


class Sample(NamedTuple):
    """What one window gave.

    Attributes:
        text: number of the text that it was cut from; None if that is not known.
        nats: summed over its predicted tokens.
        tokens: how many those are.
    """

    text: int | None
    nats: float
    tokens: int


@dataclass(frozen=True)
class SamplingError:
    """The error of a mean over tokens.

    Attributes:
        standard_error: of the mean, in nats a token; NaN for a single unit.
        windows: read.
        texts: that they were cut from; None if that is not known.
    """

    standard_error: float
    windows: int
    texts: int | None

    @property
    def degrees(self) -> int:
        """Of freedom: texts less 1, or windows less 1 where there are not several texts."""
        return (self.windows if self.texts in (None, 1) else int(self.texts or 0)) - 1

    def reach(self, confidence: float = 0.95, *, sides: int = 2) -> float:
        """How far from the mean the truth may be, in nats a token, by Student's t.

        Args:
            confidence: that it is no farther, above 0.5 and below 1.
            sides: 2, or 1 where only one direction counts.
        """
        if self.degrees < 1:
            return math.nan
        share = 1 - (1 - confidence) / sides
        return student_t(share, self.degrees) * self.standard_error

    @property
    def over(self) -> str:
        """What the error is over, and what it does not cover, in words."""
        if self.texts is None:
            return f"{self.windows} windows, taken as independent: their texts are not known"
        if self.texts == 1:
            return f"{self.windows} windows of 1 text: what other texts would give is not covered"
        return f"{self.windows} windows of {self.texts} texts, the texts being the samples"


def sampling_error(samples: Sequence[Sample]) -> SamplingError:
    """The standard error of sum nats / sum tokens.

    With N and T the sums of a unit's nats and tokens, m = sum N / sum T and G units, it is
    sqrt(G / (G - 1) sum (N - m T)^2) / sum T: that of a ratio of totals of clusters of unequal
    sizes (Cochran, Sampling Techniques, 3rd edition, chapter 9A), and the cluster-robust one of
    the mean weighted by tokens (Liang and Zeger 1986). A unit is a text, or a window where all
    are of one text or the texts are not known.

    Args:
        samples: of all windows, at least one token in all.
    """
    texts = {s.text for s in samples}
    known = None if None in texts else len(texts)
    units: dict[int, tuple[float, int]] = {}
    for place, sample in enumerate(samples):
        key = place if known in (None, 1) else int(sample.text or 0)
        nats, tokens = units.get(key, (0.0, 0))
        units[key] = nats + sample.nats, tokens + sample.tokens
    count, total = len(units), sum(tokens for _, tokens in units.values())
    mean = sum(nats for nats, _ in units.values()) / total
    squares = sum((nats - mean * tokens) ** 2 for nats, tokens in units.values())
    error = math.sqrt(count / (count - 1) * squares) / total if count > 1 else math.nan
    return SamplingError(error, len(samples), known)
