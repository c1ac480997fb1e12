"""The papers' equations and choices, rank correlations and Student's t: numbers in, numbers out.

The hooks compute every product and norm once and call the functions that take these. A metric of
layers is a function of `TokenProducts` and a row of `LAYER_METRICS`: docs/add-a-metric.md.

Shapes: B sequences, S tokens, D width, L layers, N items; "..." are any leading dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llama.parallel import has_float64
from short_gpt.models.decoder import full_float32
from short_gpt.models.numbering import check_count
from short_gpt.runtime.errors import ShortGPTError


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of the angle between vectors (..., D): (...) in [-1, 1], in float32 or wider.

    Two zero vectors count as equal (1), a zero vector and another as orthogonal (0). NaN where a
    component is not finite. In float32 norms must lie between 1e-19 and 1e19, for their squares.
    """
    # before anything is multiplied: products of norms of hidden states pass 65504, float16's
    # largest number, in ordinary models
    x, y = widen(x), widen(y)  # (..., D)
    return cosine_from_product(inner(x, y), norms(x), norms(y))  # (...)


def inner(x: Tensor, y: Tensor) -> Tensor:
    """The inner product x . y of wide vectors, (..., D) to (...), in their own dtype."""
    # vecdot is a product of matrices, which autocast and TF32 would round
    with torch.autocast(x.device.type, enabled=False), full_float32():
        return torch.linalg.vecdot(x, y)  # (...)


def widen(x: Tensor) -> Tensor:
    """``x`` itself if it is float32 or float64, else its float32 copy."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def norms(x: Tensor) -> Tensor:
    """Euclidean norms along the last dimension, (..., D) to (...), in float32 or wider."""
    return torch.linalg.vector_norm(widen(x), dim=-1)  # (...)


def cosine_from_product(xy: Tensor, x_norm: Tensor, y_norm: Tensor) -> Tensor:
    """Cosine from the inner product and the two norms, (...); zero vectors as in `cosine`."""
    product = x_norm * y_norm  # (...)
    # where it is zero, equal norms say that both are; cos (...)
    cos = torch.where(product == 0, (x_norm == y_norm).to(xy.dtype), xy / product)
    return cos.clamp(-1.0, 1.0)


def block_influence(x: Tensor, y: Tensor) -> Tensor:
    """Block Influence of each token: 1 - cos(x, y), (...) (ShortGPT, arXiv:2403.03853, Eq. 1).

    The paper's score of a layer is the mean of this over tokens and texts, for x entering and y
    leaving it, (..., D) each.

    Example:
        >>> block_influence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])).item()
        1.0
    """
    return influence(cosine(x, y))


def influence(cos: Tensor) -> Tensor:
    """How far a vector turns: 1 - cos, (...), from 0 for the same direction to 2 for opposite."""
    return 1.0 - cos


def angle(cos: Tensor) -> Tensor:
    """Angle in units of pi, arccos(cos) / pi in [0, 1] (Gromov et al., arXiv:2403.17887, Eq. 6).

    Example:
        >>> angle(torch.tensor([1.0, 0.0, -1.0])).tolist()
        [0.0, 0.5, 1.0]
    """
    return cos.arccos() / math.pi  # finite, as `cosine_from_product` clamps


def angular_distances(states: Tensor) -> Tensor:
    """Angular distances of all pairs of states (B, L + 1, D), float64 (B, L + 1, L + 1) in [0, 1].

    Example:
        >>> angular_distances(torch.eye(2)[None]).tolist()
        [[[0.0, 0.5], [0.5, 0.0]]]
    """
    states = states if has_float64(states.device) else states.cpu()
    states = states.double()  # (B, L + 1, D)
    gram = states @ states.mT  # (B, L + 1, L + 1)
    norm = gram.diagonal(dim1=1, dim2=2).sqrt()  # (B, L + 1)
    angles = angle(cosine_from_product(gram, norm[:, :, None], norm[:, None, :]))  # as gram
    # arccos turns a last digit lost in the cosine into 1e-8, not 0
    angles.diagonal(dim1=1, dim2=2).zero_()
    return angles


def relative_change(change: Tensor, norm: Tensor) -> Tensor:
    """||change|| / ||y|| from both norms, (...); 0 where both are 0, infinite if ||y|| alone is."""
    return (change / norm).masked_fill(change == 0, 0.0)  # 0 / 0 would be NaN


class TokenProducts(NamedTuple):
    """Products of the states x entering and y leaving a layer, (..., B, S), float32 or wider."""

    product: Tensor  # x . y
    entering: Tensor  # ||x||
    leaving: Tensor  # ||y||
    change: Tensor  # ||y - x||


# Further metrics that every pass takes: a value per token, of which `Importance.mean` is the mean.
# Block Influence is none of them, as its errors need more than a mean.
LAYER_METRICS: dict[str, Callable[[TokenProducts], Tensor]] = {
    "magnitude": lambda tokens: relative_change(tokens.change, tokens.leaving),
    "norm": lambda tokens: tokens.leaving,
}


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two lists (N,) of numbers, ties at their mean rank.

    In [-1, 1]; NaN if N < 2, one list is constant or one number is NaN.

    Example:
        >>> spearman(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([10.0, 20.0, 30.0]))
        1.0
    """
    if len(a) < 2 or (a == a[0]).all() or (b == b[0]).all():
        return math.nan  # as scipy returns, without its warning
    from scipy.stats import spearmanr

    correlation = float(spearmanr(a.double().numpy(), b.double().numpy()).statistic)
    return max(-1.0, min(1.0, correlation)) if math.isfinite(correlation) else math.nan


