"""Quality of a model on held-out text, what a change of it costs, and the errors of both.

Windows of one text are alike: where there are several texts, the text is what was sampled.

Shapes: B windows, S tokens, V vocabulary, G texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from short_gpt.data.texts import check_has_split, pg19, texts
from short_gpt.data.windows import evaluated, text_number, windows
from short_gpt.evaluation.distance import Reference, kl_divergence
from short_gpt.models.decoder import Decoder, padded
from short_gpt.runtime.errors import NotFiniteError, ShortGPTError
from short_gpt.runtime.frames import html_table
from short_gpt.runtime.progress import bar
from short_gpt.scoring.metrics import LEAST_DEGREES, t_quantile
from short_gpt.scoring.moments import degrees_of_freedom, ratio_covariance


class Sample(NamedTuple):
    """What one window gave."""

    text: int | None  # number of the text that it was cut from; None if that is not known
    nats: float  # loss, summed over its predicted tokens
    tokens: int  # how many those are
    kld: float | None = None  # KL(original || model) in nats, summed; None without a `Reference`
    same: float | None = None  # predicted tokens whose likeliest token is the original's


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


class Mean(NamedTuple):
    """A mean over tokens, at least 0, and its error."""

    value: float
    error: SamplingError

    def interval(self) -> tuple[float, float]:
        """Where the mean over all such text is, at 95%; NaN where that is unknown."""
        margin = self.error.margin()
        # max keeps a NaN that comes first
        return max(self.value - margin, 0.0), self.value + margin

    def __str__(self) -> str:
        margin = self.error.margin()
        return f"{self.value:.3f}" + ("" if math.isnan(margin) else f" ± {margin:.3f}")


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


# logits whose softmax is taken at once: on a CPU as many as its cache holds, several times over
AT_ONCE, ON_CPU = 2**21, 2**17


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

    @property
    def kld(self) -> Mean | None:
        """KL(original || model) in nats a token, at least 0; None where that was not measured."""
        return self._mean([s.kld for s in self.samples])

    @property
    def same_top(self) -> Mean | None:
        """Share of tokens whose likeliest token is the original's, 0 to 1; None as for `kld`."""
        return self._mean([s.same for s in self.samples])

    def _mean(self, sums: Sequence[float | None]) -> Mean | None:
        values = [value for value in sums if value is not None]
        if not sums or len(values) < len(sums):
            return None
        pairs = zip(self.samples, values, strict=True)
        error = sampling_error([s._replace(nats=value) for s, value in pairs])
        return Mean(max(math.fsum(values) / self.tokens, 0.0), error)  # rounding may give -1e-11

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

    def interval(self) -> tuple[float, float]:
        """Where the perplexity of all such text is, at 95%; NaN where that is unknown."""
        margin = math.nan if self.error is None else self.error.margin()
        low, high = self.nats / self.tokens - margin, self.nats / self.tokens + margin
        return exp(max(low, 0.0)), exp(high)  # no loss is below 0; max keeps a NaN that comes first

    def to_dict(self) -> dict[str, object]:
        """The value, what it was computed from and its error, ready for JSON."""
        content: dict[str, object] = {"perplexity": self.value, "nats": self.nats}
        content |= {"tokens": self.tokens, "windows": self.windows}
        content |= {} if self.precision == "float32" else {"precision": self.precision}
        for name, mean in (("kld", self.kld), ("same_top", self.same_top)):
            if mean is not None:
                content |= {name: mean.value}
                if mean.error.has_margin:
                    content |= {f"{name}_standard_error": mean.error.standard_error}
                    content |= {f"{name}_interval_95": [*mean.interval()]}
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
    reference: Reference | None = None,
) -> Perplexity:
    """Perplexity of the model on windows of token ids.

    Every window is read on its own: its first token is only read (of an `Answer`, the prompt), the
    others are predicted. SLEB (arXiv:2402.09025) and others print exp(sum(2048 mean loss) /
    (2048 n)) over n chunks, the mean being over a chunk's 2047 predicted tokens: the same value, as
    the chunks are equal. Their texts and chunks are those of `protocol`.

    Args:
        batches: Lists of windows, which may differ in length.
        total: Number of windows to come, for the progress bar.
        reference: The original's predictions for these windows, for `Perplexity.kld` and
            `Perplexity.same_top`. Default: neither is measured.

    Raises:
        ShortGPTError: no window has two tokens, or as in `decoder.pad`.
        NotFiniteError: a logit of a predicted token is NaN or infinite.
    """
    samples: list[Sample] = []
    with bar("perplexity", total=total, unit="window", show=progress) as shown:
        for batch in batches:
            for indices, tokens, mask in padded(batch, decoder):
                windows = [batch[i] for i in indices]
                if reference is not None and reference.awaits(windows):
                    logits = reference.predict(windows, tokens)  # (B, S, V)
                    own = measured(windows, logits, tokens, mask)
                    samples += [s._replace(kld=0.0, same=float(s.tokens)) for s in own]
                    continue
                logits = decoder.logits(tokens)  # (B, S, V)
                samples += measured(windows, logits, tokens, mask, reference)
            shown.update(len(batch))
            check_loss(sum(s.nats for s in samples[-len(batch) :]))
    check_predicted(sum(s.tokens for s in samples))
    return replace(Perplexity.of(samples), precision="mixed" if decoder.mixed else "float32")


