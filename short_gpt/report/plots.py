"""Pictures of the scores: Block Influence by layer, angular distance by block.

Functions return a `matplotlib.figure.Figure` and touch no global state; `figure.savefig("a.png")`
writes it, a notebook shows it. L layers, by their numbers in the original model, from 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from short_gpt.experiments.comparison import Row
from short_gpt.runtime.errors import MissingPackageError, ShortGPTError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Colours that colour-blind readers tell apart (Okabe and Ito), and that differ in lightness too.
KEPT, REMOVED = "#56B4E9", "#D55E00"
# Times the whole model's perplexity, up to where curves of quality are shown.
SHOWN = 100
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")


def importance_bars(
    importance: Tensor,
    *,
    standard_error: Tensor | None = None,
    removed: Sequence[int] = (),
    title: str | None = None,
) -> Figure:
    """Bars of the Block Influence of every layer (ShortGPT, arXiv:2403.03853, Eq. 1).

    Where a few layers tower over the others, the axis is broken: the lower part shows the bulk
    from 0 on, the upper part the ends of the tall bars.

    Args:
        importance: (L,), mean of 1 - cos a layer; NaN leaves the layer's place empty.
        standard_error: (L,), of these means; drawn as bars of 1.96 up and down. NaN draws none.
        removed: layers to show in another colour.
        title: a line above the picture.

    Raises:
        ShortGPTError: a shape is wrong, or a removed layer does not exist.
        MissingPackageError: matplotlib is not installed.
    """
    heights = torch.as_tensor(importance).detach().double().cpu()
    if heights.dim() != 1 or not len(heights):
        raise ShortGPTError(f"importance: expected one number a layer, (L,), got {_shape(heights)}")
    wrong = sorted({layer for layer in removed if not 0 <= layer < len(heights)})
    if wrong:
        raise ShortGPTError(f"layers {wrong} do not exist; the model has 0..{len(heights) - 1}")
    errors = torch.zeros_like(heights) if standard_error is None else _errors(standard_error)
    if errors.shape != heights.shape:
        raise ShortGPTError(f"standard_error: expected {_shape(heights)}, got {_shape(errors)}")
    return _draw_bars(heights, None if standard_error is None else errors, {*removed}, title)


def angular_heatmap(
    angular: Tensor, *, block: tuple[int, int] | None = None, title: str | None = None
) -> Figure:
    """Angular distance over every block of consecutive layers (arXiv:2403.17887, Eq. 6).

    A column is the block's first layer, a row its number of layers. A dot marks each row's least
    distance, the block that Gromov et al. would remove (Eq. 7).

    Args:
        angular: (L+1, L+1); entry [l, l+n] is the mean angular distance, 0 to 1, between the
            states in front of layer l and in front of layer l+n. Entries up to the diagonal are
            not read; NaN leaves a place empty.
        block: (start, n) of a block to outline.
        title: a line above the picture.

    Raises:
        ShortGPTError: angular is not square, or the block does not exist.
        MissingPackageError: matplotlib is not installed.
    """
    distances = torch.as_tensor(angular).detach().double().cpu()
    if distances.dim() != 2 or len(distances) != distances.shape[-1] or len(distances) < 2:
        raise ShortGPTError(f"angular: expected (L+1, L+1) distances, got {_shape(distances)}")
    n_layers = len(distances) - 1
    if block is not None and not 0 <= block[0] < block[0] + block[1] <= n_layers:
        raise ShortGPTError(
            f"a block of {block[1]} layers from layer {block[0]} does not exist; the model has "
            f"layers 0..{n_layers - 1}"
        )
    return _draw_heatmap(_by_start_and_size(distances), block, title)


def quality_curves(rows: Sequence[Row], *, title: str | None = None) -> Figure:
    """Perplexity over the number of layers removed, a colour for every method.

    The left part shows the models as cut, the right one, where there are any, the healed: lines
    for linear patches, stars for LoRA. Several rows of one method and number, such as random sets,
    are drawn as a band from the least to the largest. The axis ends at `SHOWN` times the whole
    model's perplexity; lines of what is worse leave the picture.

    Args:
        rows: of `comparison.Comparison.rows`, the whole model first.
        title: a line above the picture.

    Raises:
        ShortGPTError: there is no row.
        MissingPackageError: matplotlib is not installed.
    """
    if not rows:
        raise ShortGPTError("expected the rows of a comparison, the whole model first; got none")
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    dense, found = rows[0], rows[1:]
    colours = dict(zip(dict.fromkeys(r.method for r in found), PALETTE * 3, strict=False))
    parts = [["raw"], ["patched", "lora"]] if {r.healing for r in found} - {"raw"} else [["raw"]]
    figure = _figure(2.0 + 4.0 * len(parts), 4.4)
    axes = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    for axis, healings, name in zip(axes, parts, ("as cut", "healed"), strict=False):
        for healing in healings:
            for method, colour in colours.items():
                chosen = [r for r in found if (r.method, r.healing) == (method, healing)]
                _draw_curve(axis, dense, chosen, colour)
        axis.set_title(name, fontsize="medium")
        axis.set_xlabel("layers removed")
        axis.locator_params(axis="x", integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yscale("log")
    highest = max((r.perplexity for r in rows if math.isfinite(r.perplexity)), default=1.0)
    if highest > SHOWN * dense.perplexity:
        axes[0].set_ylim(0.9 * dense.perplexity, SHOWN * dense.perplexity)
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.5g}"))
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("perplexity")
    named = dict(
        pair
        for axis in axes
        for pair in zip(*reversed(axis.get_legend_handles_labels()), strict=True)
    )
    figure.legend(named.values(), named.keys(), loc="outside right upper", frameon=False)
    if title is not None:
        figure.suptitle(title)
    return figure


def _draw_curve(axes: Axes, dense: Row, rows: Sequence[Row], colour: str) -> None:
    """One method, healed one way: a line from the whole model on, a band, or LoRA's stars."""
    if not rows:
        return
    values = {n: [r.perplexity for r in rows if r.n == n] for n in sorted({r.n for r in rows})}
    if rows[0].healing == "lora":
        x = [n for n, found in values.items() for _ in found]
        y = [value for found in values.values() for value in found]
        label = f"{rows[0].method}, LoRA"
        style: dict[str, Any] = {"linestyle": "none", "markersize": 11, "markeredgecolor": "black"}
        axes.plot(x, y, marker="*", color=colour, label=label, zorder=3, **style)
        return
    x = [0, *values]
    low, high = ([dense.perplexity, *map(f, values.values())] for f in (min, max))
    if low == high:
        axes.plot(x, low, color=colour, marker="o", markersize=4, label=rows[0].method)
    else:
        axes.fill_between(x, low, high, color="0.88", label=rows[0].method)


