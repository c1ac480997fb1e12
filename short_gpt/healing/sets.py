"""Sets of layers to remove: what methods choose, and the perplexities without them.

Everything is measured once: scores come from one pass, the list of a search begins with those of
all smaller numbers, and a set that several methods choose is healed and evaluated once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama.files import JsonObject
from short_gpt.data.disjoint import check_disjoint
from short_gpt.evaluation.distance import Reference
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.healing.choosing import (
    REFIT,
    TRIAL_WINDOWS,
    HealedChoice,
    ResultCache,
    choose_healed,
    pruned_losses,
)
from short_gpt.healing.context import TokenWindows
from short_gpt.healing.job import RAW
from short_gpt.runtime.state import StateFile
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.run import RunState
from short_gpt.selection.methods import AUTO, BY_LOSS, choose
from short_gpt.selection.search import Search
from short_gpt.wrappers.short_model import ShortModel


class LayerSets:
    """The sets of layers that methods choose, and the perplexities without them.

    Args:
        short: Original model, which is left as it was.
        calibration: Windows that choose the layers and that closed forms are fitted on.
        evaluation: Windows whose perplexities are measured; they share no text with the others.
        search_windows: Calibration windows that the searches by loss read. Default: 4.
        heal_by: Closed form by which auto judges sets. Default: the refit.
        state: Keeps what was measured; the same calls continue from it. Default: none.
        progress: Show bars. Default: yes.
    """

    def __init__(
        self,
        short: ShortModel,
        calibration: TokenWindows,
        evaluation: TokenWindows,
        *,
        search_windows: int = TRIAL_WINDOWS,
        heal_by: str = REFIT,
        state: StateFile | None = None,
        progress: bool = True,
    ) -> None:
        check_disjoint(calibration, evaluation)
        self.short, self.calibration, self.evaluation = short, calibration, evaluation
        self.cells, self.heal_by = ResultCache(state), heal_by
        self._reference: Reference | None = None
        self._searched_on, self._progress = calibration[:search_windows], progress

    @property
    def importance(self) -> Importance:
        """Scores of the calibration windows; the model keeps its own scores."""

        def measure(part: StateFile | None) -> dict[str, object]:
            before, self.short.importance = self.short.importance, Importance.empty(self.short.kept)
            state = None if part is None else RunState(part)
            try:
                self.short.measure(self.calibration, state=state, progress=self._progress)
                return self.short.importance.to_dict()
            finally:
                self.short.importance = before

        return Importance.from_dict(self.cells.resumed("importance", measure))

    def layers(self, method: str, n: int, seed: int = 0, *, most: int | None = None) -> list[int]:
        """The n layers that a method removes; searches go on to ``most`` right away."""
        if method == AUTO:
            return self.choice(n).layers
        if method in BY_LOSS:
            return self._search(method, most or n).removed[:n]
        return choose(self.importance, n, method=method, seed=seed)

    def _search(self, method: str, n: int) -> Search:
        def measure(part: StateFile | None) -> JsonObject:
            shorter = [m for m in range(1, n) if f"{method} {m}" in self.cells]
            start = self._search(method, shorter[-1]) if shorter else None
            how: dict[str, Any] = {"state": part, "progress": self._progress, "start": start}
            result = self.short.search(self._searched_on, n, method=method, **how)
            return {"removed": result.removed, "losses": result.losses}

        longer = [m for m in self.short.kept if m >= n and f"{method} {m}" in self.cells]
        content = self.cells.resumed(f"{method} {longer[0] if longer else n}", measure)
        # JSON's keys are strings
        trials = [{int(i): v for i, v in loss.items()} for loss in content["losses"]]
        return Search(content["removed"], trials)

    def choice(self, n: int) -> HealedChoice:
        """What auto chose, and how."""

        def measure(part: StateFile | None) -> JsonObject:
            how: dict[str, Any] = {"heal_by": self.heal_by, "progress": self._progress}
            return choose_healed(self.short, self.calibration, n, state=part, **how).to_dict()

        name = f"{AUTO} {n} by {self.heal_by}"
        return HealedChoice.from_dict(self.cells.resumed(name, measure))

    def perplexities(self, layers: Sequence[int], heal_by: str = RAW) -> list[Perplexity]:
        """Of each evaluation window without these layers: raw, or healed in closed form."""

        def measure() -> list[Perplexity]:
            if self._reference is None:
                self._reference = self.short.reference(self.evaluation)
            how: dict[str, Any] = {"reference": self._reference, "progress": self._progress}
            how |= {"heal_by": heal_by, "fit_on": self.calibration}
            return pruned_losses(self.short, layers, self.evaluation, **how)

        return self.cells.perplexities(f"{heal_by} {sorted(layers)}", measure)
