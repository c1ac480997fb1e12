"""Scores of layers from one forward pass: equations, hooks, sums, and when to stop."""

from typing import TYPE_CHECKING

from llama import lazy

if TYPE_CHECKING:
    from short_gpt.scoring.hooks import LayerHooks, Scores, hooked, score_batch
    from short_gpt.scoring.importance import Importance
    from short_gpt.scoring.metrics import angular_distances, block_influence, cosine, spearman
    from short_gpt.scoring.run import RunState, ScoringRun, measure
    from short_gpt.scoring.stopping import Stop, Verdict
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = ["Importance", "LayerHooks", "RunState", "Scores", "ScoringRun", "Stop", "Verdict"]
__all__ += ["angular_distances", "block_influence", "cosine", "hooked", "measure", "score_batch"]
__all__ += ["spearman"]
