"""Pictures as files, by their names in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from short_gpt.jobs.calibration import Crossed
from short_gpt.jobs.cases import Row
from short_gpt.jobs.reproduction import PaperComparison
from short_gpt.plots.bars import importance_bars
from short_gpt.plots.beside import beside_published
from short_gpt.plots.crossmap import cross_map
from short_gpt.plots.curves import quality_curves
from short_gpt.plots.figures import save
from short_gpt.plots.heatmap import angular_heatmap
from short_gpt.scoring.importance import Importance

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

    Returns:
        The files.
    """
    removed = [] if n is None else importance.least_important(n)
    block = None if n is None else (importance.least_important(n, angular=True)[0], n)
    bars = importance_bars(importance.block_influence, margin=importance.margin, removed=removed)
    heat = angular_heatmap(importance.angular, block=block)
    files = [folder / name for name in FILES["scores"]]
    for figure, file in zip((bars, heat), files, strict=True):
        save(figure, file)
    return files


def draw_published(importance: Importance, comparison: PaperComparison, folder: Path) -> list[Path]:
    """Draws scores beside published ones into a folder; returns the file in a list."""
    files = [folder / name for name in FILES["published"]]
    save(beside_published(importance, comparison), files[0])
    return files


def draw_quality(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draws a comparison's perplexities into a folder; returns the file in a list."""
    files = [folder / name for name in FILES["quality"]]
    save(quality_curves(rows), files[0])
    return files


def draw_crossed(cells: Sequence[Crossed], folder: Path) -> list[Path]:
    """Draws what every choice costs on every text into a folder; returns the file in a list."""
    files = [folder / name for name in FILES["crossed"]]
    save(cross_map(cells), files[0])
    return files
