"""Bars of Block Influence, a bar a layer. L layers, by their numbers in the original model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from short_gpt.models.numbering import check_exist
from short_gpt.plots.figures import KEPT, REMOVED, empty, shape
from short_gpt.runtime.errors import ShortGPTError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def importance_bars(
    importance: Tensor,
    *,
    margin: Tensor | None = None,
    removed: Sequence[int] = (),
    title: str | None = None,
) -> Figure:
    """Bars of the Block Influence of every layer (ShortGPT, arXiv:2403.03853, Eq. 1).

    Where a few layers tower over the others, the axis is broken: the lower part shows the bulk
    from 0 on, the upper part the ends of the tall bars.

    Args:
        importance: (L,), mean of 1 - cos a layer; NaN leaves the layer's place empty.
        margin: (L,), drawn up and down, as `Importance.margin` is for 95%. NaN draws none.
        removed: layers to show in another colour.
        title: a line above the picture.

    Raises:
        ShortGPTError: a shape is wrong, or a removed layer does not exist.
        MissingPackageError: matplotlib is not installed.
    """
    heights = torch.as_tensor(importance).detach().double().cpu()
    if heights.dim() != 1 or not len(heights):
        raise ShortGPTError(f"importance: expected one number a layer, (L,), got {shape(heights)}")
    check_exist(removed, range(len(heights)))
    if margin is not None:
        margin = torch.as_tensor(margin).detach().double().cpu().nan_to_num(nan=0.0)
        if margin.shape != heights.shape:
            raise ShortGPTError(f"margin: expected {shape(heights)}, got {shape(margin)}")
    return _draw_bars(heights, margin, {*removed}, title)


def _draw_bars(
    heights: Tensor, errors: Tensor | None, removed: set[int], title: str | None
) -> Figure:
    n_layers = len(heights)
    figure = empty(min(max(2 + 0.22 * n_layers, 6.0), 14.0), 4.2)
    top, cut = _limits(heights if errors is None else heights + errors)
    if cut < top:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2.4))
        _break(upper, lower, cut, top)
        parts = [lower, upper]
    else:
        parts = [figure.subplots()]
        parts[0].set_ylim(0, top)
    for axes in parts:
        _bars(axes, heights, errors, removed)
    parts[0].set_xlabel("layer")
    parts[0].set_xlim(-0.7, n_layers - 0.3)
    parts[0].set_xticks(range(0, n_layers, 1 if n_layers <= 40 else 5))
    parts[0].tick_params(axis="x", labelsize=8)
    figure.supylabel("Block Influence, 1 - cos", fontsize="medium")
    _name(figure, parts[0], title)
    return figure


def _name(figure: Figure, axes: Axes, title: str | None) -> None:
    """Title and legend; without removed layers all bars are alike and need none."""
    handles, labels = axes.get_legend_handles_labels()
    if "removed" in labels:
        figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
    if title is not None:
        figure.suptitle(title)


def _limits(ends: Tensor) -> tuple[float, float]:
    """Upper end of the axis, and where it is broken (the same if it is not).

    The bulk of the layers reaches up to the 85th percentile; the axis is broken if the tallest
    bar is more than three times as high.
    """
    ends = ends[ends.isfinite()]
    if not len(ends) or ends.max() <= 0:
        return 1.0, 1.0
    top, bulk = float(ends.max()), float(ends.quantile(0.85))
    return (1.08 * top, 1.2 * bulk) if 0 < 3 * bulk < top else (1.08 * top, 1.08 * top)


def _break(upper: Axes, lower: Axes, cut: float, top: float) -> None:
    """Makes one broken axis of two, with slanted marks at the break."""
    lower.set_ylim(0, cut)
    upper.set_ylim(cut, top)
    upper.spines.bottom.set_visible(False)
    lower.spines.top.set_visible(False)
    upper.tick_params(axis="x", bottom=False, labelbottom=False)
    mark: dict[str, Any] = {
        "marker": [(-1, -0.5), (1, 0.5)],
        "markersize": 9,
        "linestyle": "none",
        "color": "black",
        "clip_on": False,
    }
    upper.plot([0, 1], [0, 0], transform=upper.transAxes, **mark)
    lower.plot([0, 1], [1, 1], transform=lower.transAxes, **mark)


def _bars(axes: Axes, heights: Tensor, errors: Tensor | None, removed: set[int]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    for label, colour, wanted in (("kept", KEPT, False), ("removed", REMOVED, True)):
        layers = [n for n in range(len(heights)) if (n in removed) is wanted]
        layers = [n for n in layers if heights[n].isfinite()]
        if not layers:
            continue
        yerr = None if errors is None else errors[layers].numpy()
        axes.bar(
            layers,
            heights[layers].numpy(),
            yerr=yerr,
            color=colour,
            label=label,
            error_kw={"elinewidth": 1, "ecolor": "black"},
        )