def measured(
    windows: Sequence[Sequence[int]],
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor,
    reference: Reference | None = None,
) -> list[Sample]:
    """What each of B windows gave, from logits (B, S, V); tokens, mask (B, S) as `decoder.pad`."""
    predicted = _predicted(windows, mask)  # (B, S - 1)
    # cross_entropy gives 0 for -100, so that padding costs nothing
    targets = tokens[:, 1:].masked_fill(~predicted, -100)  # (B, S - 1)
    columns = [_by_token(partial(F.cross_entropy, reduction="none"), logits, targets)]
    if reference is not None:
        original = reference.logits(windows, tokens.shape[1])  # (B, S, V)
        columns += [_by_token(f, logits, original) for f in (kl_divergence, _same_top)]
    predicted = predicted.cpu()
    sums = [torch.where(predicted, values, 0.0).sum(1).tolist() for values in columns]
    rows = zip(windows, zip(*sums, strict=True), predicted.sum(1).tolist(), strict=True)
    return [
        Sample(text_number(window), nats, count, *more) for window, (nats, *more), count in rows
    ]


def divergence(
    windows: Sequence[Sequence[int]], logits: Tensor, mask: Tensor, reference: Reference
) -> float:
    """KL(original || model) of B windows, in nats, summed; of `measured` what a search asks for."""
    original = reference.logits(windows, mask.shape[1])  # (B, S, V)
    values = _by_token(kl_divergence, logits, original)  # (B, S - 1)
    return float(values[_predicted(windows, mask).cpu()].sum())


def _predicted(windows: Sequence[Sequence[int]], mask: Tensor) -> Tensor:
    """Which tokens after the first are predicted, (B, S - 1), from the mask of real ones (B, S)."""
    predicted = mask[:, 1:].clone()
    for row, window in enumerate(windows):
        counted = torch.tensor([*evaluated(window)[1:]], dtype=torch.bool, device=mask.device)
        predicted[row, : len(counted)] &= counted
    return predicted


def _by_token(function: Callable[..., Tensor], logits: Tensor, other: Tensor) -> Tensor:
    """A function of predictions (N, V) and what belongs to each, a few rows at a time: (B, S - 1).

    A few rows' logarithms of softmax stay in the processor's cache.
    """
    at_once = ON_CPU if logits.device.type == "cpu" else AT_ONCE
    rows, count = max(1, at_once // logits.shape[-1]), logits.shape[1] - 1
    each = logits[:, :count].flatten(0, 1)  # (B (S - 1), V): what comes next
    others = other[:, :count].flatten(0, 1)  # (B (S - 1), ...)
    values = [function(*part) for part in zip(each.split(rows), others.split(rows), strict=True)]
    return torch.cat(values).cpu().double().view(len(logits), -1)  # MPS has no float64


def _same_top(logits: Tensor, original: Tensor) -> Tensor:
    return logits.argmax(-1) == original.argmax(-1)  # (N, V) twice to (N,)


def check_loss(nats: float) -> None:
    """Raises NotFiniteError for a loss that is NaN or infinite."""
    if not math.isfinite(nats):
        reason = "the model gave a NaN or infinite loss"
        raise NotFiniteError(f"{reason}; check the weights, or another dtype")


def check_predicted(tokens: int) -> None:
    """Raises ShortGPTError where windows were so short that no token of them is predicted."""
    if not tokens:
        raise ShortGPTError("expected windows of at least 2 tokens; nothing was predicted")


@dataclass(frozen=True)
class Difference:
    """How much a mean over tokens changed, the loss or the KL divergence, and its error."""

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
    decoder: Decoder,
    windows: Sequence[Sequence[int]],
    *,
    progress: bool = True,
    reference: Reference | None = None,
) -> list[Perplexity]:
    """What every window gave on its own; errors as in `perplexity.perplexity`."""
    each = []
    with bar("perplexity", total=len(windows), unit="window", show=progress) as shown:
        for window in windows:
            each.append(perplexity(decoder, [[window]], reference=reference))
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


