"""The normal equations of a large matrix, in the memory of one F x F matrix.

Shapes: N tokens, F inputs of a matrix, D width of the stream.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

ROWS = 256  # of X^T W X that are added at once
COLUMNS = 256  # of C that are solved at once


def _inner(first: np.ndarray, second: np.ndarray) -> float:
    """The sum of all products of entries, in no memory of its own."""
    return float(np.einsum("ij,ij->", first, second))


class NormalEquations:
    """Sums over tokens from which a change C of a matrix is solved, float64 on the CPU.

    C minimises

        sum over tokens w ||x C - r||^2 + ridge (tr(X^T W X) / F) ||C||^2.

    X^T W X is symmetric, and its factor a triangle: the memory above the diagonal holds the sums,
    and that below it their factor, for one ridge after the other.

    Attributes:
        square: tr(R^T W R).
        tokens: N.
    """

    def __init__(self) -> None:
        self._gram = torch.zeros(0, 0, dtype=torch.float64)
        self._cross = torch.zeros(0, 0, dtype=torch.float64)
        self._diagonal = torch.zeros(0, dtype=torch.float64)  # of the sums, which a factor has, too
        self.square, self.tokens = 0.0, 0

    def add(self, inputs: Tensor, rest: Tensor, weights: Tensor) -> None:
        """Adds tokens, before anything is solved; products are made in float32 where they are.

        Args:
            inputs, rest: X (N, F) and R (N, D), float32.
            weights: w (N,), at least 0.
        """
        root = weights.sqrt()[:, None]
        inputs, rest = inputs * root, rest * root
        width = inputs.shape[1]
        if not len(self._gram):
            self._gram = torch.zeros(width, width, dtype=torch.float64)
            self._cross = torch.zeros(width, rest.shape[1], dtype=torch.float64)
        for start in range(0, width, ROWS):  # the rows' part right of the diagonal is all of it
            rows, end = inputs[:, start : start + ROWS].T, start + ROWS
            self._gram[start:end, start:] += (rows @ inputs[:, start:]).cpu()
            self._cross[start:end] += (rows @ rest).cpu()
        self._diagonal = self._gram.diagonal().clone()
        self.square += float(rest.pow(2).sum())
        self.tokens += len(inputs)

    @property
    def solvable(self) -> bool:
        """Whether something is missing, and there are inputs that it could be made of."""
        return bool(self.square and self._diagonal.any())

    def solve(
        self, ridge: float, put: Callable[[slice, Tensor], object], *, aim: float = 1.0
    ) -> float:
        """Solves C for a ridge, some columns at a time.

        Args:
            ridge: above 0.
            put: takes which columns of aim C these are, and they, (F, columns) float64.
            aim: a factor of C.

        Returns:
            The share of ``square`` that X aim C restores; 0, and nothing is put, where the
            equations have no solution in float64, as with a ridge that is lost beside the sums.
        """
        # relative to the mean of the eigenvalues: a ridge suits any scale of X
        penalty = ridge * float(self._diagonal.mean())
        solved, back = self._solver(self._diagonal + penalty), 0.0
        if solved is None:
            return 0.0
        for start in range(0, self._cross.shape[1], COLUMNS):
            columns = slice(start, start + COLUMNS)
            right, change = self._cross[:, columns].numpy(), solved(columns)
            # where the equations hold, tr(C^T X^T X C) = tr(C^T X^T R) - penalty ||C||^2
            given, size = _inner(change, right), _inner(change, change)
            back += aim * (2 - aim) * given + aim**2 * penalty * size
            put(columns, torch.from_numpy(aim * change))
        return back / self.square

    def _solver(self, diagonal: Tensor) -> Callable[[slice], np.ndarray] | None:
        """What solves for columns of C, (F, columns), with another diagonal of the sums.

        None where they are singular.
        """
        from scipy.linalg import lapack

        gram, cross = self._gram.numpy().T, self._cross.numpy()  # below the diagonal is LAPACK's U
        self._fill(diagonal)
        factor, failed = lapack.dpotrf(gram, lower=0, clean=0, overwrite_a=1)
        if not failed:
            return lambda columns: lapack.dpotrs(
                factor, np.array(cross[:, columns], order="F"), lower=0, overwrite_b=1
            )[0]
        # float32's rounding may leave a small ridge short of positive
        self._fill(diagonal)
        room = {"lwork": 64 * len(gram), "overwrite_a": 1, "overwrite_b": 1}
        _, _, whole, failed = lapack.dsysv(gram, np.array(cross, order="F"), lower=0, **room)
        return None if failed else lambda columns: whole[:, columns]

    def _fill(self, diagonal: Tensor) -> None:
        """Puts the sums above the diagonal below it, too, where a factor may be, and a diagonal."""
        for start in range(0, len(self._gram), ROWS):
            end = start + ROWS
            self._gram[end:, start:end] = self._gram[start:end, end:].T
            block = self._gram[start:end, start:end]
            above = block.triu(1)
            block.copy_(above + above.T)
        self._gram.diagonal().copy_(diagonal)
