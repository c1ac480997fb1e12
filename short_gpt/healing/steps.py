"""The steps of a healing: closed forms first, then training; and their registry, `STEPS`.

A step is its settings. `Step.prepare` reads the model while it has all its layers; what that
returns heals the pruned model, as the steps before have left it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from short_gpt.healing import lora
from short_gpt.healing.closed_form import Heal, HealingContext, Step
from short_gpt.healing.distillation import Distillation
from short_gpt.healing.recipe import Recipe, recipe_for
from short_gpt.healing.refit import PatchSettings, RefitSettings
from short_gpt.healing.teacher import TOP_K, CachedTeacher, LiveTeacher, Predictor, Teacher
from short_gpt.healing.trainer import TrainingRun, begun
from short_gpt.runtime.errors import ShortGPTError

TEACHER = "teacher"  # the folder of its predictions


@dataclass(frozen=True)
class LoraSettings:
    """Settings of LoRA on text.

    Attributes:
        recipe: None takes the paper's for the model.
    """

    recipe: Recipe | None = None
    name: ClassVar[str] = "lora"
    trains: ClassVar[bool] = True

    def prepare(self, context: HealingContext) -> Heal:
        return lambda: self._train(context, None)

    def _recipe(self, context: HealingContext) -> Recipe:
        return self.recipe or recipe_for(context.short.trainable().config)

    def _training(self, context: HealingContext) -> Sequence[Sequence[int]]:
        """The windows that all steps together will read."""
        recipe = self._recipe(context)
        return context.windows.training[: recipe.steps * recipe.batch]

    def _train(
        self, context: HealingContext, distillation: Distillation | None
    ) -> tuple[dict[str, object], Callable[[], object]]:
        folder = context.folder / self.name
        run = TrainingRun(
            self._training(context),
            context.windows.validation,
            self._recipe(context),
            folder,
            resume=begun(folder),
            show=context.progress,
            distillation=distillation,
        )
        healed, undo = lora.heal_run(context.short, run, context.windows.evaluation)
        return healed.to_dict(), undo


@dataclass(frozen=True)
class DistillSettings(LoraSettings):
    """Settings of LoRA on what the original model predicts.

    Attributes:
        teacher: opens another model that predicts; None asks the model before layers go.
        live: ask that other model in every step, and keep nothing on disk.
        top_k: tokens kept of each prediction.
        temperature: by which both models' logits are divided.
        kl_share: of the divergence in the loss; the rest is the text's own.
    """

    teacher: Callable[[], Predictor] | None = None
    live: bool = False
    top_k: int = TOP_K
    temperature: float = 1.0
    kl_share: float = 1.0
    name: ClassVar[str] = "distill"

    def prepare(self, context: HealingContext) -> Heal:
        distillation = Distillation(self._teacher(context), self.kl_share)
        return lambda: self._train(context, distillation)

    def _teacher(self, context: HealingContext) -> Teacher:
        self._check(context)
        model = context.short if self.teacher is None else self.teacher()
        ours, theirs = context.short.decoder.vocab_size, model.decoder.vocab_size
        if ours != theirs:
            raise ShortGPTError(
                f"the teacher knows {theirs} tokens, the model {ours}: give the model that it was "
                "cut from"
            )
        if self.live:
            return LiveTeacher(model, k=self.top_k, temperature=self.temperature)
        windows = [*self._training(context), *context.windows.validation]
        cache = CachedTeacher(
            context.folder / TEACHER, model, windows, k=self.top_k, temperature=self.temperature
        )
        cache.fill(batch_size=self._recipe(context).micro_batch, progress=context.progress)
        return cache

    def _check(self, context: HealingContext) -> None:
        """Raises ShortGPTError where there is no teacher to learn from."""
        if self.teacher is None and not context.layers:
            raise ShortGPTError(
                "distillation learns from the model with all its layers: name the layers that go, "
                "or a teacher that still has them"
            )
        if self.teacher is None and self.live:
            raise ShortGPTError(
                "a live teacher is asked while the model is trained: open it a second time, or "
                "leave live out, which keeps its predictions on disk"
            )


# All steps by the names that ``heal --method`` knows. A new closed form is a line here.
KINDS: tuple[type[Step], ...] = (
    RefitSettings,
    PatchSettings,
    LoraSettings,
    DistillSettings,
)
STEPS = {kind.name: kind for kind in KINDS}


def check_order(steps: Sequence[tuple[str, bool]]) -> None:
    """Raises ShortGPTError unless steps can follow each other.

    Args:
        steps: the name of each, and whether it trains.

    Example:
        >>> check_order([("patch", False), ("distill", True)])
    """
    names = [name for name, _ in steps]
    chain = ",".join(names)
    if not names or len(set(names)) != len(names):
        raise ShortGPTError(f"expected different methods of healing, got {chain or 'none'}")
    late = [name for name, trains in steps[1:] if not trains]
    if late:
        raise ShortGPTError(
            f"{chain}: {late[0]} is fitted on the whole model, so nothing may heal before it; put "
            "one closed form first, and training after it"
        )