def difference(
    first: Sequence[Perplexity], second: Sequence[Perplexity], *, by: str = "nats"
) -> Difference:
    """The change from one model to another on the same windows in the same order.

    ``by`` is the field of `Sample` that is compared: "nats", the loss, or "kld".
    """
    before, after = ([s for p in parts for s in _samples(p)] for parts in (first, second))
    if [s.tokens for s in before] != [s.tokens for s in after] or not before:
        got = f"got {len(before)} windows and {len(after)}"
        raise ShortGPTError(f"expected losses of the same windows, {got}")
    changes = [
        Sample(a.text if a.text == b.text else None, getattr(b, by) - getattr(a, by), a.tokens)
        for a, b in zip(before, after, strict=True)
    ]
    mean = sum(c.nats for c in changes) / sum(c.tokens for c in changes)
    error = sampling_error(changes)
    return Difference(mean, **vars(error))


# The texts and windows on which the literature measures

PROTOCOLS = ("wikitext-2", "c4", "ptb", "pg19")
WIKITEXT2 = "Salesforce/wikitext:wikitext-2-raw-v1"
C4 = "allenai/c4:en"
C4_TEXTS, C4_WINDOWS = 1100, 256


def rows_of(name: str, source: str | Path | None = None) -> Iterator[str]:
    """The rows of a text of `PROTOCOLS` as `protocol` reads them; the first is read at once."""
    if name == "pg19":
        return pg19("test", path=source)
    split = "validation" if name == "c4" else "test"
    if source is not None:
        check_has_split(source, split)
    if name == "ptb":  # which no hub has
        if source is None:
            raise ShortGPTError("ptb needs a local copy: pass `source`, such as ptb.test.txt")
        return texts(Path(source), split=split, column="sentence")
    named = C4 if name == "c4" else WIKITEXT2
    return texts(named if source is None else source, split=split)


def protocol(
    name: str,
    encode: Callable[[str], Sequence[int]],
    *,
    size: int = 2048,
    limit: int | None = None,
    source: str | Path | None = None,
    bos: str = "first",
) -> list[list[int]]:
    """Windows of token ids for `perplexity`, cut as published results cut them.

    "wikitext-2" is the test split, its rows joined with two line breaks, and "c4" the first 1100
    texts of the English validation split, joined with spaces, of which the first 256 windows
    count: each is tokenized as one text (SLEB, arXiv:2402.09025, SliceGPT and others). So is "ptb",
    the test split of the Penn Treebank joined with spaces (GPTQ's "ptb-new"). It is read from a
    local copy alone: ptb.test.txt, or rows with the column "sentence". "pg19" is the test split,
    book by book. Windows do not overlap; a shorter last one is dropped. No token is put before a
    window: ``encode`` may add one, once a text.

    Args:
        encode: Makes token ids of a text, such as ``short.encode``.
        size: Tokens of a window. Default: 2048, as in published numbers.
        limit: Most windows, the first ones. Default: all.
        source: Local copy or another name at the hub, as `texts` reads it, with the rows of the
            original in their order; for "ptb" and "pg19" only a path. Default: the hub's.
        bos: Windows that begin with bos, as in `data.windows`. Default: "first".
    """
    if name not in PROTOCOLS:
        raise ShortGPTError(f"protocol {name!r} is unknown: expected one of {', '.join(PROTOCOLS)}")
    rows = rows_of(name, source)
    tokenized: Iterable[str] = rows  # each on its own
    if name == "c4":
        tokenized = [" ".join(islice(rows, C4_TEXTS))]
        limit = C4_WINDOWS if limit is None else min(limit, C4_WINDOWS)
    elif name == "ptb":
        tokenized = [" ".join(" ".join(rows).split())]  # of a file, its lines are the rows
    elif name == "wikitext-2":
        tokenized = ["\n\n".join(rows)]
    return [*windows(tokenized, encode, size=size, stride=size, limit=limit, bos=bos)]
