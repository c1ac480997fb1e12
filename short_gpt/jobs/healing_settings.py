"""Settings of healing: what is learned from, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from short_gpt.data.windows import at_least
from short_gpt.healing.lora import require_four_bit, require_packages
from short_gpt.healing.recipe import PRESETS, Recipe, recipe_for
from short_gpt.healing.solver import PARTS, RIDGES
from short_gpt.healing.steps import STEPS, RefitSettings, check_order
from short_gpt.jobs.inputs import Cut
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.wrappers.scored_model import ScoredModel

TRAINING = tuple(name for name, step in STEPS.items() if step.trains)
CLOSED = tuple(name for name in STEPS if name not in TRAINING)


def methods_of(text: str) -> list[str]:
    """The methods that a comma list names, in the order in which they follow each other.

    Raises:
        ShortGPTError: one is unknown, named twice, or cannot follow the one before it.

    Example:
        >>> methods_of("patch,distill")
        ['patch', 'distill']
    """
    methods = [name.strip() for name in text.split(",")]
    for name in methods:
        if name not in STEPS:
            raise ShortGPTError(
                f"`method` {text}: expected one of {', '.join(STEPS)}, or several by commas, got "
                f"{name!r}"
            )
    check_order([(name, STEPS[name].trains) for name in methods])
    return methods


@dataclass(frozen=True)
class Learned:
    """What is learned from, and what is evaluated on.

    Args:
        eval_data: texts to evaluate on; if not given, a tenth of the texts of data is held out.
        size: tokens in a window; the recipe's for lora and distill, else 1024.
        max_windows: windows to learn from; 64 for a closed form, all for lora and distill.
        eval_windows: windows to evaluate on.
        drop_overlap: leave out windows that share text with those to evaluate on, instead of
            refusing them; on if no eval_data is given.
        seed: of the choice of texts and windows, and of training.
        bos: as rank's; which windows begin with it.
    """

    eval_data: str | None = None
    size: int | None = None
    max_windows: int | None = None
    eval_windows: int = 32
    drop_overlap: bool | None = None
    seed: int = 0
    bos: str | None = None

    def check(self) -> None:
        """Raises ShortGPTError for a number out of range, before a model is loaded."""
        Cut(1024 if self.size is None else self.size, self.max_windows, bos=self.bos).check()
        at_least(1, "eval_windows", self.eval_windows)


@dataclass(frozen=True)
class Settings:
    """How the model is healed.

    Args:
        ridge: of a closed form, relative to the mean square of the inputs. If not given, 1e-4 for
            the patch; the refit chooses each matrix's on windows kept apart.
        parts: of the refit: attention, mlp or both by a comma, whose last matrices are solved, or
            best for what has the least loss on windows kept apart; both if not given.
        aim: of the refit, the share of what is missing that every change is to give, above 0 and
            at most 1; 1 if not given.
        preset: of lora and distill, paper, demo or small; each of the following changes one of its
            settings.
        rank: of the changes that are trained.
        alpha: their scale times the rank; the rank if not given.
        learning_rate: at its peak.
        steps: optimizer steps.
        warmup: steps until the peak.
        batch: windows a step.
        micro_batch: windows read at once.
        eval_every: steps between evaluations and checkpoints.
        patience: stop after so many evaluations without a better one.
        four_bit: train over weights in 4 bits; needs bitsandbytes and CUDA.
        gradient_checkpointing: less memory, more time.
        resume: training must continue an interrupted run, from OUT.training; where there is one,
            the same command continues it anyway.
    """

    ridge: float | None = None
    parts: str | None = None
    aim: float | None = None
    preset: str = "paper"
    rank: int | None = None
    alpha: int | None = None
    learning_rate: float | None = None
    steps: int | None = None
    warmup: int | None = None
    batch: int | None = None
    micro_batch: int | None = None
    eval_every: int | None = None
    patience: int | None = None
    four_bit: bool = False
    gradient_checkpointing: bool = False
    resume: bool = False

    @property
    def changes(self) -> dict[str, object]:
        """The settings of a recipe that are given."""
        own = ("ridge", "parts", "aim", "preset", "resume")
        given = {name: value for name, value in vars(self).items() if name not in own}
        # by identity: 0 is a value, though it equals False
        return {k: v for k, v in given.items() if v is not None and v is not False}

    def check(self, methods: Sequence[str]) -> None:
        """Raises ShortGPTError or MissingPackageError for what none of the methods can do."""
        training = [*self.changes, *["resume"] * self.resume]
        training += ["preset"] if self.preset != "paper" else []
        trains = any(method in TRAINING for method in methods)
        if training and not trains:
            raise ShortGPTError(f"`{training[0]}` is for `method` {' or '.join(TRAINING)}")
        if self.ridge is not None and not any(method in CLOSED for method in methods):
            raise ShortGPTError(f"`ridge` is for `method` {' or '.join(CLOSED)}")
        for name in ("parts", "aim"):
            if getattr(self, name) is not None and "refit" not in methods:
                raise ShortGPTError(f"`{name}` is for `method` refit")
        if "refit" in methods:
            self.refit()
        if self.preset not in PRESETS:
            raise ShortGPTError(f"`preset` {self.preset}: expected one of {', '.join(PRESETS)}")
        if trains:
            self._check_training()

    def _check_training(self) -> None:
        Recipe(**{**asdict(Recipe()), **self.changes})  # refuses values out of range
        require_packages()
        if self.four_bit:
            require_four_bit()

    def refit(self, max_windows: int | None = None) -> RefitSettings:
        """What the refit takes.

        Raises:
            ShortGPTError: parts, the ridge or the aim are out of range, or the aim is given though
                it is to be chosen.
        """
        ridges = RIDGES if self.ridge is None else (self.ridge,)
        if self.parts == "best":
            if self.aim is not None:
                raise ShortGPTError("`parts` best chooses the aim by itself: leave `aim` out")
            return RefitSettings(None, ridges, max_windows=max_windows)
        parts = PARTS if self.parts is None else tuple(p.strip() for p in self.parts.split(","))
        aim = RefitSettings.aim if self.aim is None else self.aim
        return RefitSettings(parts, ridges, aim=aim, max_windows=max_windows)

    def recipe(self, short: ScoredModel, seed: int) -> Recipe:
        """The recipe for a model of transformers, with the changes."""
        return recipe_for(short.trainable().config, self.preset, **{**self.changes, "seed": seed})
