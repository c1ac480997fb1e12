"""Models less some layers, refitted and then distilled, as they are saved and opened again.

Training goes through transformers; the result is saved in the demo's own format and opened as the
whole model is, so that both are measured by the same program.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.studies.scoring import build
from short_gpt import ShortHFModel, ShortLlama
from short_gpt.data import demo, without_overlap
from short_gpt.healing import (
    TOP_K,
    CachedTeacher,
    Distillation,
    HealingWindows,
    Recipe,
    heal_lora,
    heal_refit,
)

Windows = Sequence[Sequence[int]]
STEPS = 40
VALIDATED = 8  # windows by which the step is chosen
SPARE = 16  # windows cut beside those that are read, as some share text with others


def wanted(count: int) -> int:
    """Windows that are cut for `apart` to leave so many to train on."""
    return count + VALIDATED + SPARE


def apart(windows: Windows, judged: Windows, count: int) -> HealingWindows:
    """So many windows to train on, and others to validate by, which share no text at all."""
    free, _ = without_overlap(windows, judged)
    training, validation = free[:-VALIDATED], free[-VALIDATED:]
    training, _ = without_overlap(training, validation)
    return HealingWindows(training[:count], validation, judged)


class Distiller:
    """Refits and distils the demo's model, from what the whole one predicts.

    Args:
        teacher: the whole model; asked once, when the first model is made.
        fitted: windows of the refit.
        learning: windows of the distillation.
        recipe: of it.
        folder: keeps what the whole model predicts.
    """

    def __init__(
        self,
        teacher: ShortLlama,
        fitted: Windows,
        learning: HealingWindows,
        recipe: Recipe,
        folder: Path,
    ) -> None:
        self.fitted, self.learning, self.recipe = fitted, learning, recipe
        self._whole, self._folder = teacher, folder
        self._predictions: CachedTeacher | None = None

    def made(self, layers: Sequence[int]) -> tuple[ShortLlama, dict[str, object]]:
        """The model without some layers, refitted and distilled; and how the training went."""
        distillation = Distillation(self._teacher())
        short = ShortHFModel.from_meta(demo.checkpoint(), device="cpu")
        heal_refit(short, layers, self.fitted)
        read = self.learning
        windows = (read.training, read.validation, read.evaluation)
        healed = heal_lora(short, *windows, recipe=self.recipe, distillation=distillation)
        with tempfile.TemporaryDirectory() as folder:
            return build(short.save(Path(folder, "distilled"))), healed.to_dict()

    def _teacher(self) -> CachedTeacher:
        """What the whole model predicts."""
        if self._predictions is None:
            windows = [*self.learning.training, *self.learning.validation]
            self._predictions = CachedTeacher(self._folder, self._whole, windows, k=TOP_K)
            self._predictions.fill()
        return self._predictions
