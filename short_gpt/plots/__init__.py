"""Results as pictures."""

from typing import TYPE_CHECKING

from llama import lazy

if TYPE_CHECKING:
    from short_gpt.plots.layers import (
        angular_heatmap,
        beside_published,
        importance_bars,
        score_figures,
    )
    from short_gpt.plots.quality import quality_curves
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = ["angular_heatmap", "beside_published"]
__all__ += ["importance_bars", "quality_curves", "score_figures"]
