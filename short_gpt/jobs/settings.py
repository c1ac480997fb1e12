"""The settings of jobs that choose, remove or heal layers; `jobs.inputs` has what they read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from short_gpt.jobs.inputs import layer_list, listed
from short_gpt.runtime.errors import ShortGPTError, at_least, check
from short_gpt.runtime.settings import CHOOSE, Settings, setting

if TYPE_CHECKING:
    from short_gpt.checkpoints.scores import ChosenLayers
    from short_gpt.healing.settings import Recipe
    from short_gpt.scoring.stopping import Stop
    from short_gpt.wrappers.scored_model import ScoredModel


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
        "bi, angular, angular_all, deepest, relative_magnitude, norm, sequential, reverse, random, "
        "perplexity, sleb or auto, which refits the sets of several methods and takes the one of "
        "lowest held-out loss.",
    )
    confidence: float | None = setting(
        0.99,
        "With n, a seed and method bi or angular, the run ends as soon as the answer is settled: "
        "of all such runs at most 1 - confidence end with another answer than that of all windows, "
        "except where fewer than 2% of the windows decide it. none reads all windows.",
        rare=True,
        needs="n",
    )

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

    def check(self) -> None:
        """Raises ShortGPTError for a number out of range, before a model is loaded."""
        at_least(0, max_new_tokens=self.max_new_tokens, seed=self.seed)
        check(
            self.max_new_tokens <= MAX_NEW_TOKENS,
            "max_new_tokens",
            self.max_new_tokens,
            f"at most {MAX_NEW_TOKENS:,}",
        )
        check(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        check(0 <= self.top_p <= 1, "top_p", self.top_p, "0 to 1")


@dataclass(frozen=True)
class Choice(Settings):
    """Layers to remove: named, or chosen by saved scores.

    Example:
        >>> Choice([21, 22]).check().named
        [21, 22]
    """

    HEADING: ClassVar = CHOOSE
    layers: object = setting(
        None,
        "Numbers of the layers to remove, as in 21,22,23; or choose them by scores.",
        value="N,N",
    )
    scores: str | None = setting(None, "JSON file that rank wrote.", value="FILE")
    n: int | None = setting(None, "Number of layers to remove by the scores.")
    method: str | None = setting(
        None, "Method of rank to choose by. Default: the one that the scores were ranked by."
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

    @property
    def named(self) -> list[int] | None:
        return None if self.layers is None else layer_list(self.layers)

    def chosen(self, model: str) -> ChosenLayers:
        """The layers to remove from a model."""
        from short_gpt.checkpoints.scores import chosen

        return chosen(model, self.named, scores=self.scores, n=self.n, method=self.method)


# the settings of a recipe, and all of distillation alone
RECIPE = ["rank", "alpha", "learning_rate", "steps", "warmup", "batch_size", "micro_batch"]
RECIPE += ["eval_every", "patience", "four_bit", "gradient_checkpointing", "report_to"]
RECIPE += ["live_teacher", "top_k", "temperature", "kl_share"]
FITTED = ("ridge", "step_size")  # of closed forms
DISTILLING = ("teacher", "live_teacher", "top_k", "temperature", "kl_share")


@dataclass(frozen=True)
class Healing(Settings):
    """How the model is healed."""

    HEADING: ClassVar = CHOOSE
    heal_by: str = setting(
        "refit",
        "How the model is healed: refit, patch, lora or distill; or several by commas, a closed "
        "form first.",
    )
    ridge: float | None = setting(
        None,
        "Of a closed form, relative to the mean square of the inputs; if not given, in the "
        "refit 2 F / N, twice the inputs of the matrix divided by the tokens, and in the patch "
        "what held-out windows choose.",
    )
    step_size: float | None = setting(
        None,
        "Step size of the refit: the share of the solved change that is applied, above 0 and at "
        "most 1; 0.5 if not given.",
    )
    preset: str = setting(
        "paper",
        "Of lora and distill, paper, demo or small; each of the following changes one of its "
        "settings.",
    )
    rank: int | None = setting(None, "Of the LoRA changes that are trained.")
    alpha: int | None = setting(
        None, "Of LoRA, whose changes are scaled by alpha / rank; the rank if not given."
    )
    learning_rate: float | None = setting(None, "At its peak.")
    steps: int | None = setting(None, "Optimizer steps.")
    warmup: int | None = setting(
        None, "Steps until the peak; if not given, a tenth of all steps, at most 100 (paper)."
    )
    batch_size: int | None = setting(None, "Windows a step.")
    micro_batch: int | None = setting(None, "Windows read at once.")
    eval_every: int | None = setting(None, "Steps between evaluations and checkpoints.")
    patience: int | None = setting(None, "Stop after this many evaluations without a better one.")
    four_bit: bool = setting(False, "Train over weights in 4 bits; needs bitsandbytes and CUDA.")
    gradient_checkpointing: bool = setting(False, "Less memory, more time.")
    report_to: str | None = setting(
        None,
        "Services that the training reports to, such as wandb or tensorboard, whose logs stay "
        "in OUT.training/METHOD/runs.",
        value="A,B",
    )
    teacher: str | None = setting(
        None,
        "The original model of which MODEL is a part; MODEL itself, before layers go, if not "
        "given.",
    )
    live_teacher: bool = setting(
        False,
        "Ask the teacher in every step, as a second model in memory; otherwise it is asked once "
        "and its predictions stay on disk, in OUT.training, until the model is saved.",
    )
    top_k: int | None = setting(
        None, "Tokens kept of each prediction, beside the total of all others; 64 if not given."
    )
    temperature: float | None = setting(
        None, "By which both models' logits are divided; 1 if not given."
    )
    kl_share: float | None = setting(
        None,
        "Of the divergence in the loss, above 0 and at most 1; 1 if not given. The rest is the "
        "text's own.",
    )

    def _changed(self, names: Sequence[str]) -> dict[str, Any]:
        return {n: v for n in names if (v := getattr(self, n)) != getattr(Healing, n)}

    @property
    def changes(self) -> dict[str, object]:
        return self._changed(RECIPE)

    def check(self, methods: Sequence[str]) -> None:
        """Raises ShortGPTError or MissingPackageError for what none of the methods can do."""
        from short_gpt.healing import lora
        from short_gpt.healing.job import CLOSED, STEPS, TRAINING
        from short_gpt.healing.settings import PRESETS, Recipe

        closed = {name: {one.name for one in fields(STEPS[name].settings)} for name in CLOSED}
        for names, users in (
            (DISTILLING, ("distill",)),
            ((*RECIPE, "preset"), TRAINING),
            *(((name,), [kind for kind in closed if name in closed[kind]]) for name in FITTED),
        ):
            if (changed := self._changed(names)) and not {*users} & {*methods}:
                raise ShortGPTError(
                    f"`{next(iter(changed))}` is for `heal_by` {' or '.join(users)}"
                )
        for name in closed.keys() & {*methods}:
            self.closed(name)
        if self.preset not in PRESETS:
            raise ShortGPTError(f"`preset` {self.preset}: expected one of {', '.join(PRESETS)}")
        if not {*TRAINING} & {*methods}:
            return
        Recipe(**{**PRESETS[self.preset], **self.changes})  # raises for values out of range
        lora.require_packages()
        lora.check_reports(self.report_to)
        if self.four_bit:
            lora.require_four_bit()

    def closed(self, name: str) -> object:
        """The settings of a closed form; ShortGPTError for one out of range."""
        from short_gpt.healing.job import STEPS

        changes = {n: value for n in FITTED if (value := getattr(self, n)) is not None}
        return STEPS[name].settings(**changes)

    def recipe(self, short: ScoredModel, seed: int, *, few_bits: bool = False) -> Recipe:
        """The recipe for a model of transformers, with the changes.

        ``few_bits``: what it changes is rounded again, and so preset small changes little.
        """
        from short_gpt.healing.settings import OUTPUTS, recipe_for

        own = {"modules": OUTPUTS} if few_bits and self.preset == "small" else {}
        changes = {**own, **self.changes, "seed": seed}
        return recipe_for(short.trainable().config, self.preset, **changes)


def methods_of(text: str) -> list[str]:
    """The methods in a comma list; ShortGPTError unless each can follow the one before."""
    from short_gpt.healing.job import STEPS, check_order

    methods = listed(text)
    for name in methods:
        if name not in STEPS:
            raise ShortGPTError(
                f"`heal_by` {text}: expected one of {', '.join(STEPS)}, or several by commas, got "
                f"{name!r}"
            )
    check_order(methods)
    return methods
