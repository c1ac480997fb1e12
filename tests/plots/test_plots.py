"""What the pictures show: bars, colours, gaps, marks."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from short_gpt.jobs import Row
from short_gpt.plots import KEPT, REMOVED, SHOWN, angular_heatmap, importance_bars, quality_curves
from short_gpt.selection.methods import LABELS

LEVEL = torch.tensor([0.4, 0.2, 0.1, 0.3, 0.25])
TOWER = torch.tensor([0.99, 0.04, 0.03, 0.05, 0.04, 0.03, 0.06, 0.05, 0.04, 0.03])


def png(figure: Figure) -> bytes:
    """Draws all of it, so that a warning while drawing fails the test."""
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return target.getvalue()


def bars(axes: Axes) -> dict[int, tuple[float, str]]:
    """Height and colour of the bar of every layer."""
    groups = [c for c in axes.containers if isinstance(c, BarContainer)]
    found = [patch for group in groups for patch in group.patches]
    return {
        round(bar.get_x() + bar.get_width() / 2): (
            pytest.approx(bar.get_height()),
            to_hex(bar.get_facecolor()).upper(),
        )
        for bar in found
    }


def test_layers_keep_their_numbers_after_a_removal():
    """The third layer of those left is the original's fourth."""
    layers = [0, 3, 4, 5]
    figure = importance_bars(LEVEL[:4], removed=[4], layers=layers)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "3", "4", "5"]
    assert [place for place, (_, colour) in bars(axes).items() if colour == REMOVED] == [2]
    with pytest.raises(ValueError, match=r"layers \[1\] do not exist; the model has 0, 3..5"):
        importance_bars(LEVEL[:4], removed=[1], layers=layers)
    figure = angular_heatmap(torch.rand(5, 5), block=(3, 2), layers=layers)
    (frame,) = [p for p in figure.axes[0].patches if isinstance(p, Rectangle)]
    assert frame.get_label() == "best of 2: layers 3, 4" and frame.get_xy() == (0.5, 1.5)
    across = angular_heatmap(torch.rand(5, 5), block=(0, 3), layers=layers).axes[0]
    assert across.patches[0].get_label() == "best of 3: layers 0, 3, 4"
    png(figure)
    labels = {round(t.get_position()[0]): t.get_text() for t in figure.axes[0].get_xticklabels()}
    assert {1: "3", 2: "4"}.items() <= labels.items()
    with pytest.raises(ValueError, match=r"layers \[1\] do not exist"):
        angular_heatmap(torch.rand(5, 5), block=(1, 2), layers=layers)


# Bars


def test_a_bar_a_layer_and_the_removed_in_another_colour() -> None:
    figure = importance_bars(LEVEL, removed=[2, 1])
    (axes,) = figure.axes
    assert bars(axes) == {
        n: (float(height), REMOVED if n in (1, 2) else KEPT) for n, height in enumerate(LEVEL)
    }
    assert legend(figure) == ["kept", "removed"] and importance_bars(LEVEL).legends == []
    assert axes.get_xlabel() == "layer"
    assert figure.get_supylabel() == "Block Influence, 1 - cos"
    assert axes.get_ylim()[0] == 0 and 0.4 < axes.get_ylim()[1] < 0.5
    assert png(figure).startswith(b"\x89PNG")


def test_a_tall_bar_is_cut_off_below_its_value_and_the_others_stay_readable() -> None:
    figure = importance_bars(TOWER, margin=TOWER / 9, removed=[2])
    (axes,) = figure.axes
    assert [height for height, _ in bars(axes).values()].count(float(TOWER[0])) == 1
    (value,) = axes.texts
    assert value.get_text() == "0.99" and value.xy == (0, axes.get_ylim()[1])
    assert axes.get_ylim()[0] == 0 and 0.06 < axes.get_ylim()[1] < 0.1
    assert png(figure)
    title, part = figure._suptitle, axes.get_tightbbox()
    assert axes.get_window_extent().y1 < value.get_window_extent().y1
    assert value.get_window_extent().y1 <= title.get_window_extent().y0
    assert part.y0 >= figure.legends[0].get_window_extent().y1


