"""Settings of healing: what is learned from, and how."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from short_gpt.data.windows import at_least
from short_gpt.healing.four_bit import require_four_bit
from short_gpt.healing.lora import require_packages
from short_gpt.healing.recipe import PRESETS, Recipe, recipe_for
from short_gpt.jobs.inputs import Cut
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.short_model import ShortModel

METHODS = ("patch", "lora")


@dataclass(frozen=True)
class Learned:
    """What is learned from, and what is evaluated on.

    Args:
        eval_data: texts to evaluate on; if not given, a tenth of the texts of data is held out.
        size: tokens in a window; 1024 for the patch, the recipe's for lora.
        max_windows: windows to learn from; 64 for the patch, all for lora.
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
        ridge: of the patch, relative to the mean square of what the MLP gives; 1e-4 if not given.
        preset: of lora, paper or demo; each of the following changes one of its settings.
        rank: of lora's changes.
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
        resume: lora must continue from the checkpoints of an interrupted run, in OUT.training;
            where there are some, the same command continues from them anyway.
    """

    ridge: float | None = None
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
        own = ("ridge", "preset", "resume")
        given = {name: value for name, value in vars(self).items() if name not in own}
        # by identity: 0 is a value, though it equals False
        return {k: v for k, v in given.items() if v is not None and v is not False}

    def check(self, method: str) -> None:
        """Raises ShortGPTError or MissingPackageError for what the method cannot do."""
        if method not in METHODS:
            raise ShortGPTError(f"`method` {method}: expected one of {', '.join(METHODS)}")
        foreign = [*self.changes, *["resume"] * self.resume]
        foreign += ["preset"] if self.preset != "paper" else []
        if method == "patch" and foreign:
            raise ShortGPTError(f"`{foreign[0]}` is for `method` lora")
        if method == "lora" and self.ridge is not None:
            raise ShortGPTError("`ridge` is for `method` patch")
        if self.preset not in PRESETS:
            raise ShortGPTError(f"`preset` {self.preset}: expected one of {', '.join(PRESETS)}")
        if method == "lora":
            self._check_lora()

    def _check_lora(self) -> None:
        Recipe(**{**asdict(Recipe()), **self.changes})  # refuses values out of range
        require_packages()
        if self.four_bit:
            require_four_bit()

    def recipe(self, short: ShortModel, seed: int) -> Recipe:
        """The recipe for a model of transformers, with the changes."""
        return recipe_for(short.trainable().config, self.preset, **{**self.changes, "seed": seed})
