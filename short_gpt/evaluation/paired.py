"""Two states of a model on the same windows: what a change costs or brings, with its error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from short_gpt.evaluation.perplexity import Perplexity, exp, perplexity
from short_gpt.evaluation.sampling import Sample, SamplingError, sampling_error
from short_gpt.models.decoder import Decoder
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import bar


@dataclass(frozen=True)
class Difference:
    """How much the mean loss of a token changed, with the entries of `SamplingError`."""

    nats: float  # second minus first; below 0 is better. exp(nats) is the perplexities' ratio.
    standard_error: float  # of ``nats``
    windows: int
    texts: int | None = None
    degrees: float = 0.0

    @property
    def error(self) -> SamplingError:
        return SamplingError(self.standard_error, self.windows, self.texts, self.degrees)

    @property
    def told_apart(self) -> bool:
        """Whether the 95% interval leaves out 0; False where there is none."""
        return abs(self.nats) > self.error.margin()  # no number is above NaN

    def __str__(self) -> str:
        margin = self.error.no_interval and f"no interval: {self.error.no_interval}"
        margin = margin or f"95% ± {self.error.margin():.4f}"
        if not math.isnan(self.standard_error):
            margin = f"standard error {self.standard_error:.4f}, {margin}"
        return (
            f"{self.nats:+.4f} nats a token ({margin}): perplexity x {exp(self.nats):.4f}; "
            f"paired over {self.error.over}"
        )


def losses(
    decoder: Decoder, windows: Sequence[Sequence[int]], *, progress: bool = True
) -> list[Perplexity]:
    """The loss of every window on its own; errors as in `perplexity.perplexity`."""
    each = []
    with bar("perplexity", total=len(windows), unit="window", show=progress) as shown:
        for window in windows:
            each.append(perplexity(decoder, [[window]]))
            shown.update()
    return each


def combined(parts: Sequence[Perplexity]) -> Perplexity:
    """The perplexity of all windows."""
    samples = tuple(s for p in parts for s in _samples(p))
    nats, tokens = sum(s.nats for s in samples), sum(s.tokens for s in samples)
    precision = parts[0].precision if parts else "float32"
    return Perplexity(nats, tokens, sum(p.windows for p in parts), samples, precision)


def _samples(part: Perplexity) -> tuple[Sample, ...]:
    """Of every window; of all as one where only that is known."""
    return part.samples or (Sample(None, part.nats, part.tokens),)


def difference(first: Sequence[Perplexity], second: Sequence[Perplexity]) -> Difference:
    """The change from one model's `losses` to another's on the same windows in the same order."""
    before, after = ([s for p in parts for s in _samples(p)] for parts in (first, second))
    if [s.tokens for s in before] != [s.tokens for s in after] or not before:
        got = f"got {len(before)} windows and {len(after)}"
        raise ShortGPTError(f"expected losses of the same windows, {got}")
    changes = [
        Sample(a.text if a.text == b.text else None, b.nats - a.nats, a.tokens)
        for a, b in zip(before, after, strict=True)
    ]
    mean = sum(c.nats for c in changes) / sum(c.tokens for c in changes)
    error = sampling_error(changes)
    return Difference(mean, **vars(error))
