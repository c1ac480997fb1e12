"""Results as pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama.lazy import lazy

if TYPE_CHECKING:
    from short_gpt.plots.bars import importance_bars
    from short_gpt.plots.beside import beside_published
    from short_gpt.plots.crossmap import cross_map
    from short_gpt.plots.curves import quality_curves
    from short_gpt.plots.figures import require_matplotlib, save
    from short_gpt.plots.heatmap import angular_heatmap
    from short_gpt.plots.pictures import draw_crossed, draw_published, draw_quality, draw_scores
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = [
    "angular_heatmap",
    "beside_published",
    "cross_map",
    "draw_crossed",
    "draw_published",
    "draw_quality",
    "draw_scores",
    "importance_bars",
    "quality_curves",
    "require_matplotlib",
    "save",
]
