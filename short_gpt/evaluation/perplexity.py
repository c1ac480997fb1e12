"""Quality of a model on held-out text.

Shapes: B windows, S tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from short_gpt.data.windows import text_of
from short_gpt.evaluation.sampling import Sample, SamplingError, sampling_error
from short_gpt.models.decoder import Decoder, padded
from short_gpt.runtime.errors import NotFiniteError, ShortGPTError
from short_gpt.runtime.frames import html_table
from short_gpt.runtime.progress import bar, set_rate

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
        if self.error is None or not self.error.known:
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
            set_rate(shown, predicted)
            shown.update(len(batch))
            check_loss(sum(s.nats for s in samples[-len(batch) :]))
    check_predicted(predicted)
    return replace(Perplexity.of(samples), precision="mixed" if decoder.mixed else "float32")


def samples_of(windows: Sequence[Sequence[int]], nats: Sequence[float]) -> list[Sample]:
    """What windows gave, of each of which all tokens except the first are predicted."""
    pairs = zip(windows, nats, strict=True)
    return [Sample(text_of(window), value, len(window) - 1) for window, value in pairs]


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
