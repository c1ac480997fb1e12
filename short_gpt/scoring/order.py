"""From scores of L layers to layer numbers. Numbers in, numbers out; no model."""

from __future__ import annotations

import random

from torch import Tensor

from short_gpt.models.numbering import check_count
from short_gpt.runtime.errors import ShortGPTError


def lowest(scores: Tensor, n: int) -> list[int]:
    """The n layers with the lowest scores (L,), lowest first (ShortGPT, section 3.2).

    Ties go to the lower number; n is 1 to L - 1.

    Example:
        >>> import torch
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
        >>> import torch
        >>> angular = torch.tensor([[0, 0.2, 0.5], [0, 0, 0.1], [0, 0, 0]])
        >>> best_block(angular, 1)
        [1]
    """
    n = check_count(n, len(angular) - 1)
    distances = _finite(angular.diagonal(n))  # (L + 1 - n,), by the block's first layer
    start = int(distances.argsort(stable=True)[0])
    return list(range(start, start + n))


def deepest(n_layers: int, n: int) -> list[int]:
    """The n layers before the last one of L, ascending (the simple heuristic of Gromov et al.).

    Section 4.4 prints "(L-n) to (L-1)", which leaves the last layer out only if counted from 1.

    Example:
        >>> deepest(32, 8)
        [23, 24, 25, 26, 27, 28, 29, 30]
    """
    n = check_count(n, n_layers)
    return list(range(n_layers - 1 - n, n_layers - 1))


def sequential(n_layers: int, n: int) -> list[int]:
    """The first n layers (a baseline of ShortGPT, Table 10); arguments as in `deepest`."""
    n = check_count(n, n_layers)
    return list(range(n))


def reverse(n_layers: int, n: int) -> list[int]:
    """The last n layers, last first (a baseline of ShortGPT, Table 10)."""
    n = check_count(n, n_layers)
    return list(range(n_layers - 1, n_layers - 1 - n, -1))


def at_random(n_layers: int, n: int, seed: int = 0) -> list[int]:
    """n different layers, drawn with Python's ``random.Random(seed)``."""
    n = check_count(n, n_layers)
    return random.Random(seed).sample(range(n_layers), n)


def _finite(scores: Tensor) -> Tensor:
    if not scores.isfinite().all():
        raise ShortGPTError(f"scores must be finite to be compared, got {scores.tolist()}")
    return scores
