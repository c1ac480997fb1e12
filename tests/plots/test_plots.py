"""What the pictures show: bars, colours, gaps, marks."""

from __future__ import annotations

import io
import math
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from short_gpt.jobs import Crossed, Row, compare_with_paper, published_scores
from short_gpt.plots import (
    angular_heatmap,
    beside_published,
    cross_map,
    importance_bars,
    quality_curves,
)
from short_gpt.plots.figures import KEPT, REMOVED
from short_gpt.plots.quality import SHOWN
from short_gpt.scoring.hooks import Scores
from short_gpt.scoring.importance import Importance

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


# Bars


def test_a_bar_a_layer_and_the_removed_in_another_colour() -> None:
    figure = importance_bars(LEVEL, removed=[2, 1], title="A model")
    (axes,) = figure.axes
    assert bars(axes) == {
        n: (float(height), REMOVED if n in (1, 2) else KEPT) for n, height in enumerate(LEVEL)
    }
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["kept", "removed"]
    assert figure.get_suptitle() == "A model"
    assert axes.get_xlabel() == "layer"
    assert figure.get_supylabel() == "Block Influence, 1 - cos"
    assert axes.get_ylim()[0] == 0 and 0.4 < axes.get_ylim()[1] < 0.5
    assert png(figure).startswith(b"\x89PNG")


def test_nothing_removed_needs_no_legend() -> None:
    assert importance_bars(LEVEL).legends == []


def test_a_tall_bar_breaks_the_axis_and_the_others_stay_readable() -> None:
    figure = importance_bars(TOWER, removed=[2])
    upper, lower = figure.axes
    assert bars(upper) == bars(lower)
    assert [height for height, _ in bars(lower).values()].count(float(TOWER[0])) == 1
    low, cut = lower.get_ylim()
    assert (low, upper.get_ylim()[0]) == (0, cut)
    assert 0.06 < cut < 0.1
    assert 0.99 < upper.get_ylim()[1] < 1.1
    assert png(figure)


def test_error_bars_reach_the_margin_up_and_down() -> None:
    margin = torch.tensor([0.01, 0.02, 0.01, math.nan, 0.03])
    figure = importance_bars(LEVEL, margin=margin)
    (drawn,) = [c for c in figure.axes[0].containers if isinstance(c, ErrorbarContainer)]
    (lines,) = drawn.lines[2]
    ends = torch.tensor(np.array(lines.get_segments()))[:, :, 1]
    reach = margin.nan_to_num(nan=0.0)
    torch.testing.assert_close(ends.float(), torch.stack([LEVEL - reach, LEVEL + reach], 1))
    assert png(figure)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"importance": torch.zeros(2, 3)}, r"importance: .*\(L,\), got \(2, 3\)"),
        ({"importance": torch.zeros(0)}, r"importance: .*got \(0,\)"),
        ({"margin": torch.zeros(3)}, r"margin: expected \(5,\), got \(3,\)"),
        ({"removed": [1, 5, -1]}, r"layers \[-1, 5\] do not exist; the model has 0\.\.4"),
    ],
)
def test_wrong_shapes_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        importance_bars(**{"importance": LEVEL, **arguments})


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
    figure = angular_heatmap(distances(), title="A model")
    expected = [
        [0.10, 0.11, 0.12, 0.13],
        [0.20, 0.21, 0.22, math.nan],
        [0.30, 0.31, math.nan, math.nan],
        [0.40, math.nan, math.nan, math.nan],
    ]
    torch.testing.assert_close(cells(figure), torch.tensor(expected).double(), equal_nan=True)
    axes, colours = figure.axes
    assert axes.get_xlabel() == "first layer of the block"
    assert axes.get_ylabel() == "layers in the block"
    assert colours.get_ylabel() == "angular distance, arccos(cos) / pi"
    assert figure.get_suptitle() == "A model"
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
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["least of its row", "layers 1 to 2"]
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


@pytest.mark.parametrize("shape", [(5,), (4, 5), (1, 1), (2, 5, 5)])
def test_distances_must_be_square(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"angular: expected \(L\+1, L\+1\) distances, got \("):
        angular_heatmap(torch.zeros(shape))


