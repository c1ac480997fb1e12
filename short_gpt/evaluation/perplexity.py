"""Quality of a model on held-out text, what a change of it costs, and the errors of both.

Windows of one text are alike: where there are several texts, the text is what was sampled.

Shapes: B windows, S tokens, V vocabulary, G texts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from short_gpt.data.windows import text_number
from short_gpt.models.decoder import Decoder, padded
from short_gpt.runtime.errors import NotFiniteError, ShortGPTError
from short_gpt.runtime.frames import html_table
from short_gpt.runtime.progress import bar
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
    def has_margin(self) -> bool:
        """Whether the samples are enough, and equal enough, for `margin`."""
        return self.degrees >= LEAST_DEGREES

    @property
    def no_interval(self) -> str:
        """Why there is no interval, in words; empty if there is one."""
        if self.has_margin:
            return ""
        by_window = self.texts is None or self.texts == 1
        unit, count = ("window", self.windows) if by_window else ("text", self.texts)
        if count == 1:
            return f"one {unit} tells nothing of others"
        if count == 2:
            return f"two {unit}s are too few to estimate an interval"
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
    count = None if None in texts else len(texts)
    units: dict[int, tuple[float, int]] = {}
    for index, sample in enumerate(samples):
        key = index if count in (None, 1) else int(sample.text or 0)
        nats, tokens = units.get(key, (0.0, 0))
        units[key] = nats + sample.nats, tokens + sample.tokens
    nats_of, tokens_of = torch.tensor([*units.values()], dtype=torch.float64).T  # (G,) each
    error = math.sqrt(ratio_covariance(nats_of[:, None], tokens_of).item())
    return SamplingError(error, len(samples), count, degrees_of_freedom(tokens_of))


# Logits turned into losses at once: their logarithms of softmax stay in the processor's cache.
AT_ONCE = 2**21


def exp(nats: float) -> float:
    """exp(nats), and infinity where that is more than a float holds."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


@dataclass(frozen=True, repr=False)
class Perplexity:
    """Total loss over predicted tokens."""

    nats: float  # summed negative log-likelihood of the predicted tokens
    tokens: int  # how many were predicted: all of a window except its first
    windows: int
    samples: tuple[Sample, ...] = field(default=(), compare=False, repr=False)  # of every window
    precision: str = "float32"  # in which windows were read, as `OpenOptions.precision`

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Perplexity:
        each = tuple(samples)
        return cls(sum(s.nats for s in each), sum(s.tokens for s in each), len(each), each)

    @property
    def value(self) -> float:
        """exp(nats / tokens): 1 is certainty, the vocabulary's size is blind guessing."""
        return exp(self.nats / self.tokens)

    def __repr__(self) -> str:
        low, high = self.interval()
        interval = "" if math.isnan(low) else f", 95% {low:.3f} to {high:.3f}"
        return (
            f"Perplexity({self.value:.3f}{interval}, nats={self.nats!r}, tokens={self.tokens}, "
            f"windows={self.windows})"
        )

    def _repr_html_(self) -> str:
        columns = {name: [value] for name, value in self.to_dict().items()}
        return html_table(columns, "Perplexity")

    @property
    def error(self) -> SamplingError | None:
        """Of nats / tokens; None where what single windows gave is not known."""
        return sampling_error(self.samples) if self.samples else None

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Where the perplexity of all such text is, as sure as that; NaN where that is unknown."""
        margin = math.nan if self.error is None else self.error.margin(confidence)
        low, high = self.nats / self.tokens - margin, self.nats / self.tokens + margin
        return exp(max(low, 0.0)), exp(high)  # no loss is below 0; max keeps a NaN that comes first

    def to_dict(self) -> dict[str, object]:
        """The value, what it was computed from and its error, ready for JSON."""
        content: dict[str, object] = {"perplexity": self.value, "nats": self.nats}
        content |= {"tokens": self.tokens, "windows": self.windows}
        content |= {} if self.precision == "float32" else {"precision": self.precision}
        if self.error is None or not self.error.has_margin:
            return content
        content |= {"texts": self.error.texts, "standard_error": self.error.standard_error}
        return content | {"interval_95": list(self.interval())}


def perplexity(
    decoder: Decoder,
    batches: Iterable[Sequence[Sequence[int]]],
    *,
    total: int | None = None,
    progress: bool = False,
) -> Perplexity:
    """Perplexity of the model on windows of token ids.

    Every window is read on its own: its first token is only read, the others are predicted.
    SLEB (arXiv:2402.09025) and others print exp(sum(2048 mean loss) / (2048 n)) over n chunks, the
    mean being over a chunk's 2047 predicted tokens: the same value, as the chunks are equal. Their
    texts and chunks are those of `short_gpt.evaluation.protocols.protocol`.

    Args:
        batches: lists of windows, which may differ in length.
        total: number of windows to come, for the progress bar.

    Raises:
        ShortGPTError: no window has two tokens, or as in `decoder.pad`.
        NotFiniteError: a logit of a predicted token is NaN or infinite.

    Example:
        >>> perplexity(short.decoder, batches(windows, 4)).value  # doctest: +SKIP
        5.47
    """
    samples: list[Sample] = []
    predicted = 0
    with bar("perplexity", total=total, unit="window", show=progress) as shown:
        for batch in batches:
            for indices, tokens, mask in padded(batch, decoder):
                nats = window_nats(decoder, tokens, mask)
                samples += samples_of([batch[i] for i in indices], nats)
            predicted += sum(map(len, batch)) - len(batch)
            shown.update(len(batch))
            check_loss(sum(s.nats for s in samples[-len(batch) :]))
    check_predicted(predicted)
    return replace(Perplexity.of(samples), precision="mixed" if decoder.mixed else "float32")


def samples_of(windows: Sequence[Sequence[int]], nats: Sequence[float]) -> list[Sample]:
    """What windows gave, of each of which all tokens except the first are predicted."""
    pairs = zip(windows, nats, strict=True)
    return [Sample(text_number(window), value, len(window) - 1) for window, value in pairs]


def check_loss(nats: float) -> None:
    """Raises NotFiniteError for a loss that is NaN or infinite."""
    if not math.isfinite(nats):
        reason = "the model gave a NaN or infinite loss"
        raise NotFiniteError(f"{reason}; check the weights, or another dtype")


def check_predicted(tokens: int) -> None:
    """Raises ShortGPTError where windows were so short that no token of them is predicted."""
    if not tokens:
        raise ShortGPTError("expected windows of at least 2 tokens; nothing was predicted")


def window_nats(decoder: Decoder, tokens: Tensor, mask: Tensor) -> list[float]:
    """Negative log-likelihood of each window's predicted tokens, summed: all except its first.

    ``tokens`` and ``mask`` are (B, S), as `decoder.pad` gives them.
    """
    logits = decoder.logits(tokens)[:, :-1].flatten(0, 1)  # (B (S - 1), V): what comes next
    # (B (S - 1),); cross_entropy gives 0 for -100, so that padding costs nothing
    targets = tokens[:, 1:].masked_fill(~mask[:, 1:], -100).flatten()
    rows = max(1, AT_ONCE // logits.shape[-1])
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    loss = torch.cat([F.cross_entropy(x, y, reduction="none") for x, y in parts])
    loss = loss.cpu().double().view(len(tokens), -1)  # MPS has no float64
    return loss.sum(1).tolist()


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


def window_perplexities(
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
    """The change from one model to another on the same windows in the same order."""
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
