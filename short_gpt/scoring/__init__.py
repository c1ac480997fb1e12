"""Scores of layers from one forward pass: the papers' equations, hooks, sums, and when to stop.

`metrics` holds the equations, `hooks` calls them while a model runs, `importance` adds the scores
up by `moments`, `order` turns them into layer numbers, `stopping` tells when these are settled;
`run` is the loop over windows, maybe interrupted.
"""

from short_gpt.scoring.hooks import LayerHooks, Scores, hooked, score
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.metrics import (
    angular_distance,
    angular_distances,
    block_influence,
    cosine,
    relative_magnitude,
    spearman,
)
from short_gpt.scoring.run import RunState, ScoringRun, measure
from short_gpt.scoring.stopping import Stop, Verdict

__all__ = [
    "Importance",
    "LayerHooks",
    "RunState",
    "Scores",
    "ScoringRun",
    "Stop",
    "Verdict",
    "angular_distance",
    "angular_distances",
    "block_influence",
    "cosine",
    "hooked",
    "measure",
    "relative_magnitude",
    "score",
    "spearman",
]
