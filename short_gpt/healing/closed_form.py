"""The steps of a healing, what they read, and the base class of closed forms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from short_gpt.healing.texts import Learning
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.wrappers.scored_model import ScoredModel

# Heals the model; returns how, ready for JSON, and what undoes it.
Heal = Callable[[], tuple[dict[str, object], Callable[[], object]]]
Windows = Sequence[Sequence[int]]  # of token ids


@dataclass(frozen=True)
class HealingContext:
    """What all steps of one healing share."""

    short: ScoredModel  # with all its layers while steps are prepared
    windows: Learning  # to learn from, validate by and evaluate on
    layers: Sequence[int]  # removed between the two, original numbers
    folder: Path  # what steps keep, until the healing ends or to be continued
    lasting: bool = False  # whether the folder outlives the healing
    progress: bool = True  # whether to show bars
    fitted: int = 0  # training windows, from the first, that the closed form of a chain reads

    def fresh_first(self) -> Windows:
        """All training windows; those that the closed form reads come last."""
        every = self.windows.training
        return [*every[self.fitted :], *every[: self.fitted]]


class Step(Protocol):
    """One step: its name for ``heal --method``; one that trains must follow those that do not."""

    name: ClassVar[str]
    trains: ClassVar[bool]

    def prepare(self, context: HealingContext) -> Heal:
        """Reads what the step needs of the original model; returns what heals."""


class ClosedForm(ABC):
    """Frozen settings of a step fitted on the original model and folded into the pruned one."""

    max_windows: int | None  # of the training windows, from the first; None reads all
    name: ClassVar[str]
    trains: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ()  # flags of `heal` for it; the others are refused

    @abstractmethod
    def fit(self, context: HealingContext) -> Heal:
        """Fits on the original model; returns what folds."""

    def prepare(self, context: HealingContext) -> Heal:
        if not context.layers:
            raise ShortGPTError(f"{self.name} reads the original model: name the layers to remove")
        return self.fit(context)
