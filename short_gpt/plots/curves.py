"""Perplexity over the number of layers removed, a colour for every method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from short_gpt.jobs.cases import Row
from short_gpt.plots.figures import empty
from short_gpt.runtime.errors import ShortGPTError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Times the original model's perplexity, up to where curves of quality are shown.
SHOWN = 100
TRAINED = {"lora": ("*", "LoRA"), "distill": ("D", "distilled")}
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
LINES = {"refit": "s--", "linearpatch": "^:", "ghosted": "v:"}  # closed forms, also of old files


def quality_curves(rows: Sequence[Row], *, title: str | None = None) -> Figure:
    """Perplexity over the number of layers removed, a colour for every method.

    The left part shows the pruned models, the right one, where there are any, the healed: solid
    lines for patches, dashed and dotted ones for other closed forms, stars for LoRA,
    diamonds for distillation, joined where a method has one for each of several numbers. Several
    rows of one method and number, such as random sets, are a band from the least to the largest,
    and marks of their own where they were trained. The axis ends at `SHOWN` times the original
    model's perplexity; lines of what is worse leave the picture.

    Args:
        rows: of `jobs.Comparison.rows`, the original model first.
        title: a line above the picture.

    Raises:
        ShortGPTError: there is no row.
        MissingPackageError: matplotlib is not installed.
    """
    if not rows:
        raise ShortGPTError("expected the rows of a comparison, the original model first; got none")
    dense, found = rows[0], rows[1:]
    colours = dict(zip(dict.fromkeys(r.method for r in found), PALETTE * 3, strict=False))
    healed = {r.healing for r in found} - {"raw"}
    right = "healed (solid: patched)" if "patched" in healed and len(healed) > 1 else "healed"
    parts = {"pruned": ["raw"]} | ({right: ["patched", *LINES, *TRAINED]} if healed else {})
    figure = empty(2.0 + 4.0 * len(parts), 4.4)
    axes = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    for axis, (name, healings) in zip(axes, parts.items(), strict=True):
        for healing in healings:
            for method, colour in colours.items():
                chosen = [r for r in found if (r.method, r.healing) == (method, healing)]
                _draw_curve(axis, dense, chosen, colour)
        _label(axis, name)
    _scale(axes[0], rows)
    _legend(figure, axes)
    if title is not None:
        figure.suptitle(title)
    return figure


def _label(axis: Axes, name: str) -> None:
    axis.set_title(name, fontsize="medium")
    axis.set_xlabel("layers removed")
    axis.locator_params(axis="x", integer=True)
    axis.spines[["top", "right"]].set_visible(False)


def _scale(axis: Axes, rows: Sequence[Row]) -> None:
    """A logarithmic axis of perplexities, cut off where models are of no use any more."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    dense = rows[0].perplexity
    axis.set_yscale("log")
    highest = max((r.perplexity for r in rows if math.isfinite(r.perplexity)), default=1.0)
    if highest > SHOWN * dense:
        axis.set_ylim(0.9 * dense, SHOWN * dense)
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.5g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylabel("perplexity")


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    named = dict(
        pair
        for axis in axes
        for pair in zip(*reversed(axis.get_legend_handles_labels()), strict=True)
    )
    figure.legend(named.values(), named.keys(), loc="outside right upper", frameon=False)


def _draw_curve(axes: Axes, dense: Row, rows: Sequence[Row], colour: str) -> None:
    """One method, healed one way: a line from the original on, a band, or what was trained."""
    if not rows:
        return
    values = {n: [r.perplexity for r in rows if r.n == n] for n in sorted({r.n for r in rows})}
    if rows[0].healing in TRAINED:
        mark, name = TRAINED[rows[0].healing]
        x = [n for n, found in values.items() for _ in found]
        y = [value for found in values.values() for value in found]
        label = f"{rows[0].method}, {name}"
        style: dict[str, Any] = {"markersize": 11, "markeredgecolor": "black"}
        style["linestyle"] = "-." if len(x) == len(values) > 1 else "none"
        axes.plot(x, y, marker=mark, color=colour, label=label, zorder=3, **style)
        return
    x = [0, *values]
    low, high = ([dense.perplexity, *map(f, values.values())] for f in (min, max))
    line = LINES.get(rows[0].healing)
    label = f"{rows[0].method}, {rows[0].healing}" if line else rows[0].method
    line = line or "o-"
    if low == high:
        axes.plot(x, low, line, color=colour, markersize=4, label=label)
    else:
        axes.fill_between(x, low, high, color="0.88", label=rows[0].method)
