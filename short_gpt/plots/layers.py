"""Pictures of scores: Block Influence as bars, angular distance as a map, and published scores.

L layers, by their numbers in the original model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from short_gpt.jobs.reproduction import PaperComparison, published_scores
from short_gpt.models.numbering import check_exist, span
from short_gpt.plots.figures import KEPT, REMOVED, empty, logarithmic
from short_gpt.runtime.errors import check
from short_gpt.scoring.importance import Importance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLOCK = 9  # layers of the blocks whose distances others published


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

    Where a few layers tower over the others, the axis is broken: the lower part shows the bulk
    from 0 on, the upper part the ends of the tall bars.

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
    top, break_at = _limits(heights if errors is None else heights + errors)
    if break_at < top:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2.4))
        _break(upper, lower, break_at, top)
        parts = [lower, upper]
    else:
        parts = [figure.subplots()]
        parts[0].set_ylim(0, top)
    for axes in parts:
        _bars(axes, heights, errors, {numbers.index(i) for i in removed})
    parts[0].set_xlabel("layer")
    parts[0].set_xlim(-0.7, n_layers - 0.3)
    ticks = range(0, n_layers, 1 if n_layers <= 40 else 5)
    parts[0].set_xticks(ticks, [f"{numbers[position]}" for position in ticks])
    parts[0].tick_params(axis="x", labelsize=8)
    figure.supylabel("Block Influence, 1 - cos", fontsize="medium")
    entries = parts[0].get_legend_handles_labels()
    if entries[1]:
        figure.legend(*entries, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("Block Influence: how far each layer turns the hidden states")
    return figure


def _double(x: Tensor) -> Tensor:
    return torch.as_tensor(x).detach().cpu().double()


def _limits(ends: Tensor) -> tuple[float, float]:
    """Upper end of the axis, and where it is broken (the same if it is not)."""
    ends = ends[ends.isfinite()]
    if not len(ends) or ends.max() <= 0:
        return 1.0, 1.0
    # most layers reach up to the 85th percentile; broken if the tallest is thrice as high
    top, bulk = float(ends.max()), float(ends.quantile(0.85))
    return (1.08 * top, 1.2 * bulk) if 0 < 3 * bulk < top else (1.08 * top, 1.08 * top)


def _break(upper: Axes, lower: Axes, break_at: float, top: float) -> None:
    """Makes one broken axis of two, with slanted marks at the break."""
    lower.set_ylim(0, break_at)
    upper.set_ylim(break_at, top)
    upper.spines.bottom.set_visible(False)
    lower.spines.top.set_visible(False)
    upper.tick_params(axis="x", bottom=False, labelbottom=False)
    mark: dict[str, Any] = {"marker": [(-1, -0.5), (1, 0.5)], "markersize": 9}
    mark |= {"linestyle": "none", "color": "black", "clip_on": False}
    upper.plot([0, 1], [0, 0], transform=upper.transAxes, **mark)
    lower.plot([0, 1], [1, 1], transform=lower.transAxes, **mark)


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
    angular: Tensor,
    *,
    block: tuple[int, int] | None = None,
    layers: Sequence[int] | None = None,
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
    figure = empty(7.0, 5.8)
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
    axes.legend(loc="upper right", frameon=False)
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


def beside_published(importance: Importance, comparison: PaperComparison) -> Figure:
    """Block Influence, and distances of blocks of 9 layers, with those that were published.

    The published ones are sums over an unknown number of tokens, of which only the ratios mean
    something: they are scaled to the same median, Block Influence on a logarithmic axis. The layers
    that the paper removes are shaded; those that the measured scores would remove are marked.
    """
    theirs = published_scores(comparison.model)
    angles = theirs is not None and len(importance.layers) > BLOCK
    figure = empty(9.0, 7.6 if angles else 4.4)
    parts = figure.subplots(2 if angles else 1, 1, squeeze=False)[:, 0]
    _influence(parts[0], importance, comparison)
    if theirs is not None:
        _published(parts[0], importance.layers, theirs[0], importance.block_influence)
    if angles and theirs is not None:
        ours = importance.angular.diagonal(BLOCK)  # of every block, by its start
        parts[1].plot(ours, "o-", color="black", markersize=4, label="measured")
        _published(parts[1], range(len(theirs[1])), theirs[1], ours)
        parts[1].set_xlabel(f"first layer of a block of {BLOCK}")
        parts[1].set_ylabel("angular distance")
    logarithmic(parts[0], "g")
    for axes in parts:
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(f"{comparison.model}: measured and published")
    return figure


def _influence(axes: Axes, importance: Importance, comparison: PaperComparison) -> None:
    layers, ours = importance.layers, importance.block_influence
    for number, layer in enumerate(comparison.paper):
        label = "the paper removes this layer" if number == 0 else None
        axes.axvspan(layer - 0.5, layer + 0.5, color=REMOVED, alpha=0.15, linewidth=0, label=label)
    margin = importance.margin.nan_to_num(nan=0.0)
    line = axes.errorbar(layers, ours, yerr=margin, fmt="o-", color="black", markersize=4)
    line.set_label("measured, with its 95% margin")
    chosen = ours[[layers.index(i) for i in comparison.ours]]
    rings: dict[str, Any] = {"color": REMOVED, "markersize": 10, "zorder": 0}
    rings["label"] = "the measured scores remove this layer"
    axes.plot(comparison.ours, chosen, "o", **rings)
    axes.set_xlabel("layer")
    axes.set_ylabel("Block Influence, 1 - cos")


def _published(axes: Axes, x: Sequence[int], theirs: Tensor, ours: Tensor) -> None:
    scaled = theirs * (ours.median() / theirs.median())
    axes.plot(
        x, scaled, "s--", color=KEPT, markersize=4, label="published, scaled to the measured median"
    )
