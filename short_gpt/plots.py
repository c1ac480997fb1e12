"""Results as pictures: scores of layers, and what removal costs over the number of layers.

L layers, by their numbers in the original model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama.files import new_file
from short_gpt.models.numbering import check_exist, span
from short_gpt.runtime.errors import ShortGPTError, check

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from short_gpt.jobs.comparing import Row
    from short_gpt.scoring.importance import Importance

__all__ = ["angular_heatmap", "importance_bars", "quality_curves", "score_figures"]

# Colours that colour-blind readers tell apart (Okabe and Ito), and that differ in lightness too.
KEPT, REMOVED = "#56B4E9", "#D55E00"
# Times the original model's perplexity, up to where curves of quality are shown.
SHOWN = 100
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C7A00", "#000000")
MARKERS = "osD^vPX*"  # one shape a method: where lines coincide, the colour alone hides one
TITLES = {  # of parts, by healing
    "raw": "pruned, not healed",
    "patch": "healed by a patch",
    "refit": "healed by a refit",
}


def save(figure: Figure, path: Path) -> None:
    """Writes a picture as PNG, complete or not at all; it replaces only matplotlib's pictures."""
    with new_file(path, overwrite=True, replaces=is_picture) as partial:
        figure.savefig(partial, format="png", dpi=150)


def is_picture(path: Path) -> bool:
    """Whether a file is a PNG that matplotlib wrote."""
    with path.open("rb") as file:
        start = file.read(256)
    return start.startswith(b"\x89PNG") and b"Matplotlib" in start


