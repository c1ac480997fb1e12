"""All pictures of the scores, and the page of a comparison."""

from __future__ import annotations

import math
from io import StringIO
from typing import TYPE_CHECKING, Any

from short_gpt.jobs.comparing import ComparisonResult
from short_gpt.jobs.page import Picture, page
from short_gpt.plots.layers import angular_heatmap, importance_bars
from short_gpt.plots.quality import quality_curves
from short_gpt.scoring.importance import Importance
from short_gpt.selection.methods import LABELS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def score_figures(importance: Importance, n: int | None = None) -> list[Figure]:
    """Block Influence as bars, and angular distances as a map.

    Args:
        importance: at least one window.
        n: marks the layers that each of both measures would remove; None marks none.
    """
    removed = [] if n is None else importance.least_important(n)
    block = None if n is None else (importance.least_important(n, angular=True)[0], n)
    scores, margin, layers = importance.block_influence, importance.margin, importance.layers
    bars = importance_bars(scores, margin=margin, removed=removed, layers=layers)
    return [bars, angular_heatmap(importance.angular, block=block, layers=layers)]


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
