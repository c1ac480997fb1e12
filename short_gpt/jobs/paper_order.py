"""How far measured scores bear out the order of the paper's list. L layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from short_gpt.scoring.importance import Importance, difference_margins

BORNE_OUT, REVERSED, WITHIN = "as in the paper", "the other way", "within the error"


@dataclass(frozen=True)
class Pair:
    """Two layers that the paper removes, one before the other.

    Attributes:
        first, second: the layers, in the paper's order.
        difference: Block Influence of the second less that of the first; above 0 where the scores
            have them in the paper's order.
        margin: half of its interval, of the paired error; NaN if one window was read.
    """

    first: int
    second: int
    difference: float
    margin: float

    @property
    def verdict(self) -> str:
        """Whether the scores have the paper's order, the other one, or cannot tell."""
        if not abs(self.difference) > self.margin:  # nothing is beyond an error that is not known
            return WITHIN
        return BORNE_OUT if self.difference > 0 else REVERSED


@dataclass(frozen=True)
class PaperOrder:
    """What measured scores say of the order of the paper's list.

    Attributes:
        confidence: of the interval of each pair by itself.
        pairs: every two layers of the list, in its order.
    """

    confidence: float
    pairs: list[Pair]

    def of(self, verdict: str) -> list[Pair]:
        """The pairs of one verdict."""
        return [pair for pair in self.pairs if pair.verdict == verdict]

    def to_dict(self) -> dict[str, object]:
        """All pairs with their verdicts, ready for JSON; None stands for NaN."""
        pairs = []
        for pair in self.pairs:
            margin = pair.margin if pair.margin == pair.margin else None
            pairs.append({**vars(pair), "margin": margin, "verdict": pair.verdict})
        return {"confidence": self.confidence, "pairs": pairs}

    def table(self) -> str:
        """Neighbours of the paper's list, and a count of all pairs, for a terminal."""
        layers = list(dict.fromkeys(i for pair in self.pairs for i in (pair.first, pair.second)))
        neighbours = set(pairwise(layers))
        level = f"{self.confidence:.0%}"
        lines = [f"The paper's order by these scores (difference, ± its paired error at {level}):"]
        lines += [
            f"{pair.first:>5} before {pair.second:>3}  {pair.difference:>+10.6f} ± "
            f"{pair.margin:.6f}  {pair.verdict}"
            for pair in self.pairs
            if (pair.first, pair.second) in neighbours
        ]
        counts = [f"{len(self.of(name))} {name}" for name in (BORNE_OUT, WITHIN, REVERSED)]
        return "\n".join([*lines, f"pairs of the list, {len(self.pairs)}: {', '.join(counts)}"])


def bear_out(paper: Sequence[int], importance: Importance, confidence: float = 0.95) -> PaperOrder:
    """Sets the order of a list of removed layers against measured scores.

    Where a difference is within its error, these data do not tell the order: another sample of
    texts may give the other one.

    Args:
        paper: layers in order of removal, all of them scored.
        importance: the scores.
        confidence: of the interval of each pair by itself.
    """
    margins, scores = difference_margins(importance, confidence), importance.block_influence
    pairs = []
    for first, second in combinations(paper, 2):
        a, b = importance.layers.index(first), importance.layers.index(second)
        pairs.append(Pair(first, second, float(scores[b] - scores[a]), float(margins[a, b])))
    return PaperOrder(confidence, pairs)
