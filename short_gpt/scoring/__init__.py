"""Scores of layers from one forward pass: equations, hooks, sums, order, and when to stop."""

from short_gpt.scoring.hooks import LayerHooks, Scores, hooked, score
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.metrics import (
    angular_distances,
    block_influence,
    cosine,
    spearman,
)
from short_gpt.scoring.run import RunState, ScoringRun, measure
from short_gpt.scoring.stopping import Stop, Verdict

__all__ = ["Importance", "LayerHooks", "RunState", "Scores", "ScoringRun", "Stop", "Verdict"]
__all__ += ["angular_distances", "block_influence", "cosine", "hooked"]
__all__ += ["measure", "score", "spearman"]
