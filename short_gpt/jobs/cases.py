"""Settings of `compare`, and the rows of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from short_gpt.jobs.inputs import listed, whole_numbers
from short_gpt.runtime.errors import at_least, check
from short_gpt.runtime.settings import CHOOSE, Settings, setting

METHODS = "bi,angular,deepest,relative_magnitude,perplexity,sleb,reverse,random"
SEEDS = 3  # random sets for every number of layers


@dataclass(frozen=True)
class Row:
    """One model of the comparison."""

    method: str  # that chose the layers
    seed: int | None  # of the random method; None for all others
    n: int  # layers removed
    healing: str  # raw, patch or refit
    layers: list[int]  # removed, original numbers
    perplexity: float  # on the evaluation text
    nats: float  # mean loss minus that of the original model, paired over the windows
    standard_error: float  # of nats; 0 for the original model
    gain: float | None  # mean loss minus that of the raw model; None for a raw one
    gain_error: float | None  # standard error of gain
    parameters: int  # of the model without the layers
    megabytes: float  # of its weights
    tokens_per_second: float  # greedy generation with the cache, one sequence
    windows: int = 0  # that the errors are over
    texts: int | None = None  # of the windows; see `evaluation.Difference`


@dataclass(frozen=True)
class Cases(Settings):
    """What is compared: every method x number of layers x healing.

    Example:
        >>> Cases("bi, sleb", 2).methods
        ['bi', 'sleb']
    """

    HEADING: ClassVar = CHOOSE
    method: str | Sequence[str] = setting(
        METHODS, "Names as of the method of rank, with commas between.", value="A,B"
    )
    n: object = setting(
        (2, 4, 8, 12),
        "Numbers of layers to remove, as in 2,4,8; by default those of 2, 4, 8 and 12 that the "
        "model allows.",
        value="N,N",
    )
    heal_by: str | Sequence[str] = setting(
        "raw,patch",
        "Ways to heal: of raw (none), patch and refit, with commas between.",
        value="A,B",
    )

    @property
    def methods(self) -> list[str]:
        return _names(self.method)

    @property
    def counts(self) -> list[int]:
        counts = whole_numbers(self.n, "n", "2,4,8")
        at_least(1, n=min(counts))
        return counts

    @property
    def healings(self) -> list[str]:
        return _names(self.heal_by)

    def within(self, n_layers: int) -> Cases:
        """These cases for a model of so many layers: of the default numbers, those it allows.

        Raises ShortGPTError if it has too few for the numbers that the user set.
        """
        from short_gpt.models.numbering import check_count
        from short_gpt.selection.methods import BY_LOSS

        # searches keep the first and the last layer
        most, counts = n_layers - (2 if {*self.methods} & {*BY_LOSS} else 1), self.counts
        if self.n is Cases.n:
            counts = [n for n in counts if n <= most] or [1]
        for n in counts:
            check_count(n, n_layers, most=most, name="`n`")
        return replace(self, n=counts)

    def check(self) -> None:
        """Raises ShortGPTError for an unknown name, or one that stands there twice."""
        from short_gpt.healing.sets import HEALINGS
        from short_gpt.selection.methods import check_method

        for name in self.methods:
            check_method(name)
        for name in self.healings:
            check(name in HEALINGS, "`heal_by`", name, f"some of {', '.join(HEALINGS)}")
        each: dict[str, Sequence[object]] = {
            "method": self.methods,
            "n": self.counts,
            "heal_by": self.healings,
        }
        for name, values in each.items():
            check(len({*values}) == len(values), f"`{name}`", values, "each once")


def _names(names: str | Sequence[str]) -> list[str]:
    return listed(names) if isinstance(names, str) else list(names)
