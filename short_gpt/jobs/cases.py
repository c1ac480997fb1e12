"""Settings of `compare`, and the rows of a comparison."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, ClassVar, TypedDict

from short_gpt.data.texts import evaluation_texts
from short_gpt.data.windows import Text
from short_gpt.jobs.inputs import Cut, listed, name_texts, whole_numbers
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.numbers import at_least
from short_gpt.runtime.settings import CHOOSE, READ, Needs, Values, setting

if TYPE_CHECKING:
    from short_gpt.healing.recipe import ModelConfig, Recipe
    from short_gpt.wrappers.scored_model import ScoredModel

Windows = Sequence[Sequence[int]]
RAW, PATCHED, REFIT, LORA, DISTILL = "raw", "patched", "refit", "lora", "distill"
HEALINGS = (RAW, PATCHED, REFIT, LORA, DISTILL)
TRAINED = (LORA, DISTILL)  # these take far longer than all others
DEFAULT_METHODS: tuple[str, ...] = ("bi", "angular", "deepest", "relative_magnitude")
DEFAULT_METHODS += ("perplexity", "sleb", "reverse", "random")


@dataclass(frozen=True)
class Row:
    """One model of the comparison."""

    method: str  # that chose the layers
    seed: int | None  # of the random method; None for all others
    n: int  # layers removed
    healing: str  # raw, patched, refit, lora or distill
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


NEEDS_TRAINING = Needs(
    "lora or distill in `healing`", lambda v: bool({*TRAINED} & {*_names(v["healing"])})
)
RANDOM = Needs("random in `methods`", lambda v: "random" in _names(v["methods"]))
NEEDS_SEARCH = Needs("perplexity or sleb in `methods`", _searches)


@dataclass(frozen=True)
class Cases:
    """What is compared: every method x number of layers x healing.

    Args:
        methods: names as of the method of rank, with commas between.
        counts: numbers of layers to remove, as in 2,4,8; by default those that the model allows.
        healings: of raw, patched, refit, lora and distill, with commas between.
        seeds: random sets for every number of layers.
        search_windows: of the windows of data, how many the searches by loss read.
        lora_only: what to heal by lora or distill, which take far longer than the others, as in
            bi:8,angular:8; all if not given.

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
    lora_only: str | Collection[tuple[str, int]] | None = setting(None, value="A:N")

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

    @property
    def pairs(self) -> list[tuple[str, int]] | None:
        """Methods and numbers to heal by lora or distill; None is all."""
        if self.lora_only is None:
            return None
        if not {*TRAINED} & {*self.heals}:
            raise ShortGPTError("`lora_only` is for `healing` lora or distill")
        named = self.lora_only
        parts = listed(named) if isinstance(named, str) else [f"{m}:{n}" for m, n in named]
        cases = {f"{m}:{n}": (m, n) for m in self.names for n in self.numbers}
        if odd := [part for part in parts if part not in cases]:
            raise ShortGPTError(
                f"`lora_only` {odd[0]}: expected METHOD:NUMBER of `methods` and `counts`, as in "
                f"{next(iter(cases))}"
            )
        return [cases[part] for part in parts]

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
        for name, asked in (("counts", counts), ("lora_only", [n for _, n in self.pairs or ()])):
            for n in asked:
                check_count(n, n_layers, most=most, name=f"`{name}`")
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
        _ = self.pairs  # raises for what it cannot read


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


@dataclass(frozen=True)
class LoraOptions:
    """How lora and distill heal in a comparison, the latter after a refit.

    Args:
        steps: steps of training, a tenth of them warm-up but at most 100; the recipe's 5000 if not
            given.
        rank: of the changes, and their scale; the recipe's if not given.
        learning_rate: its peak; the recipe's if not given.
        batch: windows a step; the recipe's 16 if not given.
        size: tokens in a window of training; the recipe's if not given.
    """

    steps: int | None = setting(None, needs=NEEDS_TRAINING)
    rank: int | None = setting(None, needs=NEEDS_TRAINING)
    learning_rate: float | None = setting(None, needs=NEEDS_TRAINING)
    batch: int | None = setting(None, needs=NEEDS_TRAINING)
    size: int | None = setting(None, flag="lora_size", needs=NEEDS_TRAINING)

    def check(self) -> None:
        from short_gpt.healing.recipe import Recipe

        Recipe(**self._changes)  # type: ignore[arg-type]

    def recipe(self, config: ModelConfig) -> Recipe:
        """The recipe for a model of this config of transformers."""
        from short_gpt.healing.recipe import recipe_for

        return recipe_for(config, "paper", **self._changes)

    @property
    def _changes(self) -> dict[str, object]:
        changes = {name: value for name, value in asdict(self).items() if value is not None}
        if self.rank is not None:
            changes["alpha"] = self.rank
        return changes
