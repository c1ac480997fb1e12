"""What a search by loss is asked and has found, and a saved one continued."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.state import StateFile
from short_gpt.scoring.lists import layer_numbers
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


def continued(state: StateFile | None, count: int) -> tuple[Search, list[Nats]]:
    """The search that a state holds, and by group the nats of the round begun; new ones if none.

    Raises:
        ShortGPTError: the state holds no search among so many layers.
    """
    if state is None or not state.content:
        return Search(), [{}]
    try:
        content = state.content["search"]
        removed = layer_numbers(content["removed"])
        losses = [_by_layer(found, count) for found in content["losses"]]
        done = [_by_layer(found, count) for found in content["done"]]
        whole = all(i in found for i, found in zip(removed, losses, strict=True))
    except (KeyError, TypeError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise ShortGPTError(
            f"{state.path} is no whole state of a search by loss; delete it to begin anew"
        )
    return Search(removed, losses), done or [{}]  # evaluations are counted again, by rounds


def _by_layer(content: Mapping[str, float], count: int) -> Nats:
    """Losses by layers, whose numbers JSON has turned into strings; ValueError for what is none."""
    found = {int(i): value for i, value in content.items()}
    if not all(type(v) is float and 0 <= i < count for i, v in found.items()):
        raise ValueError
    return found
