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
    """What one window gave."""

    text: int | None  # number of the text that it was cut from; None if that is not known
    nats: float  # summed over its predicted tokens
    tokens: int  # how many those are


@dataclass(frozen=True)
class SamplingError:
    """The error of a mean over tokens."""

    standard_error: float  # of the mean, in nats a token; NaN for a single unit
    windows: int
    texts: int | None  # that the windows were cut from; None if that is not known
    # of freedom, see `moments.degrees_of_freedom`: of texts, or of windows if there is one text
    degrees: float = 0.0

    def margin(self, confidence: float = 0.95) -> float:
        """How far from the mean the truth may be, in nats a token, by Student's t.

        NaN if the samples are too few or too unequal, see `no_interval`.
        """
        return t_quantile(1 - (1 - confidence) / 2, self.degrees) * self.standard_error

    @property
    def known(self) -> bool:
        """Whether `margin` is."""
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
        windows = f"{self.windows} window{'s' * (self.windows != 1)}"
        if self.texts is None:
            return f"{windows}, taken as independent: their texts are not known"
        if self.texts == 1:
            return f"{windows} of 1 text: what other texts would give is not covered"
        return f"{windows} of {self.texts} texts, the texts being the samples"


def sampling_error(samples: Sequence[Sample]) -> SamplingError:
    """The standard error of sum nats / sum tokens over all windows.

    It is the jackknife's (`moments.ratio_covariance`), over texts, or over windows of one text.
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
