"""What a search by loss is asked and has found, and a saved one continued."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from short_gpt.runtime.state import StateFile
from short_gpt.selection.mending import Mending

Nats = dict[int, float]  # by candidate


@dataclass(frozen=True)
class Options:
    """How a search by loss runs.

    Attributes:
        candidates: positions that may be removed; None takes all.
        batch_size: windows read at once.
        max_memory: bytes for stored states. Windows that need more even for one state each are
            read in groups, one after the other.
        state: saves the search and continues it.
        mending: changes the layer in front of every gap while a candidate is scored; None scores
            models as cut.
        progress: whether to show a bar.
    """

    candidates: Collection[int] | None = None
    batch_size: int = 1
    max_memory: int = 2**31
    state: StateFile | None = None
    mending: Mending | None = None
    progress: bool = False

    def allowed(self, count: int) -> list[int]:
        """Candidates of a model of so many layers, whose first and last always stay."""
        places = range(count) if self.candidates is None else self.candidates
        return [i for i in range(1, count - 1) if i in places]


@dataclass
class Search:
    """The result of a search.

    Attributes:
        removed: positions of the layers, in order of removal; ascending, of `evolution`.
        losses: for every round, the mean loss in nats per token without each candidate.
        evaluations: layers run, each on one window, in a search that nothing interrupts.
        loss: of `evolution`, the mean loss without all of them.
    """

    removed: list[int] = field(default_factory=list)
    losses: list[dict[int, float]] = field(default_factory=list)
    evaluations: int = 0
    loss: float | None = None


def continued(state: StateFile | None) -> tuple[Search, list[Nats]]:
    """The search that a state holds, and by group the nats of the round begun; new ones if none."""
    if state is None or not state.content:
        return Search(), [{}]
    content = state.content["search"]
    losses, done = ([_by_layer(x) for x in content[name]] for name in ("losses", "done"))
    # evaluations are counted again, by rounds
    return Search(list(content["removed"]), losses), done or [{}]


def _by_layer(content: Mapping[str, float]) -> Nats:
    """Losses by layers, whose numbers JSON has turned into strings."""
    return {int(i): value for i, value in content.items()}
