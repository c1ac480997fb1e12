"""The steps of a healing that are closed forms: fitted on the whole model, then folded."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from short_gpt.healing import linear_patch, refit
from short_gpt.healing.kept_weights import KeptWeights
from short_gpt.healing.refit_best import TRIED, fit_best
from short_gpt.healing.refit_memory import RefitPlan, plan_of
from short_gpt.healing.solving import PARTS, RIDGES, WEIGHTS
from short_gpt.healing.texts import Learning
from short_gpt.healing.work import Heal, Work
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.state import joined
from short_gpt.wrappers.scored_model import ScoredModel


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

    def _check(self, work: Work) -> None:
        """Raises ShortGPTError where no layer is to go."""
        if not work.layers:
            raise ShortGPTError(f"{self.name} reads the whole model: name the layers that go")

    def prepare(self, work: Work) -> Heal:
        self._check(work)
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
        own = {
            "layers": [*work.layers],
            "settings": json.loads(json.dumps(vars(self))),  # as a file gives it back
            "windows": json_digest([list(window) for window in read]),
        }
        return joined(work.short.identity(), own)


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
        parts: as there; None takes those, and weights and aim, of least loss on windows kept apart,
            as `fit_best` does.
        ridges, weights, aim, batch_size: as there.
        max_windows: of those to learn from, the first so many; None takes all.
    """

    parts: tuple[str, ...] | None = PARTS
    ridges: tuple[float, ...] = RIDGES
    weights: str = WEIGHTS[0]
    aim: float = 1.0
    batch_size: int = 1
    max_windows: int | None = None
    name: ClassVar[str] = "refit"

    def plan(self, short: ScoredModel, windows: Learning, folder: Path | None) -> RefitPlan:
        """What it will take in memory and on disk; see `plan_of`."""
        every = [*windows.training[: self.max_windows], *windows.validation]
        fits = TRIED if self.parts is None else 1
        return plan_of(short, every, batch_size=self.batch_size, folder=folder, fits=fits)

    def prepare(self, work: Work) -> Heal:
        """As `ClosedForm.prepare`; the refit keeps what it solved itself, layer by layer."""
        self._check(work)
        return self.fit(work)

    def fit(self, work: Work) -> Heal:
        fit: Callable[..., refit.Refit] = fit_best
        if self.parts is not None:
            fit = partial(refit.fit, parts=self.parts, weights=self.weights, aim=self.aim)
        made = fit(
            work.short,
            work.layers,
            work.windows.training[: self.max_windows],
            held=work.windows.validation or None,
            ridges=self.ridges,
            batch_size=self.batch_size,
            work_dir=work.folder / self.name if work.lasting else None,
            progress=work.progress,
        )
        return lambda: (made.to_dict(), refit.fold(work.short, made))
