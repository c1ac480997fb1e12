"""Angular distance over every block of consecutive layers, as a map. L layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from short_gpt.plots.figures import REMOVED, empty, shape
from short_gpt.runtime.errors import ShortGPTError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def angular_heatmap(
    angular: Tensor, *, block: tuple[int, int] | None = None, title: str | None = None
) -> Figure:
    """Angular distance over every block of consecutive layers (arXiv:2403.17887, Eq. 6).

    A column is the block's first layer, a row its number of layers. A dot marks each row's least
    distance, the block that Gromov et al. would remove (Eq. 7).

    Args:
        angular: (L+1, L+1); entry [l, l+n] is the mean angular distance, 0 to 1, between the
            hidden states entering layer l and layer l+n. Entries up to the diagonal are
            not read; NaN leaves a place empty.
        block: (start, n) of a block to outline.
        title: a line above the picture.

    Raises:
        ShortGPTError: angular is not square, or the block does not exist.
        MissingPackageError: matplotlib is not installed.
    """
    distances = torch.as_tensor(angular).detach().double().cpu()
    if distances.dim() != 2 or len(distances) != distances.shape[-1] or len(distances) < 2:
        raise ShortGPTError(f"angular: expected (L+1, L+1) distances, got {shape(distances)}")
    n_layers = len(distances) - 1
    if block is not None and not 0 <= block[0] < block[0] + block[1] <= n_layers:
        raise ShortGPTError(
            f"a block of {block[1]} layers from layer {block[0]} does not exist; the model has "
            f"layers 0..{n_layers - 1}"
        )
    return _draw_heatmap(_by_start_and_size(distances), block, title)


def _by_start_and_size(distances: Tensor) -> Tensor:
    """(L, L): row n-1 and column l hold the distance [l, l+n]; NaN where there is no such block."""
    n_layers = len(distances) - 1
    found = torch.full((n_layers, n_layers), torch.nan, dtype=torch.float64)
    for n in range(1, n_layers + 1):
        found[n - 1, : n_layers - n + 1] = distances.diagonal(n)
    return found


def _draw_heatmap(values: Tensor, block: tuple[int, int] | None, title: str | None) -> Figure:
    n_layers = len(values)
    figure = empty(7.0, 5.8)
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
