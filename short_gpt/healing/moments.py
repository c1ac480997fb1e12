"""Least squares from sums: what a matrix has to know of the tokens it is fitted on.

Shapes: N tokens, F width of the inputs, D of the stream; for a linear patch F = D.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Sums over tokens from which a matrix is solved, float64 on the CPU.

    X are inputs of a matrix and R what is missing in the stream behind it. The change C of the
    matrix minimises

        sum over tokens w ||x C - r||^2 + ridge (tr(X^T W X) / F) ||C||^2,

    so that (X^T W X + ridge tr(X^T W X) / F) C = X^T W R: three sums are all it takes, whatever N
    is. The penalty pulls towards no change at all.

    Args:
        exact: multiply in float64, where there is one, and not in float32, in half the time.

    Attributes:
        gram: X^T W X, (F, F); 0 before the first tokens.
        cross: X^T W R, (F, D); 0 before the first tokens.
        square: tr(R^T W R).
        tokens: N.
    """

    def __init__(self, *, exact: bool = True) -> None:
        self._kind = torch.float64 if exact else torch.float32
        self.gram = torch.zeros((), dtype=torch.float64)
        self.cross = torch.zeros((), dtype=torch.float64)
        self.square, self.tokens = 0.0, 0

    def add(self, inputs: Tensor, rest: Tensor, weights: Tensor | None = None) -> None:
        """Adds tokens.

        Args:
            inputs, rest: X (N, F) and R (N, D), on one device.
            weights: w (N,), at least 0; None is 1 for each.
        """
        # products where the states are, in the widest type there: MPS knows no float64
        kind = torch.float32 if inputs.device.type == "mps" else self._kind
        inputs, rest = inputs.to(kind), rest.to(kind)
        if weights is not None:
            root = weights.to(kind).sqrt()[:, None]  # (N, 1)
            inputs, rest = inputs * root, rest * root
        gram, cross = (inputs.T @ inputs).cpu(), (inputs.T @ rest).cpu()  # (F, N) (N, F) -> (F, F)
        if not self.gram.dim():
            self.gram, self.cross = (
                torch.zeros_like(m, dtype=torch.float64) for m in (gram, cross)
            )
        self.gram += gram
        self.cross += cross
        self.square += float(rest.pow(2).sum())
        self.tokens += len(inputs)

    def change(self, ridge: float) -> Tensor:
        """C, (F, D) float64; 0 where there is nothing to restore, or nothing to restore it from.

        Args:
            ridge: of the penalty, relative to the mean square of an entry of X.
        """
        if self.square == 0 or self.gram.trace() == 0:
            return torch.zeros_like(self.cross)
        # the trace over F is the mean of the eigenvalues: the same ridge suits any scale of X
        penalty = ridge * self.gram.trace() / len(self.gram)
        ridged = self.gram.clone()
        ridged.diagonal().add_(penalty)
        factor, failed = torch.linalg.cholesky_ex(ridged)
        if failed:  # float32's rounding may leave a small ridge short of positive
            return torch.linalg.solve(ridged, self.cross)
        return torch.cholesky_solve(self.cross, factor)

    def restored(self, change: Tensor) -> float:
        """The share of ``tr(R^T W R)`` that X C gives back: 1 is all of it, 0 is nothing."""
        if self.square == 0:
            return 1.0
        # ||X C - R||^2 = tr(R^T R) - 2 tr(C^T X^T R) + tr(C^T X^T X C), with tr(A^T B) = sum(A * B)
        left = self.square - 2 * (change * self.cross).sum()
        left = left + (change * (self.gram @ change)).sum()
        return float(1 - left / self.square)

    def solve(self, ridge: float) -> tuple[Tensor, float]:
        """The map T = 1 + C of a linear patch, (D, D) float64, and the share that it restores."""
        change = self.change(ridge)
        return torch.eye(len(self.gram), dtype=torch.float64) + change, self.restored(change)
