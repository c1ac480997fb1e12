"""How sure the difference of two layers is. L layers."""

from __future__ import annotations

from torch import Tensor

from short_gpt.scoring.importance import Importance
from short_gpt.scoring.metrics import t_quantile
from short_gpt.scoring.moments import pair_spread


def difference_margins(importance: Importance, confidence: float = 0.95) -> Tensor:
    """Half of the interval of the difference in Block Influence of each two layers.

    The error is paired: what moves both layers of a text (or window) the same way cancels. The
    texts are the samples where there are several, as for `Importance.standard_error`.

    Args:
        importance: all is NaN where its `margin` is.
        confidence: of each interval by itself.

    Returns:
        (L, L), symmetric, in the unit of Block Influence.
    """
    spread = pair_spread(importance.sampling_covariance).sqrt()
    return t_quantile((1 + confidence) / 2, importance.degrees) * spread
