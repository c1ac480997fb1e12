"""What each text's choice of layers costs on every text, as a map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from short_gpt.jobs.calibration import Crossed
from short_gpt.plots.figures import empty
from short_gpt.runtime.errors import ShortGPTError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {"raw": "pruned", "refit": "refitted"}


def cross_map(cells: Sequence[Crossed]) -> Figure:
    """A part for each healing: a row for every choice, a column for the text it is judged on.

    Each place has the nats a token that the choice costs beyond the text's own: blue where it is
    the better one, red where it is the worse.

    Args:
        cells: of `jobs.Calibrated`, at least one.

    Raises:
        ShortGPTError: there is none.
        MissingPackageError: matplotlib is not installed.
    """
    if not cells:
        raise ShortGPTError("expected the cells of a calibration, got none")
    healings = list(dict.fromkeys(cell.healing for cell in cells))
    largest = max(abs(cell.excess) for cell in cells) or 1.0
    figure = empty(1.5 + 4.5 * len(healings), 4.2)
    every = figure.subplots(1, len(healings), squeeze=False)[0]
    for axes, healing in zip(every, healings, strict=True):
        _draw(axes, [cell for cell in cells if cell.healing == healing], largest)
        axes.set_title(TITLES.get(healing, healing), fontsize="medium")
    every[0].set_ylabel("chosen on")
    figure.suptitle("nats a token beyond the text's own choice")
    return figure


def _draw(axes: Axes, cells: Sequence[Crossed], largest: float) -> None:
    choices, texts = (
        list(dict.fromkeys(getattr(c, name) for c in cells)) for name in ("choice", "text")
    )
    found = {(c.choice, c.text): c.excess for c in cells}
    rows = [[found[choice, text] for text in texts] for choice in choices]
    axes.imshow(rows, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            strong = abs(value) > 0.6 * largest
            colour = "white" if strong else "black"
            axes.text(x, y, f"{value:+.3f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(texts)), texts, rotation=30, ha="right")
    axes.set_yticks(range(len(choices)), choices)
    axes.set_xlabel("judged on")
