"""Results as text for a terminal, and as pictures. Nothing here prints."""

from short_gpt.report import results
from short_gpt.report.bars import importance_bars
from short_gpt.report.beside import beside_published
from short_gpt.report.calibration import calibrated
from short_gpt.report.crossmap import cross_map
from short_gpt.report.curves import quality_curves
from short_gpt.report.figures import require_matplotlib, save
from short_gpt.report.heatmap import angular_heatmap
from short_gpt.report.pictures import draw_crossed, draw_published, draw_quality, draw_scores
from short_gpt.report.tables import (
    compared,
    comparison,
    drafts,
    perplexities,
    ranking,
    search,
    sublayers,
)

__all__ = [
    "angular_heatmap",
    "beside_published",
    "calibrated",
    "compared",
    "comparison",
    "cross_map",
    "drafts",
    "draw_crossed",
    "draw_published",
    "draw_quality",
    "draw_scores",
    "importance_bars",
    "perplexities",
    "quality_curves",
    "ranking",
    "require_matplotlib",
    "results",
    "save",
    "search",
    "sublayers",
]
