"""Measured scores beside published ones. L layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from short_gpt.jobs.reproduction import PaperComparison, published_scores
from short_gpt.plots.figures import KEPT, REMOVED, empty
from short_gpt.scoring.importance import Importance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLOCK = 9  # layers of the blocks whose published distances there are


def beside_published(importance: Importance, comparison: PaperComparison) -> Figure:
    """Block Influence, and distances of blocks of 9 layers, beside those that were published.

    The published ones are sums over an unknown number of tokens, so that only their ratios mean
    something: they are scaled to the same median, Block Influence on a logarithmic axis. The layers
    that the paper removes are shaded; those that the measured scores would remove are marked.

    Args:
        importance: of all layers, at least one window.
        comparison: the paper's list and ours.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    theirs = published_scores(comparison.model)
    angles = theirs is not None and len(importance.layers) > BLOCK
    figure = empty(9.0, 7.6 if angles else 4.4)
    parts = figure.subplots(2 if angles else 1, 1, squeeze=False)[:, 0]
    _influence(parts[0], importance, comparison, None if theirs is None else theirs[0])
    if angles and theirs is not None:
        _angles(parts[1], importance.angular.diagonal(BLOCK), theirs[1])
    _logarithmic(parts[0])
    for axes in parts:
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(f"{comparison.model}: measured and published")
    return figure


def _influence(
    axes: Axes, importance: Importance, comparison: PaperComparison, theirs: Tensor | None
) -> None:
    layers, ours = importance.layers, importance.block_influence
    for number, layer in enumerate(comparison.paper):
        label = "removed by the paper" if number == 0 else None
        axes.axvspan(layer - 0.5, layer + 0.5, color=REMOVED, alpha=0.15, linewidth=0, label=label)
    margin = importance.margin.nan_to_num(nan=0.0)
    line = axes.errorbar(layers, ours, yerr=margin, fmt="o-", color="black", markersize=4)
    line.set_label("measured")
    chosen = ours[[layers.index(i) for i in comparison.ours]]
    (rings,) = axes.plot(comparison.ours, chosen, "o", color=REMOVED, markersize=10, zorder=0)
    rings.set_label("removed by these scores")
    if theirs is not None:
        axes.plot(
            layers,
            _scaled(theirs, ours),
            "s--",
            color=KEPT,
            markersize=4,
            label="published, scaled",
        )
    axes.set_xlabel("layer")
    axes.set_ylabel("Block Influence, 1 - cos")


def _logarithmic(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _angles(axes: Axes, ours: Tensor, theirs: Tensor) -> None:
    """The distance of every block by its start, ours and the published one."""
    axes.plot(ours, "o-", color="black", markersize=4, label="measured")
    axes.plot(_scaled(theirs, ours), "s--", color=KEPT, markersize=4, label="published, scaled")
    axes.set_xlabel(f"first layer of a block of {BLOCK}")
    axes.set_ylabel("angular distance")


def _scaled(theirs: Tensor, ours: Tensor) -> Tensor:
    """The published scores at the median of the measured ones."""
    return theirs * (ours.median() / theirs.median())