def test_error_bars_reach_the_margin_up_and_down() -> None:
    margin = torch.tensor([0.01, 0.02, 0.01, math.nan, 0.03])
    figure = importance_bars(LEVEL, margin=margin)
    (drawn,) = [c for c in figure.axes[0].containers if isinstance(c, ErrorbarContainer)]
    (lines,) = drawn.lines[2]
    ends = torch.tensor(np.array(lines.get_segments()))[:, :, 1]
    reach = margin.nan_to_num(nan=0.0)
    torch.testing.assert_close(ends.float(), torch.stack([LEVEL - reach, LEVEL + reach], 1))
    assert png(figure)
    assert legend(figure) == ["margin, 95%"]
    assert legend(importance_bars(LEVEL, margin=margin, removed=[1])) == [
        "kept",
        "removed",
        "margin, 95%",
    ]


def test_a_layer_without_a_score_has_no_bar() -> None:
    scores = LEVEL.clone()
    scores[[1, 3]] = math.nan
    figure = importance_bars(scores, removed=[1, 3])
    assert list(bars(figure.axes[0])) == [0, 2, 4]
    assert figure.legends == []
    assert png(figure)


@pytest.mark.parametrize("scores", [[0.0, 0.0], [math.nan, math.nan], [0.3]])
def test_unusual_scores_are_drawn(scores: list[float]) -> None:
    figure = importance_bars(torch.tensor(scores, dtype=torch.bfloat16))
    assert len(bars(figure.axes[0])) == sum(map(math.isfinite, scores))
    assert png(figure)


@pytest.mark.parametrize(("n_layers", "step"), [(30, 1), (32, 1), (80, 5)])
def test_layer_numbers_do_not_overlap(n_layers: int, step: int) -> None:
    figure = importance_bars(torch.linspace(0.1, 0.3, n_layers))
    (axes,) = figure.axes
    assert [int(tick) for tick in axes.get_xticks()] == [*range(0, n_layers, step)]
    assert png(figure)
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


# Heat map


def distances() -> Tensor:
    """Of 4 layers: [l, l+n] holds n / 10 + l / 100; the lower triangle holds what is not read."""
    start, end = torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij")
    return torch.where(end > start, (end - start) / 10 + start / 100, torch.tensor(-7.0))


def cells(figure: Figure) -> Tensor:
    (image,) = figure.axes[0].images
    assert image.get_extent() == [-0.5, 3.5, 0.5, 4.5]
    assert image.origin == "lower"
    return torch.tensor(np.ma.filled(image.get_array(), np.nan))


def test_a_column_is_a_start_and_a_row_a_size() -> None:
    figure = angular_heatmap(distances())
    expected = [
        [0.10, 0.11, 0.12, 0.13],
        [0.20, 0.21, 0.22, math.nan],
        [0.30, 0.31, math.nan, math.nan],
        [0.40, math.nan, math.nan, math.nan],
    ]
    torch.testing.assert_close(cells(figure), torch.tensor(expected).double(), equal_nan=True)
    axes, colours = figure.axes
    assert axes.get_xlabel() == "first layer of the block"
    assert axes.get_ylabel() == "number of layers in the block"
    assert colours.get_ylabel() == "angular distance, arccos(cos) / pi"
    assert png(figure)


def test_a_dot_marks_the_least_of_every_row() -> None:
    angular = distances()
    angular[2, 3] = 0.05
    angular[1, 3] = 0.01
    (dots,) = angular_heatmap(angular).axes[0].lines
    assert np.array(dots.get_xydata()).tolist() == [[2, 1], [1, 2], [0, 3], [0, 4]]


