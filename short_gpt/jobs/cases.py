"""Settings of `compare`, and the rows of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, TypedDict

from short_gpt.data.texts import evaluation_texts
from short_gpt.data.windows import Text
from short_gpt.jobs.inputs import Cut, listed, name_texts, whole_numbers
from short_gpt.runtime.errors import ShortGPTError, at_least
from short_gpt.runtime.settings import CHOOSE, READ, Needs, Values, setting

if TYPE_CHECKING:
    from short_gpt.wrappers.scored_model import ScoredModel

Windows = Sequence[Sequence[int]]
HEALINGS = RAW, PATCHED, REFIT = ("raw", "patched", "refit")
DEFAULT_METHODS: tuple[str, ...] = ("bi", "angular", "deepest", "relative_magnitude")
DEFAULT_METHODS += ("perplexity", "sleb", "reverse", "random")


@dataclass(frozen=True)
class Row:
    """One model of the comparison."""

    method: str  # that chose the layers
    seed: int | None  # of the random method; None for all others
    n: int  # layers removed
    healing: str  # raw, patched or refit
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


class MethodAgreement(TypedDict):
    """How far cheap rankings agree with the greedy search, on the same windows."""

    n: int  # layers that each method removes
    overlap: dict[str, float]  # share of the n layers in common, by pair, as in "bi, sleb"
    # Spearman's, with the loss without each layer that the search tries first, in [-1, 1]
    rank_correlation_of_bi_with_loss: float


def _names(names: object) -> list[str]:
    return listed(names) if isinstance(names, str) else list(names)  # type: ignore[call-overload]


def _searches(values: Values) -> bool:
    from short_gpt.selection.methods import BY_LOSS, METHODS

    return not {*_names(values["methods"])} <= {*METHODS} - {*BY_LOSS}


RANDOM = Needs("random in `methods`", lambda v: "random" in _names(v["methods"]))
NEEDS_SEARCH = Needs("perplexity or sleb in `methods`", _searches)


@dataclass(frozen=True)
class Cases:
    """What is compared: every method x number of layers x healing.

    Args:
        methods: names as of the method of rank, with commas between.
        counts: numbers of layers to remove, as in 2,4,8; by default those that the model allows.
        healings: of raw, patched and refit, with commas between.
        seeds: random sets for every number of layers.
        search_windows: of the windows of data, how many the searches by loss read.

    Example:
        >>> Cases("bi, sleb", 2).names
        ['bi', 'sleb']
    """

    HEADING: ClassVar = CHOOSE
    methods: str | Sequence[str] = setting(DEFAULT_METHODS, value="A,B")
    counts: object = setting((2, 4, 8, 12), value="N,N")
    healings: str | Sequence[str] = setting((RAW,), flag="healing", value="A,B")
    seeds: int = setting(3, needs=RANDOM)
    search_windows: int = setting(4, heading=READ, needs=NEEDS_SEARCH)

    @property
    def names(self) -> list[str]:
        return _names(self.methods)

    @property
    def numbers(self) -> list[int]:
        numbers = whole_numbers(self.counts, "counts", "2,4,8")
        if min(numbers) < 1:
            raise ShortGPTError(f"expected whole numbers as in `counts` 2,4,8, got {self.counts!r}")
        return numbers

    @property
    def heals(self) -> list[str]:
        return _names(self.healings)

    def within(self, n_layers: int) -> Cases:
        """These cases for a model of so many layers: of the default counts, those that it allows.

        Raises ShortGPTError if it has too few for the counts that were asked for.
        """
        from short_gpt.models.numbering import check_count
        from short_gpt.selection.methods import BY_LOSS

        # searches keep the first and the last layer
        most, counts = n_layers - (2 if {*self.names} & {*BY_LOSS} else 1), self.numbers
        if self.counts is Cases.counts:
            counts = [n for n in counts if n <= most] or [1]
        for n in counts:
            check_count(n, n_layers, most=most, name="`counts`")
        return replace(self, counts=counts)

    def __post_init__(self) -> None:
        if odd := [name for name in self.heals if name not in HEALINGS]:
            raise ShortGPTError(f"no healing {odd[0]!r}; expected some of {', '.join(HEALINGS)}")
        if self.methods is not DEFAULT_METHODS:  # these are known to be valid, without an import
            from short_gpt.selection.methods import check_method

            for name in self.names:
                check_method(name)
        lists: dict[str, Sequence[object]] = {"methods": self.names, "counts": self.numbers}
        lists["healing"] = self.heals
        for name, values in lists.items():
            if not values or len({*values}) < len(values):
                raise ShortGPTError(f"{name} = {values}: expected at least one, and each once")
        at_least(1, seeds=self.seeds, search_windows=self.search_windows)


@dataclass(frozen=True)
class Shares:
    """How many windows are read, of which size, for each purpose.

    Args:
        eval_data: texts to evaluate on; if not given, a tenth of the texts of data is held out,
            or the end of a lone text.
        size: tokens in a window.
        max_windows: windows of data for scores and closed forms.
        eval_windows: windows to evaluate on.
        seed: of the choice of windows.
        bos: which windows begin with BOS; see rank.
    """

    HEADING: ClassVar = READ
    eval_data: str | None = setting(None, value="TEXTS")
    size: int = 1024
    max_windows: int = 24
    eval_windows: int = 16
    seed: int = 0
    bos: str | None = None

    def __post_init__(self) -> None:
        name_texts(self, "eval_data")

    def check(self) -> None:
        Cut(self.size, seed=self.seed, bos=self.bos).check()
        at_least(1, max_windows=self.max_windows, eval_windows=self.eval_windows)

    def held(self, column: str) -> list[list[str]]:
        """The texts of each kind of eval_data, if given."""
        return [list(kind) for kind in evaluation_texts(self.eval_data, column).values()]

    def cut(
        self, short: ScoredModel, kinds: Sequence[Sequence[Text]], limit: int
    ) -> list[list[int]]:
        """Windows of kinds of text in random order."""
        cut = Cut(self.size, limit, self.seed, bos=self.bos)
        return list(cut.mixed(kinds, short.encode, short.bos))