def save(figure: Figure, path: Path) -> None:
    """Writes a picture as PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, format="png", dpi=150)
    partial.replace(path)


def _errors(standard_error: Tensor) -> Tensor:
    return 1.96 * torch.as_tensor(standard_error).detach().double().cpu().nan_to_num(nan=0.0)


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def require_matplotlib() -> None:
    """Raises MissingPackageError that names the extra, for a check before long work."""
    if find_spec("matplotlib") is None:
        raise MissingPackageError('plots need matplotlib: pip install "short-gpt[plots]"')


def _figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches."""
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _draw_bars(
    heights: Tensor, errors: Tensor | None, removed: set[int], title: str | None
) -> Figure:
    n_layers = len(heights)
    figure = _figure(min(max(2 + 0.22 * n_layers, 6.0), 14.0), 4.2)
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
    handles, labels = parts[0].get_legend_handles_labels()
    if "removed" in labels:
        figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
    if title is not None:
        figure.suptitle(title)
    return figure


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


def _by_start_and_size(distances: Tensor) -> Tensor:
    """(L, L): row n-1 and column l hold the distance [l, l+n]; NaN where there is no such block."""
    n_layers = len(distances) - 1
    found = torch.full((n_layers, n_layers), torch.nan, dtype=torch.float64)
    for n in range(1, n_layers + 1):
        found[n - 1, : n_layers - n + 1] = distances.diagonal(n)
    return found


def _draw_heatmap(values: Tensor, block: tuple[int, int] | None, title: str | None) -> Figure:
    n_layers = len(values)
    figure = _figure(7.0, 5.8)
    axes = figure.subplots()
    extent = (-0.5, n_layers - 0.5, 0.5, n_layers + 0.5)
    image = axes.imshow(values.numpy(), origin="lower", extent=extent, cmap="viridis_r")
    figure.colorbar(image, label="angular distance, arccos(cos) / pi")
    _mark_minima(axes, values)
    if block is not None:
        _outline(axes, *block)
    axes.set_xlabel("first layer of the block")
    axes.set_ylabel("layers in the block")
    axes.locator_params(integer=True)
    axes.legend(loc="upper right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    if title is not None:
        figure.suptitle(title)
    return figure


def _mark_minima(axes: Axes, values: Tensor) -> None:
    """A dot on the least distance of every row that has one."""
    rows = [row for row in range(len(values)) if values[row].isfinite().any()]
    least = [int(values[row].nan_to_num(nan=torch.inf).argmin()) for row in rows]
    axes.plot(
        least,
        [row + 1 for row in rows],
        linestyle="none",
        marker="o",
        markersize=min(6.0, 200 / len(values)),
        markerfacecolor="white",
        markeredgecolor="black",
        markeredgewidth=0.5,
        label="least of its row",
    )


def _outline(axes: Axes, start: int, n: int) -> None:
    """A frame around the place of the block, light outside so that it shows on every colour."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    frame = Rectangle((start - 0.5, n - 0.5), 1, 1, fill=False, edgecolor=REMOVED, linewidth=2)
    frame.set_label(f"layers {start} to {start + n - 1}" if n > 1 else f"layer {start}")
    frame.set_path_effects([withStroke(linewidth=4, foreground="white")])
    axes.add_patch(frame)