def empty(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def logarithmic(axes: Axes, form: str) -> None:
    """Logarithmic heights, with numbers in this form at 1, 2 and 5 times the powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format(value, form)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def score_figures(importance: Importance, n: int | None = None) -> list[Figure]:
    """Block Influence as bars, and angular distances as a map.

    Args:
        importance: at least one window.
        n: marks the layers that each of both measures would remove; None marks none.
    """
    removed = [] if n is None else importance.least_important(n)
    block = None if n is None else (importance.least_important(n, angular=True)[0], n)
    scores, margin, layers = importance.block_influence, importance.margin, importance.layers
    bars = importance_bars(scores, margin=margin, removed=removed, layers=layers)
    return [bars, angular_heatmap(importance.angular, block=block, layers=layers)]


def importance_bars(
    importance: Tensor,
    *,
    margin: Tensor | None = None,
    removed: Sequence[int] = (),
    layers: Sequence[int] | None = None,
) -> Figure:
    """Bars of the Block Influence of every layer (ShortGPT, arXiv:2403.03853, Eq. 1).

    Bars thrice as high as most others are cut off, with their values above.

    Args:
        importance: (L,), mean of 1 - cos a layer; NaN draws no bar.
        margin: (L,), drawn up and down, as `Importance.margin` is for 95%. NaN draws none.
        removed: layers to show in another colour.
        layers: the numbers of the L layers in the original model; None counts from 0.
    """
    heights = _double(importance)
    n_layers = len(heights)
    numbers = list(range(n_layers)) if layers is None else list(layers)
    check_exist(removed, numbers)
    errors = None if margin is None else _double(margin).nan_to_num(nan=0.0)
    figure = empty(min(max(2 + 0.22 * n_layers, 6.0), 14.0), 4.2)
    axes, top = figure.subplots(), _top_of_bars(heights if errors is None else heights + errors)
    _bars(axes, heights, errors, {numbers.index(i) for i in removed})
    for layer in (heights > top).nonzero()[:, 0].tolist():
        near: dict[str, Any] = {"xytext": (0, 1), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{heights[layer]:.2f}", (layer, top), annotation_clip=False, size=7, **near)
    axes.set_ylim(0, top)
    axes.set_xlabel("layer")
    axes.set_xlim(-0.7, n_layers - 0.3)
    ticks = range(0, n_layers, 1 if n_layers <= 40 else 5)
    axes.set_xticks(ticks, [f"{numbers[position]}" for position in ticks])
    axes.tick_params(axis="x", labelsize=8)
    figure.supylabel("Block Influence, 1 - cos", fontsize="medium")
    entries = axes.get_legend_handles_labels()
    if entries[1]:
        figure.legend(*entries, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("Block Influence: how far each layer turns the hidden states")
    return figure


def _double(x: Tensor) -> Tensor:
    import torch

    return torch.as_tensor(x).detach().cpu().double()


def _top_of_bars(ends: Tensor) -> float:
    """The upper end of the axis."""
    ends = ends[ends.isfinite()]
    if not len(ends) or ends.max() <= 0:
        return 1.0
    # most layers reach up to the 85th percentile
    top, bulk = float(ends.max()), float(ends.quantile(0.85))
    return 1.2 * bulk if 0 < 3 * bulk < top else 1.08 * top


def _bars(axes: Axes, heights: Tensor, errors: Tensor | None, removed: set[int]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    scored = [n for n in range(len(heights)) if heights[n].isfinite()]
    kept, gone = ([n for n in scored if (n in removed) is part] for part in (False, True))
    for layers, label, colour in ((kept, "kept", KEPT), (gone, "removed", REMOVED)):
        if layers:  # without removed ones all bars are alike, and need no legend
            axes.bar(layers, heights[layers].numpy(), color=colour, label=label if gone else None)
    if errors is not None and bool((errors > 0).any()):
        line: dict[str, Any] = {"fmt": "none", "ecolor": "black", "elinewidth": 1}
        middle, reach = heights[scored].numpy(), errors[scored].numpy()
        axes.errorbar(scored, middle, reach, label="margin, 95%", **line)


def angular_heatmap(
    angular: Tensor, *, block: tuple[int, int] | None = None, layers: Sequence[int] | None = None
) -> Figure:
    """Angular distance over every block of consecutive layers (arXiv:2403.17887, Eq. 6).

    A column is the block's first layer, a row its number of layers. A dot marks each row's least
    distance, the block that Gromov et al. would remove (Eq. 7).

    Args:
        angular: (L+1, L+1); entry [l, l+n] is the mean angular distance, 0 to 1, between the
            hidden states entering layer l and layer l+n. Entries up to the diagonal are
            not read; NaN is drawn blank.
        block: (start, n) of a block to outline.
        layers: the numbers of the L layers in the original model; None counts from 0.
    """
    import torch

    distances = _double(angular)
    n_layers = len(distances) - 1
    numbers = list(range(n_layers)) if layers is None else list(layers)
    if block is not None:
        start, length = block
        check_exist([start], numbers)
        position = numbers.index(start)
        outlined = numbers[position : position + length]
        check(len(outlined) == length > 0, "block", block, f"a block of layers {span(numbers)}")
    # row n - 1, column l: the distance [l, l + n]; NaN where there is no such block
    values = torch.full((n_layers, n_layers), torch.nan, dtype=torch.float64)
    for n in range(1, n_layers + 1):
        values[n - 1, : n_layers - n + 1] = distances.diagonal(n)
    figure = empty(7.0, 6.0)
    axes = figure.subplots()
    extent = (-0.5, n_layers - 0.5, 0.5, n_layers + 0.5)
    image = axes.imshow(values.numpy(), origin="lower", extent=extent, cmap="viridis_r")
    figure.colorbar(image, label="angular distance, arccos(cos) / pi")
    rows = values.isfinite().any(1).nonzero()[:, 0]  # that have a block with a distance
    least = values[rows].nan_to_num(nan=torch.inf).argmin(1)
    dots: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": "black"}
    dots |= {"markersize": min(6.0, 200 / n_layers), "markeredgewidth": 0.5}
    dots["label"] = "least distance for its number of layers"
    axes.plot(least.numpy(), rows.numpy() + 1, "o", **dots)
    if block is not None:
        _outline(axes, position, outlined)
    axes.set_xlabel("first layer of the block")
    axes.set_ylabel("number of layers in the block")
    axes.locator_params(integer=True)
    if layers is not None:
        axes.xaxis.set_major_formatter(
            lambda position, _: f"{numbers[round(position)]}" if 0 <= position < n_layers else ""
        )
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Angle between the hidden states before and after a block")
    return figure


def _outline(axes: Axes, position: int, block: Sequence[int]) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    n, corner = len(block), (position - 0.5, len(block) - 0.5)
    frame = Rectangle(corner, 1, 1, fill=False, edgecolor=REMOVED, linewidth=2)
    layers = span(block).replace("..", " to ")
    frame.set_label(f"best of {n}: layers {layers}" if n > 1 else f"best layer: {layers}")
    frame.set_path_effects([withStroke(linewidth=4, foreground="white")])
    axes.add_patch(frame)


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
    healings = list(dict.fromkeys(["raw", *(r.healing for r in pruned)]))
    ends = filter(math.isfinite, [r.perplexity * math.exp(_error(r)) for r in rows])
    top = min(1.1 * max(ends, default=1.0), SHOWN * dense.perplexity)
    numbers = sorted({0, *(r.n for r in pruned)})
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


def _error(row: Row) -> float:
    """That of the loss; none is drawn where one window leaves it unknown."""
    return row.standard_error if math.isfinite(row.standard_error) else 0.0


def _draw_method(
    axes: Axes, dense: Row, rows: Sequence[Row], shift: float, top: float, style: dict[str, str]
) -> None:
    """One method, healed one way: a line, or a band where a number has several rows.

    It begins at the original model; `shift` keeps lines apart.
    """
    from short_gpt.selection.methods import LABELS

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