# Fewer degrees of freedom allow no interval: two units say too little of others, and so do more
# where one has over nine tenths of all tokens.
LEAST_DEGREES = 1.02


def t_quantile(probability: float, degrees: float) -> float:
    """`student_t`, and NaN for degrees of freedom below `LEAST_DEGREES`."""
    return student_t(probability, degrees) if degrees >= LEAST_DEGREES else math.nan


def student_t(probability: float, degrees: float) -> float:
    """Quantile of Student's t distribution, for a probability from 0.5 to below 1."""
    from scipy.stats import t

    # nearer to 1 than float64 can tell from it, the quantile would be infinite
    return float(t.ppf(min(probability, 1 - 1e-15), float(degrees)))


def lowest(scores: Tensor, n: int) -> list[int]:
    """The n layers with the lowest scores (L,), lowest first (ShortGPT, section 3.2).

    Ties go to the lower number; n is 1 to L - 1.

    Example:
        >>> lowest(torch.tensor([0.9, 0.1, 0.3, 0.1]), 2)
        [1, 3]
    """
    n = check_count(n, len(scores))
    return _finite(scores).argsort(stable=True)[:n].tolist()  # stable: ties to the lower number


def best_block(angular: Tensor, n: int) -> list[int]:
    """The n consecutive layers whose ends are nearest (Gromov et al., Eq. 7); ties go to the first.

    Entry [l, l + n] of ``angular``, (L + 1, L + 1), is the mean angular distance between the states
    entering layers l and l + n. Entries below the diagonal are not read.

    Example:
        >>> angular = torch.tensor([[0, 0.2, 0.5], [0, 0, 0.1], [0, 0, 0]])
        >>> best_block(angular, 1)
        [1]
    """
    n = check_count(n, len(angular) - 1)
    distances = _finite(angular.diagonal(n))  # (L + 1 - n,), by the block's first layer
    start = int(distances.argsort(stable=True)[0])
    return list(range(start, start + n))


def _finite(scores: Tensor) -> Tensor:
    if not scores.isfinite().all():
        raise ShortGPTError(f"scores must be finite to be compared, got {scores.tolist()}")
    return scores
