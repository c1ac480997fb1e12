"""Hadamard matrices: entries of one size, rows orthogonal to each other."""

from __future__ import annotations

import torch
from torch import Tensor

from short_gpt.runtime.errors import ShortGPTError


def hadamard(order: int) -> Tensor:
    """An orthogonal matrix (order, order) float64 whose entries are all of one size.

    Made by doubling (Sylvester 1867) from one of order 1, or of Paley's (1933): q + 1 for a prime
    q of the form 4 k + 3, and 2 (q + 1) for a prime q of the form 4 k + 1. Those are the widths of
    most models: 576 is 8 times 72.

    Raises:
        ShortGPTError: none of these gives the order.

    Example:
        >>> hadamard(2)
        tensor([[ 0.7071,  0.7071],
                [ 0.7071, -0.7071]], dtype=torch.float64)
    """
    signs = _signs(order)
    if signs is None:
        raise ShortGPTError(
            f"no Hadamard matrix of order {order} is known here: a rotation by one suits other "
            "widths alone"
        )
    return signs / order**0.5


def _signs(order: int) -> Tensor | None:
    """The same with entries 1 and -1."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if _prime(order - 1) and order % 4 == 0:
        core = _residues(order - 1)
        core[0, 1:], core[1:, 0] = 1, -1
        return core + torch.eye(order, dtype=torch.float64)
    if order % 4 == 0 and _prime(order // 2 - 1) and order // 2 % 4 == 2:
        core = _residues(order // 2 - 1)
        core[0, 1:], core[1:, 0] = 1, 1
        one, other = (
            torch.tensor(m, dtype=torch.float64) for m in ([[1, 1], [1, -1]], [[1, -1], [-1, -1]])
        )
        return torch.kron(core, one) + torch.kron(torch.eye(order // 2).double(), other)
    half = _signs(order // 2) if order % 2 == 0 else None
    if half is None:
        return None
    return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])


def _residues(q: int) -> Tensor:
    """(q + 1, q + 1): zeros, and behind the first row and column whether i - j is a square."""
    character = torch.full((q,), -1, dtype=torch.float64)
    character[torch.arange(1, q) ** 2 % q] = 1
    character[0] = 0
    places = torch.arange(q)
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[1:, 1:] = character[(places[:, None] - places) % q]
    return core


def _prime(number: int) -> bool:
    return number > 1 and all(number % i for i in range(2, int(number**0.5) + 1))