def test_the_block_is_outlined_at_its_start_and_size() -> None:
    figure = angular_heatmap(distances(), block=(1, 2))
    (frame,) = [p for p in figure.axes[0].patches if isinstance(p, Rectangle)]
    assert (frame.get_xy(), frame.get_width(), frame.get_height()) == ((0.5, 1.5), 1, 1)
    assert not frame.get_fill()
    assert legend(figure) == ["least distance for its number of layers", "best of 2: layers 1, 2"]
    figure.canvas.draw()  # no dot of the legend may be taken for one of the map
    assert figure.legends[0].get_window_extent().y1 < figure.axes[0].get_window_extent().y0
    assert png(figure)
    assert not angular_heatmap(distances()).axes[0].patches


def test_places_without_a_distance_stay_blank_and_unmarked() -> None:
    angular = distances()
    angular[1] = angular[:, 1] = math.nan
    angular[0, 4] = math.nan
    figure = angular_heatmap(angular)
    blank = cells(figure).isnan()
    assert blank[0].tolist() == [True, True, False, False]
    assert blank[:, 1].all() and blank[3].all()
    (dots,) = figure.axes[0].lines
    assert np.array(dots.get_xydata()).tolist() == [[2, 1], [0, 2], [0, 3]]
    assert png(figure)


@pytest.mark.parametrize("n_layers", [1, 2, 80])
def test_any_number_of_layers_is_drawn(n_layers: int) -> None:
    figure = angular_heatmap(torch.rand(n_layers + 1, n_layers + 1), block=(0, n_layers))
    assert len(figure.axes[0].lines[0].get_xydata()) == n_layers
    assert png(figure)


@pytest.mark.parametrize("block", [(3, 2), (1, 0)])
def test_the_block_must_exist(block: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"block = \(.*\): expected a block of layers 0\.\.3"):
        angular_heatmap(distances(), block=block)


# Curves


def row(method: str, n: int, healing: str, perplexity: float) -> Row:
    return Row(method, None, n, healing, [], perplexity, 0.0, 0.0, None, None, 1, 1.0)


DENSE = row("dense", 0, "raw", 10.0)
CUT = [row("bi", 2, "raw", 20.0), row("bi", 4, "raw", 90.0)]
RANDOM = [row("random", 2, "raw", value) for value in (30.0, 80.0, 50.0)]
HEALED = [row("bi", 2, "patch", 12.0)]


def curves(axes: Axes) -> dict[str, list[tuple[int, float]]]:
    """The points of every method, at the numbers of layers that their shifted marks stand for."""
    return {
        str(group.get_label()): [
            (round(x), y) for x, y in np.asarray(group.lines[0].get_xydata()).tolist()
        ]
        for group in axes.containers
        if isinstance(group, ErrorbarContainer)
    }


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_curve_starts_at_the_original_model_and_a_band_spans_the_seeds() -> None:
    figure = quality_curves([DENSE, *CUT, *RANDOM])
    (axes,) = figure.axes
    assert curves(axes) == {"Block Influence": [(0, 10.0), (2, 20.0), (4, 90.0)]}
    bands = [c for c in axes.collections if "random" in str(c.get_label())]
    box = bands[0].get_paths()[0].get_extents()
    assert len(bands) == 1
    assert (box.x0, box.x1, box.y0, box.y1) == (0, 2, 10.0, 80.0)
    random = "random layers, best to worst of 3"
    assert legend(figure) == [random, "Block Influence", "original model"]
    png(figure)


def test_every_healing_has_a_part_whose_title_names_it() -> None:
    other = [row("bi", 2, kind, 12.0) for kind in ("refit", "rescale", "linearpatch")]
    figure = quality_curves([DENSE, *HEALED, *CUT, *other])
    parts = {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}
    assert [*parts] == [
        "pruned, not healed",
        "healed by a patch",
        "healed by a refit",
        "healed by rescale",
        "healed by linearpatch",
    ]
    drawn = [curves(axes)["Block Influence"] for axes in parts.values()]
    assert drawn[0] == [(0, 10.0), (2, 20.0), (4, 90.0)]
    assert drawn[1:3] == [[(0, 10.0), (2, 12.0)]] * 2
    assert len({axes.get_ylim() for axes in parts.values()}) == 1
    assert legend(figure) == ["Block Influence", "original model"]
    png(figure)


