"""What a comparison gives: a row a model, and how far the methods agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from short_gpt.runtime.errors import ShortGPTError

RAW, REFIT, LORA, DISTILL = "raw", "refit", "lora", "distill"
HEALINGS = (RAW, REFIT, LORA, DISTILL)
GONE = ("patched", "linearpatch", "ghosted")  # healings of earlier versions
TRAINED = (LORA, DISTILL)  # these take far longer than all the rest
Windows = Sequence[Sequence[int]]


def check_healing(name: str) -> None:
    """Raises ShortGPTError unless a comparison can heal so."""
    if name in GONE:
        raise ShortGPTError(f"the healing {name} was removed: use refit, which restores more")
    if name not in HEALINGS:
        raise ShortGPTError(f"no healing {name!r}; expected some of {', '.join(HEALINGS)}")


@dataclass(frozen=True)
class Row:
    """One model of the comparison.

    Attributes:
        method, seed: what chose the layers; the seed is None but for the random method.
        n: layers removed.
        healing: raw, refit, lora or distill.
        layers: removed, original numbers.
        perplexity: on the evaluation text.
        nats, standard_error: mean loss less that of the whole model, paired over the windows.
        gain, gain_error: the same less that of the raw model, if this one is healed; else None.
        parameters: of the model without the layers.
        megabytes: of its weights.
        tokens_per_second: greedy generation with the cache, one sequence.
        windows, texts: that the errors are over; see `evaluation.Difference`.
    """

    method: str
    seed: int | None
    n: int
    healing: str
    layers: list[int]
    perplexity: float
    nats: float
    standard_error: float
    gain: float | None
    gain_error: float | None
    parameters: int
    megabytes: float
    tokens_per_second: float
    windows: int = 0
    texts: int | None = None


class Agreement(TypedDict):
    """How far cheap rankings agree with the greedy search, on the same windows.

    Attributes:
        n: layers that each method removes.
        overlap: for each pair of methods, as in "bi, sleb", the share of the n layers in common.
        rank_correlation_of_bi_with_loss: Spearman's, of Block Influence with the loss without each
            layer alone, over the layers that the search tries first, in [-1, 1].
    """

    n: int
    overlap: dict[str, float]
    rank_correlation_of_bi_with_loss: float
