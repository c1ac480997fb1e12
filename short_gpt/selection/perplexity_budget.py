"""As many layers as the quality on held-out text allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.runtime.errors import ShortGPTError

if TYPE_CHECKING:
    from short_gpt.short_model import ShortModel


@dataclass(frozen=True)
class Gate:
    """What `most_layers` found.

    Attributes:
        layers: to remove; empty if not even one may go.
        tried: for every number of layers tried, from 0, the perplexity without them.
        ratio: the most that the perplexity was allowed to rise by.
    """

    layers: list[int]
    tried: dict[int, Perplexity]
    ratio: float

    def to_dict(self) -> dict[str, object]:
        """The evidence, ready for JSON."""
        dense = self.tried[0].value
        rows = [
            {"layers": n, "perplexity": p.value, "ratio": p.value / dense, "tokens": p.tokens}
            for n, p in self.tried.items()
        ]
        return {"max_perplexity_ratio": self.ratio, "tried": rows}


def most_layers(
    short: ShortModel,
    choose: Callable[[int], list[int]],
    windows: Sequence[Sequence[int]],
    *,
    ratio: float,
    most: int | None = None,
    progress: bool = True,
) -> Gate:
    """Removes one layer more, on trial, until the perplexity has risen too far.

    Args:
        short: the model; it is whole again afterwards.
        choose: from a number of layers to the layers to remove.
        windows: token ids of text that neither chose the layers nor trained the model.
        ratio: most that the perplexity may rise by, as a factor of at least 1.
        most: layers to try at most; None is all but one.
        progress: whether to show bars.

    Returns:
        The largest removal up to which every smaller one holds the ratio as well.

    Raises:
        ShortGPTError: the ratio is below 1.
    """
    if not ratio >= 1:
        raise ShortGPTError(f"max_perplexity_ratio = {ratio}: expected a factor of at least 1")
    tried = {0: short.perplexity(windows, progress=progress)}
    kept: list[int] = []
    for n in range(1, (len(short.kept) - 1 if most is None else most) + 1):
        layers = choose(n)
        with short.without_layers(layers):
            tried[n] = short.perplexity(windows, progress=progress)
        if tried[n].value > ratio * tried[0].value:
            break
        kept = layers
    return Gate(kept, tried, ratio)