@pytest.mark.parametrize("healings", [["raw"], ["raw", "patch"], ["raw", "patch", "refit"]])
def test_legend_titles_and_axes_of_any_number_of_parts_do_not_overlap(healings) -> None:
    every = [row(m, n, h, 10.0 + 9 * n) for m in LABELS for n in (2, 4, 8) for h in healings]
    figure = quality_curves([DENSE, *every])
    png(figure)
    (box,) = (item.get_window_extent() for item in figure.legends)
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
    for axes in figure.axes:
        assert axes.get_tightbbox().y0 >= box.y1
        assert axes.get_tightbbox().x1 <= figure.bbox.x1
    titles = [axes.title.get_window_extent() for axes in figure.axes]
    assert all(left.x1 < right.x0 for left, right in pairwise(titles))


def test_methods_are_spelled_out_and_lines_that_coincide_can_be_told_apart() -> None:
    every = [row(method, n, "raw", 20.0) for method in (*LABELS, "evolution") for n in (2, 4)]
    figure = quality_curves([DENSE, *every[:16]])
    assert legend(figure) == [*map(LABELS.get, [*LABELS][:8]), "original model"]
    assert {"Block Influence", "best block by angle", "relative magnitude"} <= {*legend(figure)}
    groups = [g for g in figure.axes[0].containers if isinstance(g, ErrorbarContainer)]
    points = [tuple(g.lines[0].get_xydata()[1].tolist()) for g in groups]
    assert len({*points}) == 8 and max(abs(x - 2) for x, _ in points) <= 0.5
    looks = [(g.lines[0].get_marker(), g.lines[0].get_color()) for g in groups]
    assert len({mark for mark, _ in looks}) == len({colour for _, colour in looks}) == 8
    assert "evolution" in legend(quality_curves([DENSE, *every]))  # of an old file
    assert all(label != name for name, label in LABELS.items())


def test_bars_reach_one_standard_error_of_the_nats() -> None:
    figure = quality_curves([DENSE, replace(CUT[0], standard_error=0.1)])
    (group,) = (g for g in figure.axes[0].containers if isinstance(g, ErrorbarContainer))
    ends = np.array(group.lines[2][0].get_segments())[1, :, 1]
    assert ends == pytest.approx([20.0 * math.exp(-0.1), 20.0 * math.exp(0.1)])
    assert figure.legends[0].get_title().get_text() == "layers chosen by (bars: one standard error)"


@pytest.mark.parametrize("worst", [1e9, math.inf, math.nan])
def test_what_is_far_worse_is_marked_at_the_end_of_the_axis(worst: float) -> None:
    rows = [*CUT, row("reverse", 2, "raw", 5e4), row("deepest", 4, "raw", worst)]
    figure = quality_curves(
        [DENSE, *rows, *RANDOM, *(row("random", 4, "raw", p) for p in (50.0, worst))]
    )
    (axes,) = figure.axes
    top = SHOWN * DENSE.perplexity
    assert axes.get_ylim()[1] == top
    marks = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == 6]
    assert sorted((round(x), y) for own in marks for x, y in own) == [(2, top), (4, top), (4, top)]
    assert legend(figure).count("worse than 1,000, off the axis") == 1
    png(figure)


def test_a_row_without_an_error_is_on_the_axis_and_has_no_bar() -> None:
    unknown = [replace(r, standard_error=float("nan")) for r in CUT]
    figure = quality_curves([DENSE, *unknown])
    (axes,) = figure.axes
    assert axes.get_ylim()[1] > 90 and curves(axes)["Block Influence"][-1] == (4, 90.0)
    assert "off the axis" not in " ".join(legend(figure))


def test_curves_need_rows() -> None:
    with pytest.raises(ValueError, match="expected the rows of a comparison"):
        quality_curves([])
