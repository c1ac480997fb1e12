"""Pictures as files, by their names in a folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from short_gpt.jobs.calibration import CrossResult
from short_gpt.jobs.cases import Row
from short_gpt.jobs.comparing import ComparisonResult
from short_gpt.jobs.page import Picture, page
from short_gpt.jobs.reproduction import PaperComparison
from short_gpt.plots.figures import save
from short_gpt.plots.layers import angular_heatmap, beside_published, importance_bars
from short_gpt.plots.quality import cross_map, quality_curves
from short_gpt.scoring.importance import Importance
from short_gpt.selection.methods import LABELS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILES = {  # names by kind
    "scores": ("block_influence.png", "angular.png"),
    "published": ("published.png",),
    "quality": ("quality.png",),
    "crossed": ("calibration.png",),
}


def draw_scores(importance: Importance, folder: Path, n: int | None = None) -> list[Path]:
    """Draws Block Influence and angular distances into a folder.

    Args:
        importance: at least one window.
        folder: made if it is not there; pictures in it are replaced.
        n: marks the layers that each of both measures would remove; None marks none.
    """
    removed = [] if n is None else importance.least_important(n)
    block = None if n is None else (importance.least_important(n, angular=True)[0], n)
    scores, margin, layers = importance.block_influence, importance.margin, importance.layers
    bars = importance_bars(scores, margin=margin, removed=removed, layers=layers)
    heatmap = angular_heatmap(importance.angular, block=block, layers=layers)
    return _save("scores", folder, bars, heatmap)


def draw_published(importance: Importance, comparison: PaperComparison, folder: Path) -> list[Path]:
    """Draws scores with published ones into a folder; returns the file in a list."""
    return _save("published", folder, beside_published(importance, comparison))


def draw_quality(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draws a comparison's perplexities into a folder; returns the file in a list."""
    return _save("quality", folder, quality_curves(rows))


def compared_page(model: str, result: ComparisonResult, remark: str | None = None) -> str:
    """The page of a comparison: a row for every model, a remark on what judged, the picture."""
    rows = [["layers chosen by", "healed by", "perplexity", "nats more", "removed"]]
    for row in result.rows:
        name = LABELS.get(row.method, "original model")
        name += "" if row.seed is None else f", seed {row.seed}"
        value = f"{row.perplexity:.3f}" if row.perplexity < 1e5 else f"{row.perplexity:.3g}"
        error = "" if math.isnan(row.standard_error) else f" ({row.standard_error:.4f})"
        change = f"{row.nats:+.4f}{error}" if row.n else ""
        removed = f"{row.n}: {', '.join(map(str, sorted(row.layers)))}" if row.n else ""
        rows.append([name, row.healing if row.n else "", value, change, removed])
    text = StringIO()
    quality_curves(result.rows).savefig(text, format="svg")
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    about = "Perplexity of every model by the number of layers removed."
    picture = Picture("Quality", svg, about, own_paper=True)
    lead = f"{len(result.rows) - 1} pruned models on the same windows. In brackets, the standard "
    lead += "error of the nats a token more than the original model's"
    remarks = [] if remark is None else [remark]
    shown: Any = {"remarks": remarks, "pictures": [picture], "how": "\n\n".join(result.chosen)}
    return page(f"{model}: methods compared", lead, rows, **shown)


def draw_crossed(cells: Sequence[CrossResult], folder: Path) -> list[Path]:
    """Draws what every choice costs on every text into a folder; returns the file in a list."""
    return _save("crossed", folder, cross_map(cells))


def _save(kind: str, folder: Path, *figures: Figure) -> list[Path]:
    files = [folder / name for name in FILES[kind]]
    for figure, file in zip(figures, files, strict=True):
        save(figure, file)
    return files
