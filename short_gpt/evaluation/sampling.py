"""How far a mean over tokens is off because only some windows, of some texts, were read.

Windows of one text are alike: where there are several texts, the text is what was sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from short_gpt.scoring.metrics import LEAST_DEGREES, t_quantile
from short_gpt.scoring.moments import degrees_of_freedom, ratio_covariance


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
        degrees: of freedom, as in `clusters.degrees_of_freedom`: of texts, or of windows where
            there are not several texts.
    """

    standard_error: float
    windows: int
    texts: int | None
    degrees: float = 0.0

    def reach(self, confidence: float = 0.95, *, sides: int = 2) -> float:
        """How far from the mean the truth may be, in nats a token, by Student's t.

        Args:
            confidence: that it is no farther, above 0.5 and below 1.
            sides: 2, or 1 where only one direction counts.

        Returns:
            NaN where the samples are too few or too unequal, see `no_interval`.
        """
        return t_quantile(1 - (1 - confidence) / sides, self.degrees) * self.standard_error

    @property
    def known(self) -> bool:
        """Whether `reach` is."""
        return self.degrees >= LEAST_DEGREES

    @property
    def no_interval(self) -> str:
        """Why there is no interval, in words; empty if there is one."""
        if self.known:
            return ""
        by_window = self.texts is None or self.texts == 1
        unit, count = ("window", self.windows) if by_window else ("text", self.texts)
        if count == 1:
            return f"one {unit} tells nothing of others"
        if count == 2:
            return f"two {unit}s tell too little of others"
        if not self.degrees:
            return "the degrees of freedom of its error are not known"
        return f"the {count} {unit}s share their tokens too unequally to tell of others"

    @property
    def over(self) -> str:
        """What the error is over, and what it does not cover, in words."""
        if self.texts is None:
            return f"{self.windows} windows, taken as independent: their texts are not known"
        if self.texts == 1:
            return f"{self.windows} windows of 1 text: what other texts would give is not covered"
        return f"{self.windows} windows of {self.texts} texts, the texts being the samples"


def sampling_error(samples: Sequence[Sample]) -> SamplingError:
    """The standard error of sum nats / sum tokens over all windows.

    It is the jackknife's, as in `clusters.ratio_covariance`, over texts, or over windows where all
    are of one text or the texts are not known.
    """
    texts = {s.text for s in samples}
    known = None if None in texts else len(texts)
    units: dict[int, tuple[float, int]] = {}
    for index, sample in enumerate(samples):
        key = index if known in (None, 1) else int(sample.text or 0)
        nats, tokens = units.get(key, (0.0, 0))
        units[key] = nats + sample.nats, tokens + sample.tokens
    nats_of, tokens_of = torch.tensor([*units.values()], dtype=torch.float64).T  # (G,) each
    error = math.sqrt(ratio_covariance(nats_of[:, None], tokens_of).item())
    return SamplingError(error, len(samples), known, degrees_of_freedom(tokens_of))
