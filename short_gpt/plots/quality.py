"""Pictures of what removal costs, over the number of layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from short_gpt.plots.figures import empty, logarithmic
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.selection.methods import LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from short_gpt.jobs.comparing import Row

# Times the original model's perplexity, up to where curves of quality are shown.
SHOWN = 100
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C7A00", "#000000")
MARKERS = "osD^vPX*"  # one shape a method: where lines coincide, the colour alone hides one
TITLES = {  # of parts, by healing, in their order
    "raw": "pruned, not healed",
    "patch": "healed by a patch",
    "refit": "healed by a refit",
}


def quality_curves(rows: Sequence[Row]) -> Figure:
    """Perplexity over the number of layers removed: a part for each healing, a colour and shape
    for each method.

    Bars reach one standard error of the change from the original model up and down. Several rows
    of one method and number, such as random sets, are a band from the least to the largest.
    The axis ends at `SHOWN` times the original model's perplexity; triangles at its end stand for
    the models that are worse, and the legend says so.

    Args:
        rows: Rows of `compare`, the original model first.
    """
    if not rows:
        raise ShortGPTError("expected the rows of a comparison, the original model first; got none")
    dense, pruned = rows[0], rows[1:]
    methods = list(dict.fromkeys(r.method for r in pruned))
    healings = sorted({"raw", *(r.healing for r in pruned)}, key=_order)
    top, numbers = _top(rows), sorted({0, *(r.n for r in pruned)})
    gap = min((b - a for a, b in pairwise(numbers)), default=1)
    step = min(0.5 * gap / max(len(methods), 1), 0.02 * numbers[-1])  # between marks side by side
    columns = min(3, len(healings))
    lines = -(-len(healings) // columns)
    keys = -(-(len(methods) + 2) // columns)  # lines of the legend
    figure = empty(1.4 + 2.4 * columns, 1.2 + 2.5 * lines + 0.22 * keys)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, healing in zip(grid.flat, healings, strict=False):
        axes.axhline(dense.perplexity, color="0.5", linewidth=1, label="original model")
        for index, method in enumerate(methods):
            chosen = [r for r in pruned if (r.method, r.healing) == (method, healing)]
            style = {"color": PALETTE[index % 8], "marker": MARKERS[index % 8]}
            shift = step * (index - (len(methods) - 1) / 2)
            _draw_method(axes, dense, chosen, shift, top, style)
        axes.set_title(TITLES.get(healing, f"healed by {healing}"), fontsize="medium")
        axes.set_xticks(numbers)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelbottom=True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in [*grid.flat][len(healings) :]:
        axes.set_visible(False)
    logarithmic(grid[0, 0], ",.5g")
    grid[0, 0].set_ylim(0.9 * dense.perplexity, top)
    for axes in grid[-1]:
        axes.set_xlabel("layers removed")
    for axes in grid[:, 0]:
        axes.set_ylabel("perplexity, lower is better")
    _legend(figure, grid, columns)
    return figure


def _legend(figure: Figure, grid: Any, columns: int) -> None:
    """One legend below all parts: the methods first, then what they are compared with."""
    named = {
        label: handle
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    labels = sorted(named, key=lambda label: label.startswith(("original model", "worse than")))
    figure.legend(
        [named[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        title="layers chosen by (bars: one standard error)",
        fontsize=9,
    )


def _order(healing: str) -> tuple[int, str]:
    return ([*TITLES].index(healing) if healing in TITLES else len(TITLES)), healing


def _top(rows: Sequence[Row]) -> float:
    ends = [r.perplexity * math.exp(_error(r)) for r in rows]
    return min(1.1 * max(filter(math.isfinite, ends), default=1.0), SHOWN * rows[0].perplexity)


def _error(row: Row) -> float:
    """That of the loss; none is drawn where one window leaves it unknown."""
    return row.standard_error if math.isfinite(row.standard_error) else 0.0


def _draw_method(
    axes: Axes, dense: Row, rows: Sequence[Row], shift: float, top: float, style: dict[str, str]
) -> None:
    """One method, healed one way: a line, or a band where a number has several rows.

    It begins at the original model; `shift` keeps lines apart.
    """
    if not rows:
        return
    label = LABELS.get(rows[0].method, rows[0].method)
    groups = {n: [r for r in rows if r.n == n] for n in sorted({r.n for r in rows})}
    values = {n: [r.perplexity for r in group] for n, group in groups.items()}
    if most := max(map(len, values.values())) - 1:
        low, high = ([dense.perplexity, *map(end, values.values())] for end in (min, max))
        label, shift, style = f"{label}, best to worst of {most + 1}", 0.0, {"color": "0.6"}
        axes.fill_between([0, *groups], low, high, color="0.87", label=label)
    else:
        y = [dense.perplexity, *(value[0] for value in values.values())]
        errors = [0.0, *(_error(group[0]) for group in groups.values())]
        margin = [
            [v * (1 - math.exp(-e)) for v, e in zip(y, errors, strict=True)],
            [v * (math.exp(e) - 1) for v, e in zip(y, errors, strict=True)],
        ]
        x = [0.0, *(n + shift for n in groups)]
        line: dict[str, Any] = {"markersize": 5, "linewidth": 1.4, "label": label, **style}
        axes.errorbar(x, y, yerr=margin, elinewidth=1, **line)
    off = [n + shift for n, each in values.items() if not all(v <= top for v in each)]  # NaN too
    if off:
        mark: dict[str, Any] = {"linestyle": "none", "marker": 6, "markersize": 9, "zorder": 4}
        axes.plot(off, [top] * len(off), clip_on=False, color=style["color"], **mark)
        axes.plot([], [], color="black", label=f"worse than {top:,.0f}, off the axis", **mark)
