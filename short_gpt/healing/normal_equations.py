"""The normal equations of a large matrix, in the memory of one F x F matrix.

Shapes: N tokens, F inputs of a matrix, D width of the stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

ROWS = 256  # of X^T W X that are added at once


def _inner(first: np.ndarray, second: np.ndarray) -> float:
    """The sum of all products of entries, in no memory of its own."""
    return float(np.einsum("ij,ij->", first, second))


class NormalEquations:
    """Sums over tokens from which a change C of a matrix is solved, float64 on the CPU.

    C minimises

        sum over tokens w ||x C - r||^2 + ridge (tr(X^T W X) / F) ||C||^2.

    X^T W X is symmetric, and its factor a triangle: one half of the memory holds the sums, and the
    other their factor, for one ridge after the other.

    Attributes:
        square: tr(R^T W R).
        tokens: N.
    """

    def __init__(self) -> None:
        self._gram = torch.zeros(0, 0, dtype=torch.float64)
        self._cross = torch.zeros(0, 0, dtype=torch.float64)
        self.square, self.tokens = 0.0, 0

    def add(self, inputs: Tensor, rest: Tensor, weights: Tensor) -> None:
        """Adds tokens; products are made in float32 where the tokens are.

        Args:
            inputs, rest: X (N, F) and R (N, D), float32.
            weights: w (N,), at least 0.
        """
        width, rest = inputs.shape[1], rest * weights.sqrt()[:, None]
        both = torch.cat([inputs * weights.sqrt()[:, None], rest], dim=1)  # (N, F + D)
        if not len(self._gram):
            self._gram = torch.zeros(width, width, dtype=torch.float64)
            self._cross = torch.zeros(width, rest.shape[1], dtype=torch.float64)
        for start in range(0, width, ROWS):  # the rows' part right of the diagonal is all of it
            end = min(start + ROWS, width)
            products = (both[:, start:end].T @ both[:, start:]).cpu()
            self._gram[start:end, start:] += products[:, : width - start]
            self._cross[start:end] += products[:, width - start :]
        self.square += float(rest.pow(2).sum())
        self.tokens += len(inputs)

    def changes(self, ridges: Sequence[float]) -> Iterator[tuple[float, Tensor, float]]:
        """For every ridge: it, C (F, D) float64, and the share of ``square`` that X C restores.

        The sums are used up by it.
        """
        diagonal = self._gram.diagonal().clone()
        mean = float(diagonal.mean())  # of the eigenvalues: a ridge suits any scale of X
        if not self.square or not mean:
            return
        self._mirror()
        for ridge in ridges:
            self._fill(diagonal + ridge * mean)
            change = self._solved()
            # ||X C - R||^2 = tr(R^T R) - tr(C^T X^T R) - penalty ||C||^2 where the equations hold
            back = _inner(change, self._cross.numpy()) + ridge * mean * _inner(change, change)
            yield ridge, torch.from_numpy(change), back / self.square

    def _solved(self) -> np.ndarray:
        from scipy.linalg import lapack

        gram = self._gram.numpy().T  # in LAPACK's order of the entries: below the diagonal
        right = np.array(self._cross.numpy(), order="F")
        _, failed = lapack.dpotrf(gram, lower=1, clean=0, overwrite_a=1)
        if not failed:
            return lapack.dpotrs(gram, right, lower=1, overwrite_b=1)[0]
        # float32's rounding may leave a small ridge short of positive
        diagonal = self._diagonal
        whole = torch.tril(self._gram, -1)
        whole = whole + whole.T + torch.diag(diagonal)
        return torch.linalg.solve(whole, self._cross).numpy()

    def _mirror(self) -> None:
        """Copies what lies above the diagonal below it."""
        for start in range(0, len(self._gram), ROWS):
            end = start + ROWS
            self._gram[end:, start:end] = self._gram[start:end, end:].T

    def _fill(self, diagonal: Tensor) -> None:
        """Puts what lies below the diagonal above it, where a factor may be, and the diagonal."""
        for start in range(0, len(self._gram), ROWS):
            end = start + ROWS
            self._gram[start:end, end:] = self._gram[end:, start:end].T
            block = self._gram[start:end, start:end]
            below = block.tril(-1)
            block.copy_(below + below.T)
        self._gram.diagonal().copy_(diagonal)
        self._diagonal = diagonal