@pytest.mark.parametrize("block", [(3, 2), (-1, 2), (1, 0)])
def test_the_block_must_exist(block: tuple[int, int]) -> None:
    message = rf"block of {block[1]} layers from layer {block[0]} does not exist; .* 0\.\.3"
    with pytest.raises(ValueError, match=message):
        angular_heatmap(distances(), block=block)


# Curves


def row(method: str, n: int, healing: str, perplexity: float) -> Row:
    return Row(method, None, n, healing, [], perplexity, 0.0, 0.0, None, None, 1, 1.0, 1.0)


DENSE = row("dense", 0, "raw", 10.0)
CUT = [row("bi", 2, "raw", 20.0), row("bi", 4, "raw", 90.0)]
RANDOM = [row("random", 2, "raw", value) for value in (30.0, 80.0, 50.0)]
HEALED = [row("bi", 2, "patched", 12.0), row("bi", 4, "lora", 11.0), row("bi", 4, "distill", 10.5)]


def curves(axes: Axes) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]


def test_a_curve_starts_at_the_whole_model_and_a_band_spans_the_seeds() -> None:
    figure = quality_curves([DENSE, *CUT, *RANDOM], title="A model")
    (axes,) = figure.axes
    assert curves(axes) == [([0, 2, 4], [10.0, 20.0, 90.0])]
    (band,) = axes.collections
    box = band.get_paths()[0].get_extents()
    assert (box.x0, box.x1, box.y0, box.y1) == (0, 2, 10.0, 80.0)
    assert figure.get_suptitle() == "A model"
    png(figure)


def test_the_healed_stand_beside_the_cut() -> None:
    figure = quality_curves([DENSE, *CUT, *HEALED])
    cut, healed = figure.axes
    assert curves(cut) == [([0, 2, 4], [10.0, 20.0, 90.0])]
    assert curves(healed) == [([0, 2], [10.0, 12.0]), ([4], [11.0]), ([4], [10.5])]
    assert cut.get_ylim() == healed.get_ylim()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["bi", "bi, LoRA", "bi, distilled"]
    png(figure)


def test_trained_models_of_several_numbers_are_joined_by_a_line() -> None:
    many = [row("bi", n, "distill", 10.0 + n) for n in (2, 4)]
    lines = {
        len(rows): quality_curves([DENSE, *CUT, *rows]).axes[1].get_lines()[0]
        for rows in (many, many[:1])
    }
    assert [lines[n].get_linestyle() for n in (1, 2)] == ["None", "-."]
    assert list(lines[2].get_xdata()) == [2, 4]
    several = quality_curves([DENSE, *CUT, *many, *many]).axes[1].get_lines()[0]
    assert several.get_linestyle() == "None" and list(several.get_xdata()) == [2, 2, 4, 4]


def test_other_closed_forms_have_lines_of_their_own() -> None:
    kinds = ("patched", "refit", "linearpatch", "ghosted")
    figure = quality_curves([DENSE, *CUT, *(row("bi", 2, kind, 12.0) for kind in kinds)])
    lines = figure.axes[1].get_lines()
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == len(kinds)
    assert [line.get_label() for line in lines] == ["bi", *(f"bi, {kind}" for kind in kinds[1:])]
    assert figure.axes[1].get_title() == "healed (solid: patched)"


@pytest.mark.parametrize("worst", [1e9, math.inf])
def test_what_is_far_worse_leaves_the_picture(worst: float) -> None:
    figure = quality_curves(
        [DENSE, *CUT, row("reverse", 2, "raw", 5e4), row("deepest", 2, "raw", worst)]
    )
    assert figure.axes[0].get_ylim()[1] == SHOWN * DENSE.perplexity
    png(figure)


def test_curves_need_rows() -> None:
    with pytest.raises(ValueError, match="expected the rows of a comparison"):
        quality_curves([])


# Beside what was published


