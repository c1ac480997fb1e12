"""Whether a choice of layers may be trusted beyond the text that it was made on: one rule.

Text s chose layers. On another text t they cost more, or less, than the layers that t itself would
have chosen:

    excess(s, t) = loss on t without the layers of s, less that without the layers of t,

paired over the windows of t, and U its upper end of one-sided 95%. The choice of s is trusted if on
every other text that was measured U is at most `SHARE` of what the choice of t itself costs on t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from short_gpt.evaluation.paired import Difference

SHARE = 0.25
# Of the choices that it trusted on texts that nobody had measured those that did harm, and all, by
# layers removed: one small model as cut (``benchmarks/calibration_rule.py``)
CHECKED = {2: (2, 14), 4: (1, 26), 8: (0, 48)}
MIX = "mix"  # the name of the choice by all texts


@dataclass(frozen=True)
class Crossed:
    """One choice on one text.

    Attributes:
        choice: the text that chose the layers, and that a refit was fitted on; or `MIX`.
        text: the one it is judged on.
        healing: raw or refit.
        layers: removed.
        perplexity: on the text.
        nats, standard_error: mean loss less that of the whole model, paired over the windows.
        excess, excess_error: mean loss less that with the text's own choice, healed the same way;
            0 for that itself.
        excess_most: the upper end of the excess, one-sided 95%.
        windows, texts: that the errors are over; see `evaluation.Difference`.
    """

    choice: str
    text: str
    healing: str
    layers: list[int]
    perplexity: float
    nats: float
    standard_error: float
    excess: float
    excess_error: float
    excess_most: float
    windows: int
    texts: int | None


def most(excess: Difference) -> float:
    """The upper end of a difference, one-sided 95%; infinite where one window tells nothing."""
    reach = excess.error.reach(0.95, sides=1)
    return excess.nats + reach if reach == reach else float("inf")


@dataclass(frozen=True)
class Trust:
    """Whether one choice may be trusted beyond its text, and by which text that was judged.

    Attributes:
        choice, healing: as of `Crossed`.
        trusted: by the rule.
        share: the largest upper end of an excess, in parts of what the text's own choice costs.
        text: where it was largest.
    """

    choice: str
    healing: str
    trusted: bool
    share: float
    text: str


def trust(cells: Sequence[Crossed], *, share: float = SHARE) -> list[Trust]:
    """The rule for every choice, on all other texts.

    Args:
        cells: every choice on every text.
        share: of what the text's own choice costs, which the excess may reach.

    Example:
        >>> trust([])
        []
    """
    own = {(c.text, c.healing): c.nats for c in cells if c.choice == c.text}
    found = []
    for choice, healing in dict.fromkeys((c.choice, c.healing) for c in cells):
        others = [
            c for c in cells if (c.choice, c.healing) == (choice, healing) and c.text != choice
        ]
        shares = {c.text: _share(c, own[c.text, healing]) for c in others}
        if not shares:
            continue
        worst = max(shares, key=lambda text: shares[text])
        found.append(Trust(choice, healing, shares[worst] <= share, shares[worst], worst))
    return found


def _share(cell: Crossed, cost: float) -> float:
    """The upper end of the excess in parts of the cost of the text's own choice."""
    if cell.excess_most <= 0:
        return 0.0
    return cell.excess_most / cost if cost > 0 else float("inf")
