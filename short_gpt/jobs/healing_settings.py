"""Settings of healing: what is learned from, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

from short_gpt.jobs.inputs import Cut, at_least, listed
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.settings import READ, setting

if TYPE_CHECKING:
    from short_gpt.healing import DistillSettings, Recipe
    from short_gpt.healing.distillation import Predictor
    from short_gpt.healing.refit import RefitSettings
    from short_gpt.wrappers.scored_model import ScoredModel


def kinds_of_methods() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The methods that are closed forms, and those that train."""
    from short_gpt.healing.job import STEPS

    closed, training = ([n for n, s in STEPS.items() if s.trains is t] for t in (False, True))
    return tuple(closed), tuple(training)


def methods_of(text: str) -> list[str]:
    """The methods that a comma list names, in the order in which they follow each other.

    Raises:
        ShortGPTError: one is unknown, named twice, or cannot follow the one before it.

    Example:
        >>> methods_of("patch,distill")
        ['patch', 'distill']
    """
    from short_gpt.healing.job import STEPS, check_order

    methods = listed(text)
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

    HEADING: ClassVar = READ

    eval_data: str | None = setting(None, value="TEXTS")
    size: int | None = None
    max_windows: int | None = None
    eval_windows: int = 32
    drop_overlap: bool | None = None
    seed: int = 0
    bos: str | None = None

    def check(self) -> None:
        """Raises ShortGPTError for a number out of range, before a model is loaded."""
        Cut(1024 if self.size is None else self.size, self.max_windows, bos=self.bos).check()
        at_least(1, eval_windows=self.eval_windows)


@dataclass(frozen=True)
class Settings:
    """How the model is healed.

    Args:
        ridge: of a closed form, relative to the mean square of the inputs; if not given, each
            matrix's is chosen on held-out windows.
        parts: of the refit: attention, mlp or both by a comma, whose output projections are
            solved, or best for what has the least loss on held-out windows; both if not given.
        aim: step size of the refit: the share of the solved change that is applied, above 0 and at
            most 1; 1 if not given.
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
        from short_gpt.healing.recipe import PRESETS

        closed, training_methods = kinds_of_methods()
        training = [*self.changes, *["resume"] * self.resume]
        training += ["preset"] if self.preset != "paper" else []
        trains = any(method in training_methods for method in methods)
        if training and not trains:
            raise ShortGPTError(f"`{training[0]}` is for `method` {' or '.join(training_methods)}")
        if self.ridge is not None and not any(method in closed for method in methods):
            raise ShortGPTError(f"`ridge` is for `method` {' or '.join(closed)}")
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
        from short_gpt.healing.lora import require_four_bit, require_packages
        from short_gpt.healing.recipe import Recipe

        Recipe(**{**asdict(Recipe()), **self.changes})  # refuses values out of range
        require_packages()
        if self.four_bit:
            require_four_bit()

    def refit(self, max_windows: int | None = None) -> RefitSettings:
        """What the refit takes.

        Raises:
            ShortGPTError: parts, the ridge or the aim are out of range, or there is an aim although
                best chooses it.
        """
        from short_gpt.healing.refit import RefitSettings
        from short_gpt.healing.solver import PARTS, RIDGES

        ridges = RIDGES if self.ridge is None else (self.ridge,)
        if self.parts == "best":
            if self.aim is not None:
                raise ShortGPTError("`parts` best chooses the aim by itself: leave `aim` out")
            return RefitSettings(None, ridges, max_windows=max_windows)
        parts = PARTS if self.parts is None else tuple(p.strip() for p in self.parts.split(","))
        step_size = RefitSettings.step_size if self.aim is None else self.aim
        if not 0 < step_size <= 1:  # by the name of the flag
            raise ShortGPTError(f"aim = {step_size}: expected above 0 and at most 1")
        return RefitSettings(parts, ridges, step_size=step_size, max_windows=max_windows)

    def recipe(self, short: ScoredModel, seed: int) -> Recipe:
        """The recipe for a model of transformers, with the changes."""
        from short_gpt.healing.recipe import recipe_for

        return recipe_for(short.trainable().config, self.preset, **{**self.changes, "seed": seed})


@dataclass(frozen=True)
class Distilling:
    """How distill learns from the original model.

    Args:
        teacher: the original model of which MODEL is a part; MODEL itself, before layers go, if not
            given.
        stream_teacher: hold one layer of the teacher at a time in memory, as for rank --stream.
        live_teacher: ask the teacher in every step, as a second model in memory; without it, it
            is asked once and its predictions stay on disk, in OUT.training, until the model is
            saved.
        top_k: tokens kept of each prediction, beside the total of all others; 64 if not given.
        temperature: by which both models' logits are divided; 1 if not given.
        kl_share: of the divergence in the loss, above 0 and at most 1; 1 if not given. The rest is
            the text's own.
    """

    teacher: str | None = None
    stream_teacher: bool = False
    live_teacher: bool = False
    top_k: int | None = None
    temperature: float | None = None
    kl_share: float | None = None

    @property
    def given(self) -> list[str]:
        """The names of the settings that are."""
        return [
            name for name, value in vars(self).items() if value is not None and value is not False
        ]

    def check(self, methods: Sequence[str]) -> None:
        """Raises ShortGPTError for what no method here uses, or cannot be."""
        from short_gpt.healing.distillation import check_share, check_targets

        if "distill" not in methods:
            if self.given:
                raise ShortGPTError(f"`{self.given[0]}` is for `method` distill")
            return
        if self.stream_teacher and self.live_teacher:
            raise ShortGPTError(
                "`stream_teacher` reads the teacher's files once: leave out `live_teacher`, which "
                "asks it in every step"
            )
        step = self.step(None, None)
        check_targets(step.top_k, step.temperature)
        check_share(step.kl_share)

    def step(
        self, recipe: Recipe | None, teacher: Callable[[], Predictor] | None
    ) -> DistillSettings:
        """The step of healing."""
        from short_gpt.healing import TOP_K, DistillSettings

        return DistillSettings(
            recipe,
            teacher=teacher,
            live=self.live_teacher,
            top_k=TOP_K if self.top_k is None else self.top_k,
            temperature=1.0 if self.temperature is None else self.temperature,
            kl_share=1.0 if self.kl_share is None else self.kl_share,
        )
