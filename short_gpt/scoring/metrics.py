"""The papers' equations, and the rank correlation: tensors in, tensors out.

The hooks call these. What they know already, squares or all products, they pass, so that nothing
is computed twice.

Shapes: B sequences, S tokens, D width, L layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from short_gpt.runtime.errors import ShortGPTError


def cosine(x: Tensor, y: Tensor, *, xx: Tensor | None = None, yy: Tensor | None = None) -> Tensor:
    """Cosine of the angle between vectors along the last dimension, in float32 or wider.

    The vectors are widened to float32 before anything is multiplied: products of norms of
    hidden states pass 65504, float16's largest number, in ordinary models.

    Args:
        x, y: (..., D), any floating dtype.
        xx, yy: (...) their squared norms as `squares` gives them, if known.

    Returns:
        (...) in [-1, 1], float32 (float64 if both are). Two zero vectors count as equal (1); a
        zero vector and another count as orthogonal (0). NaN where a component is not finite. In
        float32 norms must lie between 1e-19 and 1e19, whose squares it can hold.
    """
    x, y = widen(x), widen(y)
    xx = squares(x) if xx is None else xx
    yy = squares(y) if yy is None else yy
    return cosine_from_products(torch.linalg.vecdot(x, y), xx, yy)


def widen(x: Tensor) -> Tensor:
    """``x`` itself if it is float32 or float64, else its float32 copy."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def squares(x: Tensor) -> Tensor:
    """Squared norms along the last dimension, (..., D) to (...), in float32 or wider."""
    x = widen(x)
    return torch.linalg.vecdot(x, x)


def cosine_from_products(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """Cosine from the three inner products x.y, x.x and y.y; zero vectors as in `cosine`."""
    # the roots are multiplied, not the squares, whose product would leave float32's range
    norms = xx.sqrt() * yy.sqrt()
    cos = torch.where(norms == 0, ((xx == 0) & (yy == 0)).to(xy.dtype), xy / norms)
    return cos.clamp(-1.0, 1.0)


def block_influence(
    x: Tensor, y: Tensor, *, xx: Tensor | None = None, yy: Tensor | None = None
) -> Tensor:
    """Block Influence of each token: 1 - cos(x, y) (ShortGPT, arXiv:2403.03853, Eq. 1).

    The paper's score of a layer is the mean of this over tokens and texts.

    Args:
        x, y: (..., D), a token's state in front of a layer and behind it.
        xx, yy: (...) their squared norms, if known.

    Returns:
        (...) in [0, 2]: 0 if the layer keeps the direction, 1 if it turns it by a right angle,
        2 if it reverses it. Positive rescaling of either state changes nothing.

    Example:
        >>> block_influence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])).item()
        1.0
    """
    return 1.0 - cosine(x, y, xx=xx, yy=yy)


def angle(cos: Tensor) -> Tensor:
    """Angle in units of pi, arccos(cos) / pi (Gromov et al., arXiv:2403.17887, Eq. 6).

    Args:
        cos: (...) in [-1, 1].

    Returns:
        (...) in [0, 1]: 0 for equal directions, 0.5 for orthogonal ones, 1 for opposite ones.

    Example:
        >>> angle(torch.tensor([1.0, 0.0, -1.0])).tolist()
        [0.0, 0.5, 1.0]
    """
    return cos.arccos() / math.pi


def angular_distance(x: Tensor, y: Tensor) -> Tensor:
    """Angle between vectors, as `angle` of their `cosine`.

    The paper takes the states of the last token of a sequence, n layers apart.

    Args:
        x, y: (..., D).

    Returns:
        (...) in [0, 1].
    """
    return angle(cosine(x, y))


def angular_distances(states: Tensor) -> Tensor:
    """Angular distances between all pairs of states, in float64.

    Args:
        states: (B, L + 1, D).

    Returns:
        (B, L + 1, L + 1) in [0, 1], zero on the diagonal.

    Example:
        >>> angular_distances(torch.eye(2)[None]).tolist()
        [[[0.0, 0.5], [0.5, 0.0]]]
    """
    # Apple's GPUs have no float64
    states = (states.cpu() if states.device.type == "mps" else states).double()
    gram = states @ states.mT  # (B, L + 1, L + 1)
    norms = gram.diagonal(dim1=1, dim2=2)  # squared, (B, L + 1)
    angles = angle(cosine_from_products(gram, norms[:, :, None], norms[:, None, :]))
    # arccos turns a last digit lost in the cosine into 1e-8, not 0
    angles.diagonal(dim1=1, dim2=2).zero_()
    return angles


def relative_magnitude(x: Tensor, y: Tensor, *, yy: Tensor | None = None) -> Tensor:
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


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two lists of numbers, ties at their mean rank.

    ``scipy.stats.spearmanr``, whose NaN for short and for constant lists is kept (without its
    warning); a NaN among the numbers gives NaN.

    Args:
        a, b: (N,), in the same order of items.

    Returns:
        A number in [-1, 1]; NaN if N < 2 or one list is constant.

    Raises:
        ShortGPTError: the lists differ in length.

    Example:
        >>> spearman(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([10.0, 20.0, 30.0]))
        1.0
    """
    if a.shape != b.shape or a.dim() != 1:
        raise ShortGPTError(
            f"expected two lists of one length, got {list(a.shape)}, {list(b.shape)}"
        )
    if len(a) < 2 or (a == a[0]).all() or (b == b[0]).all():
        return math.nan
    from scipy.stats import spearmanr

    correlation = float(spearmanr(a.double().numpy(), b.double().numpy()).statistic)
    return max(-1.0, min(1.0, correlation)) if math.isfinite(correlation) else math.nan
