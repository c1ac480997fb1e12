"""Least squares from sums: what a map has to know of the tokens it is fitted on.

Shapes: N tokens, D width of the stream.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Sums over tokens from which a map is solved, float64 on the CPU.

    M is what the MLP gives and R = X - (Y + M) what the removed layers add to the stream. The map
    is T = 1 + C where C minimises

        sum over tokens ||M C - R||^2 + ridge (tr(M^T M) / D) ||C||^2,

    so that (M^T M + ridge tr(M^T M) / D) C = M^T R: three sums are all it takes, whatever N is.

    Attributes:
        gram: M^T M, (D, D); 0 before the first tokens.
        cross: M^T R, (D, D); 0 before the first tokens.
        square: tr(R^T R).
    """

    def __init__(self) -> None:
        self.gram = torch.zeros((), dtype=torch.float64)
        self.cross = torch.zeros((), dtype=torch.float64)
        self.square = 0.0

    def add(self, mlp: Tensor, rest: Tensor) -> None:
        """Adds tokens.

        Args:
            mlp, rest: M and R, (N, D) each, on one device.
        """
        # products where the states are, in the widest type there: MPS knows no float64
        kind = torch.float32 if mlp.device.type == "mps" else torch.float64
        mlp, rest = mlp.to(kind), rest.to(kind)  # (N, D)
        self.gram = self.gram + (mlp.T @ mlp).cpu().double()  # (D, N) (N, D) -> (D, D)
        self.cross = self.cross + (mlp.T @ rest).cpu().double()
        self.square += float(rest.pow(2).sum())

    def solve(self, ridge: float) -> tuple[Tensor, float]:
        """The map T.

        Args:
            ridge: of the penalty, relative to the mean square of an entry of M.

        Returns:
            T (D, D) float64, and the share of ``tr(R^T R)`` that M (T - 1) gives back: 1 is all of
            it, 0 is nothing.
        """
        eye = torch.eye(len(self.gram), dtype=torch.float64)
        if self.square == 0 or self.gram.trace() == 0:  # nothing to restore, or nothing to map
            return eye, float(self.square == 0)
        # the trace over D is the mean of the eigenvalues: the same ridge suits any scale of M
        penalty = ridge * self.gram.trace() / len(self.gram)
        change = torch.linalg.solve(self.gram + penalty * eye, self.cross)  # C (D, D)
        # ||M C - R||^2 = tr(R^T R) - 2 tr(C^T M^T R) + tr(C^T M^T M C), with tr(A^T B) = sum(A * B)
        left = self.square - 2 * (change * self.cross).sum() + (change * (self.gram @ change)).sum()
        return eye + change, float(1 - left / self.square)
