"""The two distances of the papers, and the rank correlation: tensors in, tensors out.

Shapes: B sequences, S tokens, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from short_gpt.runtime.errors import ShortGPTError


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of the angle between vectors along the last dimension, in float32 or wider.

    The vectors are widened to float32 before anything is multiplied: products of norms of
    hidden states pass 65504, float16's largest number, in ordinary models.

    Args:
        x, y: (..., D), any floating dtype.

    Returns:
        (...) in [-1, 1], float32 (float64 if both are). Two zero vectors count as equal (1); a
        zero vector and another count as orthogonal (0). NaN where a component is not finite. In
        float32 norms must lie between 1e-19 and 1e19, whose squares it can hold.
    """
    x, y = widen(x), widen(y)
    return cosine_from_products((x * y).sum(-1), (x * x).sum(-1), (y * y).sum(-1))


def widen(x: Tensor) -> Tensor:
    """``x`` itself if it is float32 or float64, else its float32 copy."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def cosine_from_products(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """Cosine from the three inner products x.y, x.x and y.y; zero vectors as in `cosine`."""
    norms = xx.sqrt() * yy.sqrt()
    cos = torch.where(norms == 0, ((xx == 0) & (yy == 0)).to(xy.dtype), xy / norms)
    return cos.clamp(-1.0, 1.0)


def block_influence(x: Tensor, y: Tensor) -> Tensor:
    """Block Influence of each token: 1 - cos(x, y) (ShortGPT, arXiv:2403.03853, Eq. 1).

    The paper's score of a layer is the mean of this over tokens and texts.

    Args:
        x, y: (..., D), a token's state in front of a layer and behind it.

    Returns:
        (...) in [0, 2]: 0 if the layer keeps the direction, 1 if it turns it by a right angle,
        2 if it reverses it. Positive rescaling of either state changes nothing.

    Example:
        >>> block_influence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])).item()
        1.0
    """
    return 1.0 - cosine(x, y)


def angular_distance(x: Tensor, y: Tensor) -> Tensor:
    """Angle between vectors in units of pi (Gromov et al., arXiv:2403.17887, Eq. 6).

    The paper takes the states of the last token of a sequence, n layers apart.

    Args:
        x, y: (..., D).

    Returns:
        (...) in [0, 1]: 0 for equal directions, 0.5 for orthogonal ones, 1 for opposite ones.
    """
    return torch.arccos(cosine(x, y)) / math.pi


def relative_magnitude(x: Tensor, y: Tensor, yy: Tensor | None = None) -> Tensor:
    """||f(x)|| / ||x + f(x)|| of a layer that makes y = x + f(x) of x (Samragh et al. 2023).

    Args:
        x, y: (..., D), a token's state in front of a layer and behind it, float32 or wider.
        yy: (...) the squared norms of ``y``, if known.

    Returns:
        (...) from 0, for a layer that does nothing; 0 also where x and y are zero, infinite where
        y alone is.

    Example:
        >>> relative_magnitude(torch.tensor([1.0, 0.0]), torch.tensor([4.0, 0.0])).item()
        0.75
    """
    changed = torch.linalg.vector_norm(y - x, dim=-1)
    norm = torch.linalg.vector_norm(y, dim=-1) if yy is None else yy.sqrt()
    return torch.where(changed == 0, torch.zeros_like(norm), changed / norm)


def ranks(x: Tensor) -> Tensor:
    """Rank of every entry, 0 for the lowest; equal entries share the mean of their ranks.

    Args:
        x: (N,).

    Returns:
        (N,) float64.
    """
    _, inverse, counts = torch.unique(x, sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0) - 1
    return (last - (counts - 1) / 2).double()[inverse]


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two lists of numbers, ties at their mean rank.

    Args:
        a, b: (N,), in the same order of items.

    Returns:
        A number in [-1, 1]; NaN if N < 2 or one list is constant.

    Raises:
        ShortGPTError: the lists differ in length.
    """
    if a.shape != b.shape or a.dim() != 1:
        raise ShortGPTError(
            f"expected two lists of one length, got {list(a.shape)}, {list(b.shape)}"
        )
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    norm = (x @ x).sqrt() * (y @ y).sqrt()
    if len(a) < 2 or norm == 0:
        return math.nan
    return max(-1.0, min(1.0, float((x @ y) / norm)))
