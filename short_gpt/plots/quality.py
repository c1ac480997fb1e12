"""Pictures of what removal costs: over the number of layers, and of each text's choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from short_gpt.jobs.calibration import Crossed
from short_gpt.jobs.cases import Row
from short_gpt.plots.figures import empty, logarithmic
from short_gpt.runtime.errors import ShortGPTError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Times the original model's perplexity, up to where curves of quality are shown.
SHOWN = 100
TRAINED = {"lora": ("*", "LoRA"), "distill": ("D", "distilled")}
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
LINES = {"refit": "s--", "linearpatch": "^:", "ghosted": "v:"}  # closed forms, also of old files
TITLES = {"raw": "pruned", "refit": "refitted"}


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
    """
    if not rows:
        raise ShortGPTError("expected the rows of a comparison, the original model first; got none")
    dense, pruned = rows[0], rows[1:]
    colours = dict(zip(dict.fromkeys(r.method for r in pruned), PALETTE * 3, strict=False))
    healed = {r.healing for r in pruned} - {"raw"}
    right = "healed (solid: patched)" if "patched" in healed and len(healed) > 1 else "healed"
    parts = {"pruned": ["raw"]} | ({right: ["patched", *LINES, *TRAINED]} if healed else {})
    figure = empty(2.0 + 4.0 * len(parts), 4.4)
    axes = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    for axis, (name, healings) in zip(axes, parts.items(), strict=True):
        for healing in healings:
            for method, colour in colours.items():
                own = [r for r in pruned if (r.method, r.healing) == (method, healing)]
                _draw_curve(axis, dense, own, colour)
        axis.set_title(name, fontsize="medium")
        axis.set_xlabel("layers removed")
        axis.locator_params(axis="x", integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    logarithmic(axes[0], ",.5g")
    highest = max((r.perplexity for r in rows if math.isfinite(r.perplexity)), default=1.0)
    if highest > SHOWN * dense.perplexity:
        axes[0].set_ylim(0.9 * dense.perplexity, SHOWN * dense.perplexity)
    axes[0].set_ylabel("perplexity")
    named: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), loc="outside right upper", frameon=False)
    if title is not None:
        figure.suptitle(title)
    return figure


def _draw_curve(axes: Axes, dense: Row, rows: Sequence[Row], colour: str) -> None:
    """One method, healed one way: a line from the original on, a band, or what was trained."""
    if not rows:
        return
    method, healing = rows[0].method, rows[0].healing
    values = {n: [r.perplexity for r in rows if r.n == n] for n in sorted({r.n for r in rows})}
    if healing in TRAINED:
        mark, name = TRAINED[healing]
        x = [n for n, own in values.items() for _ in own]
        y = [value for own in values.values() for value in own]
        style: dict[str, Any] = {"markersize": 11, "markeredgecolor": "black", "zorder": 3}
        style["linestyle"] = "-." if len(x) == len(values) > 1 else "none"
        axes.plot(x, y, marker=mark, color=colour, label=f"{method}, {name}", **style)
        return
    x = [0, *values]
    low, high = ([dense.perplexity, *map(f, values.values())] for f in (min, max))
    if low == high:
        label = f"{method}, {healing}" if healing in LINES else method
        line = LINES.get(healing, "o-")
        axes.plot(x, low, line, color=colour, markersize=4, label=label)
    else:
        axes.fill_between(x, low, high, color="0.88", label=method)


def cross_map(cells: Sequence[Crossed]) -> Figure:
    """A part for each healing: a row for every choice, a column for the text it is judged on.

    A cell has the nats a token that the choice costs beyond the text's own: blue where it is
    the better one, red where it is the worse.
    """
    if not cells:
        raise ShortGPTError("expected the cells of a calibration, got none")
    healings = list(dict.fromkeys(cell.healing for cell in cells))
    largest = max(abs(cell.excess) for cell in cells) or 1.0
    figure = empty(1.5 + 4.5 * len(healings), 4.2)
    parts = figure.subplots(1, len(healings), squeeze=False)[0]
    for axes, healing in zip(parts, healings, strict=True):
        _draw_map(axes, [cell for cell in cells if cell.healing == healing], largest)
        axes.set_title(TITLES.get(healing, healing), fontsize="medium")
    parts[0].set_ylabel("chosen on")
    figure.suptitle("nats a token beyond the text's own choice")
    return figure


def _draw_map(axes: Axes, cells: Sequence[Crossed], largest: float) -> None:
    choices, texts = (
        list(dict.fromkeys(names)) for names in zip(*(c[:2] for c in cells), strict=True)
    )
    excess = {(c.choice, c.text): c.excess for c in cells}
    rows = [[excess[choice, text] for text in texts] for choice in choices]
    axes.imshow(rows, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            colour = "white" if abs(value) > 0.6 * largest else "black"
            axes.text(x, y, f"{value:+.3f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(texts)), texts, rotation=30, ha="right")
    axes.set_yticks(range(len(choices)), choices)
    axes.set_xlabel("judged on")
