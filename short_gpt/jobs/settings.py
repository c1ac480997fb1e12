"""The settings of jobs that choose, remove or heal layers; `jobs.inputs` has what they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar

from short_gpt.jobs.inputs import count_of, listed, whole_numbers
from short_gpt.runtime.errors import ShortGPTError, at_least, check
from short_gpt.runtime.settings import CHOOSE, Settings, setting

if TYPE_CHECKING:
    from short_gpt.checkpoints.scores import ChosenLayers
    from short_gpt.healing.settings import Recipe
    from short_gpt.scoring.stopping import Stop
    from short_gpt.wrappers.scored_model import ScoredModel


# methods that `compare` takes by default
COMPARED = "bi,angular,deepest,relative_magnitude,perplexity,sleb,reverse,random"
MAX_NEW_TOKENS = 2**20  # more than Llamas are trained for; their cache is allocated in advance


@dataclass(frozen=True)
class Answer(Settings):
    """What a ranking must answer.

    Raises:
        ShortGPTError: there is no such method, or it needs a number of layers.
    """

    HEADING: ClassVar = CHOOSE
    n: int | None = setting(
        None, "Number of layers to remove; also print which ones each method would remove."
    )
    method: str = setting(
        "bi",
        "bi, angular, deepest, relative_magnitude, norm, sequential, reverse, random, "
        "perplexity, sleb, greedy_kld or auto, which refits the sets of several methods and takes "
        "the one nearest to the original on held-out windows.",
    )
    # share of all runs that do not end early with another answer; None never ends early
    confidence: float | None = 0.99

    def __post_init__(self) -> None:
        if self.method != Answer.method:  # the default is valid, without an import
            from short_gpt.selection.methods import check_method

            check_method(self.method)
            if self.by_loss and self.n is None:
                raise ShortGPTError(f"`method` {self.method} needs `n`")

    @property
    def by_loss(self) -> bool:
        from short_gpt.selection.methods import BY_LOSS

        return self.method in BY_LOSS

    def rule(self, seed: int | None) -> Stop | None:
        """The rule that ends a run early, where the answer can be settled.

        That takes a method that chooses n layers by means over windows, which a seed shuffles.
        """
        from short_gpt.scoring.stopping import Stop

        if self.confidence is None:
            return None
        rule = Stop(self.n or 1, self.method == "angular", self.confidence)
        can_settle = self.n is not None and seed is not None and self.method in ("bi", "angular")
        return rule if can_settle else None


@dataclass(frozen=True)
class Sampling(Settings):
    """How a text is continued."""

    max_new_tokens: int = setting(64, "Tokens to add at most; those of each sample.")
    temperature: float = setting(0.6, "Divisor of the logits; 0 takes the likeliest token.")
    top_p: float = setting(0.9, "Sample from the smallest set of tokens with this probability.")
    seed: int = setting(1, "Seed of the sampling.", rare=True)

    def __post_init__(self) -> None:
        at_least(0, max_new_tokens=self.max_new_tokens, seed=self.seed)
        most, count = f"at most {MAX_NEW_TOKENS:,}", self.max_new_tokens
        check(count <= MAX_NEW_TOKENS, "max_new_tokens", count, most)
        check(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        check(0 <= self.top_p <= 1, "top_p", self.top_p, "0 to 1")


@dataclass(frozen=True)
class Choice(Settings):
    """Layers to remove: named, or chosen by saved scores."""

    HEADING: ClassVar = CHOOSE
    layers: object = setting(
        None,
        "Numbers of the layers to remove, as in 21,22,23; or choose them by scores.",
        value="N,N",
    )
    scores: str | None = setting(None, "JSON file that rank wrote.", value="FILE")
    n: int | None = setting(None, "Number of layers to remove by the scores.")
    method: str | None = setting(
        None,
        "Method of rank to choose by. Default: the one that the scores were ranked by.",
        rare=True,
    )

    def check(self) -> Choice:
        """Itself; ShortGPTError unless it names either layers or scores to choose them by."""
        from short_gpt.selection.methods import check_method

        if (self.layers is None) == (self.scores is None):
            raise ShortGPTError("expected either `layers`, as in 21,22,23, or `scores` and `n`")
        if self.method is not None:
            check_method(self.method)
            if self.layers is not None:
                raise ShortGPTError("`method` chooses from `scores`, not from `layers`")
        return self

    def chosen(self, model: str) -> ChosenLayers:
        """The layers to remove from a model."""
        from short_gpt.checkpoints.scores import chosen

        layers = None
        if self.layers is not None:
            named = self.layers, "layers", "21,22,23"
            layers = whole_numbers(*named, what="layer numbers", empty=True)
        return chosen(model, layers, scores=self.scores, n=self.n, method=self.method)


CLOSED_FORM = ("ridge", "step_size")  # settings of closed forms
DISTILLED = ("top_k", "temperature", "kl_share")  # of a recipe, for distill alone
CHECKS = 40  # evaluations of a long training, at most


@dataclass(frozen=True)
class Healing(Settings):
    """How the model is healed."""

    HEADING: ClassVar = CHOOSE
    heal_by: str = setting(
        "refit",
        "Way to heal: refit, patch, lora or distill; or several by commas, a closed form first.",
    )
    ridge: float | None = setting(
        None,
        "Ridge of a closed form, relative to the mean square of the inputs. Default: in the refit "
        "2 F / N, twice the inputs of the matrix divided by the tokens; in the patch what held-out "
        "windows choose.",
        rare=True,
    )
    step_size: float | None = setting(
        None,
        "Share of the solved change that a closed form applies, above 0 and at most 1. Default: "
        "0.5 in the refit, 1 in the patch.",
        rare=True,
    )
    recipe: str | Mapping[str, object] | None = setting(
        None,
        "Settings of lora and distill: a preset (paper, demo or small) and changes, such as "
        "small,steps=400,rank=16,batch_size=4 or distill's top_k=64; in Python "
        "also a dict or a Recipe, which describes all. Default: paper.",
    )
    tokens: str | int | None = setting(
        None,
        "Tokens that lora and distill read, as in 400k or 1.6M, instead of the recipe's steps; "
        "more than once where the texts have fewer.",
        value="COUNT",
    )
    teacher: str | None = setting(
        None,
        "Original model of which MODEL is a part, for distill; with stream it is read by the "
        "layer. Default: MODEL itself, before layers go.",
        rare=True,
    )

    def check(self, methods: Sequence[str]) -> None:
        """Raises ShortGPTError for what none of the methods can do."""
        from short_gpt.healing import Recipe, lora
        from short_gpt.healing.job import CLOSED, STEPS, TRAINING

        closed = {name: {one.name for one in fields(STEPS[name].settings)} for name in CLOSED}
        users = {name: [form for form in closed if name in closed[form]] for name in CLOSED_FORM}
        users |= {"recipe": [*TRAINING], "tokens": [*TRAINING], "teacher": ["distill"]}
        for name, ways in users.items():
            if getattr(self, name) is not None and not {*ways} & {*methods}:
                raise ShortGPTError(f"`{name}` is for `heal_by` {' or '.join(ways)}")
        for name in closed.keys() & {*methods}:
            self.closed(name)
        if {*TRAINING} & {*methods}:
            recipe = Recipe.parse(self.recipe or "")  # raises for values out of range
            changed = [n for n in DISTILLED if getattr(recipe, n) != getattr(Recipe, n)]
            if changed and "distill" not in methods:
                raise ShortGPTError(f"{', '.join(changed)} of `recipe`: for `heal_by` distill")
            lora.check_installed(recipe)
            at_least(1, optional=True, tokens=self.count)
            # a recipe that names its steps has them whatever the default is
            one, two = (Recipe.parse(self.recipe or "", steps=steps).steps for steps in (1, 2))
            twice = self.count is not None and one == two and recipe is not self.recipe
            check(not twice, "tokens", self.tokens, "a recipe without steps, which say the same")

    @property
    def count(self) -> int | None:
        """The tokens that a training reads; None where the recipe's steps say it."""
        return None if self.tokens is None else count_of(self.tokens, "tokens")

    def closed(self, name: str) -> object:
        """The settings of a closed form; ShortGPTError for one out of range."""
        from short_gpt.healing.job import STEPS

        known = {one.name for one in fields(STEPS[name].settings)}
        changes = {n: getattr(self, n) for n in CLOSED_FORM if n in known}
        return STEPS[name].settings(**{n: v for n, v in changes.items() if v is not None})

    def trained(
        self, short: ScoredModel, seed: int, *, few_bits: bool = False, steps: int | None = None
    ) -> Recipe:
        """The recipe for a model of transformers.

        ``few_bits``: what it changes is rounded again, and so a preset that changes all maps
        changes the output projections alone. ``steps`` follow from ``tokens``.
        """
        from short_gpt.healing.settings import ALL, OUTPUTS, Recipe

        given, config = self.recipe or "", short.trainable().config
        recipe = Recipe.parse(given, config, seed=seed)
        if isinstance(given, Recipe):
            return recipe if steps is None else replace(recipe, steps=steps)
        if steps is not None:  # how often it is evaluated stays, if the recipe says it
            every = max(recipe.eval_every, -(-steps // CHECKS))
            recipe = Recipe.parse(given, config, seed=seed, steps=steps, eval_every=every)
        if few_bits and recipe.modules == ALL:
            return replace(recipe, modules=OUTPUTS)
        return recipe


def methods_of(text: str) -> list[str]:
    """The methods in a comma list; ShortGPTError unless each can follow the one before."""
    from short_gpt.healing.job import STEPS, check_order

    methods = listed(text)
    for name in methods:
        check(name in STEPS, "heal_by", name, f"one of {', '.join(STEPS)}, or several by commas")
    check_order(methods)
    return methods


@dataclass(frozen=True)
class Cases(Settings):
    """What is compared: every method x number of layers x healing.

    Example:
        >>> Cases("bi, sleb", 2).methods
        ['bi', 'sleb']
    """

    HEADING: ClassVar = CHOOSE
    method: str | Sequence[str] = setting(
        COMPARED, "Names as of the method of rank, with commas between.", value="A,B"
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
        """Raises ShortGPTError for an unknown name."""
        from short_gpt.healing.job import HEALINGS
        from short_gpt.selection.methods import check_method

        for name in self.methods:
            check_method(name)
        for name in self.healings:
            check(name in HEALINGS, "`heal_by`", name, f"some of {', '.join(HEALINGS)}")


def _names(names: str | Sequence[str]) -> list[str]:
    return listed(names) if isinstance(names, str) else list(names)