def measured(seed: int = 0) -> Importance:
    """Scores of 32 layers whose means are the published ones by a factor, and a little noise."""
    influence, _ = published_scores("Llama-2-7B") or pytest.fail("none")
    generator = torch.Generator().manual_seed(seed)
    found, windows, layers = Importance.empty(range(32)), 12, 32
    each = influence / influence.max() * 0.7
    each = each * (1 + 0.1 * torch.randn(windows, layers, generator=generator, dtype=torch.double))
    states = torch.arange(layers + 1)
    angles = 0.02 * (states[:, None] - states).abs().sqrt().expand(windows, -1, -1)
    tokens = torch.full((windows,), 64.0)
    found.add(Scores(tokens=tokens, influence=each * 64, angles=angles), [0, 1, 2] * 4)
    return found


def lines(axes: Axes) -> dict[str, np.ndarray]:
    """Heights of the curves by their names."""
    return {str(line.get_label()): np.asarray(line.get_ydata()) for line in axes.lines} | {
        str(group.get_label()): np.asarray(group.lines[0].get_ydata())
        for group in axes.containers
        if isinstance(group, ErrorbarContainer)
    }


def test_measured_scores_stand_beside_published_ones_of_the_same_median() -> None:
    scores, (influence, angles) = measured(), published_scores("Llama-2-7B") or pytest.fail("none")
    comparison = compare_with_paper("Llama-2-7B", scores.least_important(9))
    figure = beside_published(scores, comparison)
    png(figure)
    above, below = figure.axes
    found = lines(above)
    assert found["measured"] == pytest.approx(scores.block_influence.numpy())
    ratios = found["published, scaled"] / influence.numpy()
    assert ratios == pytest.approx(np.full(32, ratios[0]))
    assert np.sort(found["published, scaled"])[15] == pytest.approx(scores.block_influence.median())
    assert sorted(found["removed by these scores"]) == sorted(
        scores.block_influence[comparison.ours].tolist()
    )
    shaded = sorted(patch.get_x() + 0.5 for patch in above.patches)
    assert shaded == sorted(comparison.paper)
    assert lines(below)["measured"] == pytest.approx(scores.angular.diagonal(9).numpy())
    assert len(lines(below)["published, scaled"]) == len(angles) == 24
    assert (above.get_yscale(), below.get_yscale()) == ("log", "linear")


def test_of_a_model_without_published_scores_the_measured_ones_stand_alone() -> None:
    scores = measured()
    figure = beside_published(scores, compare_with_paper("Baichuan-2-7B", [1, 2]))
    png(figure)
    (axes,) = figure.axes
    assert "published, scaled" not in lines(axes) and "measured" in lines(axes)


# All


def test_pyplot_is_not_needed() -> None:
    before = set(sys.modules)
    png(importance_bars(LEVEL))
    png(angular_heatmap(distances()))
    png(quality_curves([DENSE, *CUT]))
    assert "matplotlib.pyplot" not in set(sys.modules) - before


def test_without_matplotlib_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (lambda: importance_bars(LEVEL), lambda: angular_heatmap(distances())):
        with pytest.raises(ImportError, match=r"drawing needs matplotlib .*pip install matplotlib"):
            draw()


def crossed(choice: str, text: str, healing: str, excess: float) -> Crossed:
    return Crossed(choice, text, healing, [1], 9.0, 1.0, 0.1, excess, 0.1, 0.0, 3, None)


def test_a_map_of_choices_shows_what_each_costs_on_every_text() -> None:
    costs = {("a", "a"): 0.0, ("a", "b"): 0.25, ("b", "a"): -0.5, ("b", "b"): 0.0}
    cells = [
        crossed(*pair, h, v * k) for h, k in (("raw", 1), ("refit", 2)) for pair, v in costs.items()
    ]
    figure = cross_map(cells)
    raw, refit = figure.axes
    assert (raw.get_title(), refit.get_title()) == ("pruned", "refitted")
    assert raw.images[0].get_array().tolist() == [[0.0, 0.25], [-0.5, 0.0]]
    assert refit.images[0].get_array().tolist() == [[0.0, 0.5], [-1.0, 0.0]]
    assert raw.images[0].get_clim() == refit.images[0].get_clim() == (-1.0, 1.0)
    assert [t.get_text() for t in raw.texts] == ["+0.000", "+0.250", "-0.500", "+0.000"]
    assert [t.get_text() for t in raw.get_xticklabels()] == ["a", "b"]
    png(figure)
    with pytest.raises(ValueError, match="expected the cells of a calibration"):
        cross_map([])
