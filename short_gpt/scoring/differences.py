"""How sure the difference of two layers is. L layers."""

from __future__ import annotations

from torch import Tensor

from short_gpt.scoring.clusters import covariance_over_texts
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.metrics import student_t
from short_gpt.scoring.moments import pair_spread


def difference_margins(importance: Importance, confidence: float = 0.95) -> Tensor:
    """Half of the interval of the difference in Block Influence of each two layers.

    The error is paired: what moves both layers of a text (or window) the same way cancels. The
    texts are the samples where there are several, as for `Importance.standard_error`.

    Args:
        importance: at least two windows, else all is NaN.
        confidence: of each interval by itself.

    Returns:
        (L, L), symmetric, in the unit of Block Influence.
    """
    texts = importance.texts
    several = texts is not None and len(texts) > 1
    covariance = covariance_over_texts(texts or {}) if several else importance.covariance
    if importance.n_windows < 2:
        return covariance
    return student_t((1 + confidence) / 2, importance.degrees) * pair_spread(covariance).sqrt()
