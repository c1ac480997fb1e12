"""What all steps of one healing share, and what each of them is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from short_gpt.healing.texts import Learning
from short_gpt.wrappers.scored_model import ScoredModel

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

    short: ScoredModel
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
