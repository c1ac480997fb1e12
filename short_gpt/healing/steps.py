"""The steps of a healing, one after the other: closed forms first, then training.

A step is what its settings say. `Step.prepare` reads the model while it has all its layers; what
that returns heals the model as cut, and as the steps before have left it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Protocol

from short_gpt.healing import linear_patch, lora, refit
from short_gpt.healing.distillation import Distillation
from short_gpt.healing.kept_weights import KeptWeights
from short_gpt.healing.recipe import Recipe, recipe_for
from short_gpt.healing.run_folder import begun
from short_gpt.healing.teacher import TOP_K, CachedTeacher, LiveTeacher, Predictor, Teacher
from short_gpt.healing.texts import Learning
from short_gpt.healing.trainer import TrainingRun
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.short_model import ShortModel

# Heals the model as it is; returns how, ready for JSON, and what takes it out again.
Heal = Callable[[], tuple[dict[str, object], Callable[[], object]]]


@dataclass(frozen=True)
class Work:
    """What all steps of one healing share.

    Attributes:
        short: the model, with all its layers while steps are prepared.
        windows: to learn from, validate by and evaluate on.
        layers: that are removed between the two, in the original model's numbering.
        folder: what steps keep, until the healing ends or to be continued.
        lasting: whether the folder outlives the healing.
        progress: whether to show bars.
    """

    short: ShortModel
    windows: Learning
    layers: Sequence[int]
    folder: Path
    lasting: bool = False
    progress: bool = True


class Step(Protocol):
    """One step.

    Attributes:
        name: as ``heal --method`` knows it.
        trains: whether it changes the model by training, as the steps behind it then must too.
    """

    @property
    def name(self) -> str: ...

    @property
    def trains(self) -> bool: ...

    def prepare(self, work: Work) -> Heal:
        """Reads the whole model as far as the step must."""


class ClosedForm(ABC):
    """Settings of a step that is fitted on the whole model and folded into the cut one.

    They are a dataclass. Where a healing can be continued, the weights that such a step changed are
    kept, so that training continues from the same ones, bit for bit, and nothing is fitted twice.
    """

    name: ClassVar[str]
    trains: ClassVar[bool] = False

    @abstractmethod
    def fit(self, work: Work) -> Heal:
        """Fits on the whole model; what is returned folds."""

    def prepare(self, work: Work) -> Heal:
        if not work.layers:
            raise ShortGPTError(f"{self.name} reads the whole model: name the layers that go")
        if not work.lasting:
            return self.fit(work)
        kept = KeptWeights(work.folder, self.name, self._identity(work))
        if kept.there:
            return lambda: kept.put_into(work.short)
        fold = self.fit(work)

        def fold_and_keep() -> tuple[dict[str, object], Callable[[], object]]:
            how, undo = fold()
            try:
                kept.save(work.short)
            except BaseException:
                undo()
                raise
            return how, undo

        return fold_and_keep

    def _identity(self, work: Work) -> dict[str, object]:
        """What the step's result depends on, ready for JSON."""
        read = [*work.windows.training, *work.windows.validation]
        return {
            **work.short.identity(),
            "layers": [*work.layers],
            "settings": json.loads(json.dumps(vars(self))),  # as a file gives it back
            "windows": json_digest([list(window) for window in read]),
        }


@dataclass(frozen=True)
class PatchSettings(ClosedForm):
    """Settings of the linear patch.

    Attributes:
        ridge: relative to the mean square of what the MLP gives.
        batch_size: windows read at once.
        max_windows: of those to learn from, the first so many; None takes all.
    """

    ridge: float = linear_patch.RIDGE
    batch_size: int = 1
    max_windows: int | None = None
    name: ClassVar[str] = "patch"

    def fit(self, work: Work) -> Heal:
        patch = linear_patch.fit(
            work.short,
            work.layers,
            work.windows.training[: self.max_windows],
            ridge=self.ridge,
            batch_size=self.batch_size,
            progress=work.progress,
        )
        return lambda: (patch.to_dict(), linear_patch.fold(work.short, patch))


@dataclass(frozen=True)
class RefitSettings(ClosedForm):
    """Settings of the refit; see `refit.fit`.

    Attributes:
        parts: as there; None takes those of least loss on windows kept apart, as `fit_best` does.
        ridges, batch_size: as there.
        max_windows: of those to learn from, the first so many; None takes all.
    """

    parts: tuple[str, ...] | None = refit.PARTS
    ridges: tuple[float, ...] = refit.RIDGES
    batch_size: int = 1
    max_windows: int | None = None
    name: ClassVar[str] = "refit"

    def fit(self, work: Work) -> Heal:
        fit: Callable[..., refit.Refit] = refit.fit_best
        if self.parts is not None:
            fit = partial(refit.fit, parts=self.parts)
        made = fit(
            work.short,
            work.layers,
            work.windows.training[: self.max_windows],
            held=work.windows.validation or None,
            ridges=self.ridges,
            batch_size=self.batch_size,
            progress=work.progress,
        )
        return lambda: (made.to_dict(), refit.fold(work.short, made))


@dataclass(frozen=True)
class LoraSettings:
    """Settings of LoRA on text.

    Attributes:
        recipe: None takes the paper's for the model.
    """

    recipe: Recipe | None = None
    name: ClassVar[str] = "lora"
    trains: ClassVar[bool] = True

    def prepare(self, work: Work) -> Heal:
        return lambda: self._train(work, None)

    def _recipe(self, work: Work) -> Recipe:
        return self.recipe or recipe_for(work.short.trainable().config)

    def _training(self, work: Work) -> Sequence[Sequence[int]]:
        """The windows that all steps together will read."""
        recipe = self._recipe(work)
        return work.windows.training[: recipe.steps * recipe.batch]

    def _train(
        self, work: Work, distillation: Distillation | None
    ) -> tuple[dict[str, object], Callable[[], object]]:
        folder = work.folder / self.name
        run = TrainingRun(
            self._training(work),
            work.windows.validation,
            self._recipe(work),
            folder,
            resume=begun(folder),
            show=work.progress,
            distillation=distillation,
        )
        healed, undo = lora.heal_run(work.short, run, work.windows.evaluation)
        return healed.to_dict(), undo


@dataclass(frozen=True)
class DistillSettings(LoraSettings):
    """Settings of LoRA on what the whole model predicts.

    Attributes:
        teacher: opens another model that predicts; None asks the model itself before its layers go.
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

    def prepare(self, work: Work) -> Heal:
        distillation = Distillation(self._teacher(work), self.kl_share)
        return lambda: self._train(work, distillation)

    def _teacher(self, work: Work) -> Teacher:
        self._check(work)
        model = work.short if self.teacher is None else self.teacher()
        ours, theirs = work.short.decoder.vocab_size, model.decoder.vocab_size
        if ours != theirs:
            raise ShortGPTError(
                f"the teacher knows {theirs} tokens, the model {ours}: give the model that it was "
                "cut from"
            )
        if self.live:
            return LiveTeacher(model, k=self.top_k, temperature=self.temperature)
        windows = [*self._training(work), *work.windows.validation]
        cache = CachedTeacher(
            work.folder / "teacher", model, windows, k=self.top_k, temperature=self.temperature
        )
        cache.fill(batch_size=self._recipe(work).micro_batch, progress=work.progress)
        return cache

    def _check(self, work: Work) -> None:
        """Raises ShortGPTError where there is no teacher to learn from."""
        if self.teacher is None and not work.layers:
            raise ShortGPTError(
                "distillation learns from the model with all its layers: name the layers that go, "
                "or a teacher that still has them"
            )
        if self.teacher is None and self.live:
            raise ShortGPTError(
                "a live teacher is asked while the model is trained: open it a second time, or "
                "leave live out, which keeps its predictions on disk"
            )


# All steps by the names that ``heal --method`` knows, closed forms first.
STEPS = {kind.name: kind for kind in (RefitSettings, PatchSettings, LoraSettings, DistillSettings)}


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
            "one closed form first, and training behind it"
        )
